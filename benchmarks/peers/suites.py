"""The suites: which work goes to which contenders, and what is kept of it.

Rows are plain dicts (they go to the JSON file as they are).  A contender that fails or computes something wrong is an
error in :attr:`Run.errors`, and has no figure.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from .contenders import OURS, Contender, is_ours
from .driver import IDLE, Process, Sample, WorkerError, WrongResult, check, take_turns
from .fresh import first_call, memory
from .run import Row, Run, failed, started
from .work import Work, flop, shape_of

__all__ = ["NN_LSTM", "NO_BUDGET", "SUITES", "run_suite"]

SUITES = ("step", "forward", "custom", "cells", "training", "memory", "memory-budget", "first-call")
#: A training run has no pauses: its batches are so many times as long as those of a single step.
UNBROKEN = 10
#: Ours a second time in a row, for a ratio with ourselves: the layer beside another cell, and no budget beside one.
NN_LSTM, NO_BUDGET = "ours, nn.LSTM", "ours, no budget"
#: Custom cells: at larger shapes autograd is left out, and of jax's forms all but the fastest.
SMALL, MIDDLING = ("tiny", "small", "online"), ("medium", "long")


def run_suite(run: Run, suite: str, threads: int) -> None:
    """One suite with one number of threads; adds to the run's rows."""
    if suite in ("memory", "first-call"):
        (memory if suite == "memory" else first_call)(run, threads)
        return
    settings = run.settings
    peaks = [] if suite == "training" else run.peaks(threads)
    if suite in ("step", "forward"):
        for shape in settings.shapes if suite == "step" else settings.forward_shapes:
            work = Work(suite, "lstm", shape)
            timed(run, suite, [(c, work) for c in run.contenders(suite)], threads, peaks)
    elif suite == "training":
        work = Work("training", "lstm", settings.training)
        timed(run, suite, [(c, work) for c in run.contenders(suite)], threads, peaks)
    elif suite == "memory-budget":
        memory_budget(run, threads, peaks)
    else:
        shapes = settings.custom_shapes if suite == "custom" else settings.cells_shapes
        for shape in shapes:
            if shape_of(Work("step", "lstm", shape))[4] > 1:
                run.note(f"{suite}: {shape} is left out, these cells have one layer")
                continue
            for cell in settings.cells if suite == "custom" else settings.own_cells:
                (custom if suite == "custom" else own)(run, Work("step", cell, shape), threads, peaks)
    for peak in peaks:
        run.rates.setdefault(threads, {})[peak.name] = peak.ask("rate")["rates"]


def custom(run: Run, work: Work, threads: int, peaks: list[Process]) -> None:
    """A cell that nobody ships."""
    contenders = run.contenders("custom")
    if work.shape not in SMALL:
        contenders = [c for c in contenders if c.package != "autograd"]
    thin_out = "jax" if work.shape not in SMALL + MIDDLING else None
    timed(run, "custom", [(c, work) for c in contenders], threads, peaks, thin_out=thin_out)


def own(run: Run, work: Work, threads: int, peaks: list[Process]) -> None:
    """A cell that we ship, beside nn.LSTM in the same rounds: what a floating-point operation costs in each."""
    contenders = [c for c in run.contenders("cells") if _has(c, work.cell)]
    entrants = [(c, work) for c in contenders]
    lstm = work._replace(cell="lstm")
    if work != lstm:
        entrants += [(c._replace(name=NN_LSTM), lstm) for c in contenders if c.name == OURS]
    row = timed(run, "cells", entrants, threads, peaks)
    if row and NN_LSTM in row["contenders"] and OURS in row["contenders"]:
        share = flop(work) / flop(lstm)
        row["per_flop"] = quartiles([ratio / share for ratio in ratios(row, OURS, NN_LSTM)])


def _has(contender: Contender, cell: str) -> bool:
    """Whether a peer has this cell: a layer of its own, or else typed in a loop."""
    form = contender.options.get("form")
    return form is None or (form == "fused") == (cell in ("lstm", "gru", "rnn", "projection"))


def memory_budget(run: Run, threads: int, peaks: list[Process]) -> None:
    """What keeping less for the backward pass costs."""
    shape, part = run.settings.memory_budget
    work = Work("step", "lstm", shape)
    entrants = [
        (contender._replace(name=name, options={"memory": budget}), work)
        for contender in run.contenders("memory-budget")
        for name, budget in ((OURS, part), (NO_BUDGET, None))
    ]
    row = timed(run, "memory-budget", entrants, threads, peaks, label=f"{shape}, memory={part:g}")
    if row and OURS in row["contenders"] and NO_BUDGET in row["contenders"]:
        row["slowdown"] = quartiles(ratios(row, OURS, NO_BUDGET))


