"""Pictures, as PNG and SVG.  matplotlib is imported when the first one is drawn, not before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixcache.config import format_size
from prefixcache.errors import InvalidRequest
from prefixcache.types import Layout
from prefixcache_bench.experiments.capacity import format_tokens
from prefixcache_bench.experiments.curve import Curve
from prefixcache_bench.experiments.outcome import FATES
from prefixcache_bench.experiments.rows import Row
from prefixcache_bench.experiments.sweep import Ceilings


class PictureMissing(InvalidRequest):
    """What draws is not installed."""


_INK = "#333333"
_FATE_COLOURS = {
    "hit": "#1b7837",
    "partial": "#7fbf7b",
    "joined": "#d9f0d3",
    "granularity": "#fee08b",
    "evicted": "#d6604d",
    "cold": "#bababa",
}
_FATES = {
    "hit": "in whole blocks",
    "partial": "in a part of a block",
    "joined": "computed by another",
    "granularity": "stored, too short to share",
    "evicted": "was stored once",
    "cold": "never seen",
}
_PARTIALS = {
    "off": "whole blocks only",
    "blocks": "and parts of full blocks",
    "tails": "and partly filled tails",
}


def draw_sweep(path: Path, title: str, rows: Sequence[Row], limits: Ceilings) -> list[Path]:
    """Draw reuse against block size, a line per capacity, a panel per policy and partial mode.

    If there is only one block size: against capacity, a line per policy.
    """
    if len({row["block_size"] for row in rows}) == 1 and any(
        row["capacity_tokens"] for row in rows
    ):
        return _draw_policies(path, title, rows, limits)
    figures = _pyplot()
    partials = list(dict.fromkeys(row["partial"] for row in rows))
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    figure, axes = figures.subplots(
        len(policies),
        len(partials),
        figsize=(1.6 + 4.2 * len(partials), 0.9 + 3.5 * len(policies)),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    capacities = list(dict.fromkeys(row["capacity"] for row in _by_capacity(rows)))
    colours = figures.get_cmap("viridis")
    handles: dict[str, Any] = {}
    for down, policy in enumerate(policies):
        for across, partial in enumerate(partials):
            ax = axes[down][across]
            for index, capacity in enumerate(capacities):
                found = sorted(
                    (row["block_size"], 100 * row["reused_rate"])
                    for row in rows
                    if (row["policy"], row["partial"], row["capacity"])
                    == (policy, partial, capacity)
                )
                if found:
                    (handles[_capacity_label(capacity)],) = ax.plot(
                        *zip(*found, strict=True),
                        color=colours(0.9 * index / max(1, len(capacities) - 1)),
                        marker="o",
                        markersize=3.5,
                        linewidth=1.6,
                    )
            shown = sorted({row["block_size"] for row in rows})
            (handles["ceiling: infinite memory, whole blocks"],) = ax.plot(
                shown,
                [100 * limits.by_block_size[size] for size in shown],
                color=_INK,
                linestyle="--",
                linewidth=1,
            )
            handles[f"ceiling: infinite memory, block size {min(limits.by_block_size)}"] = (
                ax.axhline(100 * limits.finest, color=_INK, linestyle=":", linewidth=1)
            )
            ax.set_xscale("log", base=2)
            ax.set_xticks(shown, [str(size) for size in shown])
            ax.set_title(f"{policy}, {_PARTIALS[partial]}", fontsize=10)
            _clean(ax)
            if not across:
                ax.set_ylabel("prompt tokens reused, %")
            if down == len(policies) - 1:
                ax.set_xlabel("block size, tokens")
    figure.suptitle(title)
    figure.legend(
        handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=8.5
    )
    return _save(figure, path)


def _draw_policies(path: Path, title: str, rows: Sequence[Row], limits: Ceilings) -> list[Path]:
    """Draw reuse against capacity for one block size, a line per policy, a panel per mode."""
    figures = _pyplot()
    partials = list(dict.fromkeys(row["partial"] for row in rows))
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    size = rows[0]["block_size"]
    figure, axes = figures.subplots(
        1,
        len(partials),
        figsize=(3.4 + 4.8 * len(partials), 4.6),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    colours = figures.get_cmap("tab20" if len(policies) > 10 else "tab10")
    handles: dict[str, Any] = {}
    for ax, partial in zip(axes[0], partials, strict=True):
        for index, policy in enumerate(policies):
            found = sorted(
                (row["capacity_tokens"], 100 * row["reused_rate"])
                for row in rows
                if (row["policy"], row["partial"]) == (policy, partial) and row["capacity_tokens"]
            )
            if found:
                (handles[policy],) = ax.plot(
                    *zip(*found, strict=True),
                    # What all others are compared with, in ink and in front.
                    color=_INK if policy == "lru" else colours(index),
                    marker="osD^v<>PX*"[index % 10],
                    markersize=4.5,
                    linewidth=2.2 if policy == "lru" else 1.3,
                    zorder=3 if policy == "lru" else 2,
                )
        ceiling, finest = 100 * limits.by_block_size[size], 100 * limits.finest
        handles["ceiling: infinite memory"] = ax.axhline(
            ceiling, color=_INK, linestyle="--", linewidth=1
        )
        handles[f"ceiling: infinite memory, block size {min(limits.by_block_size)}"] = ax.axhline(
            finest, color=_INK, linestyle=":", linewidth=1
        )
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda value, _: format_tokens(round(value)))
        ax.set_xlabel("capacity, tokens")
        ax.set_title(f"blocks of {size}, {_PARTIALS[partial]}", fontsize=10)
        _clean(ax)
    axes[0][0].set_ylabel("prompt tokens reused, %")
    figure.suptitle(title)
    figure.legend(
        handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=8.5
    )
    return _save(figure, path)


def draw_tiers(path: Path, title: str, rows: Sequence[Row], limits: Ceilings) -> list[Path]:
    """Draw, for each pool and what is below it, what is reused, and the time to the first token.

    Of the first block size, policy and mode that there are.
    """
    figures = _pyplot()
    first = rows[0]
    where = ("block_size", "policy", "partial")
    shown = [row for row in rows if all(row[name] == first[name] for name in where)]
    names = [f"{_capacity_label(row['capacity'])}\n{row['below']}" for row in shown]
    figure, (left, right) = figures.subplots(
        1, 2, figsize=(10.4, 1.6 + 0.42 * len(shown)), sharey=True, layout="constrained"
    )
    restored = [row["restored_percent"] for row in shown]
    here = [100 * row["reused_rate"] - more for row, more in zip(shown, restored, strict=True)]
    at = list(range(len(shown)))
    left.barh(at, here, color="#1b7837", height=0.7, label="found in the pool")
    left.barh(at, restored, left=here, color="#7fbf7b", height=0.7, label="came back from below")
    ceiling = 100 * limits.finest
    left.axvline(ceiling, color=_INK, linestyle="--", linewidth=1, label="ceiling: infinite memory")
    left.set_xlabel("prompt tokens, %")
    left.set_xlim(0, 100)
    left.set_yticks(at, names, fontsize=8.5)
    left.invert_yaxis()
    for name, colour, label in (
        ("first_token_p99_s", "#d9d9d9", "99th percentile"),
        ("first_token_mean_s", "#4575b4", "mean"),
    ):
        right.barh(at, [row[name] for row in shown], color=colour, height=0.7, label=label)
    right.set_xlabel("seconds from the engine's begin to the first token")
    for ax in (left, right):
        _clean(ax)
        ax.grid(axis="x", color="#dddddd", linewidth=0.6)
        ax.grid(axis="y", visible=False)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=8)
    how = f"blocks of {first['block_size']}, {first['policy']}, {_PARTIALS[first['partial']]}"
    figure.suptitle(f"{title}\n{how}")
    return _save(figure, path)


def draw_curve(
    path: Path, title: str, curves: Sequence[Curve], unit: int, layout: Layout | None, name: str
) -> list[Path]:
    """Draw hit rate against capacity, a line per block size, knees marked, bytes on top."""
    figures = _pyplot()
    figure, ax = figures.subplots(figsize=(8.2, 4.8), layout="constrained")
    colours = figures.get_cmap("viridis")
    least = max(unit, min(one.block_size for one in curves))
    for index, one in enumerate(curves):
        at = [blocks for blocks in one.capacities(400) if blocks * one.block_size >= 16 * least]
        at = at or [one.working_set]
        colour = colours(0.85 * index / max(1, len(curves) - 1))
        ax.plot(
            [blocks * one.block_size for blocks in at],
            [100 * rate for rate in one.hit_rates(at)],
            color=colour,
            label=f"block size {one.block_size}",
        )
        knee = one.knee()
        rate = 100 * one.hit_rates([knee])[0]
        ax.plot(knee * one.block_size, rate, "o", color=colour)
        if index == 0:
            text = f"knee: {knee * one.block_size:,} tokens\n{rate:.1f} %"
            if layout is not None:
                text += f", {format_size(knee * one.block_size * layout.token_bytes)}"
            ax.annotate(
                text,
                (knee * one.block_size, rate),
                xytext=(12, -30),
                textcoords="offset points",
                fontsize=9,
            )
        ceiling = 100 * one.hit_rates([one.working_set])[0]
        ax.axhline(ceiling, color=colour, linestyle="--", linewidth=0.9)
    ax.plot([], [], color=_INK, linestyle="--", linewidth=0.9, label="ceiling: infinite memory")
    ax.plot([], [], "o", color=_INK, label="knee")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: format_tokens(round(value)))
    ax.set_xlabel("capacity, tokens")
    ax.set_ylabel("hit rate, % of prompt tokens")
    _clean(ax)
    if layout is not None:
        size = layout.token_bytes
        top = ax.secondary_xaxis(
            "top", functions=(lambda tokens: tokens * size, lambda num_bytes: num_bytes / size)
        )
        top.set_xscale("log", base=2)
        top.xaxis.set_major_formatter(lambda value, _: format_size(int(value)))
        top.set_xlabel(f"memory for {name} ({format_size(size)} a token)")
    ax.legend(frameon=False, loc="lower right")
    figure.suptitle(title)
    return _save(figure, path)


def draw_ledger(path: Path, title: str, windows: Sequence[dict[str, Any]]) -> list[Path]:
    """Draw the fates of all prompt tokens over the trace's time, stacked to 100 %."""
    figures = _pyplot()
    figure, ax = figures.subplots(figsize=(8.2, 4.2), layout="constrained")
    used = [one for one in windows if one["total"]]
    minutes = [one["start_s"] / 60 for one in used]
    order = [fate for fate in _FATE_COLOURS if fate in FATES and any(one[fate] for one in used)]
    shares = [[100 * one[fate] / one["total"] for one in used] for fate in order]
    if len(windows) > 1:  # the last part is as long as the others
        minutes.append(minutes[-1] + (windows[1]["start_s"] - windows[0]["start_s"]) / 60)
        shares = [[*share, share[-1]] for share in shares]
    ax.stackplot(
        minutes,
        shares,
        labels=[f"{fate}: {_FATES[fate]}" for fate in order],
        colors=[_FATE_COLOURS[fate] for fate in order],
        step="post",
    )
    ax.set_xlabel("time, minutes")
    ax.set_ylabel("prompt tokens, %")
    ax.set_ylim(0, 100)
    _clean(ax)
    figure.legend(loc="outside right center", frameon=False, reverse=True)
    figure.suptitle(title)
    return _save(figure, path)


