"""Native functions run in parallel: a pool of threads of our own.

A launch runs its parts on the caller's thread and on workers.  Workers spin for a moment after each launch,
so that the next one of a training step finds them awake, and then sleep: a pool that is not used costs
nothing.  A launch never waits for a worker that has not begun; the caller takes what nobody else takes.

OpenMP would not survive a fork, and waits for all of its threads.
"""

from __future__ import annotations

import atexit
import ctypes
import operator
import os
import threading
import time
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from tinygrad_lstm.errors import ArgumentError, DTypeError

from . import codecache
from .control import LOCK, SEEN, SLOT, SLOTS, SPINS, WORKERS

__all__ = ["get_num_threads", "run", "set_num_threads"]

VARIABLE = "TINYGRAD_LSTM_NUM_THREADS"
MOST = 1024  # threads
SPIN = 1e-3  # seconds that an idle worker stays awake: as long as what stands between two launches of a training step
STOPPING = 2.0  # seconds that the end of the interpreter waits for parts that are still running

_lock = threading.Lock()
_threads: int | None = None  # what set_num_threads said
_team: _Team | None = None
_ending: list[_Team] = []  # told to stop, and perhaps still finishing a launch
_closed = False  # the interpreter is ending: no more workers
_native: Any = None  # launch.py, compiled
_serial: Any = None
_launch: Any = None


def _load() -> Any:
    """The compiled functions of launch.py."""
    global _native, _serial, _launch
    if _native is None:
        text = Path(__file__).with_name("launch.py").read_text(encoding="utf-8")
        native = codecache.load(text, stem="launch")
        _serial, _launch, _native = native.function("serial"), native.function("launch"), native
    return _native


