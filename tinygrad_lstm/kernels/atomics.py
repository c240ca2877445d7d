"""Atomic words, the CPU's pause, and locks that need no GIL, for native code.

Addresses are integers; a word is an int64 aligned to 8 bytes.  The orderings are those of the C11 memory
model, and each intrinsic is named after its own.
"""

from __future__ import annotations

import os
from typing import Any

from llvmlite import ir

from .dialect import Intrinsic
from .instructions import I32, I64, declared
from .machine import target

__all__ = [
    "acquire_lock", "compare_exchange", "fetch_add", "fetch_or", "load_acquire", "load_ordered", "load_relaxed",
    "pause", "release_lock", "store_ordered", "store_relaxed", "store_release", "yield_cpu",
]  # fmt: skip


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, I64.as_pointer())


def _loads(ordering: str) -> Intrinsic:
    @Intrinsic
    def load(builder: Any, address: Any) -> Any:
        """The word at ``address``."""
        return builder.load_atomic(_pointer(builder, address), ordering, 8, typ=I64)

    return load


def _stores(ordering: str) -> Intrinsic:
    @Intrinsic
    def store(builder: Any, address: Any, value: Any) -> None:
        """Writes the word at ``address``."""
        builder.store_atomic(value, _pointer(builder, address), ordering, 8)

    return store


def _updates(operation: str) -> Intrinsic:
    @Intrinsic
    def update(builder: Any, address: Any, value: Any) -> Any:
        """Combines ``value`` into the word at ``address``; returns what was there."""
        return builder.atomic_rmw(operation, _pointer(builder, address), value, "acq_rel")

    return update


load_relaxed, load_acquire, load_ordered = _loads("monotonic"), _loads("acquire"), _loads("seq_cst")
store_relaxed, store_release, store_ordered = _stores("monotonic"), _stores("release"), _stores("seq_cst")
fetch_add, fetch_or = _updates("add"), _updates("or")


@Intrinsic
def compare_exchange(builder: Any, address: Any, expected: Any, desired: Any) -> Any:
    """Whether the word at ``address`` was ``expected``, and is ``desired`` now (sequentially consistent)."""
    pair = builder.cmpxchg(_pointer(builder, address), expected, desired, "seq_cst", "seq_cst")
    return builder.extract_value(pair, 1)


@Intrinsic
def pause(builder: Any) -> None:
    """Tells the CPU that this is a spin loop: saves power, and leaves the core to a sibling thread."""
    machine = target().triple.split("-")[0]
    if machine in {"x86_64", "i386", "i686"}:
        _c_function(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
    elif machine in {"aarch64", "arm64"}:
        _c_function(builder, "llvm.aarch64.hint", ir.VoidType(), [I32(1)])


@Intrinsic
def yield_cpu(builder: Any) -> None:
    """Lets another thread of the system run on this CPU."""
    _c_function(builder, "SwitchToThread" if os.name == "nt" else "sched_yield", I32, [])


# CPython's own locks: on every platform, in the stable interface, and usable by a thread without the GIL.


@Intrinsic
def acquire_lock(builder: Any, lock: Any) -> None:
    """Waits for a lock of PyThread_allocate_lock, asleep."""
    _c_function(builder, "PyThread_acquire_lock", I32, [_byte_pointer(builder, lock), I32(1)])


@Intrinsic
def release_lock(builder: Any, lock: Any) -> None:
    """Releases a lock of PyThread_allocate_lock, whichever thread holds it."""
    _c_function(builder, "PyThread_release_lock", ir.VoidType(), [_byte_pointer(builder, lock)])


def _byte_pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.IntType(8).as_pointer())


def _c_function(builder: Any, name: str, result: Any, args: list[Any]) -> None:
    builder.call(declared(builder.module, ir.FunctionType(result, [a.type for a in args]), name), args)
