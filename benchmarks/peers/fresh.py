"""The suites that need a fresh process for every figure: memory, and the first call."""

from __future__ import annotations

import tempfile
from statistics import median
from typing import Any

from .contenders import OURS, Contender
from .driver import Process, WorkerError, WrongResult, check
from .run import Row, Run, failed
from .work import Work

__all__ = ["first_call", "memory"]


def memory(run: Run, threads: int) -> None:
    """Peak above what a process needs after a small step, and whether it stays flat."""
    large, settings = Work("step", "lstm", run.settings.memory), run.settings
    row: Row = {"suite": "memory", "label": large.label, "threads": threads, "contenders": {}}
    expected = run.expected(large)
    for contender in run.contenders("memory"):
        with Process(contender, threads) as process:
            try:
                process.load()
                process.receive()
                process.ask("make", work=list(large._replace(shape="tiny")), options=contender.options)
                process.ask("memory", calls=2)
                base = process.ask("memory", calls=0)["rss"][-1]
                process.ask("make", work=list(large), options=contender.options)
                found = process.ask("memory", calls=settings.memory_steps)
                early = found["rss"][min(4, len(found["rss"]) - 1)]
                row["contenders"][contender.name] = {
                    "base": base, "peak": found["peak"] - base, "growth": found["rss"][-1] - early,
                }  # fmt: skip
                if expected is not None:
                    check(process, large, expected, run.folder)
            except (WorkerError, WrongResult) as problem:
                row["contenders"].pop(contender.name, None)
                failed(run, process, str(problem))
    run.rows.append(row)
    run.say(f"  memory {large.label}")


def first_call(run: Run, threads: int) -> None:
    """Imports, building, the first and the second call."""
    for kind, cell, shape in run.settings.first:
        work = Work(kind, cell, shape)
        label = work.label + (", forward alone" if kind == "forward" else "")
        needed = kind if cell == "lstm" else "custom"
        row: Row = {"suite": "first-call", "label": label, "threads": threads, "contenders": {}}
        for contender in run.contenders("first-call"):
            if needed not in contender.suites:
                continue
            try:
                if contender.name == OURS:
                    other = Work(kind, "minimal-gated" if cell == "lstm" else "lstm", shape)
                    row["contenders"] |= _own_first_calls(run, contender, work, other, threads)
                else:
                    timed = [_first_call(run, contender, work, threads, {}) for _ in range(run.settings.repeats)]
                    row["contenders"][contender.name] = _medians(timed)
            except (WorkerError, WrongResult) as problem:
                run.errors.append(str(problem))
                run.say(f"  ERROR {str(problem).splitlines()[0]}")
        run.rows.append(row)
        run.say(f"  first-call {label}")


def _own_first_calls(run: Run, contender: Contender, work: Work, other: Work, threads: int) -> dict[str, Any]:
    """With an empty cache, from the cache, and with a cache that another cell has filled."""
    found: dict[str, list[Row]] = {"ours, empty cache": [], "ours, cached": []}
    if run.settings.other_cell:
        found["ours, other cell cached"] = []
    for _ in range(run.settings.repeats):
        with tempfile.TemporaryDirectory() as folder:
            extra = {"TINYGRAD_LSTM_CACHE_DIR": folder, "NUMBA_CACHE_DIR": folder}
            for name in ("ours, empty cache", "ours, cached"):
                found[name].append(_first_call(run, contender, work, threads, extra))
        if run.settings.other_cell:
            with tempfile.TemporaryDirectory() as folder:
                extra = {"TINYGRAD_LSTM_CACHE_DIR": folder, "NUMBA_CACHE_DIR": folder}
                _first_call(run, contender, other, threads, extra)
                found["ours, other cell cached"].append(_first_call(run, contender, work, threads, extra))
    return {name: _medians(timed) for name, timed in found.items()}


def _first_call(run: Run, contender: Contender, work: Work, threads: int, extra: dict[str, str]) -> Row:
    """One process; its results are compared when it has been timed: a check before would be the first call."""
    expected = run.expected(work)
    with Process(contender, threads, extra) as process:
        process.load()
        imported = process.receive()["seconds"]
        made = process.ask("make", work=list(work), options=contender.options)
        second = process.ask("batch", calls=1, warm=0)
        if expected is not None:
            check(process, work, expected, run.folder)
    total = imported + made["build"] + made["first"]
    return {"import": imported, **made, "second": second["seconds"], "total": total}


def _medians(timed: list[Row]) -> Row:
    return {key: median(one[key] for one in timed) for key in ("import", "build", "first", "second", "total")}
