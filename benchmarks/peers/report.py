"""Tables, the description of the machine, and the plot."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

from .contenders import OURS
from .suites import Row, Run

__all__ = ["bounds", "geometric_mean", "machine", "plot", "tables"]

_PACKAGES = (
    "tinygrad-lstm", "numpy", "numba", "llvmlite", "torch", "jax", "jaxlib", "onnx", "onnxruntime", "autograd", "scipy",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    model, info = platform.processor(), Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": model, "cores": os.cpu_count(), "cores_allowed": affinity, "platform": platform.platform(),
        "python": platform.python_version(), "versions": versions,
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def best_rate(run: Run, threads: int) -> float | None:
    """The limit: the most operations per second that any library did at any size, in this run."""
    found = [rate for sizes in run.rates.get(threads, {}).values() for rate in sizes.values()]
    return max(found, default=None)


def bounds(run: Run) -> None:
    """Give every timed row its ``bound`` (seconds of its matrix products at the limit) and our ``fraction`` of it."""
    for row in run.rows:
        rate = best_rate(run, row["threads"])
        if row.get("flop") and rate:
            row["bound"] = row["flop"] / rate
            if OURS in row["contenders"]:
                row["fraction"] = row["bound"] / row["contenders"][OURS]["median"]


def geometric_mean(rows: list[Row]) -> float | None:
    """Of the speed-ups."""
    ratios = [row["speedup"]["median"] for row in rows if "speedup" in row]
    return float(np.exp(np.mean(np.log(ratios)))) if ratios else None


def digits(value: float | None) -> str:
    """Three significant digits without an exponent."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def grid(corner: str, columns: list[str], lines: list[tuple[str, list[str]]]) -> str:
    """A table of text."""
    first = max([len(corner), *(len(name) for name, _ in lines)])
    widths = [max([len(head), *(len(cells[k]) for _, cells in lines)]) + 2 for k, head in enumerate(columns)]
    out = [f"{corner:<{first}}" + "".join(f"{head:>{w}}" for head, w in zip(columns, widths, strict=True))]
    for name, cells in lines:
        out.append(f"{name:<{first}}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True)))
    return "\n".join(out)


def tables(run: Run) -> str:
    """All of them."""
    out = []
    keys = list(dict.fromkeys((row["suite"], row["threads"]) for row in run.rows))
    for suite, threads in keys:
        rows = [row for row in run.rows if (row["suite"], row["threads"]) == (suite, threads)]
        title = f"{suite}, {threads} thread{'s' if threads > 1 else ''}"
        if suite == "memory":
            out.append(title + ", MiB\n" + _memory(rows))
        elif suite == "first-call":
            out.append(title + ", seconds\n" + _first_call(rows))
        else:
            out.append(title + ", ms\n" + _timed(rows))
    for threads, libraries in sorted(run.rates.items()):
        lines = [
            (name, [digits(rate / 1e9) for rate in sizes.values()] + [digits(max(sizes.values()) / 1e9)])
            for name, sizes in libraries.items()
        ]
        sizes = list(next(iter(libraries.values()))) if libraries else []
        head = f"matrix products (M, K, N), {threads} thread{'s' if threads > 1 else ''}, GFLOP/s\n"
        out.append(head + grid("", [*sizes, "best"], lines))
    return "\n\n".join(out)


def _timed(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["contenders"]))
    lines = []
    for name in names:
        cells = [row["contenders"].get(name) for row in rows]
        lines.append((name, [digits(cell and 1e3 * cell["median"]) for cell in cells]))
        if any("tokens" in row for row in rows):
            per_second = [cell and row["tokens"] / cell["median"] for row, cell in zip(rows, cells, strict=True)]
            lines.append(("    tokens/s", [digits(value) for value in per_second]))
    ratios = [row.get("speedup") for row in rows]
    lines.append(("fastest peer / ours", [digits(r and r["median"]) for r in ratios]))
    lines.append(("    quartiles", [f"{r['q1']:.2f}-{r['q3']:.2f}" if r else "-" for r in ratios]))
    lines.append(("    which", [row.get("fastest_peer", "-") for row in rows]))
    if any("bound" in row for row in rows):
        lines.append(("GEMM bound", [digits(row["bound"] * 1e3) if "bound" in row else "-" for row in rows]))
        lines.append(("    fraction", [f"{row['fraction']:.2f}" if "fraction" in row else "-" for row in rows]))
    text = grid("", [row["label"] for row in rows], lines)
    mean = geometric_mean(rows)
    return text + (f"\ngeometric mean of fastest peer / ours: {mean:.2f}" if mean else "")


def _memory(rows: list[Row]) -> str:
    mib, parts = 2.0**20, []
    for row in rows:
        lines = [
            (name, [f"{found[key] / mib:.1f}" for key in ("base", "peak", "growth")])
            for name, found in row["contenders"].items()
        ]
        parts.append(grid(row["label"], ["after a tiny step", "peak above it", "growth after step 5"], lines))
    return "\n".join(parts)


def _first_call(rows: list[Row]) -> str:
    keys = ("import", "build", "first", "second", "total")
    parts = []
    for row in rows:
        lines = [(name, [f"{found[key]:.3f}" for key in keys]) for name, found in row["contenders"].items()]
        parts.append(grid(row["label"], list(keys), lines))
    return "\n".join(parts)


def plot(run: Run, path: str) -> None:
    """Bars: how many times faster than each contender we are, one panel per suite and number of threads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in run.rows if OURS in row["contenders"] and "median" in row["contenders"][OURS]]
    keys = list(dict.fromkeys((row["suite"], row["threads"]) for row in timed))
    figure, axes = pyplot.subplots(len(keys) or 1, 1, figsize=(11, 3.2 * (len(keys) or 1)), squeeze=False)
    for (suite, threads), axis in zip(keys, axes[:, 0], strict=False):
        rows = [row for row in timed if (row["suite"], row["threads"]) == (suite, threads)]
        names = [n for n in dict.fromkeys(n for row in rows for n in row["contenders"]) if n != OURS]
        width = 0.8 / max(1, len(names))
        for k, name in enumerate(names):
            entries = [(j, row["contenders"]) for j, row in enumerate(rows) if name in row["contenders"]]
            heights = [found[name]["median"] / found[OURS]["median"] for _, found in entries]
            axis.bar([j - 0.4 + (k + 0.5) * width for j, _ in entries], heights, width, label=name)
        axis.axhline(1.0, color="black", linewidth=1)
        axis.set_yscale("log")
        axis.set_ylabel("time / ours")
        axis.set_title(f"{suite}, {threads} thread{'s' if threads > 1 else ''}")
        axis.set_xticks(range(len(rows)), [row["label"] for row in rows], rotation=20 if suite == "custom" else 0)
        axis.legend(fontsize=7, ncols=3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
