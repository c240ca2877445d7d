"""One row of a loop body in native code: an expression, and reductions of it, over the columns of a row.

The code that a compiled loop is made of.  A row's length is known when the code is generated, so the
tail is one masked vector; every lane computes the same instructions wherever it stands, so results do not
depend on how rows are shared out.  Imported lazily, by generated modules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from .dialect import Intrinsic
from .expression import Expression, Node
from .instructions import declared, for_range, on_stack
from .lowering import apply
from .machine import target
from .native import emit
from .vector import Lanes, Value

__all__ = ["copy_row", "row_kernel"]

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_ITEMSIZE = {"float32": 4, "float64": 8, "bool": 1, "int32": 4, "int64": 8}
_SCALAR = {"float32": ir.FloatType(), "float64": ir.DoubleType(), "bool": _I8, "int32": _I32, "int64": _I64}
_SUFFIX = {"float32": "f32", "float64": "f64", "bool": "i8", "int32": "i32", "int64": "i64"}
_NEUTRAL = {"sum": 0.0, "max": -math.inf, "min": math.inf}
_COMBINE = {"sum": "add", "max": "maximum", "min": "minimum"}


def row_kernel(
    n_inputs: int, nodes: tuple[tuple[Any, ...], ...], outputs: tuple[int, ...], dtypes: tuple[str, ...],
    along: tuple[bool, ...], reductions: tuple[str, ...], targets: tuple[int, ...], columns: int,
) -> Intrinsic:  # fmt: skip
    """A function of addresses (inputs..., targets...): the expression on one row of ``columns`` elements.

    Parameters
    ----------
    n_inputs, nodes, outputs, dtypes
        The expression and the dtypes of its inputs.
    along : one flag per input
        Whether it has an element for every column; else one element for the row.
    reductions : one word per output
        ``""``, or ``sum``, ``max``, ``min``: then a single element is written.
    targets : indices of outputs
        Where each written address gets its value from (an output may be written to several places).
    columns : int
    """
    expression = Expression(n_inputs, [Node(*node) for node in nodes], outputs, False)

    @Intrinsic
    def row(builder: Any, *addresses: Any) -> None:
        writer = _Row(builder, expression, dtypes, along, reductions, columns)
        writer.write(addresses[:n_inputs], addresses[n_inputs:], targets)

    return row


class _Row:
    def __init__(
        self, builder: Any, expression: Expression, dtypes: tuple[str, ...], along: tuple[bool, ...],
        reductions: tuple[str, ...], columns: int,
    ) -> None:  # fmt: skip
        results = [d.name for d in expression.result_dtypes(dtypes)]
        widest = 4 if "float32" in (*dtypes, *results) else 8
        # Few columns get few lanes: what a mask writes has to reach the cache before it can be read again.
        self.count = min(max(2, target().vector_bytes // widest), 1 << (columns - 1).bit_length())
        self.lanes = Lanes(builder, self.count)
        self.builder, self.expression, self.columns = builder, expression, columns
        self.dtypes, self.results, self.along, self.reductions = dtypes, results, along, reductions

    def _scalar(self, dtype: str) -> Any:
        return _SCALAR[dtype]

    def _vector(self, dtype: str) -> Any:
        return ir.VectorType(self._scalar(dtype), self.count) if self.count > 1 else self._scalar(dtype)

    def write(self, inputs: Sequence[Any], addresses: Sequence[Any], targets: tuple[int, ...]) -> None:
        b = self.builder
        splats = [None if a else self._splat(x, d) for x, a, d in zip(inputs, self.along, self.dtypes, strict=True)]
        # Additions that wait for one another cost their latency: short chains get several sums side by side.
        full, rest = divmod(self.columns, self.count)
        side = min(full, 4 if len(self.expression.nodes) <= 16 else 1) if any(self.reductions) else 1
        side = max(side, 1)
        folds: list[list[Any]] = []
        for kind, dtype in zip(self.reductions, self.results, strict=True):
            cells = []
            for _ in range(side if kind else 0):
                cell = on_stack(b, self._vector(dtype))
                b.store(self.lanes.literal(self._vector(dtype), _NEUTRAL[kind]), cell)
                cells.append(cell)
            folds.append(cells)

        def chunk(column: Any, mask: Any, lane: int = 0) -> None:
            values = [
                self._load(b.add(x, b.mul(column, _I64(_ITEMSIZE[d]))), d, mask) if s is None else s
                for x, s, d in zip(inputs, splats, self.dtypes, strict=True)
            ]
            results = emit(self.expression, values)
            for k, value in enumerate(results):
                if self.reductions[k]:
                    self._fold(k, folds[k][lane], value, mask)
            for address, k in zip(addresses, targets, strict=True):
                if not self.reductions[k]:
                    place = b.add(address, b.mul(column, _I64(_ITEMSIZE[self.results[k]])))
                    self._store(results[k], place, mask)

        whole = full // side * side
        if whole == side:
            for lane in range(side):
                chunk(_I64(lane * self.count), None, lane)
        elif whole:
            with for_range(b, _I64(0), _I64(whole * self.count), side * self.count) as column:
                for lane in range(side):
                    chunk(b.add(column, _I64(lane * self.count)), None, lane)
        for lane in range(full - whole):
            chunk(_I64((whole + lane) * self.count), None, lane)
        if rest:
            lanes = ir.VectorType(ir.IntType(1), self.count)
            chunk(_I64(full * self.count), ir.Constant(lanes, [k < rest for k in range(self.count)]))
        for address, k in zip(addresses, targets, strict=True):
            if self.reductions[k]:
                total = self._across(self._gathered(folds[k], k), self.reductions[k])
                b.store(total, b.inttoptr(address, self._scalar(self.results[k]).as_pointer()))

    def _fold(self, k: int, cell: Any, value: Value, mask: Any) -> None:
        b, kind = self.builder, self.reductions[k]
        raw = value.ir
        if mask is not None:
            raw = b.select(mask, raw, ir.Constant(raw.type, [_NEUTRAL[kind]] * self.count))
        before = Value(self.lanes, b.load(cell), self.results[k])
        after = apply(_COMBINE[kind], [before, Value(self.lanes, raw, self.results[k])], [None, None])
        b.store(after.ir, cell)

    def _gathered(self, cells: list[Any], k: int) -> Value:
        """The sums side by side as one, pairwise."""
        values = [Value(self.lanes, self.builder.load(cell), self.results[k]) for cell in cells]
        while len(values) > 1:
            pairs = [values[i : i + 2] for i in range(0, len(values), 2)]
            values = [
                apply(_COMBINE[self.reductions[k]], pair, [None, None]) if len(pair) == 2 else pair[0] for pair in pairs
            ]
        return values[0]

    def _across(self, value: Value, kind: str) -> Any:
        """The lanes of a vector combined pairwise, the halves first."""
        b, raw, count = self.builder, value.ir, self.count
        while count > 1:
            half = count // 2
            undefined = ir.Constant(raw.type, ir.Undefined)

            def part(start: int, raw: Any = raw, undefined: Any = undefined, half: int = half) -> Any:
                index = ir.Constant(ir.VectorType(_I32, half), list(range(start, start + half)))
                return b.shuffle_vector(raw, undefined, index)

            low, high = part(0), part(half)
            count = half
            lanes = Lanes(b, half)
            if half == 1:
                low, high = (b.extract_element(x, _I32(0)) for x in (low, high))
            pair = [Value(lanes, low, value.dtype), Value(lanes, high, value.dtype)]
            raw = apply(_COMBINE[kind], pair, [None, None]).ir
        return raw

    def _broadcast(self, scalar: Any, type_: Any) -> Any:
        if self.count == 1:
            return scalar
        b = self.builder
        undefined = ir.Constant(type_, ir.Undefined)
        zeros = ir.Constant(ir.VectorType(_I32, self.count), [0] * self.count)
        return b.shuffle_vector(b.insert_element(undefined, scalar, _I32(0)), undefined, zeros)

    def _truth(self, raw: Any, dtype: str) -> Value:
        if dtype == "bool":
            raw = self.builder.icmp_signed("!=", raw, self.lanes.literal(raw.type, 0))
        return Value(self.lanes, raw, dtype)

    def _splat(self, address: Any, dtype: str) -> Value:
        b = self.builder
        scalar = b.load(b.inttoptr(address, self._scalar(dtype).as_pointer()))
        return self._truth(self._broadcast(scalar, self._vector(dtype)), dtype)

    def _load(self, address: Any, dtype: str, mask: Any) -> Value:
        b, vector = self.builder, self._vector(dtype)
        pointer = b.inttoptr(address, vector.as_pointer())
        if mask is None:
            raw = b.load(pointer, align=_ITEMSIZE[dtype])
        else:
            zero = ir.Constant(vector, [0.0 if dtype[0] == "f" else 0] * self.count)
            kind = ir.FunctionType(vector, [pointer.type, _I32, mask.type, vector])
            load = declared(b.module, kind, f"llvm.masked.load.{self._suffix(dtype)}")
            raw = b.call(load, [pointer, _I32(_ITEMSIZE[dtype]), mask, zero])
        return self._truth(raw, dtype)

    def _store(self, value: Value, address: Any, mask: Any) -> None:
        b, dtype = self.builder, value.dtype
        raw = b.zext(value.ir, self._vector(dtype)) if dtype == "bool" else value.ir
        pointer = b.inttoptr(address, self._vector(dtype).as_pointer())
        if mask is None:
            b.store(raw, pointer, align=_ITEMSIZE[dtype])
        else:
            kind = ir.FunctionType(ir.VoidType(), [raw.type, pointer.type, _I32, mask.type])
            store = declared(b.module, kind, f"llvm.masked.store.{self._suffix(dtype)}")
            b.call(store, [raw, pointer, _I32(_ITEMSIZE[dtype]), mask])

    def _suffix(self, dtype: str) -> str:
        return f"v{self.count}{_SUFFIX[dtype]}.p0"


def copy_row(nbytes: int) -> Intrinsic:
    """A function (source, target) that copies ``nbytes`` bytes; the two do not overlap."""

    @Intrinsic
    def copy(builder: Any, source: Any, target: Any) -> None:
        pointer = _I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, pointer, _I64, ir.IntType(1)])
        memcpy = declared(builder.module, kind, "llvm.memcpy.p0.p0.i64")
        ends = [builder.inttoptr(address, pointer) for address in (target, source)]
        builder.call(memcpy, [*ends, _I64(nbytes), ir.IntType(1)(0)])

    return copy
