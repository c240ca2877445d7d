"""Native parts for the thread pool, and what its tests ask of it."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm.kernels import codecache, threads
from tinygrad_lstm.kernels.control import PARKED, SLOT, SLOTS, STATE

PATIENCE = 60  # seconds after which something hangs


PARTS = codecache.load(
    '''
from __future__ import annotations

from tinygrad_lstm.kernels.atomics import fetch_add, load_acquire, pause, yield_cpu
from tinygrad_lstm.kernels.dialect import exported


@exported
def count(argument: int, part: int) -> int:
    """Counts how often each part ran."""
    fetch_add(argument + 8 * part, 1)
    return 1 << (part % 62)


@exported
def meet(argument: int, part: int) -> int:
    """Returns 0 when as many parts as argument[0] run at the same moment, 1 when they never do."""
    wanted = load_acquire(argument)
    present = fetch_add(argument + 8, 1) + 1
    full = (present + wanted - 1) // wanted * wanted  # the counter is never reset: launch after launch
    for k in range(1_000_000):
        if load_acquire(argument + 8) >= full:
            return 0
        if k < 1000:
            pause()
        else:
            yield_cpu()
    return 1


@exported
def wait(argument: int, part: int) -> int:
    """Reports in argument[1], and runs until argument[0] is not 0."""
    fetch_add(argument + 8, 1)
    while load_acquire(argument) == 0:
        yield_cpu()
    return 0
''',
    stem="test",
)
COUNT, MEET, WAIT = PARTS.address("count"), PARTS.address("meet"), PARTS.address("wait")


def counted(parts: int) -> tuple[np.ndarray, int]:
    counters = np.zeros(parts + 1, np.int64)
    return counters, threads.run(COUNT, counters.ctypes.data, parts)


def check(parts: int) -> None:
    counters, result = counted(parts)
    assert counters.tolist() == [1] * parts + [0]
    assert result == sum(1 << bit for bit in range(min(parts, 62)))


def gather(team: Any, many: int = 1) -> bool:
    """Whether all threads of the team run at the same moment, in each of so many launches."""
    words = np.array([team.workers + 1, 0], np.int64)
    return not any(threads.run(MEET, words.ctypes.data, team.workers + 1) for _ in range(many))


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never happened"


def states(team: Any) -> list[int]:
    slots = [team.control + SLOTS + SLOT * k for k in range(team.workers)]
    return [ctypes.c_int64.from_address(slot + STATE).value for slot in slots]


def parked(team: Any) -> bool:
    return states(team) == [PARKED] * team.workers


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """A number of threads that nobody has set, and afterwards no worker that is left.  What hangs is ended."""
    faulthandler.dump_traceback_later(2 * PATIENCE, exit=True)
    before, threads._threads = threads._threads, None
    yield
    with threads._lock:
        old, threads._team, threads._threads = threads._team, None, before
    if old is not None:
        old.stop()
        old.join(PATIENCE)
        assert not any(member.is_alive() for member in old._members)
    faulthandler.cancel_dump_traceback_later()


def team_of(n: int, spin: float | None = None, monkeypatch: Any = None) -> Any:
    if spin is not None:
        monkeypatch.setattr(threads, "SPIN", spin)
        monkeypatch.setattr(threads, "_available", lambda: threads.MOST)  # spins although there are fewer CPUs
    tg.set_num_threads(n)
    team = threads._assemble()
    assert team.workers == n - 1
    return team


class Held:
    """A launch of another Python thread that goes on until the block is left."""

    def __enter__(self) -> Held:
        self.words = np.zeros(2, np.int64)
        self.thread = threading.Thread(target=threads.run, args=(WAIT, self.words.ctypes.data, 3), daemon=True)
        self.thread.start()
        eventually(lambda: self.words[1] >= 2)
        return self

    def __exit__(self, *exception: object) -> None:
        self.words[0] = 1
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        assert self.words[1] == 3


def forked(action: Callable[[], None], seconds: int = PATIENCE) -> int:
    """The exit status of a child that does ``action``; a child that hangs is killed by an alarm."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on forks with threads: what is tested
        child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        try:
            action()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
