"""Atomic words, the CPU's pause, and locks that need no GIL, for nopython code.  Imports Numba.

Addresses are integers; a word is an int64 aligned to 8 bytes.  The orderings are those of the C11 memory
model, and each intrinsic is named after its own.
"""

from __future__ import annotations

import os
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

__all__ = [
    "acquire_lock", "compare_exchange", "fetch_add", "fetch_or", "load_acquire", "load_ordered", "load_relaxed",
    "pause", "release_lock", "store_ordered", "store_relaxed", "store_release", "yield_cpu",
]  # fmt: skip

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_WORD = types.int64


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _I64.as_pointer())


def _loads(ordering: str) -> Any:
    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        """The word at ``address``."""

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.load_atomic(_pointer(builder, args[0]), ordering, 8, typ=_I64)

        return _WORD(_WORD), generate

    return load


def _stores(ordering: str) -> Any:
    @intrinsic
    def store(typingctx: Any, address: Any, value: Any) -> Any:
        """Writes the word at ``address``."""

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            builder.store_atomic(args[1], _pointer(builder, args[0]), ordering, 8)
            return context.get_dummy_value()

        return types.void(_WORD, _WORD), generate

    return store


def _updates(operation: str) -> Any:
    @intrinsic
    def update(typingctx: Any, address: Any, value: Any) -> Any:
        """Combines ``value`` into the word at ``address``; returns what was there."""

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.atomic_rmw(operation, _pointer(builder, args[0]), args[1], "acq_rel")

        return _WORD(_WORD, _WORD), generate

    return update


load_relaxed, load_acquire, load_ordered = _loads("monotonic"), _loads("acquire"), _loads("seq_cst")
store_relaxed, store_release, store_ordered = _stores("monotonic"), _stores("release"), _stores("seq_cst")
fetch_add, fetch_or = _updates("add"), _updates("or")


@intrinsic
def compare_exchange(typingctx: Any, address: Any, expected: Any, desired: Any) -> Any:
    """Whether the word at ``address`` was ``expected``, and is ``desired`` now (sequentially consistent)."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pair = builder.cmpxchg(_pointer(builder, args[0]), args[1], args[2], "seq_cst", "seq_cst")
        return context.cast(builder, builder.extract_value(pair, 1), types.boolean, types.boolean)

    return types.boolean(_WORD, _WORD, _WORD), generate


@intrinsic
def pause(typingctx: Any) -> Any:
    """Tells the CPU that this is a spin loop: saves power, and leaves the core to a sibling thread."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        machine = builder.module.triple.split("-")[0]
        if machine in {"x86_64", "i386", "i686"}:
            _c_function(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        elif machine in {"aarch64", "arm64"}:
            _c_function(builder, "llvm.aarch64.hint", ir.VoidType(), [_I32(1)])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def yield_cpu(typingctx: Any) -> Any:
    """Lets another thread of the system run on this CPU."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _c_function(builder, "SwitchToThread" if os.name == "nt" else "sched_yield", _I32, [])
        return context.get_dummy_value()

    return types.void(), generate


# CPython's own locks: on every platform, in the stable interface, and usable by a thread without the GIL.


@intrinsic
def acquire_lock(typingctx: Any, lock: Any) -> Any:
    """Waits for a lock of PyThread_allocate_lock, asleep."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _c_function(builder, "PyThread_acquire_lock", _I32, [_byte_pointer(builder, args[0]), _I32(1)])
        return context.get_dummy_value()

    return types.void(_WORD), generate


@intrinsic
def release_lock(typingctx: Any, lock: Any) -> Any:
    """Releases a lock of PyThread_allocate_lock, whichever thread holds it."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _c_function(builder, "PyThread_release_lock", ir.VoidType(), [_byte_pointer(builder, args[0])])
        return context.get_dummy_value()

    return types.void(_WORD), generate


def _byte_pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.IntType(8).as_pointer())


def _c_function(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    signature = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)
