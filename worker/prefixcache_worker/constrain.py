"""Answers that are held to a grammar: which tokens may come next, by llguidance.

```
grammar ──► compiled, once for the same one ──► a state for each answer
               state ── mask ──► logits of what may not come are -inf ──► chosen as ever ──► add
                     └─ forced ──► where there is one way to go on, nothing is asked of the model
```
The state is a function of the answer's tokens alone: whoever goes on with another worker's answer
runs them through it, and is where that one was.

| bound | of a mask, or of compiling |
|---|---|
| `llguidance`'s own, of items and of fuel | some 10 ms, then the answer fails |
| `MOST_STATES` | memory of an answer's state, about 1 to 2 KB each |
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from prefixcache.errors import InvalidRequest, Unsupported
from prefixcache.extras import how_to_install
from prefixcache_worker.grammar import Grammar

MOST_STATES: Final = 20_000
_KEPT: Final = 16
"""Compiled grammars that are kept for the next request."""
_NO_FURTHER: Final = "grammar: it cannot be followed any further"
_LONGEST_REASON: Final = 300


class Constraint:
    """The state of one answer.  Belongs to one thread at a time.

    Args:
        matcher: of llguidance.
        vocab_size: of the model.
        ends: tokens that end the answer, by the model.
        left_out: what of the schemas is not enforced.
    """

    def __init__(
        self, matcher: Any, vocab_size: int, ends: frozenset[int], left_out: tuple[str, ...]
    ) -> None:
        self.ends = ends
        self.left_out = left_out
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._failure = ""
        self._allowed: Tensor | None = None

    def copy(self) -> Constraint:
        """Give another one in the same state.  O(1), or nearly."""
        made = Constraint(self._matcher.deep_copy(), self._vocab_size, self.ends, self.left_out)
        made._failure = self._failure
        return made

    @property
    def fits(self) -> bool:
        """Whether all tokens did that were added."""
        return not self._failure

    @property
    def is_over(self) -> bool:
        """Whether nothing can follow any more."""
        return not self._failure and bool(self._matcher.is_stopped())

    def add(self, token: int) -> bool:
        """Take the answer's next token; tell whether it fits.  If not, nothing fits any more."""
        self._allowed = None
        try:
            fits = not self._failure and _guarded(lambda: self._matcher.consume_token(token))
        except InvalidRequest as error:
            fits, self._failure = False, str(error)
        if not fits:
            self._failure = self._failure or f"{_NO_FURTHER}{self._reason()}"
        return bool(fits)

    def forced(self) -> list[int]:
        """Give the tokens that must follow, as far as there is one way; perhaps none."""
        if self._failure:
            return []
        try:
            return [int(token) for token in _guarded(self._matcher.compute_ff_tokens)]
        except InvalidRequest as error:
            self._failure = str(error)
            return []

    def prepare(self) -> None:
        """Work out which tokens may come next; does nothing if that is known.

        Raises:
            InvalidRequest: the grammar takes too much time here, or nothing can follow.
        """
        if self._failure:
            raise InvalidRequest(self._failure)
        if self._allowed is not None:
            return
        bits = np.frombuffer(_guarded(self._matcher.compute_bitmask), dtype=np.uint8)
        if self._matcher.is_error():
            raise InvalidRequest(f"{_NO_FURTHER}{self._reason()}")
        allowed = np.unpackbits(bits, bitorder="little")[: self._vocab_size].view(np.bool_)
        if not allowed.any():
            raise InvalidRequest("grammar: no token of this model can follow")
        self._allowed = torch.from_numpy(allowed)

    def apply(self, logits: Tensor, not_yet: Tensor) -> None:
        """Rule out, in place, what may not come next.  O(vocabulary).

        Args:
            logits: `[vocab]`.
            not_yet: tokens that shall not come here either, unless nothing else may.
        """
        self.prepare()
        assert self._allowed is not None
        allowed = self._allowed
        if len(not_yet):
            later = allowed.clone()
            later[not_yet] = False
            allowed = later if bool(later.any()) else allowed
        logits.masked_fill_(~allowed, -torch.inf)
        if not bool(logits.max() > -torch.inf):  # the model itself rules out what may come
            logits[allowed] = 0.0

    def _reason(self) -> str:
        lines = str(self._matcher.get_error()).partition("\n<")[0].strip()
        return f": {lines[:_LONGEST_REASON]}" if lines else ""


