// `openai` for node, and `ai` with `@ai-sdk/openai-compatible`.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [url, model, folder] = process.argv.slice(2);
const from = createRequire(pathToFileURL(`${folder}/package.json`));
const load = async (name) => import(pathToFileURL(from.resolve(name)).href);
const { default: OpenAI } = await load("openai");
const { generateText, streamText, generateObject, jsonSchema } = await load("ai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");

const QUESTION = "What is the capital of France? Answer in one sentence.";
const LONG = "Tell me a long story about a dog that travels around the world.";
const CITY = {
  type: "object",
  properties: {
    city: { type: "string", enum: ["Paris", "Rome", "Oslo"] },
    is_capital: { type: "boolean" },
  },
  required: ["city", "is_capital"],
  additionalProperties: false,
};

const tell = (told) => console.log(JSON.stringify(told));
const must = (condition, what = "") => {
  if (!condition) throw new Error(`not so: ${JSON.stringify(what)}`);
};
const doing = async (what, work) => {
  const began = Date.now();
  try {
    await work();
    tell({ what, ok: true, seconds: (Date.now() - began) / 1000 });
  } catch (error) {
    tell({ what, ok: false, why: String(error.stack).slice(0, 2000) });
  }
};
const meter = async (name) => {
  const text = await (await fetch(`${url.replace(/\/v1$/, "")}/metrics`)).text();
  return Number(text.match(new RegExp(`^prefixcache_front_${name} (\\S+)`, "m"))[1]);
};
// Fails, if the endpoint does not see that the client leaves, or still computes its answer.
const leaving = async (work) => {
  const before = await meter("clients_gone_total");
  await work();
  let gone = 0;
  let running = 0;
  for (const ends = Date.now() + 60_000; Date.now() < ends; ) {
    gone = (await meter("clients_gone_total")) - before;
    running = await meter("answers_running");
    if (gone > 0 && running === 0) return;
    await new Promise((done) => setTimeout(done, 50));
  }
  throw new Error(`${gone} clients left, and ${running} answers are still computed`);
};
const version = (name) =>
  JSON.parse(readFileSync(`${folder}/node_modules/${name}/package.json`)).version;
const names = ["openai", "ai", "@ai-sdk/openai-compatible"];
tell({ client: names.map((name) => `${name} ${version(name)} (node)`).join(", ") });

const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: QUESTION }];
const short = { model, messages, max_tokens: 24, temperature: 0 };
let whole = "";

await doing("chat", async () => {
  const told = await client.chat.completions.create(short);
  whole = told.choices[0].message.content;
  must(whole.length > 0);
});
await doing("stream", async () => {
  const stream = await client.chat.completions.create({
    ...short,
    stream: true,
    stream_options: { include_usage: true },
  });
  let text = "";
  let usage = null;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  must(text === whole, text);
  must(usage.prompt_tokens_details.cached_tokens === usage.prompt_tokens - 1, usage);
});
await doing("structured", async () => {
  const told = await client.chat.completions.create({
    ...short,
    max_tokens: 80,
    response_format: { type: "json_schema", json_schema: { name: "city", schema: CITY, strict: true } },
  });
  must(CITY.properties.city.enum.includes(JSON.parse(told.choices[0].message.content).city));
});
await doing("tools", async () => {
  const told = await client.chat.completions.create({
    ...short,
    max_tokens: 80,
    tools: [{ type: "function", function: { name: "find_city", parameters: CITY } }],
    tool_choice: "required",
  });
  const [call] = told.choices[0].message.tool_calls;
  must(CITY.properties.city.enum.includes(JSON.parse(call.function.arguments).city), call);
});
await doing("responses", async () => {
  const terms = { model, input: QUESTION, max_output_tokens: 24, temperature: 0 };
  const told = await client.responses.create(terms);
  must(told.output_text === whole, told);
  let text = "";
  for await (const event of await client.responses.create({ ...terms, stream: true })) {
    if (event.type === "response.output_text.delta") text += event.delta;
  }
  must(text === whole, text);
});
await doing("errors", async () => {
  for (const [wrong, status, param] of [
    [{ model: "nope" }, 404, "model"],
    [{ foo: 1 }, 400, "foo"],
  ]) {
    const error = await client.chat.completions.create({ ...short, ...wrong }).catch((one) => one);
    must(error instanceof OpenAI.APIError && error.status === status, String(error));
    must(error.param === param, error.param);
  }
});
await doing("abort", () => leaving(async () => {
  const long = [{ role: "user", content: LONG }];
  const stream = await client.chat.completions.create({
    model,
    messages: long,
    max_tokens: 1000,
    ignore_eos: true,
    stream: true,
  });
  for await (const _ of stream) break;
  stream.controller.abort();
}));

const provider = createOpenAICompatible({
  name: "here",
  baseURL: url,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const told = { model: provider(model), prompt: QUESTION, maxOutputTokens: 24, temperature: 0, maxRetries: 0 };
await doing("ai: chat", async () => {
  const { text, usage } = await generateText(told);
  must(text === whole, text);
  must(usage.cachedInputTokens > 0, usage);
});
await doing("ai: stream", async () => {
  let text = "";
  for await (const part of streamText(told).textStream) text += part;
  must(text === whole, text);
});
await doing("ai: structured", async () => {
  const { object } = await generateObject({ ...told, maxOutputTokens: 80, schema: jsonSchema(CITY) });
  must(CITY.properties.city.enum.includes(object.city), object);
});
await doing("ai: abort", () => leaving(async () => {
  const controller = new AbortController();
  const stream = streamText({
    ...told,
    prompt: LONG,
    maxOutputTokens: 1000,
    abortSignal: controller.signal,
    onError: () => {},
  });
  for await (const _ of stream.textStream) break;
  controller.abort();
}));
