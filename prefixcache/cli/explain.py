"""`prefixcache explain`: why a prompt, or a request of a moment ago, was not reused in full."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefixcache.cli import decoder as decoding
from prefixcache.cli import prompt, view
from prefixcache.errors import InvalidRequest
from prefixcache.types import Explanation, Namespace, unpack

if TYPE_CHECKING:
    from prefixcache.cli.status import Status
    from prefixcache.client import Client

_CONTEXT_TOKENS = 12
"""Tokens before a parting that are shown with it."""

What = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[FILE|REQUEST_ID|-|TOKEN...]",
        help="A file or stdin (-) with text, token ids or a chat in JSON; the id of a request of "
        "a moment ago, or worker#lease; or token ids. Default: stdin.",
        show_default=False,
    ),
]


def explain(
    what: What = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="PATH", help="The same as FILE.", show_default=False),
    ] = None,
    as_text: Annotated[
        bool,
        typer.Option("--text", help="Take it as text, whatever it looks like.", show_default=False),
    ] = False,
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

    source, ids = _source(what, file)
    with view.open_client(connect) as client:
        now = status.read(client)
        folder = Path(model) if model and Path(model).is_dir() else None
        if folder is not None:
            model = _model_of(folder, now.snapshot.namespaces)
        spaces = view.Chosen(model, adapter, tenant, salt)
        told: Explanation
        if source is None:
            namespace = spaces.choose(now.snapshot)
            tokens = ids
            told = client.explain(namespace, tokens)
        elif source == "-" or Path(source).is_file():
            namespace = spaces.choose(now.snapshot)
            data, name = prompt.read_source(source)
            tokens = prompt.read_prompt(
                data,
                name,
                lambda: decoding.open_decoder(tokenizer or folder, namespace),
                as_text=as_text,
            )
            told = client.explain(namespace, tokens)
        else:
            told = _recount(client, source, spaces)
            assert told.past is not None
            tokens, namespace = told.past.tokens, told.past.namespace
        reader = decoding.open_decoder(tokenizer or folder, namespace)
        sentence = advice.advise(told, tokens, now, reader)
        again = _again(client, told, spaces)
    if as_json:
        view.print_json(fields(told, namespace, tokens, reader, sentence, again))
    else:
        _print(told, namespace, tokens, reader, now)
        if again is not None:
            typer.echo(
                f"now {again.ledger.reused:,} of its {again.ledger.total:,} tokens would be reused"
            )
        if sentence:
            for line in view.wrap(f"advice: {sentence}"):
                typer.echo(line)
    if not told.ledger.reused:
        raise typer.Exit(1)


def _source(what: list[str] | None, file: Path | None) -> tuple[str | None, bytes]:
    """Say where the prompt is: a source, or None and the token ids that the arguments are."""
    if file is not None:
        if what:
            raise InvalidRequest("give a prompt as an argument or with --file, not both")
        if str(file) != "-" and not file.is_file():
            raise InvalidRequest(f"there is no file {file}")
        return str(file), b""
    if not what:
        return "-", b""
    if len(what) == 1 and not (what[0].isdecimal() and not Path(what[0]).exists()):
        return what[0], b""
    return None, prompt.read_ids(" ".join(what), "the arguments")


def _model_of(folder: Path, namespaces: dict[Namespace, Any]) -> str | None:
    """Give the model of the namespace that a model's folder is attached as."""
    name = folder.resolve().name
    found = {one.model for one in namespaces if one.model.partition("@")[0] == name}
    return found.pop() if len(found) == 1 else None


def _recount(client: Client, request: str, spaces: view.Chosen) -> Explanation:
    from prefixcache.errors import NotFound

    try:
        return client.recount(request, spaces.named())
    except NotFound as error:
        raise NotFound(f"{request!r} is no file, and {error}") from None


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
        typer.echo(
            f"{name} of {past.worker}#{past.lease}, {view.show_idle(past.age_s)} ago, in "
            f"{view.show_namespace(past.namespace)}: {past.num_tokens:,} tokens"
        )
    else:
        typer.echo(f"{told.ledger.total:,} tokens, in {view.show_namespace(namespace)}")
    width = view.width()
    view.show(view.bar([(s.fate, s.end - s.start) for s in told.spans], min(width, 100)))
    for line in view.wrap(view.show_ledger(told.ledger)):
        typer.echo(line)
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
        typer.echo(f"{told.num_pending:,} more are being computed now")
    if told.parted_at is not None:
        _print_parting(told, told.parted_at, tokens, reader)


def _print_parting(
    told: Explanation, at: int, tokens: bytes, reader: decoding.Decoder | None
) -> None:
    """Show where a prompt leaves the stored ones, and how both go on."""
    typer.echo(f"parts from the closest stored prompt at token {at:,}")
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
        typer.echo(
            f"  the same again from token {told.resumes_at:,} on, for {told.num_same:,} tokens"
        )
    if told.num_parted:
        who = "One request" if told.num_parted == 1 else f"{told.num_parted:,} requests"
        typer.echo(f"  {who} of the last hour parted there")
