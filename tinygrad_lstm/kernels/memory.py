"""Raw memory for nopython code: integers as addresses.  Imports Numba; used by generated code only."""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.types.containers import StarArgUniTuple
from numba.extending import intrinsic

__all__ = [
    "call_address", "load8", "load32", "load64", "load_float32", "load_float64", "stack", "store8", "store32",
    "store64", "store_float32", "store_float64",
]  # fmt: skip


def _load(builder: Any, address: Any, bits: int) -> Any:
    value = builder.load(builder.inttoptr(address, ir.IntType(bits).as_pointer()))
    return value if bits == 64 else builder.sext(value, ir.IntType(64))


@intrinsic
def load64(typingctx: Any, address: Any) -> Any:
    """The int64 at ``address``."""
    return types.int64(types.int64), lambda context, builder, sig, args: _load(builder, args[0], 64)


@intrinsic
def load32(typingctx: Any, address: Any) -> Any:
    """The int32 at ``address``, widened."""
    return types.int64(types.int64), lambda context, builder, sig, args: _load(builder, args[0], 32)


@intrinsic
def load8(typingctx: Any, address: Any) -> Any:
    """The int8 at ``address``, widened."""
    return types.int64(types.int64), lambda context, builder, sig, args: _load(builder, args[0], 8)


def _floating(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    kind = context.get_value_type(sig.return_type)
    return builder.load(builder.inttoptr(args[0], kind.as_pointer()))


@intrinsic
def load_float32(typingctx: Any, address: Any) -> Any:
    """The float32 at ``address``."""
    return types.float32(types.int64), _floating


@intrinsic
def load_float64(typingctx: Any, address: Any) -> Any:
    """The float64 at ``address``."""
    return types.float64(types.int64), _floating


def _store(context: Any, builder: Any, sig: Any, args: Any, bits: int = 0) -> Any:
    value = builder.trunc(args[1], ir.IntType(bits)) if 0 < bits < 64 else args[1]
    builder.store(value, builder.inttoptr(args[0], value.type.as_pointer()))
    return context.get_dummy_value()


@intrinsic
def store64(typingctx: Any, address: Any, value: Any) -> Any:
    """Writes an int64 to ``address``."""
    return types.void(types.int64, types.int64), _store


@intrinsic
def store32(typingctx: Any, address: Any, value: Any) -> Any:
    """Writes the low half of an int64 to ``address``."""
    return types.void(types.int64, types.int64), partial(_store, bits=32)


@intrinsic
def store8(typingctx: Any, address: Any, value: Any) -> Any:
    """Writes the lowest byte of an int64 to ``address``."""
    return types.void(types.int64, types.int64), partial(_store, bits=8)


@intrinsic
def store_float32(typingctx: Any, address: Any, value: Any) -> Any:
    """Writes a float32 to ``address``."""
    return types.void(types.int64, types.float32), _store


@intrinsic
def store_float64(typingctx: Any, address: Any, value: Any) -> Any:
    """Writes a float64 to ``address``."""
    return types.void(types.int64, types.float64), _store


@intrinsic
def stack(typingctx: Any, words: Any) -> Any:
    """The address of ``words`` (a literal) int64 of scratch, gone when the function returns."""
    if not isinstance(words, types.IntegerLiteral):
        return None
    count = words.literal_value

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.ptrtoint(cgutils.alloca_once(builder, ir.ArrayType(ir.IntType(64), count)), ir.IntType(64))

    return types.int64(words), generate


@intrinsic
def call_address(typingctx: Any, address: Any, *arguments: Any) -> Any:
    """What the C function at ``address`` returns, an int64, for int64 arguments (any number of them)."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        words = cgutils.unpack_tuple(builder, args[1])
        i64 = ir.IntType(64)
        function = ir.FunctionType(i64, [i64] * len(words))
        return builder.call(builder.inttoptr(args[0], function.as_pointer()), words)

    return types.int64(types.int64, StarArgUniTuple(types.int64, len(arguments))), generate
