"""The handshake between a launch and the worker threads.  The text of this module is compiled by
:func:`.codecache.load`; it is never imported.

Tickets number the parts of all launches, from the first to the last, and are never used twice.  NEXT is the
first that nobody has claimed, LIMIT the first that no launch has issued; between launches they are equal.  A
launch writes its fields, then raises LIMIT (release).  A thread that finds NEXT below LIMIT (acquire) claims
the ticket by a compare-exchange; there is no ABA, since NEXT only grows.  From then on the fields stay as
they are until DONE has counted its part, for the next launch waits for that.  So a worker that is held up
before its claim, for ever so long, does no harm, and no launch waits for it.

A worker parks in two steps: it writes PARKED, then looks at LIMIT and STOP again.  A waker raises one of
these, then looks for PARKED.  In the one order of all sequentially consistent accesses, one of the two comes
second and sees the other's.  Whoever turns PARKED back to RUNNING, by compare-exchange, owns the wake-up: the
worker then does not sleep, or the waker releases its lock once, and the worker acquires it once.
"""

from __future__ import annotations

from tinygrad_lstm.kernels.atomics import (
    acquire_lock,
    compare_exchange,
    fetch_add,
    fetch_or,
    load_acquire,
    load_ordered,
    load_relaxed,
    pause,
    release_lock,
    store_ordered,
    store_relaxed,
    store_release,
    yield_cpu,
)
from tinygrad_lstm.kernels.control import (
    ARGUMENT,
    BASE,
    BUSY,
    DONE,
    FUNCTION,
    LIMIT,
    LOCK,
    NEXT,
    PARKED,
    PARTS,
    RESULT,
    RUNNING,
    SEEN,
    SLOT,
    SLOTS,
    SPINS,
    STATE,
    STOP,
    WORKERS,
)
from tinygrad_lstm.kernels.dialect import entry, exported, private
from tinygrad_lstm.kernels.memory import call_address, load32, load64, store64

POLITE = 64  # a power of two; rounds of a spin loop between two offers of the CPU

HEAD = object.__basicsize__  # of an array object: data, ndim, dimensions, strides, base, descr, flags follow it
ITEMS = tuple.__basicsize__


@entry
def pauses(count: int) -> int:
    """As long as so many rounds of a spin loop."""
    k = 0
    while k < count:
        pause()
        k += 1
    return k


@private
def relax(k: int) -> int:
    """Round k of a spin loop.  Where the system has put two threads of a team on one CPU, the one that spins
    would otherwise keep the one that works from it."""
    if k & (POLITE - 1) == POLITE - 1:
        yield_cpu()
    else:
        pause()
    return k + 1


@entry
def serial(function: int, argument: int, parts: int) -> int:
    """All parts, one after another."""
    result = 0
    for part in range(parts):
        result |= call_address(function, argument, part)
    return result


@exported
def wake(control: int, index: int) -> int:
    """Wake the worker with this index if it is parked."""
    slot = control + SLOTS + SLOT * index
    if load_ordered(slot + STATE) == PARKED and compare_exchange(slot + STATE, PARKED, RUNNING):
        release_lock(load_relaxed(slot + LOCK))
        return 1
    return 0


@private
def wake_children(control: int, node: int) -> int:
    """Each thread wakes two others: a wake-up is a call of the system, and the launching thread has work."""
    needed = min(load_relaxed(control + PARTS) - 1, load_relaxed(control + WORKERS))
    woken = 0
    for child in range(2 * node + 1, 2 * node + 3):
        if child <= needed:
            woken += wake(control, child - 1)
    return woken


@entry
def halt(control: int) -> int:
    """Tell all workers to end."""
    store_ordered(control + STOP, 1)
    woken = 0
    for index in range(load_relaxed(control + WORKERS)):
        woken += wake(control, index)
    return woken


@private
def claim(control: int) -> int:
    """The ticket that this thread has to run next, -1 if none is left."""
    while True:
        ticket = load_acquire(control + NEXT)
        if ticket >= load_acquire(control + LIMIT):
            return -1
        if compare_exchange(control + NEXT, ticket, ticket + 1):
            return ticket


@exported
def sleep(control: int, index: int) -> int:
    """Park the worker with this index until it is woken."""
    slot = control + SLOTS + SLOT * index
    seen = load_relaxed(slot + SEEN)
    store_ordered(slot + STATE, PARKED)
    if load_ordered(control + LIMIT) != seen or load_ordered(control + STOP) != 0:  # noqa: SIM102 - a handshake
        if compare_exchange(slot + STATE, PARKED, RUNNING):
            return 0
    acquire_lock(load_relaxed(slot + LOCK))
    return 1


@entry
def work(control: int, index: int) -> int:
    """The life of a worker: spin, park, take parts, until STOP."""
    slot = control + SLOTS + SLOT * index
    idle = 0
    while load_ordered(control + STOP) == 0:
        limit = load_ordered(control + LIMIT)
        if limit == load_relaxed(slot + SEEN):
            if idle < load_relaxed(control + SPINS):
                idle = relax(idle)
            else:
                sleep(control, index)
                idle = 0
            continue
        store_relaxed(slot + SEEN, limit)
        idle = 0
        if load_relaxed(control + NEXT) < limit:
            wake_children(control, index + 1)
        while True:
            ticket = claim(control)
            if ticket < 0:
                break
            part = ticket - load_relaxed(control + BASE)
            result = call_address(load_relaxed(control + FUNCTION), load_relaxed(control + ARGUMENT), part)
            if result != 0:
                fetch_or(control + RESULT, result)
            fetch_add(control + DONE, 1)
    return 0


@entry
def launch(control: int, function: int, argument: int, parts: int) -> int:
    """All parts, on this thread and the workers; one after another if another thread has the workers."""
    if not compare_exchange(control + BUSY, 0, 1):
        return serial(function, argument, parts)
    base = load_relaxed(control + LIMIT)
    done = load_relaxed(control + DONE)
    store_relaxed(control + FUNCTION, function)
    store_relaxed(control + ARGUMENT, argument)
    store_relaxed(control + BASE, base)
    store_relaxed(control + PARTS, parts)
    store_ordered(control + LIMIT, base + parts)
    wake_children(control, 0)
    result = 0
    while True:
        ticket = claim(control)
        if ticket < 0:
            break
        result |= call_address(function, argument, ticket - base)
        done -= 1
    # Only parts that a worker is running are waited for.
    idle = 0
    while load_acquire(control + DONE) != done + parts:
        idle = relax(idle)
    result |= load_relaxed(control + RESULT)
    store_relaxed(control + RESULT, 0)
    store_release(control + BUSY, 0)
    return result


@entry
def plain(operands: int, first: int, stop: int, ndarray_type: int) -> bool:
    """Whether these items of a tuple are arrays in C order."""
    for k in range(first, stop):
        array = load64(operands + ITEMS + 8 * k)
        if load64(array + HEAD - 8) != ndarray_type or load32(array + HEAD + 48) & 1 == 0:
            return False
    return True


@entry
def steps(control: int, prepare: int, loop: int, table: int, operands: int, start: int, stop: int, parts: int) -> int:
    """The steps from ``start`` to ``stop`` of a compiled loop (see compiler/generate.py); all of its matrices are
    packed by ``prepare`` (0: nothing to pack) before the first."""
    store64(table, operands)
    store64(table + 8, start)
    store64(table + 16, stop)
    if start == 0 and prepare != 0:
        call_address(prepare, table, 0)
    if parts > 1 and control != 0:
        return launch(control, loop, table, parts)
    return serial(loop, table, parts)
