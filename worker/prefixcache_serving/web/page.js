// The front's page: one stream of states in, a lane per worker out; and a box to ask something.
"use strict";

const $ = id => document.getElementById(id);
const count = n => Math.round(n).toLocaleString("en");
const many = (n, noun) => `${count(n)} ${noun}${n === 1 ? "" : "s"}`;
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const theme = new URLSearchParams(location.search).get("theme");
if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;

let key = "";
const headers = more => ({ ...(key ? { authorization: `Bearer ${key}` } : {}), ...more });

function element(tag, fields, ...children) {
  const made = Object.assign(document.createElement(tag), fields);
  made.append(...children);
  return made;
}

function status(state, text) { $("status").textContent = text; $("status").dataset.state = state; }

// Server-sent events over fetch, which shows a key where EventSource cannot.
async function* events(response) {
  const reader = response.body.getReader(), decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + decoder.decode(value, { stream: true })).split("\n\n");
    rest = parts.pop();
    // An empty line of its own keeps a quiet stream open.
    for (const part of parts.map(one => one.trimStart())) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

// ------------------------------------------------------------------------------------------ lanes

const lanes = new Map(), chips = new Map();
let served = "";

function lane(name) {
  if (!lanes.has(name)) {
    const pill = element("span", { className: "pill" }), small = element("small");
    const answers = element("div", { className: "answers" }), rate = element("div", { className: "rate" });
    const row = element("div", { className: "lane" }, element("div", { className: "who" }, element("b", { textContent: name }), pill, small), answers, rate);
    row.dataset.worker = name;
    $("lanes").append(row);
    lanes.set(name, { pill, small, answers, rate });
  }
  return lanes.get(name);
}

function chip(answer, into) {
  let one = chips.get(answer.id);
  if (!one) {
    const text = element("span"), bar = element("i");
    one = { node: element("div", { className: "chip" }, element("b", { textContent: answer.id }), text, bar), text, bar };
    one.node.dataset.answer = answer.id;
    chips.set(answer.id, one);
  }
  if (one.node.parentElement !== into) {
    const before = one.node.getBoundingClientRect(), moves = one.node.isConnected;
    into.append(one.node);
    if (moves) {
      one.node.classList.add("moved");
      const after = one.node.getBoundingClientRect();
      if (!calm.matches) one.node.animate([{ transform: `translate(${before.x - after.x}px, ${before.y - after.y}px)` }, { transform: "none" }], { duration: 600, easing: "ease-in-out" });
    }
  }
  one.node.title = `a prompt of ${many(answer.prompt, "token")}; ${answer.workers.join(", then ")}`;
  one.text.textContent = answer.due ? `${count(answer.due)} to compute` : `${count(answer.generated)} written`;
  one.bar.style.width = `${(100 * answer.generated) / answer.most}%`;
}

function show(state) {
  served = state.model;
  $("model").textContent = `${state.model} · ${many(state.workers.length, "worker")} · ${many(state.tokens, "token")} written`;
  status(state.is_draining ? "draining" : "live", state.is_draining ? "draining" : "live");
  const running = state.workers.reduce((sum, one) => sum + one.running, 0);
  const tiles = [[state.tokens_per_s.toFixed(1), "tokens a second"], [count(running), "answers being written"], [count(state.waiting), `in the queue of ${count(state.longest_queue)}`], [count(state.moved), "went on elsewhere"], [count(state.computed_again), "tokens computed again for that"]];
  $("tiles").replaceChildren(...tiles.map(([value, what], at) => element("div", { className: at ? "tile" : "tile first" }, element("b", { textContent: value }), element("span", { textContent: what }))));
  const seen = new Set();
  for (const worker of state.workers) {
    const row = lane(worker.worker);
    row.pill.textContent = worker.state;
    row.pill.dataset.state = worker.state;
    row.small.textContent = worker.pid ? `pid ${worker.pid}` : "";
    row.rate.replaceChildren(...(worker.pid ? [`${worker.tokens_per_s.toFixed(1)} tokens/s`, element("small", { textContent: `${worker.running} of ${worker.seats}` })] : []));
    for (const answer of worker.answers) { seen.add(answer.id); chip(answer, row.answers); }
  }
  for (const [id, one] of chips) if (!seen.has(id) && Date.now() - (one.gone ??= Date.now()) > 1500) { one.node.remove(); chips.delete(id); } else if (seen.has(id)) delete one.gone;
}

async function watch() {
  for (;;) {
    try {
      const response = await fetch("/workers/live", { headers: headers() });
      if (response.status === 401) { $("door").hidden = false; status("lost", "needs a key"); return; }
      if (!response.ok) throw new Error(response.status);
      $("door").hidden = true;
      for await (const data of events(response)) show(JSON.parse(data));
    } catch { /* told below */ }
    status("lost", "connection lost, trying again");
    await new Promise(done => setTimeout(done, 1000));
  }
}

// -------------------------------------------------------------------------------------- the box

let asking = null;

async function ask() {
  asking = new AbortController();
  $("send").disabled = true; $("stop").disabled = false;
  $("answer").textContent = ""; $("answer").className = ""; $("cost").textContent = "";
  const began = performance.now();
  let first = 0;
  try {
    const body = { model: served, messages: [{ role: "user", content: $("prompt").value }], max_tokens: +$("most").value, temperature: +$("temperature").value, stream: true, stream_options: { include_usage: true } };
    const response = await fetch("/v1/chat/completions", { method: "POST", signal: asking.signal, headers: headers({ "content-type": "application/json", "x-prefixcache-explain": "1" }), body: JSON.stringify(body) });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      for (const choice of chunk.choices) { first ||= performance.now() - began; $("answer").textContent += choice.delta.content ?? ""; }
      if (chunk.usage) {
        const cached = chunk.usage.prompt_tokens_details.cached_tokens, workers = chunk.prefixcache[0].workers;
        $("cost").textContent = `cached ${count(cached)} of ${count(chunk.usage.prompt_tokens)} · ${many(chunk.usage.completion_tokens, "token")} · ${workers.join(", then ")} · first token after ${first.toFixed(0)} ms, all after ${((performance.now() - began) / 1e3).toFixed(2)} s`;
      }
    }
  } catch (error) {
    if (error.name === "AbortError") $("cost").textContent = "stopped";
    else { $("answer").textContent += ` ${error.message}`; $("answer").className = "failed"; }
  } finally {
    asking = null;
    $("send").disabled = false; $("stop").disabled = true;
  }
}

$("door").onsubmit = event => { event.preventDefault(); key = $("key").value.trim(); watch(); };
$("try").onsubmit = event => { event.preventDefault(); if (!asking) ask(); };
$("stop").onclick = () => asking?.abort();
$("prompt").onkeydown = event => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("try").requestSubmit(); };
watch();