def draw_memory(path: Path, title: str, rows: Sequence[dict[str, Any]]) -> list[Path]:
    """Draw the shares of KV memory, a bar per way of allocating."""
    figures = _pyplot()
    figure, ax = figures.subplots(figsize=(8.2, 0.42 * len(rows) + 1.4), layout="constrained")
    colours = {
        ("useful", "holds a token"): "#1b7837",
        ("reserved", "will hold one"): "#fee08b",
        ("internal", "promised, never used"): "#f4a582",
        ("external", "fits nobody"): "#bababa",
    }
    names = [row["allocation"] for row in rows]
    left = [0.0] * len(rows)
    for (share, meaning), colour in colours.items():
        values = [row[f"{share}_percent"] for row in rows]
        label = f"{share}: {meaning}"
        ax.barh(names, values, left=left, color=colour, label=label, height=0.7)
        left = [start + value for start, value in zip(left, values, strict=True)]
    for at, row in enumerate(rows):
        ax.text(1, at, f"{row['useful_percent']:.1f} %", va="center", color="white", fontsize=8.5)
    published = [
        (value, at)
        for at, row in enumerate(rows)
        if (value := row["published_useful_percent"]) is not None
    ]
    if published:
        label = "useful, as published"
        ax.plot(*zip(*published, strict=True), "D", color=_INK, markersize=4.5, label=label)
    ax.invert_yaxis()
    ax.set_xlim(0, 100)
    ax.set_xlabel("KV memory, %")
    _clean(ax)
    figure.legend(loc="outside right center", frameon=False)
    figure.suptitle(title)
    return _save(figure, path)


