"""Starts workers, checks what they compute, and lets them take turns."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .contenders import Contender, environment
from .work import Work

__all__ = ["BOUND", "Process", "Sample", "WorkerError", "WrongResult", "check", "largest_error", "take_turns"]

#: A result may differ from the float64 reference by this much of the largest entry of its array.
BOUND = 2e-5
#: Losses of training steps drift apart as the weights do.
TRAINING_BOUND = 1e-3
SILENCE = 900.0  # seconds without an answer
# Seconds between two contenders: threads look for work before they sleep, those of OpenMP for 10 ms, those of OpenBLAS
# for 100 ms (as long as a batch: whoever came next would share a CPU with them all the while).
SETTLE = 0.15
SLOW = 5.0  # who takes so many times the fastest's time, is measured in every third round
FEWEST = 5  # rounds, however long they take
IDLE = 0.05  # cores that a waiting worker may use before it is reported


class WorkerError(RuntimeError):
    """A contender failed; the message says which, and the last lines that it printed."""


class WrongResult(RuntimeError):
    """A contender computed something else than the reference."""


class Process:
    """A worker and the pipe to it; a context manager that ends it."""

    def __init__(self, contender: Contender, threads: int, extra: dict[str, str] | None = None) -> None:
        self.contender, self.name = contender, contender.name
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "peers.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            env=environment(contender, threads, extra), cwd=tempfile.gettempdir(),
        )  # fmt: skip
        self.buffer = b""

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, do: str, **more: Any) -> None:
        """A command, without waiting for the answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **more}).encode() + b"\n")
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise WorkerError(f"{self.name}: the process ended before {do!r}\n{self._last_words()}") from None

    def receive(self) -> dict[str, Any]:
        """The next answer."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        while b"\n" not in self.buffer:
            if not select.select([descriptor], [], [], SILENCE)[0]:
                self.process.kill()
                raise WorkerError(f"{self.name}: no answer for {SILENCE:.0f} s; the process was ended")
            part = os.read(descriptor, 1 << 16)
            if not part:
                code = self.process.wait()
                raise WorkerError(f"{self.name}: the process ended with status {code}\n{self._last_words()}")
            self.buffer += part
        line, self.buffer = self.buffer.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {answer['error']}\n{self._last_words()}")
        return answer

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """A command and its answer."""
        self.send(do, **more)
        return self.receive()

    def load(self) -> None:
        """Send the command that imports the contender's libraries."""
        self.send("load", libraries=libraries(self.contender.module), module=self.contender.module)

    def close(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            try:
                self.send("quit")
                self.process.wait(10)
            except (WorkerError, subprocess.TimeoutExpired):
                self.process.kill()
                self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.log.close()

    def _last_words(self) -> str:
        self.log.seek(0)
        return "".join(self.log.readlines()[-12:])


def libraries(module: str) -> list[str]:
    """A contender's ``LIBRARIES``, read without importing it: the driver has no use for torch."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return []
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "LIBRARIES":
            return list(ast.literal_eval(node.value))
    return []


# ---------------------------------------------------------------------------- right before fast


def largest_error(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> tuple[float, str]:
    """The largest difference, as a part of the largest entry of its array, and the array's name.

    Raises WrongResult where an array is missing, has another shape, or is not finite.
    """
    if set(found) != set(expected):
        raise WrongResult(f"arrays {sorted(found)}, expected {sorted(expected)}")
    worst, where = 0.0, ""
    for name, right in expected.items():
        value = found[name]
        if value.shape != right.shape:
            raise WrongResult(f"{name} has shape {value.shape}, expected {right.shape}")
        if not np.isfinite(value).all():
            raise WrongResult(f"{name} is not finite")
        scale = float(np.abs(right).max(initial=0.0)) or 1.0
        error = float(np.abs(value.astype(np.float64) - right).max(initial=0.0)) / scale
        if error >= worst:
            worst, where = error, name
    return worst, where


def check(process: Process, work: Work, expected: dict[str, np.ndarray], folder: str) -> float:
    """The error of what a worker computes; WrongResult above the bound."""
    path = os.path.join(folder, "found.npz")
    process.ask("result", path=path)
    bound = TRAINING_BOUND if work.kind == "training" else BOUND
    try:
        with np.load(path) as file:
            found = dict(file)
        error, where = largest_error(found, expected)
    except WrongResult as problem:
        raise WrongResult(f"{process.name}, {work.kind} {work.label}: {problem}") from None
    if not error <= bound:
        raise WrongResult(
            f"{process.name}, {work.kind} {work.label}: {where} differs from the float64 reference by {error:.2g} "
            f"of its largest entry (bound {bound:g})"
        )
    return error


# ---------------------------------------------------------------------------- rounds


class Sample(NamedTuple):
    """What the rounds gave for one contender: seconds a call per round (None where it sat out), cores in use."""

    seconds: list[float | None]
    cores: float
    idle: float


def take_turns(
    processes: list[Process], rounds: int, budget: float, peaks: list[Process], limit: float = math.inf
) -> dict[str, Sample]:
    """Let every worker time one batch per round, in an order that rotates; ``budget`` is seconds per batch.

    The ``peaks`` are asked once a round, so that the limit is measured under the same conditions.  There are fewer
    rounds, down to five, if the contenders would take longer than ``limit`` seconds together.
    """
    once: dict[str, float] = {}
    for process in processes:
        first = process.ask("batch", calls=1, warm=1)["seconds"]
        calls = max(1, min(200, int(0.2 * budget / max(first, 1e-9))))
        once[process.name] = process.ask("batch", calls=calls, warm=0)["seconds"] / calls
    fastest = min(once.values())
    batches = {name: max(1, int(budget / value)) for name, value in once.items()}
    # A batch's untimed calls included; slow contenders take part in every third round.
    spent = sum(
        (batches[name] + max(1, batches[name] // 5)) * value / (3 if value > SLOW * fastest else 1)
        for name, value in once.items()
    )
    rounds = min(rounds, max(FEWEST, int(limit / spent))) if spent > 0 and limit < math.inf else rounds
    seconds: dict[str, list[float | None]] = {process.name: [] for process in processes}
    cores: dict[str, list[float]] = {process.name: [] for process in processes}
    left: dict[str, tuple[float, float]] = {}
    idle = {process.name: [0.0, 0.0] for process in processes}
    for k in range(rounds):
        order = processes[k % len(processes) :] + processes[: k % len(processes)]
        for process in order:
            name = process.name
            if once[name] > SLOW * fastest and k % 3:
                seconds[name].append(None)
                continue
            calls = batches[name]
            time.sleep(SETTLE)
            asked = time.perf_counter()
            answer = process.ask("batch", calls=calls, warm=max(1, calls // 5))
            if name in left:
                cpu, when = left[name]
                idle[name][0] += answer["at"] - cpu
                idle[name][1] += asked - when
            left[name] = (answer["until"], time.perf_counter())
            seconds[name].append(answer["seconds"] / calls)
            cores[name].append(answer["cpu"] / answer["seconds"])
        for peak in peaks:
            time.sleep(SETTLE)
            peak.ask("rate")
    return {
        name: Sample(values, float(np.median(cores[name])), idle[name][0] / max(idle[name][1], 1e-9))
        for name, values in seconds.items()
    }
