"""Raw memory for nopython code: integers as addresses.  Imports Numba; used by generated code only."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.types.containers import StarArgUniTuple
from numba.extending import intrinsic

__all__ = ["call_address", "load8", "load32", "load64", "stack", "store64"]


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


@intrinsic
def store64(typingctx: Any, address: Any, value: Any) -> Any:
    """Writes an int64 to ``address``."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], ir.IntType(64).as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


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
