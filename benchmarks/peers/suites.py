"""The suites: which work goes to which contenders, and what is kept of it.

Rows are plain dicts (they go to the JSON file as they are).  A contender that fails or computes something wrong is an
error in :attr:`Run.errors`, and has no figure.
"""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from .contenders import CONTENDERS, OURS, PEAKS, Contender, installed, reference
from .driver import IDLE, Process, Sample, WorkerError, WrongResult, check, take_turns
from .work import CELLS, Work, flop, shape_of

__all__ = ["SUITES", "Run", "Settings", "run_suite"]

SUITES = ("step", "forward", "custom", "training", "memory", "first-call")
#: What the first-call suite runs: the layer, and a cell that only a user would write.
FIRST = (("lstm", "small"), ("peephole-norm", "small"))
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How long and how much."""

    shapes: tuple[str, ...]
    forward_shapes: tuple[str, ...]
    custom_shapes: tuple[str, ...]
    cells: tuple[str, ...] = CELLS
    rounds: int = 15
    budget: float = 0.1  # seconds per batch
    training: str = "character"
    memory: str = "large"
    memory_steps: int = 30
    first: tuple[tuple[str, str], ...] = FIRST
    repeats: int = 3
    other_cell: bool = True  # also time a first call with another cell's code in the cache
    only: tuple[str, ...] = ()  # names of contenders; all if empty


@dataclass
class Run:
    """Everything that one run finds."""

    settings: Settings
    folder: str
    say: Any = print
    rows: list[Row] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rates: dict[int, dict[str, dict[str, float]]] = field(default_factory=dict)  # threads -> library -> size -> 1/s
    references: dict[Work, dict[str, np.ndarray]] = field(default_factory=dict)
    kept: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # workers that serve the whole run
    _reference: dict[str, Process] = field(default_factory=dict)
    _peaks: dict[int, list[Process]] = field(default_factory=dict)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.kept.close()

    def contenders(self, suite: str) -> list[Contender]:
        """Who takes part, of those that are installed."""
        only = self.settings.only
        return [c for c in CONTENDERS.values() if suite in c.suites and (not only or c.name in only) and installed(c)]

    def expected(self, work: Work) -> dict[str, np.ndarray] | None:
        """The float64 result, computed once."""
        key = work._replace(dtype="float64")
        if key not in self.references:
            who = reference(work.cell != "lstm")
            if who is None or (work.kind != "step" and who.package == "autograd"):
                return None
            if work.kind == "training" and who.package != "torch":
                return None
            path = f"{self.folder}/reference.npz"
            if who.name not in self._reference:
                process = self._reference[who.name] = self.kept.enter_context(Process(who, 1))
                process.load()
                process.receive()
            self._reference[who.name].ask("make", work=list(key), options=who.options)
            self._reference[who.name].ask("result", path=path)
            with np.load(path) as file:
                self.references[key] = dict(file)
        return self.references[key]

    def peaks(self, threads: int) -> list[Process]:
        """The workers that multiply matrices."""
        if threads not in self._peaks:
            work, contenders = Work("peak", "lstm", "tiny"), [c for c in PEAKS.values() if installed(c)]
            self._peaks[threads] = _started(self, self.kept, work, contenders, threads)
        return self._peaks[threads]

    def note(self, text: str) -> None:
        """Once."""
        if text not in self.notes:
            self.notes.append(text)


def run_suite(run: Run, suite: str, threads: int) -> None:
    """One suite with one number of threads; adds to the run's rows."""
    settings = run.settings
    if suite in ("step", "forward"):
        shapes = settings.shapes if suite == "step" else settings.forward_shapes
        works = [Work(suite, "lstm", shape) for shape in shapes]
    elif suite == "custom":
        works = [Work("step", cell, shape) for cell in settings.cells for shape in settings.custom_shapes]
    elif suite == "training":
        works = [Work("training", "lstm", settings.training)]
    else:
        (memory if suite == "memory" else first_call)(run, threads)
        return
    peaks = [] if suite == "training" else run.peaks(threads)
    for work in works:
        _timed(run, suite, work, threads, peaks)
    for peak in peaks:
        run.rates.setdefault(threads, {})[peak.name] = peak.ask("rate")["rates"]


def _started(
    run: Run, stack: contextlib.ExitStack, work: Work, contenders: list[Contender], threads: int
) -> list[Process]:
    """Workers with their case built and run once, started side by side; those that fail are reported and left out."""
    started: list[Process] = []
    for contender in contenders:
        process = stack.enter_context(Process(contender, threads))
        process.load()
        process.send("make", work=list(work), options=contender.options)
        started.append(process)
    ready = []
    for process in started:
        try:
            process.receive()
            process.receive()
        except WorkerError as problem:
            _failed(run, process, f"{work.kind} {work.label}, {threads} threads: {problem}")
        else:
            ready.append(process)
    return ready


def _failed(run: Run, process: Process, text: str) -> None:
    run.errors.append(text)
    run.say(f"  ERROR {text.splitlines()[0]}")
    process.close()