def _c_lock(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(ctypes.pythonapi, name)
    function.restype, function.argtypes = result, list(arguments)
    return function


class _Team:
    """Workers and the control block that they share with launches.  Its size never changes: another number of
    threads is another team, while launches that are under way finish with this one."""

    def __init__(self, threads: int) -> None:
        self._locks: list[int] = []
        _load()
        self._memory = ctypes.create_string_buffer(SLOTS + SLOT * threads)
        self.control = -(-ctypes.addressof(self._memory) // SLOT) * SLOT
        self.threads = threads
        self._free = _c_lock("PyThread_free_lock", None, ctypes.c_void_p)
        # Spinning helps only where every thread has a CPU to spin on.
        self._write(SPINS, int(SPIN / _pause_seconds()) if 1 < threads <= _available() else 0)
        self._members: list[threading.Thread] = []
        try:
            self._start(threads - 1)
        except BaseException:  # Ctrl-C: nobody will ever see this team, nor stop it
            self._count(len(self._members))
            self.stop()
            raise
        self._count(len(self._members))

    def _start(self, workers: int) -> None:
        allocate = _c_lock("PyThread_allocate_lock", ctypes.c_void_p)
        acquire = _c_lock("PyThread_acquire_lock", ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
        for index in range(workers):
            lock = allocate()
            if not lock:
                return
            self._locks.append(lock)
            acquire(lock, 0)
            slot = SLOTS + SLOT * index
            self._write(slot + LOCK, lock)
            self._write(slot + SEEN, -1)
            member = threading.Thread(target=self._work, args=(index,), name=f"tinygrad_lstm-{index}", daemon=True)
            try:
                member.start()
            except RuntimeError:  # the system allows no more: the parts are shared by fewer
                return
            self._members.append(member)

    def _count(self, workers: int) -> None:
        self.workers = workers
        self._write(WORKERS, workers)

    def _write(self, offset: int, value: int) -> None:
        ctypes.c_int64.from_address(self.control + offset).value = value

    def _work(self, index: int) -> None:
        _native.function("work")(self.control, index)

    def stop(self) -> None:
        """Tell the workers to end; parts that they are running are finished."""
        _native.function("halt")(self.control)

    def is_alive(self) -> bool:
        """Whether some worker has not ended yet."""
        return any(member.is_alive() for member in self._members)

    def join(self, seconds: float) -> None:
        """Wait until the workers have ended, at most so long."""
        end = time.monotonic() + seconds
        for member in self._members:
            member.join(max(0.0, end - time.monotonic()))

    def __del__(self) -> None:
        # Workers and launches hold a reference, so nobody uses the locks now.
        for lock in self._locks:
            self._free(lock)


def _pause_seconds() -> float:
    """The length of one round of a spin loop: from 10 to 60 ns, depending on the CPU."""
    rounds, best = 500, 1.0
    for _ in range(5):
        start = time.perf_counter()
        _native.function("pauses")(rounds)
        best = min(best, time.perf_counter() - start)
    return max(best / rounds, 1e-9)


def _available() -> int:
    """The CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def get_num_threads() -> int:
    """How many threads native code may use, the caller's included.

    What :func:`set_num_threads` said; else the environment variable ``TINYGRAD_LSTM_NUM_THREADS``; else the
    number of CPUs that this process may run on.

    Returns
    -------
    int
        At least 1.

    Raises
    ------
    ArgumentError
        If the variable holds anything but a whole number from 1 to 1024.

    Examples
    --------
    >>> import tinygrad_lstm as tg
    >>> tg.get_num_threads() >= 1
    True
    """
    if _threads is not None:
        return _threads
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return min(_available(), MOST)
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= MOST:
        raise ArgumentError(
            f"the environment variable {VARIABLE} is {text!r}; expected a whole number from 1 to {MOST} "
            "(unset it to use every CPU that the process may run on)"
        )
    return value


def set_num_threads(n: SupportsIndex) -> None:
    """Set how many threads native code may use, the caller's included.

    May be called at any time, from any thread; launches under way finish with the threads that they have.
    Results do not depend on the number: it decides who computes what, never in which order a sum is taken.

    Parameters
    ----------
    n : int
        From 1 (everything runs on the calling thread) to 1024.  Above the number of CPUs nothing is gained.

    Raises
    ------
    DTypeError
        If ``n`` is not a whole number.
    ArgumentError
        If ``n`` is out of range.

    Examples
    --------
    >>> import tinygrad_lstm as tg
    >>> before = tg.get_num_threads()
    >>> tg.set_num_threads(2)
    >>> tg.get_num_threads()
    2
    >>> tg.set_num_threads(before)
    """
    global _threads, _team
    try:
        value = operator.index(n)
    except TypeError:
        value = None
    if value is None or isinstance(n, bool):
        raise DTypeError(f"set_num_threads takes a whole number of threads, found {n!r} of type {type(n).__name__}")
    if not 1 <= value <= MOST:
        raise ArgumentError(f"set_num_threads takes from 1 to {MOST} threads, found {value}")
    with _lock:
        _threads, old = value, _team
        if old is None or old.threads == value:
            return
        _team = None
        _ending[:] = [team for team in _ending if team.is_alive()] + [old]
    old.stop()


def run(function: int, argument: int, parts: int) -> int:
    """Run all parts of a native function, in parallel, without the GIL; returns when all are done.

    The calling thread takes part.  While one Python thread has the workers, the launches of others (and those
    from inside a part) run their parts one after another on their own thread.

    Parameters
    ----------
    function : int
        The address of a C function ``int64 f(int64 argument, int64 part)``.  It must not raise, nor touch
        Python objects.
    argument : int
        Passed on; in general the address of a table, which the caller keeps alive.
    parts : int
        The function is called for part = 0 .. parts - 1, once each, in any order.

    Returns
    -------
    int
        The bitwise or of what the parts returned.

    Examples
    --------
    >>> from tinygrad_lstm.kernels import codecache
    >>> text = '''
    ... from tinygrad_lstm.kernels.dialect import exported
    ... @exported
    ... def shifted(argument, part):
    ...     return argument << part
    ... '''
    >>> run(codecache.load(text, stem="example").address("shifted"), 1, 4)
    15
    """
    if (team := team_for(parts)) is not None:
        return _launch(team.control, function, argument, parts)
    if _serial is None:
        _load()
    return _serial(function, argument, parts)


def over_rows(function: int, rows: int, cost: int, *arguments: int) -> int:
    """Run a native function of (table, part) over rows that do not depend on one another, on as many threads as pay.

    Parameters
    ----------
    function : int
        The address of a C function, as for :func:`run`.  Its table holds the number of rows, how many of them a part
        takes, and the arguments.
    rows, cost : int
        How many, and about how many nanoseconds one takes.
    arguments : int

    Returns
    -------
    int
        As :func:`run`.
    """
    parts = max(1, min(count(), rows * cost // WORTH))
    chunk = -(-rows // parts)
    table = np.array((rows, chunk, *arguments), np.int64)
    return run(function, table.ctypes.data, -(-rows // chunk) if rows else 0)


WORTH = 20_000  # nanoseconds of work that are worth another thread


def count() -> int:
    """:func:`get_num_threads`, without asking the environment once there is a team."""
    if _threads is not None:
        return _threads
    team = _team
    return team.threads if team is not None else get_num_threads()


def loop_functions() -> tuple[Any, Any]:
    """``plain`` and ``steps`` of launch.py."""
    native = _load()
    return native.function("plain"), native.function("steps")


def team_for(parts: int) -> Any:
    """The workers for a launch of so many parts; None where it needs none.  Whoever uses its control block holds it."""
    if parts < 2:
        return None
    team = _team or _assemble()
    return team if team.workers else None


def _assemble() -> _Team:
    global _team
    with _lock:
        if _team is None:
            _team = _Team(1 if _closed else get_num_threads())
        return _team


def _close() -> None:
    """Before the interpreter ends: workers leave native code, which is about to be unloaded."""
    global _closed, _team
    with _lock:
        _closed = True
        old, _team = _team, None
        teams = [*_ending, old] if old is not None else [*_ending]
        _ending.clear()
    for team in teams:
        team.stop()
    end = time.monotonic() + STOPPING
    for team in teams:
        team.join(max(0.0, end - time.monotonic()))


def _after_fork() -> None:
    """The child has only the forking thread: what the others held or shared is left alone, and made anew."""
    global _lock, _team
    _lock, _team = threading.Lock(), None
    _ending.clear()


atexit.register(_close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
