"""The thread pool: every part once, no lost wake-ups, callers in several threads, forks, the interpreter's end."""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import cfunc, njit, types

import tinygrad_lstm as tg
from tinygrad_lstm.kernels import threads
from tinygrad_lstm.kernels.atomics import fetch_add, load_acquire, pause, yield_cpu

part_type = types.int64(types.int64, types.int64)
PATIENCE = 60  # seconds after which something hangs


@cfunc(part_type, nopython=True)
def count(argument: int, part: int) -> int:
    """Counts how often each part ran."""
    fetch_add(argument + 8 * part, 1)
    return 1 << (part % 62)


@cfunc(part_type, nopython=True)
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


@cfunc(part_type, nopython=True)
def wait(argument: int, part: int) -> int:
    """Reports in argument[1], and runs until argument[0] is not 0."""
    fetch_add(argument + 8, 1)
    while load_acquire(argument) == 0:
        yield_cpu()
    return 0


def counted(parts: int) -> tuple[np.ndarray, int]:
    counters = np.zeros(parts + 1, np.int64)
    return counters, threads.run(count.address, counters.ctypes.data, parts)


def check(parts: int) -> None:
    counters, result = counted(parts)
    assert counters.tolist() == [1] * parts + [0]
    assert result == sum(1 << bit for bit in range(min(parts, 62)))


def gather(team: Any, many: int = 1) -> bool:
    """Whether all threads of the team run at the same moment, in each of so many launches."""
    words = np.array([team.workers + 1, 0], np.int64)
    return not any(threads.run(meet.address, words.ctypes.data, team.workers + 1) for _ in range(many))


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never happened"


def states(team: Any) -> list[int]:
    native = threads._native
    slots = [team.control + native["SLOTS"] + native["SLOT"] * k for k in range(team.workers)]
    return [ctypes.c_int64.from_address(slot + native["STATE"]).value for slot in slots]


def parked(team: Any) -> bool:
    return states(team) == [threads._native["PARKED"]] * team.workers


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    faulthandler.dump_traceback_later(2 * PATIENCE, exit=True)
    before = threads._threads
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


# ---------------------------------------------------------------------------- what is run


@given(number=st.sampled_from([1, 2, 3, 8]), sizes=st.lists(st.integers(0, 70) | st.sampled_from([1000]), max_size=8))
def test_every_part_runs_once(number: int, sizes: list[int]) -> None:
    tg.set_num_threads(number)
    for parts in sizes:
        check(parts)


def test_the_calls_return_the_bits_of_every_part() -> None:
    for number in (1, 2, 3, 8):
        tg.set_num_threads(number)
        for parts in range(65):
            assert counted(parts)[1] == sum({1 << (part % 62) for part in range(parts)})


@pytest.mark.parametrize("number", [2, 3, 8])
def test_parts_run_at_the_same_moment(number: int) -> None:
    assert gather(team_of(number), 20)


