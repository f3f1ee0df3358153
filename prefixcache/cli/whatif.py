"""`prefixcache what-if`: what other configurations would have reused of the live requests."""

from __future__ import annotations

from typing import Any

import typer

from prefixcache.cli import view
from prefixcache.texts import many


def what_if(connect: view.Connect = None, as_json: view.AsJson = False) -> None:
    """Compare the shadow caches with the service, on the very same requests of the last hour.

    The service runs them beside itself if it was started with --shadow; exit code 1 if not.

    Example: prefixcache serve --shadow policy=slru,block_size=32 --shadow memory=4GiB
    """
    from prefixcache.v1 import prefixcache_pb2 as pb

    with view.open_client(connect) as client:
        told = client.call("snapshot", pb.SnapshotRequest())
    span_s = min(3600.0, told.service.uptime_s)
    if as_json:
        view.print_json(
            {
                "span_s": span_s,
                "dropped": told.shadow_dropped,
                "shadows": [
                    {
                        "name": shadow.name,
                        "num_blocks": shadow.num_blocks,
                        "block_size": shadow.block_size,
                        "last_hour": sums(shadow.last_hour),
                        "whole": sums(shadow.whole),
                    }
                    for shadow in told.shadows
                ],
            }
        )
    elif not told.shadows:
        view.tell(
            "no shadow caches (yet): start the service with, for example, "
            "--shadow policy=slru,block_size=32, and attach a worker"
        )
    else:
        for shadow in told.shadows:
            view.tell(sentence(shadow, span_s))
        if told.shadow_dropped:
            view.tell(
                f"{many(told.shadow_dropped, 'request', 'were')} left out: the shadow caches "
                f"could not "
                "keep up"
            )
    if not told.shadows:
        raise typer.Exit(1)


def sums(message: Any) -> dict[str, Any]:
    """Give the numbers of one span, with both rates."""
    fields = {
        name: getattr(message, name)
        for name in ("requests", "tokens", "reused", "actual", "refused")
    }
    rates = {
        "hit_rate": message.reused / message.tokens if message.tokens else None,
        "actual_hit_rate": message.actual / message.tokens if message.tokens else None,
    }
    return fields | rates


def sentence(shadow: Any, span_s: float) -> str:
    """Say what a shadow cache would have brought.

    >>> from types import SimpleNamespace as S
    >>> hour = S(requests=1200, tokens=10_000, reused=8100, actual=7860, refused=0)
    >>> sentence(S(name="policy=slru,block_size=32", last_hour=hour), 3600.0)
    'with policy=slru,block_size=32 the last hour would have been 81.0 % instead of 78.6 % (1,200 requests, 10,000 tokens)'
    """  # noqa: E501 - one line of output
    hour = shadow.last_hour
    when = (
        "hour" if span_s >= 3600 else f"{span_s / 60:.0f} min" if span_s > 90 else f"{span_s:.0f} s"
    )
    if not hour.tokens:
        return f"with {shadow.name}: no request in the last {when}"
    text = (
        f"with {shadow.name} the last {when} would have been {hour.reused / hour.tokens:.1%} "
        f"instead of {hour.actual / hour.tokens:.1%}"
    ).replace("%", " %")
    text += f" ({many(hour.requests, 'request')}, {many(hour.tokens, 'token')}"
    return text + (f"; no room for {hour.refused:,})" if hour.refused else ")")
