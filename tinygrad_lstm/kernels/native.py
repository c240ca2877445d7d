"""The native elementwise loop: an expression as one pass over rows and columns of vectors.

Imported lazily (it imports llvmlite), by generated modules and by :mod:`.elementwise`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir

from . import codecache, interface  # noqa: F401  the second raises ImportError where arrays are not known
from .dialect import Intrinsic
from .expression import Expression, Node, node_dtypes
from .instructions import declared, for_range, on_stack
from .lowering import apply
from .machine import target
from .printer import literal
from .table import LEAVES
from .vector import Lanes, Value

__all__ = ["compile_loop", "elementwise_loop", "emit"]

_I8, _I64 = ir.IntType(8), ir.IntType(64)
_ITEMSIZE = {"float32": 4, "float64": 8, "bool": 1}


@functools.cache
def layout_program() -> codecache.Program:
    """:mod:`.layout`, compiled."""
    text = Path(__file__).with_name("layout.py").read_text(encoding="utf-8")
    return codecache.load(text, stem="layout")


def emit(expression: Expression, inputs: list[Value]) -> list[Value]:
    """The outputs of ``expression`` as registers, for inputs in registers: what a larger kernel inlines."""
    lanes = inputs[0].lanes
    dtypes = node_dtypes(expression, tuple(np.dtype(value.dtype) for value in inputs))
    values: list[Value | None] = []

    def register(index: int, dtype: str) -> Value:
        value = values[index]
        if value is None:
            return lanes.constant(expression.nodes[index].param, dtype)
        return value.to(dtype)

    for index, node in enumerate(expression.nodes):
        if node.op == "input":
            values.append(inputs[node.param])
        elif node.op == "constant":
            values.append(None)
        elif node.op == "cast":
            source = expression.nodes[node.args[0]]
            number = source.op == "constant"
            values.append(register(node.args[0], node.param if number else str(dtypes[node.args[0]])).to(node.param))
        else:
            values.append(_leaf(expression, index, dtypes, register))
    results = expression.result_dtypes([value.dtype for value in inputs])
    return [register(i, dtype.name) for i, dtype in zip(expression.outputs, results, strict=True)]


def _leaf(expression: Expression, index: int, dtypes: tuple[Any, ...], register: Callable[[int, str], Value]) -> Value:
    node, leaf = expression.nodes[index], LEAVES[expression.nodes[index].op]
    if leaf.kind == "logic":
        args = [register(i, "bool") for i in node.args]
    elif leaf.kind == "select":
        args = [register(node.args[0], "bool")] + [register(i, dtypes[index].name) for i in node.args[1:]]
    elif leaf.kind == "compare":
        # Python numbers are weak; bools compare exactly as float64.
        strong = [np.zeros(0, d) if isinstance(d, np.dtype) else d(0) for d in (dtypes[i] for i in node.args)]
        common = np.result_type(*strong)
        whole = common.kind == "i" and node.op != "isfinite"
        args = [register(i, common.name if common.kind == "f" or whole else "float64") for i in node.args]
    else:
        args = [register(i, dtypes[index].name) for i in node.args]
    constants = [float(expression.nodes[i].param) if expression.nodes[i].op == "constant" else None for i in node.args]
    return apply(node.op, args, constants)


def elementwise_loop(
    n_inputs: int, nodes: tuple[tuple[Any, ...], ...], outputs: tuple[int, ...], dtypes: tuple[str, ...]
) -> Intrinsic:
    """``loop(table)`` for the expression with these nodes and input dtypes.

    ``table`` is the address of what :func:`layout` wrote.
    """
    expression = Expression(n_inputs, [Node(*node) for node in nodes], outputs, False)
    operands = list(dtypes) + [d.name for d in expression.result_dtypes(dtypes)]

    return Intrinsic(lambda builder, table: _Loop(builder, expression, operands).write(table))


class _Loop:
    """Writes the loops.  A row's tail goes through the same body: operands are copied lane by lane (masked)
    to a buffer on the stack, and results back from it; so does an operand that is constant along a row."""

    def __init__(self, builder: Any, expression: Expression, operands: list[str]) -> None:
        widest = 4 if "float32" in operands else 8
        self.count = max(2, target().vector_bytes // widest)
        self.lanes = Lanes(builder, self.count)
        self.builder, self.expression, self.operands = builder, expression, operands
        self.buffers = []
        for dtype in operands:
            buffer = on_stack(builder, self._vector(dtype), align=64)
            builder.store(self._zeros(dtype), buffer)
            self.buffers.append(builder.ptrtoint(buffer, _I64))

    def _scalar(self, dtype: str) -> Any:
        return _I8 if dtype == "bool" else ir.FloatType() if dtype == "float32" else ir.DoubleType()

    def _vector(self, dtype: str) -> Any:
        return ir.VectorType(self._scalar(dtype), self.count)

    def _zeros(self, dtype: str) -> Any:
        return ir.Constant(self._vector(dtype), [0 if dtype == "bool" else 0.0] * self.count)

    def _word(self, table: Any, index: int) -> Any:
        pointer = self.builder.inttoptr(self.builder.add(table, _I64(8 * index)), _I64.as_pointer())
        return self.builder.load(pointer)

    def write(self, table: Any) -> None:
        b = self.builder
        n_in = self.expression.n_inputs
        outer, rows, cols = (self._word(table, i) for i in range(3))
        full = b.and_(cols, _I64(-self.count))
        rest = b.sub(cols, full)
        mask = self._mask(rest)
        fields = [[self._word(table, 3 + 4 * k + j) for j in range(4)] for k in range(len(self.operands))]
        with for_range(b, _I64(0), outer) as block, for_range(b, _I64(0), rows) as row:
            starts, steps = [], []
            for k, (address, step, row_stride, outer_stride) in enumerate(fields):
                offset = b.add(b.mul(block, outer_stride), b.mul(row, row_stride))
                start = b.add(address, offset)
                if k < n_in:
                    constant = b.icmp_signed("==", step, _I64(0))
                    with b.if_then(constant):
                        self._splat(start, k)
                    start = b.select(constant, self.buffers[k], start)
                starts.append(start)
                steps.append(b.mul(step, _I64(_ITEMSIZE[self.operands[k]])))
            self._columns(starts, steps, full, rest, mask)

    def _columns(self, starts: list[Any], steps: list[Any], full: Any, rest: Any, mask: Any) -> None:
        """for column in range(0, cols, lanes): one vector of everything."""
        b, n_in = self.builder, self.expression.n_inputs
        total = b.add(full, b.select(b.icmp_signed(">", rest, _I64(0)), _I64(self.count), _I64(0)))
        with for_range(b, _I64(0), total, self.count) as column:
            here = [b.add(start, b.mul(column, step)) for start, step in zip(starts, steps, strict=True)]
            tail = b.icmp_signed("==", column, full)
            before = b.block
            with b.if_then(tail, likely=False):
                for k in range(n_in):
                    # A buffer that already holds a row's constant is copied onto itself.
                    self._copy(here[k], self.buffers[k], k, mask)
                inside = b.block
            where = []
            for k, address in enumerate(here):
                phi = b.phi(_I64)
                phi.add_incoming(address, before)
                phi.add_incoming(self.buffers[k], inside)
                where.append(phi)
            inputs = [self._load(where[k], k) for k in range(n_in)]
            results = emit(self.expression, inputs)
            for k, value in enumerate(results, n_in):
                self._store(value, where[k], k)
            with b.if_then(tail, likely=False):
                for k in range(n_in, len(self.operands)):
                    self._copy(self.buffers[k], here[k], k, mask)

    def _mask(self, rest: Any) -> Any:
        b, type_ = self.builder, ir.VectorType(ir.IntType(32), self.count)
        limit = b.trunc(rest, ir.IntType(32))
        splat = self._broadcast(limit, type_)
        return b.icmp_signed("<", ir.Constant(type_, list(range(self.count))), splat)

    def _broadcast(self, scalar: Any, type_: Any) -> Any:
        b, zero = self.builder, ir.IntType(32)(0)
        first = b.insert_element(ir.Constant(type_, ir.Undefined), scalar, zero)
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), self.count), [0] * self.count)
        return b.shuffle_vector(first, ir.Constant(type_, ir.Undefined), zeros)

    def _splat(self, address: Any, k: int) -> None:
        b, dtype = self.builder, self.operands[k]
        scalar = b.load(b.inttoptr(address, self._scalar(dtype).as_pointer()))
        target = b.inttoptr(self.buffers[k], self._vector(dtype).as_pointer())
        b.store(self._broadcast(scalar, self._vector(dtype)), target, align=_ITEMSIZE[dtype])

    def _load(self, address: Any, k: int) -> Value:
        b, dtype = self.builder, self.operands[k]
        raw = b.load(b.inttoptr(address, self._vector(dtype).as_pointer()), align=_ITEMSIZE[dtype])
        if dtype == "bool":
            raw = b.icmp_signed("!=", raw, ir.Constant(raw.type, [0] * self.count))
        return Value(self.lanes, raw, dtype)

    def _store(self, value: Value, address: Any, k: int) -> None:
        b, dtype = self.builder, self.operands[k]
        raw = b.zext(value.ir, self._vector(dtype)) if dtype == "bool" else value.ir
        b.store(raw, b.inttoptr(address, self._vector(dtype).as_pointer()), align=_ITEMSIZE[dtype])

    def _copy(self, source: Any, target: Any, k: int, mask: Any) -> None:
        """The masked lanes from one address to another."""
        b, dtype = self.builder, self.operands[k]
        vector = self._vector(dtype)
        pointer, i32 = vector.as_pointer(), ir.IntType(32)
        suffix = f"v{self.count}{'i8' if dtype == 'bool' else 'f32' if dtype == 'float32' else 'f64'}.p0"
        align, zero = i32(_ITEMSIZE[dtype]), self._zeros(dtype)
        load = declared(
            b.module, ir.FunctionType(vector, [pointer, i32, mask.type, vector]), f"llvm.masked.load.{suffix}"
        )
        store = declared(
            b.module, ir.FunctionType(ir.VoidType(), [vector, pointer, i32, mask.type]), f"llvm.masked.store.{suffix}"
        )
        value = b.call(load, [b.inttoptr(source, pointer), align, mask, zero])
        b.call(store, [value, b.inttoptr(target, pointer), align, mask])


def compile_loop(expression: Expression, dtypes: tuple[np.dtype, ...]) -> Callable[..., int]:
    """``entry(id(np.ndarray), id(input0), ..., id(output0), ...) -> status``; 0 means done.

    The caller keeps the arrays alive during the call.  Compiled now, or taken from the disk.
    """
    outputs = expression.result_dtypes(dtypes)
    operands = [*dtypes, *outputs]
    n_in, n = len(dtypes), len(operands)
    names = ", ".join(f"p{k}" for k in range(n))
    nodes = "\n".join(f"    ({node.op!r}, {node.args!r}, {literal(node.param)})," for node in expression.nodes)
    described = "".join(f"    # {line}\n" for line in expression.source.splitlines())
    stores = "\n".join(
        f"    store64(operands + {24 * k}, p{k})\n"
        f"    store64(operands + {24 * k + 8}, {dtype.num})\n"
        f"    store64(operands + {24 * k + 16}, {dtype.itemsize})"
        for k, dtype in enumerate(operands)
    )
    source = f'''"""Generated elementwise loop; inputs {", ".join(d.name for d in dtypes)}."""
from tinygrad_lstm.kernels.memory import stack, store64
from tinygrad_lstm.kernels.native import elementwise_loop
from tinygrad_lstm.kernels.dialect import entry, external

nodes = (
{nodes}
)
loop = elementwise_loop({n_in}, nodes, {expression.outputs!r}, {tuple(d.name for d in dtypes)!r})
layout = external({layout_program().symbol("layout")!r}, 6)


@entry
def run(ndarray_type, {names}):
{described}    operands = stack({3 * n})
{stores}
    work = stack({8 * (n + 1)})
    table = stack({3 + 4 * n})
    status = layout(ndarray_type, operands, {n_in}, {n}, work, table)
    if status == 0:
        loop(table)
    return status
'''
    return codecache.load(source, stem="elementwise").function("run")