def _timed(run: Run, suite: str, work: Work, threads: int, peaks: list[Process]) -> None:
    """Build, check, let them take turns, keep the row."""
    expected = run.expected(work)
    if expected is None:
        run.note(f"{suite} {work.label}: left out, there is no reference for it (install torch)")
        return
    contenders = run.contenders(suite)
    if suite == "custom" and work.shape not in ("tiny", "small"):
        contenders = [c for c in contenders if c.package != "autograd"]
    with contextlib.ExitStack() as stack:
        ready, errors = [], {}
        for process in _started(run, stack, work, contenders, threads):
            try:
                errors[process.name] = check(process, work, expected, run.folder)
            except (WorkerError, WrongResult) as problem:
                _failed(run, process, str(problem))
            else:
                ready.append(process)
        if not ready:
            return
        try:
            samples = take_turns(ready, run.settings.rounds, run.settings.budget, peaks)
        except WorkerError as problem:
            run.errors.append(str(problem))
            return
    row = _row(suite, work, threads, samples, errors)
    run.rows.append(row)
    for name, sample in samples.items():
        if sample.idle > IDLE:
            run.note(f"{name} used {sample.idle:.2f} cores while it waited ({suite} {work.label}, {threads} threads)")
        if sample.cores > threads + 0.15:
            run.note(f"{name} used {sample.cores:.1f} cores where {threads} were given ({suite} {work.label})")
    speedup = row.get("speedup", {}).get("median")
    run.say(f"  {suite} {work.label}" + (f": {speedup:.2f} x the fastest peer" if speedup else ""))


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = (float(v) for v in np.percentile(values, [25, 50, 75]))
    return {"q1": low, "median": middle, "q3": high}


def _row(suite: str, work: Work, threads: int, samples: dict[str, Sample], errors: dict[str, float]) -> Row:
    """Times, and ours against the fastest peer: ratios within each round, then their median."""
    entries: dict[str, dict[str, Any]] = {
        name: quartiles([v for v in sample.seconds if v is not None])
        | {"cores": sample.cores, "idle_cores": sample.idle, "error": errors[name], "seconds": sample.seconds}
        for name, sample in samples.items()
    }
    row: Row = {
        "suite": suite, "label": work.label, "cell": work.cell, "shape": work.shape, "sizes": shape_of(work),
        "threads": threads, "flop": flop(work), "contenders": entries,
    }  # fmt: skip
    if work.kind == "training":
        row["tokens"] = shape_of(work)[0] * shape_of(work)[1]
    peers = [name for name in entries if name != OURS]
    medians = {name: float(entry["median"]) for name, entry in entries.items()}
    if OURS in entries and peers:
        fastest = min(peers, key=medians.__getitem__)
        pairs = zip(samples[fastest].seconds, samples[OURS].seconds, strict=True)
        ratios = [theirs / mine for theirs, mine in pairs if theirs is not None and mine is not None]
        row |= {"fastest_peer": fastest, "speedup": quartiles(ratios)}
    return row


# ---------------------------------------------------------------------------- memory and the first call


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
                _failed(run, process, str(problem))
    run.rows.append(row)
    run.say(f"  memory {large.label}")


def first_call(run: Run, threads: int) -> None:
    """Fresh processes: start and imports, building, the first and the second step."""
    for cell, shape in run.settings.first:
        work = Work("step", cell, shape)
        row: Row = {"suite": "first-call", "label": work.label, "threads": threads, "contenders": {}}
        for contender in run.contenders("first-call"):
            if (
                cell != "lstm"
                and contender.module not in ("peers.ours", "peers.jax_peer")
                and (contender.options.get("form") != "loop")
            ):
                continue
            try:
                if contender.name == OURS:
                    other = Work("step", "minimal-gated" if cell == "lstm" else "lstm", shape)
                    row["contenders"] |= _own_first_calls(run, contender, work, other, threads)
                else:
                    timed = [_first_call(contender, work, threads, {}) for _ in range(run.settings.repeats)]
                    row["contenders"][contender.name] = _medians(timed)
            except WorkerError as problem:
                run.errors.append(str(problem))
                run.say(f"  ERROR {str(problem).splitlines()[0]}")
        run.rows.append(row)
        run.say(f"  first-call {work.label}")


def _own_first_calls(run: Run, contender: Contender, work: Work, other: Work, threads: int) -> dict[str, Any]:
    """With an empty cache, from the cache, and with a cache that another cell has filled."""
    found: dict[str, list[Row]] = {"ours, empty cache": [], "ours, cached": []}
    if run.settings.other_cell:
        found["ours, other cell cached"] = []
    for _ in range(run.settings.repeats):
        with tempfile.TemporaryDirectory() as folder:
            extra = {"TINYGRAD_LSTM_CACHE_DIR": folder, "NUMBA_CACHE_DIR": folder}
            for name in ("ours, empty cache", "ours, cached"):
                found[name].append(_first_call(contender, work, threads, extra))
        if run.settings.other_cell:
            with tempfile.TemporaryDirectory() as folder:
                extra = {"TINYGRAD_LSTM_CACHE_DIR": folder, "NUMBA_CACHE_DIR": folder}
                _first_call(contender, other, threads, extra)
                found["ours, other cell cached"].append(_first_call(contender, work, threads, extra))
    return {name: _medians(timed) for name, timed in found.items()}


def _first_call(contender: Contender, work: Work, threads: int, extra: dict[str, str]) -> Row:
    with Process(contender, threads, extra) as process:
        process.load()
        imported = process.receive()["seconds"]
        made = process.ask("make", work=list(work), options=contender.options)
        second = process.ask("batch", calls=1, warm=0)
    total = imported + made["build"] + made["first"]
    return {"import": imported, **made, "second": second["seconds"], "total": total}


def _medians(timed: list[Row]) -> Row:
    return {key: median(one[key] for one in timed) for key in ("import", "build", "first", "second", "total")}
