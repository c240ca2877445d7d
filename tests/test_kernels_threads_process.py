"""The thread pool across forks and at the interpreter's end; the number of threads."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from thread_parts import PATIENCE, Held, check, eventually, forked, gather, parked, restored, team_of

import tinygrad_lstm as tg
from tinygrad_lstm.kernels import codecache, machine, threads
from tinygrad_lstm.kernels.translate import translate

__all__ = ["restored"]  # a fixture of every test here


# ---------------------------------------------------------------------------- processes


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
    with threads._lock, codecache._lock:  # a child that waits for them waits for ever
        forker = threading.Thread(target=lambda: statuses.append(forked(load_and_check)))
        statuses: list[int] = []
        forker.start()
        forker.join(2 * PATIENCE)
    assert statuses == [0]


def load_and_check() -> None:
    head = "from tinygrad_lstm.kernels.dialect import entry\n"
    assert codecache.load(head + "@entry\ndef f():\n    return 7\n", stem="test").function("f")() == 7
    check(5)


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
from tinygrad_lstm.kernels.atomics import fetch_add
from tinygrad_lstm.kernels.dialect import exported

@exported
def count(argument, part):
    fetch_add(argument + 8 * part, 1)
    return part
'''
count = codecache.load(source, stem="test").address("count")
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


@forks
def test_a_fork_while_another_thread_compiles() -> None:
    """The child can compile: no lock of the compiler is held in it by a thread that is not there."""
    go, texts = threading.Event(), iter(range(1000))

    def compile_many() -> None:
        while not go.is_set():
            machine.machine_code(translate(TEXT.format(next(texts)), "busy", "<busy>")[0])

    def compile_one() -> None:
        machine.machine_code(translate(TEXT.format(-1), "child", "<child>")[0])

    machine.machine_code(translate(TEXT.format(-2), "first", "<first>")[0])  # imports Numba
    thread = threading.Thread(target=compile_many)
    thread.start()
    try:
        assert [forked(compile_one) for _ in range(4)] == [0] * 4
    finally:
        go.set()
        thread.join()


TEXT = """
from tinygrad_lstm.kernels.dialect import entry

@entry
def f(n):
    total = 0
    for k in range(n):
        total += k * {}
    return total
"""
