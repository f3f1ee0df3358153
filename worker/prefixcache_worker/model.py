"""A language model on paged keys and values: loaded, probed, and fast where its kind is known.

```
path or id ──► AutoModelForCausalLM ──► layout ──► probe against eager attention ──► refused
   │                                                │ equal
   │                                                ├─ Llama's family: a network of our own, probed
   │                                                │  as well: `native` in C, else `lean`
   │                                                └─ any other: the library's own modules
   └─ packed before, by any worker ──► mapped, tried: ready
```
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from prefixcache.errors import InvalidRequest, NotFound, Unsupported
from prefixcache.prompts.chat_template import ChatTemplate, Prompt, prompt_of
from prefixcache.prompts.logged_request import LoggedRequest, read_logged
from prefixcache.types import DTYPE_ALIASES, DTYPE_BYTES, Layout, unpack
from prefixcache_kernels import TORCH_DTYPES, GroupedPlan, Plan, SharedPool, SharingCost
from prefixcache_kernels.cpu.library import library
from prefixcache_worker import smollm2
from prefixcache_worker.batch import Batch
from prefixcache_worker.constrain import Grammars
from prefixcache_worker.identity import identify
from prefixcache_worker.lean import LeanNetwork, twin
from prefixcache_worker.light_tokenizer import LightTokenizer, alike
from prefixcache_worker.mapped import About, Place, may_pack, say
from prefixcache_worker.native import NativeNetwork
from prefixcache_worker.probe import (
    TOLERANCE,
    Network,
    distance,
    paged_logits,
    plain_logits,
    random_prompts,
)
from prefixcache_worker.reach import max_context, windows

DTYPES: Final = ("float32", "bfloat16")
"""Element types a model can be loaded in."""

WEIGHTS: Final = ("packed", "int8", "private")
"""How a worker holds a model's weights."""

_EIGHT_BITS: Final = "+int8"

EIGHT_BITS_TOLERANCE: Final = 0.1
"""Largest accepted `distance` of a network in eight bits from the one that it was made of.  The
demo model lies 2e-2 apart, as far as its bfloat16 from float32; a ruined one lies near 1."""