def timed(
    run: Run, suite: str, entrants: list[tuple[Contender, Work]], threads: int, peaks: list[Process], *,
    label: str | None = None, thin_out: str | None = None,
) -> Row | None:  # fmt: skip
    """Build, check, let them take turns, keep the row; None if there is none.

    The row is about the first entrant's work.  ``thin_out`` names a package of which the fastest contender alone
    takes turns.
    """
    if not entrants:
        return None
    work, works = entrants[0][1], {c.name: each for c, each in entrants}
    label = label or (f"{work.cell} {work.shape}" if suite == "cells" else work.label)
    where = f"{suite} {label}, {threads} thread{'s' if threads > 1 else ''}"
    expected = {each: run.expected(each) for each in works.values()}
    if any(value is None for value in expected.values()):
        run.note(f"{suite} {label}: left out, there is no reference for it (install torch)")
        return None
    facts: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        ready = []
        for process in started(run, stack, entrants, threads):
            each = works[process.name]
            right = expected[each]
            assert right is not None
            try:
                facts[process.name] = {"error": check(process, each, right, run.folder)} | process.ask("facts")
            except (WorkerError, WrongResult) as problem:
                failed(run, process, str(problem))
            else:
                ready.append(process)
        try:
            if thin_out:
                ready, slower = fastest_of(ready, thin_out)
                if slower:
                    run.note(f"{where}: slower forms, not timed: {'; '.join(slower)}")
            if not ready:
                return None
            budget = run.settings.budget * (UNBROKEN if suite == "training" else 1)
            samples = take_turns(ready, run.settings.rounds, budget, peaks, run.settings.row_seconds)
        except WorkerError as problem:
            run.errors.append(str(problem))
            return None
    row = row_of(suite, label, work, threads, samples, facts)
    run.rows.append(row)
    _look_at_cores(run, where, threads, samples)
    speedup = row.get("speedup", {}).get("median")
    run.say(f"  {suite} {label}" + (f": {speedup:.2f} x the fastest peer" if speedup else ""))
    return row


def fastest_of(processes: list[Process], package: str) -> tuple[list[Process], list[str]]:
    """Keep the fastest of a package's contenders (the better of two calls each), end the others; their names."""
    once = {
        process.name: min(process.ask("batch", calls=1, warm=warm)["seconds"] for warm in (1, 0))
        for process in processes
        if process.contender.package == package
    }
    slower = [name for name in once if name != min(once, key=once.__getitem__)]
    for process in processes:
        if process.name in slower:
            process.close()
    return [process for process in processes if process.name not in slower], slower


def _look_at_cores(run: Run, where: str, threads: int, samples: dict[str, Sample]) -> None:
    """Notes on who disturbed others, or had more than its share."""
    for name, sample in samples.items():
        if sample.idle > IDLE:
            run.note(f"{name} used {sample.idle:.2f} cores while it waited ({where})")
        if sample.cores > threads + 0.15:
            run.note(f"{name} used {sample.cores:.1f} cores where {threads} were given ({where})")


# ---------------------------------------------------------------------------- rows


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = (float(v) for v in np.percentile(values, [25, 50, 75]))
    return {"q1": low, "median": middle, "q3": high}


def ratios(row: Row, above: str, below: str) -> list[float]:
    """The time of one contender over that of another, in every round that has both."""
    pairs = zip(row["contenders"][above]["seconds"], row["contenders"][below]["seconds"], strict=True)
    return [a / b for a, b in pairs if a is not None and b is not None]


def row_of(
    suite: str, label: str, work: Work, threads: int, samples: dict[str, Sample], facts: dict[str, dict[str, Any]]
) -> Row:
    """Times, and ours against the fastest peer: ratios within each round, then their median."""
    entries: dict[str, dict[str, Any]] = {
        name: quartiles([v for v in sample.seconds if v is not None])
        | {"cores": sample.cores, "idle_cores": sample.idle, "seconds": sample.seconds, **facts[name]}
        for name, sample in samples.items()
    }
    row: Row = {
        "suite": suite, "label": label, "cell": work.cell, "shape": work.shape, "sizes": shape_of(work),
        "threads": threads, "flop": flop(work), "contenders": entries,
    }  # fmt: skip
    if work.kind == "training":
        row["tokens"] = shape_of(work)[0] * shape_of(work)[1]
    peers = [name for name in entries if not is_ours(name)]
    if OURS in entries and peers:
        fastest = min(peers, key=lambda name: float(entries[name]["median"]))
        row |= {"fastest_peer": fastest, "speedup": quartiles(ratios(row, fastest, OURS))}
    return row
