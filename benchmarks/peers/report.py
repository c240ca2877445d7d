"""Tables, the description of the machine, and the plot."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from .contenders import OURS, ROOT, avx512
from .run import Row, Run
from .suites import NN_LSTM, NO_BUDGET

__all__ = ["FLOP_TARGET", "SLOWDOWN_TARGET", "bounds", "geometric_mean", "headline", "machine", "peaks", "tables"]

#: At most: the time of one operation in another cell over that in nn.LSTM; of T=1000 in 5 % of the memory over without.
FLOP_TARGET, SLOWDOWN_TARGET = 1.4, 1.35

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
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    pairs = [line.split(":", 1) for line in lines if ":" in line]
    told = {key.strip(): value.strip() for key, value in reversed(pairs)}  # the first processor's
    # The "AMD EPYC" of a virtual machine may be any: families 25 (Zen 4) and 26 (Zen 5) differ twofold in products.
    kind = ", ".join(f"{key} {told[key]}" for key in ("cpu family", "model", "stepping") if key in told)
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": told.get("model name", platform.processor()), "cpu_kind": kind, "avx512": avx512(),
        "cores": os.cpu_count(), "cores_allowed": affinity,
        "platform": platform.platform(), "commit": commit(), "python": platform.python_version(), "versions": versions,
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def commit() -> str | None:
    """The state of the repository, ``-dirty`` behind it where files were changed; None outside of one."""
    line = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def peaks(run: Run) -> dict[int, dict[str, float]]:
    """Threads -> library -> the most operations per second that its product did at any size, in this run."""
    return {
        threads: {name.removeprefix("peak "): max(sizes.values()) for name, sizes in libraries.items()}
        for threads, libraries in sorted(run.rates.items())
    }


def best_rate(run: Run, threads: int) -> float | None:
    """The limit: the most that any library did."""
    return max(peaks(run).get(threads, {}).values(), default=None)


def headline(about: dict[str, Any], run: Run) -> str:
    """The machine, the versions, and what matrix products reach, on one line each."""
    vectors = {True: "AVX-512", False: "no AVX-512", None: "AVX-512 unknown"}[about["avx512"]]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    lines = [
        f"CPU: {about['cpu']} ({about['cpu_kind'] or 'kind unknown'}), {vectors}, {about['cores']} cores "
        f"({about['cores_allowed']} allowed), {about['date']}",
        f"versions: commit {about['commit'] or 'unknown'}, Python {about['python']}, {versions}; float32",
    ]
    for threads, libraries in peaks(run).items():
        if libraries:
            best = max(libraries, key=libraries.__getitem__)
            each = "; ".join(f"{name} {digits(rate / 1e9)}" for name, rate in libraries.items())
            lines.append(f"peak GFLOP/s of matrix products, {_threads(threads)}: {each} (the limit: {best})")
    return "\n".join(lines)


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
    # Cells side by side, a table per shape: all of them in one would be too wide to read.
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in run.rows:
        key = (row["suite"], row["threads"], row["shape"] if row["suite"] in ("custom", "cells") else "")
        groups.setdefault(key, []).append(row)
    for (suite, threads, shape), rows in groups.items():
        title = ", ".join(filter(None, (suite, shape, _threads(threads))))
        if suite == "memory":
            out.append(title + ", MiB\n" + _memory(rows))
        elif suite == "first-call":
            out.append(title + ", seconds\n" + _first_call(rows))
        else:
            out.append(title + ", ms\n" + _timed(rows, [row["cell"] if shape else row["label"] for row in rows]))
    for threads, libraries in sorted(run.rates.items()):
        lines = [
            (name, [digits(rate / 1e9) for rate in sizes.values()] + [digits(max(sizes.values()) / 1e9)])
            for name, sizes in libraries.items()
        ]
        sizes = list(next(iter(libraries.values()))) if libraries else []
        head = f"matrix products (M, K, N), {_threads(threads)}, GFLOP/s\n"
        out.append(head + grid("", [*sizes, "best"], lines))
    return "\n\n".join(out)


def _threads(number: int) -> str:
    return f"{number} thread{'s' if number > 1 else ''}"


def _timed(rows: list[Row], labels: list[str]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["contenders"]))
    names.sort(key=(NN_LSTM, NO_BUDGET).__contains__)  # ourselves a second time: last
    lines = []
    for name in names:
        cells = [row["contenders"].get(name) for row in rows]
        lines.append((name, [digits(cell and 1e3 * cell["median"]) for cell in cells]))
        if any("tokens" in row for row in rows):
            per_second = [cell and row["tokens"] / cell["median"] for row, cell in zip(rows, cells, strict=True)]
            lines.append(("    tokens/s", [digits(value) for value in per_second]))
    lines += _ratio("fastest peer / ours", rows, "speedup")
    if any("speedup" in row for row in rows):
        lines.append(("    which", [row.get("fastest_peer", "-") for row in rows]))
    lines += _ratio(f"time per flop / nn.LSTM's (target {FLOP_TARGET})", rows, "per_flop")
    lines += _ratio(f"with / without the budget (target {SLOWDOWN_TARGET})", rows, "slowdown")
    lines += _plans(rows)
    if any("bound" in row for row in rows):
        lines.append(("GEMM bound", [digits(row["bound"] * 1e3) if "bound" in row else "-" for row in rows]))
        lines.append(("    fraction", [f"{row['fraction']:.2f}" if "fraction" in row else "-" for row in rows]))
    mean, count = geometric_mean(rows), sum("speedup" in row for row in rows)
    text = grid("", labels, lines)
    return text + (f"\ngeometric mean of fastest peer / ours: {mean:.2f} (over {count} of {len(rows)})" if mean else "")


def _ratio(title: str, rows: list[Row], key: str) -> list[tuple[str, list[str]]]:
    """A ratio's median and its quartiles, where any row has it."""
    found = [row.get(key) for row in rows]
    if not any(found):
        return []
    quarters = [f"{r['q1']:.2f}-{r['q3']:.2f}" if r else "-" for r in found]
    return [(title, [digits(r and r["median"]) for r in found]), ("    quartiles", quarters)]


def _plans(rows: list[Row]) -> list[tuple[str, list[str]]]:
    """What the plan of a memory budget says beforehand."""
    plans = [row["contenders"].get(OURS, {}).get("facts") for row in rows]
    if not any(plans):
        return []
    return [
        ("plan: peak, bytes", [str(p["peak"]) if p else "-" for p in plans]),
        ("    of everything", [f"{100 * p['peak'] / p['whole']:.1f} % of {p['whole']}" if p else "-" for p in plans]),
        ("    steps run again", [f"{p['recomputed']} of {p['steps']}" if p else "-" for p in plans]),
    ]


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