@dataclass
class Model:
    """A model that runs batches on a pool; make one with `load` or `of`.

    Attributes:
        name: what the service files its prefixes under; the same in every worker that loads the
            same weights.
        layout: shape of its keys and values.
        num_heads: heads of its queries.
        windows: for each layer, how many tokens it sees; None is all of them.
        max_tokens: how long a sequence may become.
        vocab_size: logits per token.
        stop_ids: tokens that end an answer.
        tokenizer: the model's tokenizer, or None for models without one.
        kind: `native`, `lean` or `transformers`: which network runs.
        gap: distance of its logits from plain attention's, as the probe saw it; in eight bits, from
            those of the network that it was made of.
    """

    name: str
    layout: Layout
    num_heads: int
    windows: tuple[int | None, ...]
    max_tokens: int
    vocab_size: int
    stop_ids: tuple[int, ...]
    tokenizer: Any
    kind: str
    gap: float
    network: Network
    load_s: float = 0.0
    invariant: bool = False
    """Whether a row's logits have the same bits whatever is computed with it, or was before."""
    source: str = ""
    """Folder or id that it was loaded from; empty: it was not."""
    packed_now: bool = False
    """Whether this process packed its weights, for which it took memory that it does not need."""

    @classmethod
    def load(
        cls,
        path_or_id: str | Path,
        *,
        dtype: str = "float32",
        threads: int = 1,
        lean: bool = True,
        weights: str = "packed",
    ) -> Model:
        """Load a model from a folder or from the Hugging Face hub, and probe it.

        Sets the number of threads that torch uses in this process.  `smollm2` names the demo model.
        Where the C library knows a folder's model, its weights come from a file that all workers of
        this user map, and that the first one makes (`mapped`).

        Args:
            path_or_id: folder, hub id or `smollm2`.
            dtype: `float32` or `bfloat16`, or another name of these.
            threads: torch's threads; workers x threads should not exceed the machine's cores.
            lean: use a network of our own where one applies.
            weights: `packed`; `int8`: packed in eight bits; or `private`: this worker has its own,
                and PyTorch multiplies.

        Raises:
            NotFound: nothing can be loaded from there.
            Unsupported: the architecture cannot run on paged memory, the message names it; or
                it has no eight bits.
            InvalidRequest: no such dtype or weights, or threads below 1.
        """
        if (known := DTYPE_ALIASES.get(dtype, dtype)) not in DTYPES:
            raise InvalidRequest(f"dtype {dtype!r}: not one of {', '.join(DTYPES)}")
        dtype = known
        if threads < 1:
            raise InvalidRequest(f"{threads} threads: give 1 or more")
        if weights not in WEIGHTS:
            raise InvalidRequest(f"weights {weights!r}: not one of {', '.join(WEIGHTS)}")
        torch.set_num_threads(threads)
        started = time.monotonic()
        source = str(path_or_id)
        if source == smollm2.NAME:
            source = str(smollm2.folder())
        model = None
        eight_bits = weights == "int8"
        if lean and weights != "private" and may_pack(source):
            model = cls._load_packed(source, dtype, eight_bits=eight_bits)
        if model is None:
            model = cls._load_library(source, dtype, lean=lean, native=weights != "private")
            if eight_bits:
                model = model.in_eight_bits()
        model.load_s = time.monotonic() - started
        model.source = source
        return model

    @classmethod
    def _load_packed(cls, source: str, dtype: str, *, eight_bits: bool) -> Model:
        """Map a folder's packed weights, made if need be; where that cannot be, its own."""
        name = identify(source, None)
        place = Place(name, source, dtype, eight_bits=eight_bits)
        if eight_bits:
            name += _EIGHT_BITS
        if found := place.find():
            return cls._mapped(name, source, dtype, *found)
        with place.alone() as kept:
            if found := place.find():  # made while this worker waited
                return cls._mapped(name, source, dtype, *found)
            say(f"packing the weights of {name} as {dtype}, once: {place.path}")
            model = cls._load_library(source, dtype, lean=True, native=True)
            if eight_bits:
                model = model.in_eight_bits()
            if not kept or not isinstance(model.network, NativeNetwork):
                return model
            try:
                light = alike(LightTokenizer(Path(source)), model.tokenizer)
            except (OSError, ValueError):
                light = False
            about = About(model.gap, model.max_tokens, model.stop_ids, light)
            try:
                place.keep(model.network, about)
            except Unsupported as fault:
                say(f"weights are not shared with other workers: {fault}")
                return model
            found = place.find()
        if found:
            model = cls._mapped(name, source, dtype, *found)
            model.packed_now = True
        return model

    @classmethod
    def _mapped(
        cls, name: str, source: str, dtype: str, network: NativeNetwork, about: About
    ) -> Model:
        facts = network.facts
        if about.light:
            tokenizer: Any = LightTokenizer(Path(source))
        else:
            import transformers

            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        return cls(
            name=name,
            layout=Layout(facts.num_layers, facts.num_kv_heads, facts.head_dim, dtype),
            num_heads=facts.num_heads,
            windows=facts.windows,
            max_tokens=about.max_tokens,
            vocab_size=facts.vocab,
            stop_ids=about.stop_ids,
            tokenizer=tokenizer,
            kind="native",
            gap=about.gap,
            network=network,
        )

    @classmethod
    def _load_library(cls, source: str, dtype: str, *, lean: bool, native: bool) -> Model:
        """Load a model with the library, and take it over."""
        import transformers

        transformers.utils.logging.disable_progress_bar()
        try:
            config = transformers.AutoConfig.from_pretrained(source)
            module = transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype=TORCH_DTYPES[dtype], attn_implementation="eager"
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise NotFound(f"no model could be loaded from {source!r}: {error}") from error
        return cls.of(
            module,
            name=identify(source, config),
            dtype=dtype,
            tokenizer=tokenizer,
            lean=lean,
            native=native,
        )

    @classmethod
    def of(
        cls,
        module: Any,
        *,
        name: str = "",
        dtype: str = "float32",
        tokenizer: Any = None,
        lean: bool = True,
        native: bool = True,
    ) -> Model:
        """Take over a loaded `AutoModelForCausalLM`, and probe it.  Its own generation is over.

        Of our own networks (`lean`), the one in C is tried first (`native`).

        Raises:
            Unsupported: as `load`.
        """
        from prefixcache_worker.hf import HuggingFaceNetwork

        dtype = DTYPE_ALIASES.get(dtype, dtype)
        module.eval()
        config = module.config.get_text_config()
        architecture = config.model_type
        if getattr(module.config, "is_encoder_decoder", False):
            raise Unsupported(f"architecture {architecture!r} has an encoder; only decoders share")
        limit = max_context(config)
        prompts = random_prompts(config.vocab_size)
        if limit:
            prompts = [p[:limit] for p in prompts]
        want = plain_logits(module, prompts)
        network: Network = HuggingFaceNetwork(module)
        assert isinstance(network, HuggingFaceNetwork)
        layout = network.learn_layout(dtype)
        kind, gap = "transformers", distance(paged_logits(network, layout, prompts), want)
        if gap > TOLERANCE[dtype]:
            raise Unsupported(
                f"architecture {architecture!r} gives other logits on paged memory than with "
                f"plain attention: {gap:.1e} of the largest apart, {TOLERANCE[dtype]:.0e} allowed"
            )
        ways: dict[str, type[NativeNetwork | LeanNetwork]] = {}
        if lean and native and library() is not None:
            ways["native"] = NativeNetwork
        if lean:
            ways["lean"] = LeanNetwork
        for way, restated in ways.items():
            swift = restated.of(module)
            if swift is None or not (dtype == "float32" or _twin_agrees(module, restated)):
                continue
            swift_gap = distance(paged_logits(swift, layout, prompts), want)
            if swift_gap <= TOLERANCE[dtype]:
                kind, gap, network = way, swift_gap, swift
                break
        return cls(
            name=name or architecture,
            layout=layout,
            num_heads=config.num_attention_heads,
            windows=tuple(windows(config)),
            max_tokens=limit,
            vocab_size=config.vocab_size,
            stop_ids=_stop_ids(module, tokenizer),
            tokenizer=tokenizer,
            kind=kind,
            gap=gap,
            network=network,
        )

    def forward(self, batch: Batch, pool: SharedPool) -> Tensor:
        """Run a batch.  Fills its slots of the pool; gives float32 logits `[R, vocab]`.

        When it returns, the device has finished writing.
        """
        where = (batch.block_tables, batch.query_start, batch.context_lens, pool.block_size)
        if self.invariant:
            return self.network(batch, pool, Plan.build(*where, fixed=True))
        return self.network(batch, pool, GroupedPlan.build(*where, batch.groups))

    def made_invariant(self) -> Model:
        """Give this model with every bit of an answer fixed: alone or in a batch, cached or not.

        Its prefixes are others than those of this one: their bits may differ.

        Raises:
            Unsupported: another network than the one in C runs.
        """
        if self.kind != "native":
            raise Unsupported(
                f"model {self.name!r} runs on {self.kind!r}: only the network in C computes a row "
                "without regard to others; it takes Llama's family, a C compiler, packed weights"
            )
        return replace(self, name=f"{self.name}+invariant", invariant=True)

    def in_eight_bits(self) -> Model:
        """Give this model with its matrices in eight bits.

        Its prefixes are others than those of this one: its keys and values are.

        Raises:
            Unsupported: another network than the one in C runs, or nothing would be left of its
                answers.
        """
        if not isinstance(self.network, NativeNetwork):
            raise Unsupported(
                f"model {self.name!r} runs on {self.kind!r}: only the network in C has weights in "
                "eight bits; it takes Llama's family and a C compiler"
            )
        network = self.network.in_eight_bits()
        prompts = [prompt[: self.max_tokens or None] for prompt in random_prompts(self.vocab_size)]
        want, got = (paged_logits(one, self.layout, prompts) for one in (self.network, network))
        apart = distance(got, want)
        if apart > EIGHT_BITS_TOLERANCE:
            raise Unsupported(
                f"model {self.name!r} gives other logits in eight bits: {apart:.1e} of the largest "
                f"apart, {EIGHT_BITS_TOLERANCE:g} allowed; leave int8 out"
            )
        return replace(self, name=self.name + _EIGHT_BITS, network=network, gap=apart)

    def first_layers(self, count: int) -> Network:
        """Give a network of its first layers, which fills their slots and gives no logits.

        Its weights are this model's own.

        Raises:
            Unsupported: none of our own networks runs, and the library's has no end in between.
        """
        if self.layout.num_layers <= count:
            return self.network
        if isinstance(self.network, NativeNetwork | LeanNetwork):
            return self.network.first_layers(count)
        raise Unsupported(
            f"model {self.name!r} runs on {self.kind!r}, which computes all layers or none: what "
            "is furthest off at one of them cannot be told"
        )

    def sharing_cost(self, block_size: int) -> SharingCost:
        """Give what it costs a layer to read what sequences share once, on this processor."""
        return SharingCost.cpu(
            block_size=block_size,
            heads=self.num_heads,
            kv_heads=self.layout.num_kv_heads,
            head_dim=self.layout.head_dim,
            itemsize=DTYPE_BYTES[self.layout.dtype],
            native=library() is not None,
        )

    def prompt(self, request: LoggedRequest) -> Prompt:
        """Turn a request into prompt tokens, a chat by the model's template, as `explain` does.

        Raises:
            InvalidRequest: the template refuses it, or it holds an image, a recording or a file.
            Unsupported: the model has no tokenizer or no chat template.
        """
        if any(part["type"] != "text" for part in _parts(request)):
            raise InvalidRequest(f"model {self.name!r} takes text; the messages hold a medium")
        return prompt_of(
            request,
            lambda: self._template,
            lambda text, special: self.encode(text, special=special),
        )

    @cached_property
    def _template(self) -> ChatTemplate:
        source = getattr(self.tokenizer, "chat_template", None)
        if not source:
            raise Unsupported(f"model {self.name!r} has no chat template; send `tokens` instead")
        special = getattr(self.tokenizer, "special_tokens_map", {})
        return ChatTemplate.of_config({**special, "chat_template": source})

    def chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Turn messages into prompt tokens by the model's chat template, ready for an answer.

        Raises:
            InvalidRequest: they are no messages, or the template refuses them.
            Unsupported: the model has no tokenizer or no chat template.
        """
        (request,) = read_logged({"messages": list(messages)})
        return unpack(self.prompt(request).tokens).tolist()

    @cached_property
    def grammars(self) -> Grammars:
        """What compiles grammars for its tokens."""
        return Grammars(self.tokenizer, self.vocab_size, self.stop_ids)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Turn text into tokens; `special` adds what the tokenizer puts around every text.

        Raises:
            Unsupported: the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise Unsupported(f"model {self.name!r} has no tokenizer; send `tokens` instead")
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special)
        return ids


def _parts(request: LoggedRequest) -> Iterator[dict[str, Any]]:
    for message in request.messages:
        if isinstance(message["content"], list):
            yield from message["content"]


def _twin_agrees(module: Any, restated: type[NativeNetwork | LeanNetwork]) -> bool:
    """Tell whether a network of ours restates this architecture, to float32's precision."""
    from prefixcache_worker.hf import HuggingFaceNetwork

    small = twin(module)
    prompts = random_prompts(small.config.vocab_size)
    want = plain_logits(small, prompts)
    layout = HuggingFaceNetwork(small).learn_layout("float32")
    swift = restated.of(small)
    if swift is None:
        return False
    return distance(paged_logits(swift, layout, prompts), want) <= TOLERANCE["float32"]


def _stop_ids(module: Any, tokenizer: Any) -> tuple[int, ...]:
    """Collect every token that ends an answer: of the generation config and of the tokenizer."""
    stated = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    ids = set(stated if isinstance(stated, list) else [stated])
    ids.add(getattr(tokenizer, "eos_token_id", None))
    return tuple(sorted(i for i in ids if i is not None))
