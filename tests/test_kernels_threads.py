"""The thread pool: every part once, no lost wake-ups, callers in several Python threads."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from thread_parts import (
    COUNT,
    MEET,
    PATIENCE,
    Held,
    check,
    counted,
    eventually,
    gather,
    parked,
    restored,
    states,
    team_of,
)

import tinygrad_lstm as tg
from tinygrad_lstm.kernels import codecache, threads
from tinygrad_lstm.kernels.control import LIMIT, LOCK, PARKED, RUNNING, SEEN, SLOTS, SPINS, STATE, STOP

__all__ = ["restored"]  # a fixture of every test here


def native(text: str) -> codecache.Program:
    """A program that calls the functions of launch.py."""
    functions = {"launch": 4, "pauses": 1, "sleep": 2, "wake": 2}
    head = "from tinygrad_lstm.kernels.dialect import entry, exported, external\n"
    symbols = [f"{name} = external({threads._load().symbol(name)!r}, {n})\n" for name, n in functions.items()]
    return codecache.load(head + "".join(symbols) + text, stem="test")


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
    storm = native(
        """
@entry
def storm(control, function, argument, launches):
    # At every distance from the end of the one before.
    for k in range(launches):
        pauses(k % 211)
        if launch(control, function, argument, 2) != 0:
            return k
    return -1
"""
    ).function("storm")
    words = np.array([2, 0], np.int64)
    assert storm(team.control, MEET, words.ctypes.data, 5000) == -1


def test_the_steps_of_the_handshake() -> None:
    """What no race can be made to show at will: the worker is between its two looks when the waker comes."""
    program = native(
        """
@entry
def sleeps(control, index):
    return sleep(control, index)

@entry
def wakes(control, index):
    return wake(control, index)
"""
    )
    sleep, wake, memory = program.function("sleeps"), program.function("wakes"), np.zeros(200, np.int64)
    control, slot = memory.ctypes.data, SLOTS // 8
    state, lock, seen, limit, stop = slot + STATE // 8, slot + LOCK // 8, slot + SEEN // 8, LIMIT // 8, STOP // 8
    api = ctypes.pythonapi
    api.PyThread_allocate_lock.restype = ctypes.c_void_p
    memory[lock] = pointer = api.PyThread_allocate_lock()  # free: who sleeps on it wakes up at once
    held = lambda: api.PyThread_acquire_lock(ctypes.c_void_p(pointer), 0) == 0
    slept, awake = 1, 0

    assert sleep(control, 0) == slept and memory[state] == PARKED and held()
    assert wake(control, 0) == 1 and memory[state] == RUNNING and not held()
    assert wake(control, 0) == 0 and memory[state] == RUNNING and held()
    memory[limit] = 1
    assert sleep(control, 0) == awake and memory[state] == RUNNING
    memory[seen] = 1
    memory[stop] = 1
    assert sleep(control, 0) == awake and memory[state] == RUNNING
    api.PyThread_free_lock(ctypes.c_void_p(pointer))


@pytest.mark.parametrize("number", [3, 8])
def test_no_wake_up_is_lost_among_many(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gather(team_of(number, 0.0, monkeypatch), 200)


@pytest.mark.parametrize("number", [2, 5])
def test_a_hundred_thousand_tiny_launches(number: int) -> None:
    team_of(number)
    counters = np.zeros(4, np.int64)
    for _ in range(100_000):
        threads.run(COUNT, counters.ctypes.data, 3)
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
    team._write(SPINS, 1 << 60)  # whoever is woken stays awake
    for _ in range(20):
        check(2)
    assert states(team)[1:] == [PARKED] * 6


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


def test_a_second_caller_does_not_wait_for_the_first() -> None:
    team = team_of(2)
    eventually(lambda: parked(team))
    with Held():
        assert states(team) == [RUNNING]
        for parts in range(10):
            check(parts)
    check(10)


def test_a_part_may_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    team = team_of(2)
    text = """
from tinygrad_lstm.kernels.memory import load64

@exported
def outer(argument, part):
    return launch(load64(argument), load64(argument + 8), argument + 16 + 8 * 10 * part, 10)
"""
    words = np.array([team.control, COUNT] + [0] * 50, np.int64)
    assert threads.run(native(text).address("outer"), words.ctypes.data, 5) == 2**10 - 1
    assert words.tolist()[2:] == [1] * 50


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