def draw_segments(path: Path, title: str, certificate: Mapping[str, Any]) -> list[Path]:
    """Draw divergence against what is computed again: a panel per kind of text, a line per rule."""
    figures = _pyplot()
    rules = {
        "first": ("the first tokens of each run", "o", "#2166ac"),
        "deviation": ("those furthest from fresh ones", "s", "#b2182b"),
    }
    policies, limit = certificate["policies"], certificate["threshold_kl"]
    kinds = list(policies[0]["kinds"])
    worst = max([limit] + [of["kl_mean"] for one in policies for of in one["kinds"].values()])
    figure, axes = figures.subplots(
        1, len(kinds), figsize=(3.1 * len(kinds), 3.7), squeeze=False, sharey=True, sharex=True
    )
    figure.set_layout_engine("constrained")
    handles: dict[str, Any] = {}
    for ax, kind in zip(axes[0], kinds, strict=True):
        of = {one["policy"]: one["kinds"][kind] for one in policies}
        for rule, (label, marker, colour) in rules.items():
            chosen = [name for name in of if name.startswith(rule) or name == "none"]
            found = sorted((100 * of[name]["again_share"], of[name]["kl_mean"]) for name in chosen)
            (handles[label],) = ax.plot(
                *zip(*found, strict=True), color=colour, marker=marker, markersize=4, linewidth=1.5
            )
        (handles["nothing computed again"],) = ax.plot(
            0, of["none"]["kl_mean"], "D", color=_INK, markersize=5, zorder=3
        )
        handles[f"threshold: {limit:g}"] = ax.axhline(
            limit, color=_INK, linestyle="--", linewidth=1
        )
        ax.set_yscale("log")
        ax.set_ylim(limit / 1000, 2 * worst)
        ax.set_xlim(-4, 104)
        ax.set_xlabel("moved tokens computed again, %")
        ax.set_title(kind, fontsize=10)
        _clean(ax)
    axes[0][0].set_ylabel("KL(full || blended), nats per token")
    figure.suptitle(title)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=8.5,
    )
    return _save(figure, path)


def _by_capacity(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row["capacity_tokens"] or float("inf"))


def _capacity_label(text: str) -> str:
    return "infinite memory" if text == "inf" else f"capacity {text}"


def _clean(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(colors=_INK)


def _save(figure: Any, path: Path) -> list[Path]:
    saved = [path.with_suffix(".png"), path.with_suffix(".svg")]
    for file in saved:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Without a date in it, the same result is the same file.
        metadata = {"Date": None} if file.suffix == ".svg" else {}
        figure.savefig(file, dpi=130, metadata=metadata)
    _pyplot().close(figure)
    return saved


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ModuleNotFoundError:
        raise PictureMissing(
            "drawing a picture needs matplotlib: pip install matplotlib "
            "(or leave the picture out with --no-picture)"
        ) from None
    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "prefixcache"
    from matplotlib import pyplot as plt

    return plt
