"""Writing C functions in LLVM IR: arithmetic on addresses, loops, vectors of one dtype.

Used while native code is generated.  Every function made here is a C function of int64 arguments
(addresses, counts, strides in bytes) that returns an int64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from llvmlite import ir

from .instructions import I32, I64, declared, for_range
from .machine import target

__all__ = ["I32", "I64", "Code", "Tile", "define", "tile_for"]


class Tile(NamedTuple):
    """The registers a micro-kernel sums in."""

    dtype: str
    lanes: int
    vectors: int
    rows: int

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 8

    @property
    def panel(self) -> int:
        """P: columns of a panel of B, and of a tile of C."""
        return self.lanes * self.vectors

    @property
    def scalar(self) -> Any:
        return ir.FloatType() if self.dtype == "float32" else ir.DoubleType()

    @property
    def vector(self) -> Any:
        return ir.VectorType(self.scalar, self.lanes)

    @property
    def suffix(self) -> str:
        return f"v{self.lanes}f{8 * self.itemsize}"


def tile_for(dtype: str) -> Tile:
    """What fits the registers of the CPU that is compiled for: sums, one row of the panel, a broadcast."""
    width = target().vector_bytes
    many = width == 64 or target().triple.startswith(("aarch64", "arm64"))  # 32 registers, else 16
    lanes = width // (4 if dtype == "float32" else 8)
    # Without three-operand instructions (SSE) a product needs a register of its own.
    return Tile(dtype, lanes, 4, 6) if many else Tile(dtype, lanes, 2, 6 if width == 32 else 4)


class Code:
    """A function being written: arithmetic on addresses, loops, loads and stores of one dtype."""

    def __init__(self, function: Any, tile: Tile) -> None:
        self.function, self.tile = function, tile
        self.b = ir.IRBuilder(function.append_basic_block("entry"))

    def index(self, base: Any, *terms: tuple[Any, Any]) -> Any:
        """``base + sum(count * stride)``."""
        for count, stride in terms:
            base = self.b.add(base, self.b.mul(_int(count), _int(stride)))
        return base

    def least(self, x: Any, y: Any) -> Any:
        return self.b.select(self.b.icmp_signed("<", _int(x), _int(y)), _int(x), _int(y))

    def most(self, x: Any, y: Any) -> Any:
        return self.b.select(self.b.icmp_signed(">", _int(x), _int(y)), _int(x), _int(y))

    def carry(
        self, start: Any, stop: Any, step: int, carried: Sequence[Any], body: Callable[[Any, list[Any]], Sequence[Any]]
    ) -> list[Any]:
        """``for i in range(start, stop, step)`` with values carried from one round to the next."""
        b = self.b
        before, head = b.block, b.append_basic_block("head")
        inside, after = b.append_basic_block("body"), b.append_basic_block("after")
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(I64)
        values = [b.phi(value.type) for value in carried]
        b.cbranch(b.icmp_signed("<", index, _int(stop)), inside, after)
        b.position_at_end(inside)
        results = body(index, values)
        following, last = b.add(index, I64(step)), b.block
        b.branch(head)
        for phi, first, then in zip([index, *values], [_int(start), *carried], [following, *results], strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(then, last)
        b.position_at_end(after)
        return values

    @contextmanager
    def loop(self, start: Any, stop: Any, step: int = 1) -> Iterator[Any]:
        with for_range(self.b, _int(start), _int(stop), step) as index:
            yield index

    def call(self, function: Any, *args: Any) -> Any:
        return self.b.call(function, [_int(arg) for arg in args])

    def end(self) -> Any:
        self.b.ret(I64(0))
        return self.function

    # One number, one vector.

    def number(self, address: Any) -> Any:
        return self.b.load(self.b.inttoptr(address, self.tile.scalar.as_pointer()))

    def put_number(self, value: Any, address: Any) -> None:
        self.b.store(value, self.b.inttoptr(address, self.tile.scalar.as_pointer()))

    def vector(self, address: Any, mask: Any = None, other: float = 0.0) -> Any:
        """The vector at ``address``; where a mask is given, its lanes alone are read, the others are ``other``."""
        pointer = self.b.inttoptr(address, self.tile.vector.as_pointer())
        if mask is None:
            return self.b.load(pointer, align=self.tile.itemsize)
        type_ = ir.FunctionType(self.tile.vector, [pointer.type, I32, mask.type, self.tile.vector])
        load = declared(self.function.module, type_, f"llvm.masked.load.{self.tile.suffix}.p0")
        return self.b.call(load, [pointer, I32(self.tile.itemsize), mask, self.constant(other)])

    def put_vector(self, value: Any, address: Any, mask: Any = None) -> None:
        pointer = self.b.inttoptr(address, self.tile.vector.as_pointer())
        if mask is None:
            self.b.store(value, pointer, align=self.tile.itemsize)
            return
        type_ = ir.FunctionType(ir.VoidType(), [self.tile.vector, pointer.type, I32, mask.type])
        store = declared(self.function.module, type_, f"llvm.masked.store.{self.tile.suffix}.p0")
        self.b.call(store, [value, pointer, I32(self.tile.itemsize), mask])

    def prefetch(self, address: Any) -> None:
        pointer = ir.IntType(8).as_pointer()
        type_ = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        function = declared(self.function.module, type_, "llvm.prefetch.p0")
        self.b.call(function, [self.b.inttoptr(address, pointer), I32(0), I32(3), I32(1)])

    def constant(self, number: float) -> Any:
        return ir.Constant(self.tile.vector, [number] * self.tile.lanes)

    def splat(self, scalar: Any) -> Any:
        type_ = ir.VectorType(scalar.type, self.tile.lanes)
        undefined = ir.Constant(type_, ir.Undefined)
        first = self.b.insert_element(undefined, scalar, I32(0))
        return self.b.shuffle_vector(
            first, undefined, ir.Constant(ir.VectorType(I32, self.tile.lanes), [0] * self.tile.lanes)
        )

    def mask(self, count: Any) -> Any:
        """The first ``count`` lanes."""
        type_ = ir.VectorType(I32, self.tile.lanes)
        numbers = ir.Constant(type_, list(range(self.tile.lanes)))
        return self.b.icmp_signed("<", numbers, self.splat(self.b.trunc(count, I32)))

    def masks(self, columns: Any) -> list[Any]:
        """Of each vector of a panel of which ``columns`` columns exist."""
        lanes = self.tile.lanes
        within = self.least(self.most(columns, 0), self.tile.panel)
        return [self.mask(self.b.sub(within, I64(v * lanes))) for v in range(self.tile.vectors)]

    def fmuladd(self, x: Any, y: Any, z: Any) -> Any:
        # Not llvm.fma, which is a library call where the CPU has no such instruction.
        suffix = self.tile.suffix if isinstance(x.type, ir.VectorType) else f"f{8 * self.tile.itemsize}"
        type_ = ir.FunctionType(x.type, [x.type] * 3)
        return self.b.call(declared(self.function.module, type_, f"llvm.fmuladd.{suffix}"), [x, y, z])


def _int(value: Any) -> Any:
    return I64(value) if isinstance(value, int) else value


def define(module: Any, tile: Tile, name: str, parameters: str) -> tuple[Code, list[Any]]:
    """A new function ``int64 name(int64 ...)``, private to the module and never inlined."""
    names = parameters.split()
    function = ir.Function(module, ir.FunctionType(I64, [I64] * len(names)), f"tinygrad_lstm.{name}.{tile.dtype}")
    function.linkage = "internal"
    function.attributes.add("noinline")
    function.attributes.add("nounwind")
    for argument, text in zip(function.args, names, strict=True):
        argument.name = text
    return Code(function, tile), list(function.args)
