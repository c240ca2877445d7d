"""Raw memory for native code: integers as addresses.  Used by translated text only (see :mod:`.translate`)."""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir

from .dialect import Intrinsic
from .instructions import I64, on_stack

__all__ = [
    "call_address", "load8", "load32", "load64", "load_float32", "load_float64", "stack", "store8", "store32",
    "store64", "store_float32", "store_float64",
]  # fmt: skip


def _load(builder: Any, address: Any, bits: int) -> Any:
    value = builder.load(builder.inttoptr(address, ir.IntType(bits).as_pointer()))
    return value if bits == 64 else builder.sext(value, I64)


def _store(builder: Any, address: Any, value: Any, bits: int) -> None:
    value = builder.trunc(value, ir.IntType(bits)) if bits < 64 else value
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()))


def _load_float(builder: Any, address: Any, type_: Any) -> Any:
    return builder.load(builder.inttoptr(address, type_.as_pointer()))


def _store_float(builder: Any, address: Any, value: Any, type_: Any) -> None:
    if value.type != type_:
        value = (builder.fptrunc if isinstance(value.type, ir.DoubleType) else builder.fpext)(value, type_)
    builder.store(value, builder.inttoptr(address, type_.as_pointer()))


# The integer at an address, widened to int64, and the low part of an int64 to an address.
load8, load32, load64 = (Intrinsic(partial(_load, bits=bits)) for bits in (8, 32, 64))
store8, store32, store64 = (Intrinsic(partial(_store, bits=bits)) for bits in (8, 32, 64))
load_float32, load_float64 = (Intrinsic(partial(_load_float, type_=t)) for t in (ir.FloatType(), ir.DoubleType()))
store_float32, store_float64 = (Intrinsic(partial(_store_float, type_=t)) for t in (ir.FloatType(), ir.DoubleType()))


@Intrinsic
def stack(builder: Any, words: Any) -> Any:
    """The address of ``words`` (a literal) int64 of scratch, gone when the function returns."""
    return builder.ptrtoint(on_stack(builder, ir.ArrayType(I64, words.constant)), I64)


@Intrinsic
def call_address(builder: Any, address: Any, *arguments: Any) -> Any:
    """What the C function at ``address`` returns, an int64, for int64 arguments (any number of them)."""
    function = ir.FunctionType(I64, [I64] * len(arguments))
    return builder.call(builder.inttoptr(address, function.as_pointer()), arguments)
