"""The demo's picture: who served what and when, what was computed, how long people waited.

```
┌ timeline: one lane per worker, a bar per request; solid until its first token, coloured by fate ┐
├ tokens: sent · separate caches · computed · ideal ┬ time to first token ┬ memory ────────────────┤
```
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from prefixcache.texts import many
from prefixcache_worker.demo.record import Fate, Request, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK: Final = "#22303c"
QUIET: Final = "#8a97a3"
COLOURS: Final = {
    Fate.COLD: "#3b6fb6",
    Fate.TAKEOVER: "#8d5fb8",
    Fate.JOINED: "#e0992f",
    Fate.WARM: "#3f9d6b",
}
HATCHES: Final = {Fate.COLD: "", Fate.TAKEOVER: "xx", Fate.JOINED: "//", Fate.WARM: ".."}
"""The fates can be told apart in print as well."""
DEAD: Final = "#c8403a"

_MILLION: Final = 1e6


def draw(path: Path, shared: Run, unshared: Run, report: dict[str, Any]) -> None:
    """Write the picture as PNG.  About a second; needs matplotlib, but no display.

    Args:
        path: the file; an old one is replaced.
        shared: the run with the shared pool, drawn as the timeline.
        unshared: the run without any cache, for the comparison of waiting times.
        report: the figures of `report.figures`, which the bars show.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": QUIET,
        "axes.labelcolor": INK,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "hatch.linewidth": 0.4,
    }
    with rc_context(style):
        figure = Figure(figsize=(13, 8.4), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(2, 3, height_ratios=[1.35, 1], width_ratios=[1.15, 1.3, 0.8])
        figure.suptitle(_headline(report), fontsize=13, fontweight="bold", x=0.008, ha="left")
        _timeline(figure.add_subplot(grid[0, :]), shared)
        _tokens(figure.add_subplot(grid[1, 0]), report)
        _waiting(figure.add_subplot(grid[1, 1]), shared, unshared)
        _memory(figure.add_subplot(grid[1, 2]), report)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _headline(report: dict[str, Any]) -> str:
    same = "the same" if report["identical"] else "NOT THE SAME"
    long = report["ttft_at_1000_tokens"]
    faster = (
        f"first token {long['ratio']:.1f}x sooner after a system prompt of about 1,000 tokens · "
        if long["ratio"]
        else ""
    )
    return (
        f"{report['requests']} requests, {report['workers']} workers, one cache: "
        f"{report['tokens_computed']:,} of {report['tokens_sent']:,} prompt tokens computed\n"
        f"{faster}answers {same}, {report['compared'][:-1]} for {report['compared'][:-1]}, "
        "as without a cache"
    )


def _timeline(axes: Axes, run: Run) -> None:
    """Draw a lane per worker, split into rows where requests overlap."""
    from matplotlib.patches import Patch

    top = 0.0
    ticks: list[float] = []
    for worker in run.workers:
        served = [request for request in run.requests if request.worker == worker]
        dead = [a for a in (run.death.attempts if run.death else ()) if a.worker == worker]
        spans = [(r.sent_s, r.done_s or r.sent_s) for r in served]
        spans += [(attempt.sent_s, attempt.died_s) for attempt in dead]
        rows, num_rows = _rows(spans)
        for request, row in zip(served, rows, strict=False):
            _bar(axes, request, top + row)
        for attempt, row in zip(dead, rows[len(served) :], strict=True):
            axes.barh(
                top + row,
                attempt.died_s - attempt.sent_s,
                left=attempt.sent_s,
                height=0.8,
                facecolor="white",
                edgecolor=DEAD,
                hatch="xxxx",
                linewidth=1.0,
            )
        if run.death and run.death.worker == worker:
            _kill(axes, run, top, num_rows)
        ticks.append(top + (num_rows - 1) / 2)
        top += num_rows + 0.6
        axes.axhline(top - 0.8, color=QUIET, linewidth=0.4)
    axes.set_yticks(ticks, run.workers)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(top - 0.7, -0.9)
    axes.set_xlim(left=0, right=max((r.done_s or 0 for r in run.requests), default=1) * 1.005)
    axes.set_xlabel("seconds", loc="left")
    axes.set_title(
        "Every request on its worker: solid until the first token, pale while it answers"
    )
    handles = [
        Patch(facecolor=COLOURS[f], hatch=HATCHES[f], edgecolor="white", label=_meaning(f))
        for f in (Fate.COLD, Fate.JOINED, Fate.TAKEOVER, Fate.WARM)
        if run.fated(f)
    ]
    if run.death:
        handles.append(Patch(facecolor="white", edgecolor=DEAD, hatch="xxxx", label="killed"))
    axes.legend(
        handles=handles,
        loc="upper right",
        ncols=len(handles),
        frameon=False,
        bbox_to_anchor=(1, -0.055),
    )


def _bar(axes: Axes, request: Request, row: float) -> None:
    colour = COLOURS[request.fate]
    first = request.first_s or request.sent_s
    done = request.done_s or first
    axes.barh(row, done - request.sent_s, left=request.sent_s, height=0.8, color=colour, alpha=0.25)
    axes.barh(
        row,
        first - request.sent_s,
        left=request.sent_s,
        height=0.8,
        color=colour,
        hatch=HATCHES[request.fate],
        edgecolor="white",
        linewidth=0,
    )


def _kill(axes: Axes, run: Run, top: float, num_rows: int) -> None:
    death = run.death
    assert death is not None
    axes.plot([death.at_s] * 2, [top - 0.5, top + num_rows - 0.5], color=DEAD, linewidth=2)
    took = "" if death.takeover_ms is None else f"\ntaken over after {death.takeover_ms:.0f} ms"
    back = f"{many(death.leases, 'lease')} and {many(death.blocks_returned, 'block')} back"
    axes.annotate(
        f"kill -9{' in mid-prefill' if death.in_prefill else ''}\n{back}{took}",
        (death.at_s, top + (num_rows - 1) / 2),
        xytext=(10, 0),
        textcoords="offset points",
        va="center",
        color=DEAD,
        fontweight="bold",
    )


def _rows(spans: list[tuple[float, float]]) -> tuple[list[int], int]:
    """Put overlapping spans into different rows, each into the first one that is free.

    >>> _rows([(0.0, 2.0), (1.0, 3.0), (2.5, 4.0)])
    ([0, 1, 0], 2)
    """
    ends: list[float] = []
    rows = [0] * len(spans)
    for i in sorted(range(len(spans)), key=lambda i: spans[i]):
        start, end = spans[i]
        row = next((k for k, taken in enumerate(ends) if taken <= start), len(ends))
        if row == len(ends):
            ends.append(end)
        else:
            ends[row] = end
        rows[i] = row
    return rows, max(len(ends), 1)


def _tokens(axes: Axes, report: dict[str, Any]) -> None:
    names = ["sent", "computed with\na cache per worker", "computed", "ideal"]
    keys = ["tokens_sent", "tokens_separate_caches", "tokens_computed", "tokens_ideal"]
    values = [report[key] for key in keys]
    colours = [QUIET, QUIET, COLOURS[Fate.COLD], "white"]
    labels = [f"{value:,}" for value in values]
    if lost := report["tokens_lost"]:
        labels[2] = f"{labels[2]}\n+{lost} lost"
    _bars(axes, names, values, colours, labels)
    axes.patches[-1].set_edgecolor(COLOURS[Fate.COLD])
    axes.set_title(f"Prompt tokens, {report['tokens_over_ideal_percent']:+.2f} % off the ideal")


def _waiting(axes: Axes, shared: Run, unshared: Run) -> None:
    """Draw each request as a dot and each group's median as a line, on a logarithmic scale."""
    from statistics import median

    groups = [
        ("no cache", unshared.requests, QUIET),
        *((str(f), shared.fated(f), COLOURS[f]) for f in (Fate.COLD, Fate.JOINED, Fate.WARM)),
    ]
    groups = [(name, requests, colour) for name, requests, colour in groups if requests]
    for x, (_, requests, colour) in enumerate(groups):
        times = [request.ttft_ms for request in requests]
        # Spread by rank, not by chance: the same run gives the same picture.
        shift = [x + 0.3 * ((i * 0.618) % 1 - 0.5) for i in range(len(times))]
        axes.scatter(shift, times, s=14, color=colour, alpha=0.55, linewidths=0)
        middle = median(times)
        axes.plot([x - 0.3, x + 0.3], [middle] * 2, color=INK, linewidth=1.8)
        axes.annotate(
            f"{middle:,.0f}", (x + 0.32, middle), va="center", fontweight="bold", fontsize=9
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xticks(range(len(groups)), [f"{name}\n{len(r)} requests" for name, r, _ in groups])
    axes.set_xlim(-0.5, len(groups) - 0.25)
    axes.set_ylabel("ms")
    axes.set_title("Time to first token, and medians")


def _memory(axes: Axes, report: dict[str, Any]) -> None:
    values = [report["separate_caches_bytes"] / _MILLION, report["pool_bytes_used"] / _MILLION]
    labels = [f"{value:,.0f} MB" if value >= 10 else f"{value:.1f} MB" for value in values]
    _bars(axes, ["a cache\nper worker", "one pool"], values, [QUIET, COLOURS[Fate.WARM]], labels)
    axes.set_title("Memory for keys and values")


def _bars(
    axes: Axes, names: list[str], values: list[float], colours: list[str], labels: list[str]
) -> None:
    axes.bar(range(len(values)), values, width=0.62, color=colours, linewidth=1.2)
    for x, (value, label) in enumerate(zip(values, labels, strict=True)):
        axes.annotate(
            label,
            (x, value),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontweight="bold",
        )
    axes.set_xticks(range(len(names)), names)
    axes.tick_params(axis="x", length=0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.margins(y=0.12)


def _meaning(fate: Fate) -> str:
    return {
        Fate.COLD: "cold: computes the system prompt",
        Fate.JOINED: "joined: waits while another computes it",
        Fate.TAKEOVER: "takeover",
        Fate.WARM: "warm: reads it in place",
    }[fate]