@pytest.mark.parametrize("spin", [0.0, 1e-6, 20e-6])
def test_no_wake_up_is_lost(spin: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are asleep, about to sleep, or awake when a launch comes; each launch needs all of them."""
    team = team_of(2, spin, monkeypatch)
    assert gather(team, 500)
    launch, function, round_ = threads._native["launch"], meet.address, threads._native["pauses"]

    @njit(nogil=True)
    def storm(control: int, argument: int, launches: int) -> int:
        """Launches at every distance from the end of the one before."""
        for k in range(launches):
            round_(k % 211)
            if launch(control, function, argument, 2) != 0:
                return k
        return -1

    words = np.array([2, 0], np.int64)
    assert storm(team.control, words.ctypes.data, 5000) == -1


def test_the_steps_of_the_handshake() -> None:
    """What no race can be made to show at will: the worker is between its two looks when the waker comes."""
    threads._load()
    native, memory = threads._native, np.zeros(200, np.int64)
    control, slot = memory.ctypes.data, native["SLOTS"] // 8
    state, lock, seen, limit, stop = (
        slot + native["STATE"] // 8, slot + native["LOCK"] // 8, slot + native["SEEN"] // 8,
        native["LIMIT"] // 8, native["STOP"] // 8,
    )  # fmt: skip
    api = ctypes.pythonapi
    api.PyThread_allocate_lock.restype = ctypes.c_void_p
    memory[lock] = pointer = api.PyThread_allocate_lock()  # free: who sleeps on it wakes up at once
    held = lambda: api.PyThread_acquire_lock(ctypes.c_void_p(pointer), 0) == 0
    parked, running, slept, awake = native["PARKED"], native["RUNNING"], 1, 0

    assert native["sleep"](control, 0) == slept and memory[state] == parked and held()
    assert native["wake"](control, 0) == 1 and memory[state] == running and not held()
    assert native["wake"](control, 0) == 0 and memory[state] == running and held()
    memory[limit] = 1
    assert native["sleep"](control, 0) == awake and memory[state] == running
    memory[seen] = 1
    memory[stop] = 1
    assert native["sleep"](control, 0) == awake and memory[state] == running
    api.PyThread_free_lock(ctypes.c_void_p(pointer))


@pytest.mark.parametrize("number", [3, 8])
def test_no_wake_up_is_lost_among_many(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gather(team_of(number, 0.0, monkeypatch), 200)


@pytest.mark.parametrize("number", [2, 5])
def test_a_hundred_thousand_tiny_launches(number: int) -> None:
    team_of(number)
    counters = np.zeros(4, np.int64)
    for _ in range(100_000):
        threads.run(count.address, counters.ctypes.data, 3)
    assert counters.tolist() == [100_000] * 3 + [0]


@pytest.mark.parametrize("number", [2, 8])
def test_an_idle_pool_sleeps_and_wakes(number: int) -> None:
    team = team_of(number)
    for _ in range(5):
        assert gather(team)
        eventually(lambda: parked(team))
        check(1)
        assert parked(team), "one part needs no worker"


def test_a_launch_with_few_parts_wakes_no_more_workers_than_it_can_use() -> None:
    team = team_of(8)
    check(8)
    eventually(lambda: parked(team))
    team._write(threads._native["SPINS"], 1 << 60)  # whoever is woken stays awake
    for _ in range(20):
        check(2)
    assert states(team)[1:] == [threads._native["PARKED"]] * 6


# ---------------------------------------------------------------------------- several callers


@pytest.mark.parametrize("callers", [2, 4])
def test_python_threads_share_the_pool(callers: int) -> None:
    team_of(3)
    failures: list[Any] = []
    start = threading.Barrier(callers)

    def call(seed: int) -> None:
        start.wait(PATIENCE)
        for k in range(1000):
            parts = 1 + (seed + k) % 7
            counters, result = counted(parts)
            if counters.tolist() != [1] * parts + [0] or result != (1 << parts) - 1:
                failures.append((parts, counters, result))

    everyone = [threading.Thread(target=call, args=(seed,)) for seed in range(callers)]
    for thread in everyone:
        thread.start()
    for thread in everyone:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert not failures


class Held:
    """A launch of another Python thread that goes on until the block is left."""

    def __enter__(self) -> Held:
        self.words = np.zeros(2, np.int64)
        self.thread = threading.Thread(target=threads.run, args=(wait.address, self.words.ctypes.data, 3), daemon=True)
        self.thread.start()
        eventually(lambda: self.words[1] >= 2)
        return self

    def __exit__(self, *exception: object) -> None:
        self.words[0] = 1
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        assert self.words[1] == 3


def test_a_second_caller_does_not_wait_for_the_first() -> None:
    team = team_of(2)
    eventually(lambda: parked(team))
    with Held():
        assert states(team) == [threads._native["RUNNING"]]
        for parts in range(10):
            check(parts)
    check(10)


def test_a_part_may_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    team = team_of(2)
    launch, control, inner = threads._native["launch"], team.control, count.address

    @cfunc(part_type, nopython=True)
    def outer(argument: int, part: int) -> int:
        return launch(control, inner, argument + 8 * 10 * part, 10)

    counters = np.zeros(50, np.int64)
    assert threads.run(outer.address, counters.ctypes.data, 5) == 2**10 - 1
    assert counters.tolist() == [1] * 50


def test_the_number_changes_during_launches() -> None:
    stop, failures = threading.Event(), []

    def call() -> None:
        while not stop.is_set():
            counters, _ = counted(5)
            if counters.tolist() != [1] * 5 + [0]:
                failures.append(counters)

    callers = [threading.Thread(target=call) for _ in range(2)]
    for thread in callers:
        thread.start()
    for k in range(200):
        tg.set_num_threads(1 + k % 4)
        check(4)
    stop.set()
    for thread in callers:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert not failures
    tg.set_num_threads(1)
    eventually(lambda: not any(t.name.startswith("tinygrad_lstm-") for t in threading.enumerate()))


def test_threads_that_cannot_be_started_are_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    started, start = [], threading.Thread.start

    def refusing(self: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(self)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refusing)
    tg.set_num_threads(6)
    check(6)
    assert threads._team is not None and threads._team.workers == 2
    assert gather(threads._team, 10)


# ---------------------------------------------------------------------------- processes


def forked(action: Callable[[], None]) -> int:
    """The exit status of a child that does ``action``; a child that hangs is killed by an alarm."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on forks with threads: what is tested
        child = os.fork()
    if child == 0:
        signal.alarm(PATIENCE)
        try:
            action()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def child_of(number: int) -> Callable[[], None]:
    def action() -> None:
        assert threads.get_num_threads() == number
        for parts in range(20):
            check(parts)
        assert gather(threads._team, 20)
        assert forked(lambda: check(7)) == 0

    return action


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@forks
def test_a_forked_child_has_a_pool_of_its_own() -> None:
    team = team_of(3)
    check(5)
    assert forked(child_of(3)) == 0
    check(5)
    eventually(lambda: parked(team))
    assert forked(child_of(3)) == 0
    assert gather(team, 20) and threads._team is team


@forks
def test_a_fork_during_a_launch() -> None:
    team_of(3)
    with Held():
        assert forked(child_of(3)) == 0
        check(5)
    check(5)


@forks
def test_a_fork_while_another_thread_makes_the_team() -> None:
    team_of(2)
    with threads._lock:
        assert forked(child_of(2)) == 0


def _in_a_process() -> None:
    for parts in range(20):
        check(parts)


@forks
def test_multiprocessing_by_fork() -> None:
    team_of(2)
    check(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        processes = [multiprocessing.get_context("fork").Process(target=_in_a_process) for _ in range(3)]
        for process in processes:
            process.start()
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0
    check(3)


SCRIPT = """
import atexit, sys, threading

@atexit.register
def after_everything_else():
    launch(5)
    print("at exit", counters.tolist()[-1], [t for t in threading.enumerate() if t.name.startswith("tinygrad_lstm")])

import numpy as np
import tinygrad_lstm as tg
from tinygrad_lstm.kernels import codecache, threads

source = '''
from numba import cfunc, njit, types
from tinygrad_lstm.kernels.atomics import fetch_add

@cfunc(types.int64(types.int64, types.int64), nopython=True, cache=True)
def count(argument, part):
    fetch_add(argument + 8 * part, 1)
    return part
'''
count = codecache.load(source, "count", stem="test").address
counters = np.zeros(5, np.int64)

def launch(parts=3):
    return threads.run(count, counters.ctypes.data, parts)
"""

ENDINGS = {
    "workers spin": "threads.SPIN = 3600.0\nthreads._available = lambda: 99\nlaunch()",
    "workers sleep": "threads.SPIN = 0.0\nlaunch()",
    "a daemon thread launches": """
def forever():
    while True:
        threads.run(count, counters.ctypes.data, 3)
threading.Thread(target=forever, daemon=True).start()
launch()
""",
    "an error": "launch()\nsys.exit('the end')",
    "many teams": "for k in range(50): tg.set_num_threads(2 + k % 3); launch()",
}


def python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT + script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.mark.parametrize("ending", ENDINGS, ids=str)
def test_the_interpreter_ends_cleanly(ending: str) -> None:
    done = python(f"tg.set_num_threads(4)\n{ENDINGS[ending]}")
    assert (done.returncode, done.stderr) == ((1, "the end\n") if ending == "an error" else (0, ""))
    assert done.stdout == "at exit 1 []\n", "workers are gone, launches still work"


# ---------------------------------------------------------------------------- the number of threads


def test_the_environment_sets_the_number() -> None:
    variable = "TINYGRAD_LSTM_NUM_THREADS"
    script = "print(launch(4), tg.get_num_threads(), threads._team.workers)"
    assert python(script, **{variable: "3"}).stdout.startswith("3 3 2\n")
    assert python(script, **{variable: ""}).stdout.split()[1] == str(threads._available())
    wrong = python("launch()", **{variable: "many"})
    assert wrong.returncode == 1
    assert f"ArgumentError: the environment variable {variable} is 'many'; expected a whole number" in wrong.stderr


@pytest.mark.parametrize("text", ["0", "-1", "1025", "2.5", "two", "1e3"])
def test_a_wrong_variable(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYGRAD_LSTM_NUM_THREADS", text)
    with pytest.raises(tg.ArgumentError, match="expected a whole number from 1 to 1024"):
        tg.get_num_threads()
    tg.set_num_threads(2)  # an explicit number does not ask
    assert tg.get_num_threads() == 2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this system")
def test_the_default_is_the_cpus_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINYGRAD_LSTM_NUM_THREADS", raising=False)
    allowed = os.sched_getaffinity(0)
    assert tg.get_num_threads() == len(allowed)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert tg.get_num_threads() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize("wrong", [1.0, "2", None, True, [2]])
def test_a_number_of_the_wrong_type(wrong: Any) -> None:
    before = tg.get_num_threads()
    with pytest.raises(tg.DTypeError, match="takes a whole number of threads, found"):
        tg.set_num_threads(wrong)
    assert tg.get_num_threads() == before


@pytest.mark.parametrize("wrong", [0, -3, 1025])
def test_a_number_out_of_range(wrong: int) -> None:
    before = tg.get_num_threads()
    with pytest.raises(tg.ArgumentError, match=f"from 1 to 1024 threads, found {wrong}"):
        tg.set_num_threads(wrong)
    assert tg.get_num_threads() == before


def test_numpy_integers_and_no_change() -> None:
    tg.set_num_threads(np.int32(2))
    team = threads._assemble()
    tg.set_num_threads(2)
    assert threads._assemble() is team and type(tg.get_num_threads()) is int
