"""`prefixcache explain`: why a prompt, or a request of a moment ago, was not reused in full."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from prefixcache.cli import decoder as decoding
from prefixcache.cli import source, view
from prefixcache.texts import many
from prefixcache.types import Explanation, Namespace, TierSpan, unpack

if TYPE_CHECKING:
    from prefixcache.cli.status import Status
    from prefixcache.client import Client

_ANSWER_S = 0.1
"""A store elsewhere is asked what lies there by the first question, and has answered by then."""
_CONTEXT_TOKENS = 12
"""Tokens before a parting that are shown with it."""


def explain(
    what: source.What = None,
    file: source.File = None,
    as_text: source.AsText = False,
    tokenizer: decoding.TokenizerPath = None,
    model: view.Model = None,
    adapter: view.Adapter = "",
    tenant: view.Tenant = "",
    salt: view.Salt = "",
    connect: view.Connect = None,
    as_json: view.AsJson = False,
) -> None:
    """Say why each token of a prompt is, or was, reused or not.

    Takes nothing and changes nothing.  Exit code 1: nothing of it is reused.

    Example: prefixcache explain prompt.txt --tokenizer /models/my-model
    """
    from prefixcache.cli import advice, status

    spaces = view.Chosen(model, adapter, tenant, salt)
    asked = source.ask(what, file, as_text, tokenizer, spaces)
    with view.open_client(connect) as client:
        now = status.read(client)
        found = source.find(client, asked)
        tokens, namespace = found.tokens, found.namespace
        told = found.told or client.explain(namespace, tokens)
        if found.told is None and now.snapshot.has_remote:
            time.sleep(_ANSWER_S)
            told = client.explain(namespace, tokens)
        reader = decoding.open_decoder(tokenizer, namespace)
        sentence = advice.advise(told, tokens, now, reader)
        again = _again(client, told, spaces)
    if as_json:
        view.print_json(fields(told, namespace, tokens, reader, sentence, again))
    else:
        _print(told, namespace, tokens, reader, now)
        if again is not None:
            view.tell(
                f"now {again.ledger.reused:,} of its {many(again.ledger.total, 'token')} would be "
                f"reused"
            )
        if sentence:
            for line in view.wrap(f"advice: {sentence}"):
                view.tell(line)
    if not told.ledger.reused:
        raise typer.Exit(1)


def _again(client: Client, told: Explanation, spaces: view.Chosen) -> Explanation | None:
    """Explain a past request once more, as if it came now, if all of its prompt is told."""
    past = told.past
    if past is None or not past.tokens or len(past.tokens) < 4 * past.num_tokens:
        return None
    return client.explain(spaces.named() or past.namespace, past.tokens)


def fields(
    told: Explanation,
    namespace: Namespace,
    tokens: bytes,
    reader: decoding.Decoder | None,
    sentence: str,
    again: Explanation | None,
) -> dict[str, Any]:
    """Give an explanation as plain values."""
    past = told.past
    shown: dict[str, Any] = {
        "namespace": view.namespace_fields(namespace),
        "request": None
        if past is None
        else {
            "request_id": past.request_id,
            "worker": past.worker,
            "lease": past.lease,
            "age_s": past.age_s,
        },
        "spans": [asdict(span) for span in told.spans],
        "ledger": view.ledger_fields(told.ledger),
        "parted_at": told.parted_at,
        "stored_next": unpack(told.stored_next).tolist(),
        "num_parted": told.num_parted,
        "resumes_at": told.resumes_at,
        "num_same": told.num_same,
        "extra_blocks": told.extra_blocks,
        "num_pending": told.num_pending,
        "num_below": told.num_below,
        "below_s": told.below_s,
        "below": [asdict(part) for part in told.below],
        "holding": None if told.holding is None else asdict(told.holding),
        "elsewhere": [
            view.namespace_fields(space) | {"num_tokens": there} for space, there in told.elsewhere
        ],
        "advice": sentence or None,
        "reused_now": None if again is None else again.ledger.reused,
    }
    if reader is not None and told.parted_at is not None:
        mine = unpack(tokens).tolist()[told.parted_at :][: len(told.stored_next) // 4]
        shown["text"] = {
            "yours": reader.decode(mine),
            "stored": reader.decode(unpack(told.stored_next).tolist()),
        }
    return shown


def _print(
    told: Explanation,
    namespace: Namespace,
    tokens: bytes,
    reader: decoding.Decoder | None,
    status: Status,
) -> None:
    if told.past is not None:
        past = told.past
        name = past.request_id or "a request"
        view.tell(
            f"{name} of {past.worker}#{past.lease}, {view.show_idle(past.age_s)} ago, in "
            f"{view.show_namespace(past.namespace)}: {many(past.num_tokens, 'token')}"
        )
    else:
        view.tell(f"{many(told.ledger.total, 'token')}, in {view.show_namespace(namespace)}")
    width = view.width()
    view.show(view.bar([(s.fate, s.end - s.start) for s in told.spans], min(width, 100)))
    for line in view.wrap(view.show_ledger(told.ledger)):
        view.tell(line)
    rows: list[tuple[str, ...]] = []
    for span in told.spans:
        glyph = view.GLYPHS[span.fate]
        where = f"{span.start:,} to {span.end - 1:,}"
        rows.append((f"tokens {where}", f"{span.end - span.start:,}", f"{glyph} {span.fate}"))
    room = width - 2 - sum(max(len(row[i]) for row in rows) + 2 for i in range(3)) if rows else 0
    if tokens and room >= 16:
        rows = [
            (*row, decoding.preview(reader, tokens[4 * span.start : 4 * span.end][:256], room))
            for row, span in zip(rows, told.spans, strict=True)
        ]
    view.print_table(rows, indent="  ", align="<><<")
    if told.num_pending:
        view.tell(f"{told.num_pending:,} more are being computed now")
    for part in told.below:
        view.tell(_tier_line(part))
    if told.holding is not None and told.holding.kept:
        view.tell(f"its tenant has {view.show_holding(told.holding)}")
    if told.parted_at is not None:
        _print_parting(told, told.parted_at, tokens, reader)


def _tier_line(part: TierSpan) -> str:
    """Say where evicted tokens lie, and why they are fetched or not."""
    where = f"tokens {part.start:,} to {part.end - 1:,} lie on {part.tier.upper()}"
    fetch = f"{part.fetch_s * 1000:,.0f} ms to fetch"
    if part.compute_s is None:
        return f"{where}: {fetch} for who waits; how long to compute is not known yet"
    cost = f"{where}: {fetch}, {part.compute_s * 1000:,.0f} ms to compute"
    return cost if part.is_worth else f"{cost}; they are computed"


def _print_parting(
    told: Explanation, at: int, tokens: bytes, reader: decoding.Decoder | None
) -> None:
    """Show where a prompt leaves the stored ones, and how both go on."""
    view.tell(f"parts from the closest stored prompt at token {at:,}")
    room = view.width() - 12
    shown = len(told.stored_next)
    before = tokens[4 * max(0, at - _CONTEXT_TOKENS) : 4 * at]
    rows = [
        ("yours", decoding.preview(reader, tokens[4 * at :][:shown], room) or "(ends)"),
        ("stored", decoding.preview(reader, told.stored_next, room)),
    ]
    if before:
        rows.insert(0, ("shared", decoding.preview_end(reader, before, room)))
    view.print_table(rows, indent="  ")
    if told.resumes_at is not None:
        view.tell(
            f"  the same again from token {told.resumes_at:,} on, for "
            f"{many(told.num_same, 'token')}"
        )
    if told.num_parted:
        who = "One request" if told.num_parted == 1 else f"{many(told.num_parted, 'request')}"
        view.tell(f"  {who} of the last hour parted there")
