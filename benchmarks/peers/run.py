"""What one run was asked for, and what it finds: settings, rows, errors, and the workers that serve all suites."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .contenders import CONTENDERS, PEAKS, Contender, installed, reference
from .driver import Process, WorkerError
from .work import CELLS, OWN_CELLS, Work

__all__ = ["Row", "Run", "Settings", "failed", "started"]

Row = dict[str, Any]
#: What the first-call suite runs: the layer with its gradients and without, and a cell that only a user would write.
FIRST = (("step", "lstm", "small"), ("forward", "lstm", "small"), ("step", "peephole-norm", "small"))


@dataclass(frozen=True)
class Settings:
    """How long and how much."""

    shapes: tuple[str, ...]
    forward_shapes: tuple[str, ...]
    custom_shapes: tuple[str, ...]
    cells_shapes: tuple[str, ...]
    cells: tuple[str, ...] = CELLS
    own_cells: tuple[str, ...] = OWN_CELLS
    rounds: int = 15
    budget: float = 0.1  # seconds per batch
    row_seconds: float = 90.0  # rounds of a row that would take longer are left out, but for the first five
    training: str = "character"
    memory: str = "large"
    memory_steps: int = 30
    memory_budget: tuple[str, float] = ("long", 0.05)  # a shape, and the part of its activations that may be kept
    first: tuple[tuple[str, str, str], ...] = FIRST
    repeats: int = 3
    other_cell: bool = True  # also time a first call with another cell's code in the cache
    only: tuple[str, ...] = ()  # names of contenders; all if empty
    peaks: tuple[str, ...] = tuple(PEAKS)


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
            who = reference(work)
            if who is None:
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
            work = Work("peak", "lstm", "tiny")
            entrants = [(c, work) for c in PEAKS.values() if c.name in self.settings.peaks and installed(c)]
            self._peaks[threads] = started(self, self.kept, entrants, threads)
        return self._peaks[threads]

    def note(self, text: str) -> None:
        """Once."""
        if text not in self.notes:
            self.notes.append(text)


def started(
    run: Run, stack: contextlib.ExitStack, entrants: list[tuple[Contender, Work]], threads: int
) -> list[Process]:
    """Workers with their case built and run once, started side by side; those that fail are reported and left out."""
    waiting: list[tuple[Process, Work]] = []
    for contender, work in entrants:
        process = stack.enter_context(Process(contender, threads))
        process.load()
        process.send("make", work=list(work), options=contender.options)
        waiting.append((process, work))
    ready = []
    for process, work in waiting:
        try:
            process.receive()
            process.receive()
        except WorkerError as problem:
            failed(run, process, f"{work.kind} {work.label}, {threads} threads: {problem}")
        else:
            ready.append(process)
    return ready


def failed(run: Run, process: Process, text: str) -> None:
    """Report an error and end the process."""
    run.errors.append(text)
    run.say(f"  ERROR {text.splitlines()[0]}")
    process.close()
