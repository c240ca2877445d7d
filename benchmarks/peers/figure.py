"""The figure: how many times longer each peer takes than we do, with quartiles, per suite, shape and number of threads.

A column per number of threads, a panel per suite, a line per row of the tables.  Right of 1 we are faster; the
leftmost mark of a line is the fastest peer, whose quartiles are drawn heavily.  Peers that take more than FAR times as
long stand in the grey margin in their order: on the scale they would press together what matters, around 1.  Ratios
with ourselves (a cell beside nn.LSTM, a memory budget beside none) have panels of their own, in which the target is a
dashed line and less is better.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .contenders import CONTENDERS, OURS, is_ours
from .report import FLOP_TARGET, SLOWDOWN_TARGET
from .run import Row, Run
from .suites import quartiles, ratios

__all__ = ["plot"]

Quartiles = dict[str, float]
FAR = 8.0
STEP = 1.13  # between two marks in the margin
WIDE = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5)  # ticks
NARROW = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 2.5, 3, 4, 5)
MARKS = "osD^vPX*<>hdp"
#: Rows' key -> what the axis says, and the target.
OWN_RATIOS = {
    "per_flop": ("time per floating-point operation / nn.LSTM's", FLOP_TARGET),
    "slowdown": ("time with the memory budget / without", SLOWDOWN_TARGET),
}


def against_peers(row: Row) -> dict[str, Quartiles]:
    """Peer -> the quartiles of its time over ours, from the rounds that have both."""
    found = row["contenders"]
    if OURS not in found or "seconds" not in found[OURS]:
        return {}
    each = {name: ratios(row, name, OURS) for name in found if not is_ours(name)}
    return {name: quartiles(values) for name, values in each.items() if values}


def against_ourselves(row: Row, key: str) -> dict[str, Quartiles]:
    """The ratio under this key."""
    return {OURS: row[key]} if key in row else {}


def plot(run: Run, path: str) -> None:
    """Draw it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: list[tuple[str, Callable[[Row], dict[str, Quartiles]], str, float | None, list[str]]] = []
    for suite in dict.fromkeys(row["suite"] for row in run.rows):
        rows = [row for row in run.rows if row["suite"] == suite]
        labels = list(dict.fromkeys(row["label"] for row in rows if against_peers(row)))
        if labels:
            panels.append((suite, against_peers, f"peer's time / ours (grey: more than {FAR:g})", None, labels))
        for key, (title, target) in OWN_RATIOS.items():
            labels = list(dict.fromkeys(row["label"] for row in rows if key in row))
            if labels:
                panels.append((suite, partial(against_ourselves, key=key), title, target, labels))
    threads = sorted({row["threads"] for row in run.rows})
    heights = [len(labels) + 2.2 for *_, labels in panels] or [2.0]
    names = [name for name in CONTENDERS if any(name in row["contenders"] for row in run.rows) and not is_ours(name)]
    # A colour for each library, a mark for each of its forms.
    colors = {package: f"C{k}" for k, package in enumerate(dict.fromkeys(c.package for c in CONTENDERS.values()))}
    style = {name: (colors[CONTENDERS[name].package], MARKS[k % len(MARKS)]) for k, name in enumerate(names)}
    style[OURS] = ("black", "o")
    figure, axes = pyplot.subplots(
        len(heights), len(threads) or 1, squeeze=False, layout="constrained", height_ratios=heights,
        figsize=(1.5 + 6.0 * (len(threads) or 1), 1.2 + 0.33 * sum(heights)),
    )  # fmt: skip
    for (suite, found, title, target, labels), line in zip(panels, axes, strict=False):
        everything: list[dict[str, Quartiles]] = []
        for number, axis in zip(threads, line, strict=True):
            rows = {row["label"]: row for row in run.rows if (row["suite"], row["threads"]) == (suite, number)}
            entries = [found(rows[label]) if label in rows else {} for label in labels]
            everything += entries
            _panel(axis, entries, style, linear=target is not None)
            axis.set_yticks(range(len(labels)), labels, fontsize=8)
            axis.set_ylim(len(labels) - 0.4, -0.6)
            axis.set_title(f"{suite}, {number} thread{'s' if number > 1 else ''}", fontsize=10, loc="left")
            axis.set_xlabel(title, fontsize=8)
        _scale(line, everything, target)
    handles = [
        pyplot.Line2D([], [], color=style[name][0], marker=style[name][1], linestyle="", label=name) for name in names
    ]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _panel(axis: Any, entries: list[dict[str, Quartiles]], style: dict[str, tuple[str, str]], linear: bool) -> None:
    """The marks of all lines."""
    for place, found in enumerate(entries):
        order = sorted(found, key=lambda name: found[name]["median"])
        far = [] if linear else [name for name in order if found[name]["median"] > FAR]
        for name in order:
            (color, mark), q, heavy = style[name], found[name], name == order[0]
            edge, alpha = "black" if heavy else color, 1.0 if heavy else 0.75
            middle = q["median"]
            if name in far:
                middle = FAR * STEP ** (far.index(name) + 1)
            else:
                axis.plot(
                    [q["q1"], q["q3"]], [place, place], color=edge, linewidth=4 if heavy else 1.5, alpha=alpha,
                    solid_capstyle="butt", zorder=3 if heavy else 2,
                )  # fmt: skip
            axis.plot(
                middle, place, mark, color=color, markeredgecolor=edge, markersize=7 if heavy else 5, alpha=alpha,
                zorder=4 if heavy else 2,
            )  # fmt: skip


def _scale(line: Any, entries: list[dict[str, Quartiles]], target: float | None) -> None:
    """One scale for all numbers of threads, a line at 1 and at the target."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, StrMethodFormatter

    found = [[q for q in each.values() if target is not None or q["median"] <= FAR] for each in entries]
    beyond = 0 if target is not None else max(len(each) - len(near) for each, near in zip(entries, found, strict=True))
    low = min([0.85, *(0.95 * q["q1"] for near in found for q in near)])
    high = max([1.5, target or 0.0, *(1.05 * q["q3"] for near in found for q in near)]) * 1.02
    if beyond:
        high = FAR * STEP ** (beyond + 0.7)
    for axis in line:
        if target is None:
            axis.set_xscale("log")
            wide = high / low > 6
            ticks = (
                (0.1, 0.2, 0.5, 1, 2, 5) if wide else (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 2.5, 3, 4, 5)
            )
            axis.xaxis.set_major_locator(FixedLocator([*ticks, FAR]))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        else:
            axis.axvline(target, color="black", linewidth=1, linestyle="--")
        if beyond:
            axis.axvspan(FAR, high, color="0.9", zorder=0)
        axis.axvline(1.0, color="black", linewidth=1)
        axis.set_xlim(low, high)
        axis.grid(axis="x", alpha=0.25)
        axis.tick_params(axis="x", labelsize=8)