class Grammars:
    """Compiles grammars for one model's tokens.

    What it needs of the tokenizer is made for the first grammar: some tenths of a second.

    Args:
        tokenizer: of transformers; None: the model has none.
        vocab_size: of the model.
        stop_ids: tokens that end its answers.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, stop_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_ids = frozenset(one for one in stop_ids if one < vocab_size)
        self._tokens: Any = None
        self._special: dict[str, int] = {}
        self._kept: OrderedDict[str, Constraint] = OrderedDict()
        self._lock = threading.Lock()

    def constraint(self, grammar: Grammar) -> Constraint:
        """Give the state of an answer that is about to begin.

        From any thread; others go on meanwhile, but for the first time.

        Raises:
            Unsupported: llguidance is not installed, or knows no such tokenizer.
            InvalidRequest: the grammar cannot be compiled, or takes too much.
        """
        with self._lock:
            if self._tokens is None:
                self._tokens, self._special = self._learn()
            source = grammar.lark(self._special)
            kept = self._kept.pop(source, None)
            if kept is None:
                kept = self._compile(source)
            self._kept[source] = kept
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return kept.copy()

    def _compile(self, source: str) -> Constraint:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_lexer_states=MOST_STATES, verbose_errors=False)
        matcher = _guarded(lambda: LLMatcher(self._tokens, source, log_level=0, limits=limits))
        if matcher.is_error():
            told = _told(matcher.get_error())
            raise InvalidRequest(f"grammar: {told}")
        warnings = tuple(sorted({_told(one) for one in matcher.get_grammar_warnings()}))
        left_out = tuple(f"parts of a schema that are not enforced: {one}" for one in warnings)
        return Constraint(matcher, self._vocab_size, self._stop_ids, left_out)

    def _learn(self) -> tuple[Any, dict[str, int]]:
        try:
            from llguidance import LLTokenizer
        except ModuleNotFoundError:
            raise Unsupported(
                "grammar: holding answers to one needs llguidance, which is not installed: "
                f"{how_to_install('serving', module='llguidance')}"
            ) from None
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None or not self._stop_ids:
            raise Unsupported("grammar: this model has no tokenizer of the kind that it takes")
        try:
            tokens = _guarded(
                lambda: LLTokenizer(
                    _plain(backend), n_vocab=self._vocab_size, eos_token=sorted(self._stop_ids)
                )
            )
        except Exception as error:  # noqa: BLE001 - the library's own, of any kind
            raise Unsupported(
                f"grammar: it knows no tokenizer like this model's: {error}"
            ) from None
        special = {
            added.content: number
            for number, added in backend.get_added_tokens_decoder().items()
            if added.special and number < self._vocab_size
        }
        return tokens, special


def _plain(backend: Any) -> str:
    """Give a tokenizer as JSON, without what cuts or fills up its texts."""
    made = type(backend).from_str(backend.to_str())
    made.no_padding()
    made.no_truncation()
    return str(made.to_str())


def _told(message: str) -> str:
    """Shorten what the compiler says: its first line, without our own words of the grammar."""
    first = message.strip().split("\n")[0]
    _, _, rest = first.rpartition("failed to compile JSON schema: ")
    return (rest or first)[:_LONGEST_REASON]


def _guarded(call: Any) -> Any:
    """Call into the library, whose own faults are no `Exception`: they end this request only."""
    try:
        return call()
    except Exception:
        raise
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise InvalidRequest("grammar: the compiler failed at it") from None
