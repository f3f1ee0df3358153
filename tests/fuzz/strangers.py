"""Targets that read what strangers wrote: traces, prompts, requests, configurations, identities.

The first bytes of an input say which form it is in, and whether what follows is the file itself or
changes to a good one (see `odd.py`).  Whatever is not refused must be sound.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from fuzz.odd import changed, json_line, toml
from prefixcache.cli.decoder import Decoder
from prefixcache.cli.prompt import read_prompt
from prefixcache.errors import InvalidRequest
from prefixcache.prompts.logged_request import read_logged
from prefixcache.service.auth.identity import Identities, Proof
from prefixcache.service.pool.model_layout import read_layout
from prefixcache.texts import MAX_TEXT, check_text, escape, escape_all, is_plain
from prefixcache.types import TOKEN_BYTES, Namespace, pack
from prefixcache_bench.experiments.readers.load import Form, load
from prefixcache_bench.experiments.traces import Trace
from prefixcache_worker.request_line import name_of, read_id, read_object, read_request

MOST_GROWTH = 2**30
"""Bytes by which this process may grow at most, whatever it reads."""

LONGEST_REFUSAL = 2000
"""Characters of what is said of an input, however long it is itself."""

Made = TypeVar("Made")

TOOL_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    {"role": "assistant", "content": "I call", "tool_calls": [TOOL_CALL]},
    {"role": "tool", "content": "5", "tool_call_id": "c"},
    {"role": "user", "content": "and now"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
SHAREGPT = [
    {"from": "human", "value": "hello"},
    {"from": "gpt", "value": "hello to you"},
    {"from": "human", "value": "and now"},
    {"from": "gpt", "value": "the end"},
]
HEADER = {"format": "delta-hash-v1", "block_size": 64}
AGENTIC = {"t_ms": 5, "trace": "s", "i": 0, "input_length": 130, "keep": 0, "tail": [1, 2]}
LINES: tuple[tuple[Form | None, list[Any]], ...] = (
    (Form.JSONL, [{"t": 0.5, "namespace": "m", "tokens": [1, 2, 3], "prompt": 2}]),
    (Form.JSONL, [{"t": 1, "namespace": ["m", "a", "t", "s"], "tokens": "AQAAAAIAAAA="}]),
    (None, [{"prompt_token_ids": [1, 2, 3]}]),
    (
        Form.MOONCAKE,
        [{"timestamp": 1, "input_length": 900, "output_length": 3, "hash_ids": [1, 2]}],
    ),
    (
        Form.MOONCAKE,
        [
            {"chat_id": 1, "parent_chat_id": -1, "timestamp": 1.5, "input_length": 30}
            | {"output_length": 3, "type": "text", "turn": 1, "hash_ids": [1, 2]}
        ],
    ),
    (
        Form.MOONCAKE,
        [
            {"session_id": "s", "delay": 9, "input_length": 600, "hash_ids": ["a", 2**64]},
            {"session_id": "s", "delay": 9, "input_length": 600, "hash_ids": ["a", -1]},
        ],
    ),
    (Form.AGENTIC, [HEADER, AGENTIC, AGENTIC | {"i": 1, "keep": 2, "tail": []}]),
    (Form.CHAT, [{"t": 1.0, "model": "m", "messages": CHAT, "tools": TOOLS}]),
    (Form.CHAT, [{"custom_id": "r", "body": {"model": "m", "messages": CHAT}}]),
    (Form.CHAT, [{"id": "a", "conversations": SHAREGPT}, {"id": None, "conversations": SHAREGPT}]),
    (Form.CHAT, [{"conversation": CHAT[:2] + CHAT[2:3], "model": "m", "timestamp": "2024-01-01"}]),
    (None, [{"messages": CHAT}, {"messages": CHAT[:2]}]),
    (None, [[1, 2, 3], [[4], [5, 6]]]),
    (Form.CHAT, [{"text": "hello you"}, CHAT, ["hello", "you"]]),
)
"""Good traces of every form."""
CONVERSATIONS = [
    {"format": "kvtrace-v1"},
    {"conv": 0, "tokens": [1, 2, 3, 4]},
    {"conv": 1, "parent": 0, "lcp": 2, "len": 9},
]
REQUESTS = [
    {"format": "kvtrace-v1"},
    {"t_ms": 1, "conv": 0, "prompt_len": 2, "cached_len": 4},
    {"t_ms": 2, "conv": 1, "prompt_len": 3, "cached_len": 9},
]
IDENTITIES: dict[str, Any] = {
    "domain": [{"name": "acme", "memory": "1GiB"}],
    "identity": [
        {"name": "acme", "tenant": "acme", "models": ["llama-*"], "domain": "acme"}
        | {"token_sha256": ["ab" * 32], "certificates": ["serving.acme"]},
        {"name": "b", "tenant": "b", "socket": "/run/b.sock", "uid": 1001},
        {"name": "operator", "admin": True, "token_sha256": ["cd" * 32]},
    ],
}
CONFIGS: tuple[dict[str, Any], ...] = (
    {"model_type": "llama", "num_hidden_layers": 30, "num_attention_heads": 9, "dtype": "bfloat16"}
    | {"num_key_value_heads": 3, "hidden_size": 576, "head_dim": 64, "rope_scaling": {"a": 1}},
    {"text_config": {"num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 64}}
    | {"torch_dtype": "float16", "vision_config": {"num_hidden_layers": 3}},
    {"model_type": "falcon", "n_layer": 2, "n_head": 71, "hidden_size": 4544, "multi_query": True},
    {"n_layers": 3, "n_heads": 4, "d_model": 64, "attn_config": {"kv_n_heads": 2}},
    {"num_hidden_layers": 2, "num_attention_heads": [8, 8], "hidden_size": 64}
    | {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 9},
)
LOGGED: tuple[Any, ...] = (
    {"messages": CHAT, "tools": TOOLS, "model": "m", "chat_template_kwargs": {"a": 1}}
    | {"cache_salt": "s", "lora_request": {"lora_name": "x"}, "documents": [{"title": "a"}]},
    {
        "instructions": "be brief",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "5"},
        ],
    },
    {
        "system": [{"type": "text", "text": "be"}],
        "messages": [
            {"role": "user", "content": [{"type": "image", "source": {"data": "AAAA"}}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "content": "5"}]},
        ],
    },
    {"prompt": ["hello", "you"]},
    {"body": {"messages": CHAT}},
    {"conversations": SHAREGPT},
    CHAT,
)
"""Requests as servers log them, in every form."""
WORKER_LINES: tuple[dict[str, Any], ...] = (
    {"id": "a", "messages": CHAT, "tools": TOOLS, "max_new_tokens": 3, "stop": ["x"]},
    {"id": 7, "tokens": [1, 2], "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop_ids": [3]},
    {"id": "d", "tokens": [1], "temperature": 1, "sample": 2, "generated": [2, 3]},
    {"id": "e", "tokens": [1], "top_k": 3, "min_p": 0.1, "presence_penalty": 1, "min_tokens": 1}
    | {"frequency_penalty": 1, "repetition_penalty": 1.2, "logit_bias": {"1": -5}}
    | {"ignore_eos": True, "logprobs": True, "top_logprobs": 3},
    {"id": "c", "prompt": "hello", "wait_s": 1, "log_logits": True, "stop": "x"},
)
"""Lines as a worker reads them."""
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{{ part['text'] }}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer_in(folder: Path) -> None:
    """Leave a small tokenizer with a chat template in a folder, as a model's is."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"?": 0} | {word: at for at, word in enumerate(("hello", "you", "and", "now", "be"), 1)}
    made = Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    config = {"chat_template": TEMPLATE, "bos_token": "?"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


class _Folder:
    """A target with a folder of its own, in memory."""

    def __init__(self) -> None:
        self._temporary = tempfile.TemporaryDirectory(dir="/dev/shm", prefix="fuzz-")
        self.folder = Path(self._temporary.name)
        self._first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def close(self) -> None:
        self._temporary.cleanup()

    def check_memory(self) -> None:
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._first
        assert grown * 1024 < MOST_GROWTH, f"{grown / 1024:.0f} MiB more than before"


class Traces(_Folder):
    """A trace of each form: read, refused, or read but for the lines that are told as broken."""

    def __init__(self) -> None:
        super().__init__()
        tokenizer_in(self.folder)

    def __call__(self, data: bytes) -> None:
        how, which, data = (*data[:2], data[2:]) if len(data) > 1 else (0, 0, b"")
        form, good = LINES[which % len(LINES)]
        content = data
        if how & 1:
            odd = changed(good, data)
            rows = odd if isinstance(odd, list) else [odd]
            content = b"\n".join(map(json_line, [*rows, *good]))
            if how & 2:
                content = json_line([*rows, *good])
        content = b"\xef\xbb\xbf" * bool(how & 4) + content
        if how & 8:
            content = gzip.compress(content, 1)[: -1 - data[0] if how & 16 and data else None]
        path = self.folder / "trace.jsonl"
        path.write_bytes(content)
        with contextlib.suppress(InvalidRequest):
            chosen = form if how & 32 else None
            sound(load(str(path), form=chosen, tokenizer=str(self.folder)))
        self.check_memory()


class Conversations(_Folder):
    """A kvtrace's two files, changed or random."""

    def __call__(self, data: bytes) -> None:
        how, data = (data[0], data[1:]) if data else (0, b"")
        files: list[Any] = [CONVERSATIONS, REQUESTS]
        if how & 1:
            files[how >> 1 & 1] = changed(files[how >> 1 & 1], data)
        for ending, rows in zip(("convs", "requests"), files, strict=True):
            rows = rows if isinstance(rows, list) else [rows]
            content = gzip.compress(b"\n".join(map(json_line, rows)), 1)
            (self.folder / f"w.{ending}.jsonl.gz").write_bytes(content)
        if not how & 1:
            name = ("w.convs.jsonl.gz", "w.requests.jsonl.gz")[how >> 1 & 1]
            (self.folder / name).write_bytes(data if how & 4 else gzip.compress(data, 1))
        with contextlib.suppress(InvalidRequest):
            sound(load(str(self.folder)))
        self.check_memory()


def _or_refusal(read: Callable[..., Made], *given: Any) -> Made | None:
    """Give what is made of it; None if it is refused, in one line that can be shown and read."""
    try:
        return read(*given)
    except InvalidRequest as error:
        told = str(error)
    assert is_plain(told), ascii(told)
    assert len(told) < LONGEST_REFUSAL, len(told)
    return None


def sound(trace: Trace) -> None:
    """See that what was read of a trace makes sense."""
    assert trace.requests
    for request in trace.requests:
        assert math.isfinite(request.t), request
        assert len(request.tokens) % TOKEN_BYTES == 0
        assert 0 <= request.prompt <= len(request.tokens) // TOKEN_BYTES, request
        assert isinstance(request.namespace, Namespace)
    for line in trace.broken:
        assert str(line).isprintable(), ascii(line)


class Prompts(_Folder):
    """What a user gives as a prompt: token ids, text, chats."""

    GOOD: tuple[Any, ...] = (
        CHAT,
        {"messages": CHAT, "tools": TOOLS, "model": "m", "temperature": 0.5},
        {"prompt": "hello you"},
        {"tokens": [1, 2, 3]},
        {"input_ids": [1, 2]},
        [1, 2, 3],
        {"messages": CHAT, "functions": [TOOLS[0]["function"]], "documents": [{"text": "hello"}]},
        LOGGED[2] | {"tools": [{"name": "f", "input_schema": {"type": "object"}}]},
        LOGGED[1] | {"tools": TOOLS},
        {"instructions": "hello", "input": "you"},
    )

    def __init__(self) -> None:
        super().__init__()
        tokenizer_in(self.folder)
        decoder = Decoder(self.folder)
        self._open = lambda: decoder

    def __call__(self, data: bytes) -> None:
        how, data = (data[0], data[1:]) if data else (0, b"")
        if how & 1:
            data = json_line(changed(self.GOOD[(how >> 1) % len(self.GOOD)], data))
        source = "p.bin" if how == 2 else "p.json"
        with contextlib.suppress(InvalidRequest):
            tokens = read_prompt(data, source, self._open, as_text=how == 4)
            assert tokens
            assert len(tokens) % TOKEN_BYTES == 0


def logged(data: bytes) -> None:
    """A record of a log: requests, or a refusal."""
    how, data = (data[0], data[1:]) if data else (0, b"")
    value = _parsed(json_line(changed(LOGGED[how % len(LOGGED)], data)) if how & 128 else data)
    found = _or_refusal(read_logged, value)
    for request in found or ():
        assert sum((bool(request.messages), request.text is not None, request.tokens is not None))


class _Model:
    """What the reader of a worker's lines asks of a model."""

    max_tokens = 4096

    def prompt(self, request: Any) -> Any:
        return SimpleNamespace(tokens=pack([1, 2]), left_out=set(request.left_out))


def worker_lines(data: bytes) -> None:
    """A line of a worker's input: a request that can be served, or a refusal."""
    how, data = (data[0], data[1:]) if data else (0, b"")
    good = WORKER_LINES[how % len(WORKER_LINES)]
    line = json_line(changed(good, data)) if how & 128 else data
    assert len(name_of(line)) <= 300
    fields = _or_refusal(read_object, line)
    if fields is not None and (name := name_of(line)) and line.count(b'"id"') == 1:
        assert _or_refusal(read_id, fields) in {name, None}, "told under another's name"
        assert isinstance(fields["id"], str) or type(fields["id"]) is int, "a name that is none"
    model: Any = _Model()
    request = None if fields is None else _or_refusal(read_request, fields, model)
    if request is not None:
        assert request.max_new_tokens >= 1
        assert math.isfinite(request.wait_s)
        assert math.isfinite(request.sampling.temperature)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


class IdentityFiles(_Folder):
    """A file of identities: taken whole, or refused in words."""

    def __call__(self, data: bytes) -> None:
        path = self.folder / "identities.toml"
        if data[:1] == b"\0":
            path.write_bytes(data[1:])
        else:
            try:
                written = toml(changed(IDENTITIES, data))
            except RecursionError:
                return  # deeper than our own writer goes: bytes, above, make such files
            path.write_text(written, errors="replace")
        path.chmod(0o600)
        identities = _or_refusal(Identities, path)
        if identities is None:
            return
        assert all(size > 0 for size in identities.domains.values())
        for tenant in identities.tenants:
            assert is_plain(tenant), ascii(tenant)
        identities.of(Proof.by_token("x\ud800y"))
        identities.of(Proof(certificate=("\x00",)))


class Configs(_Folder):
    """A model's config.json: a layout that makes sense, or a refusal that names the field."""

    def __call__(self, data: bytes) -> None:
        how, data = (data[0], data[1:]) if data else (0, b"")
        if how & 1:
            data = json_line(changed(CONFIGS[(how >> 1) % len(CONFIGS)], data))
        (self.folder / "config.json").write_bytes(data)
        layout = _or_refusal(read_layout, self.folder)
        if layout is None:
            return
        assert layout.is_ours  # without a block size nothing else is read
        assert min(layout.num_layers, layout.num_kv_heads, layout.head_dim) > 0
        assert all(type(one) is int for one in (layout.num_layers, layout.num_kv_heads))


def texts(data: bytes) -> None:
    """A text at the door: refused, or it shows itself; escaped, it always does."""
    text = data.decode("utf-8", "surrogateescape" if data[:1] == b"s" else "replace")
    shown = escape(text)
    assert is_plain(shown), ascii(shown)
    assert escape(shown) == shown
    assert all(map(is_plain, escape_all({text: [text, {text}, data]})))
    if _or_refusal(lambda: check_text(text, "a name") or text) is not None:
        assert shown == text
        assert len(text) <= MAX_TEXT
        text.encode()  # it can be kept
