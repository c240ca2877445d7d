"""Native code of :mod:`.multi`: the loop over tensors, and sums of squares.  Imported lazily."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir

from . import codecache, threads
from .dialect import Intrinsic
from .expression import Expression
from .instructions import for_range, on_stack
from .printer import literal

__all__ = [
    "TILE_BYTES", "add_squares", "by_itemsize", "compile_sums", "compile_update", "copy_element", "layout_program",
    "transpose_block",
]  # fmt: skip

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_FLOATS = {4: ir.FloatType(), 8: ir.DoubleType()}
# Of the sum of squares: fixed numbers, so that the order of summation is the same on every CPU.
_LANES, _VECTORS = 16, 4
# Of a tile of a transposed operand: about what stays in the L1 cache.
TILE_BYTES = 1 << 15


@functools.cache
def layout_program() -> codecache.Program:
    """:mod:`.multi_layout`, compiled."""
    text = Path(__file__).with_name("multi_layout.py").read_text(encoding="utf-8")
    return codecache.load(text, stem="multi_layout")


def _at(builder: Any, address: Any, type_: Any) -> Any:
    return builder.inttoptr(address, type_.as_pointer())


def by_itemsize(write: Callable[..., None]) -> Intrinsic:
    """Instructions for floats and for doubles; one more argument, the item size, tells which of them run."""

    def emit(builder: Any, *args: Any) -> None:
        single = builder.icmp_signed("==", args[-1], _I64(4))
        with builder.if_else(single) as (then, otherwise):
            with then:
                write(builder, 4, *args[:-1])
            with otherwise:
                write(builder, 8, *args[:-1])

    return Intrinsic(emit)


@by_itemsize
def copy_element(builder: Any, item: int, source: Any, target: Any) -> None:
    """One element from an address to another."""
    type_ = ir.IntType(8 * item)
    builder.store(builder.load(_at(builder, source, type_)), _at(builder, target, type_))


@by_itemsize
def transpose_block(builder: Any, item: int, source: Any, step: Any, target: Any, target_step: Any) -> None:
    """A square block of 64 bytes a row (steps in bytes), in log2(side) rounds of exchanges between pairs of rows."""
    side = 64 // item
    vector = ir.VectorType(_FLOATS[item], side)

    def row(start: Any, number: int, stride: Any) -> Any:
        return _at(builder, builder.add(start, builder.mul(stride, _I64(number))), vector)

    rows = [builder.load(row(source, i, step), align=item) for i in range(side)]
    half = 1
    while half < side:
        low = [lane if not lane & half else side + lane - half for lane in range(side)]
        high = [lane + half if not lane & half else side + lane for lane in range(side)]
        for i in range(side):
            if not i & half:
                pair = rows[i], rows[i + half]
                for j, chosen in ((i, low), (i + half, high)):
                    rows[j] = builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(_I32, side), chosen))
        half *= 2
    for i, value in enumerate(rows):
        builder.store(value, row(target, i, target_step), align=item)


@by_itemsize
def add_squares(builder: Any, item: int, source: Any, count: Any, result: Any) -> None:
    """The sum of squares of ``count`` elements as the double at ``result``; no fused multiplication, one order."""
    double = ir.DoubleType()
    wide, narrow = ir.VectorType(double, _LANES), ir.VectorType(_FLOATS[item], _LANES)
    sums = [on_stack(builder, wide) for _ in range(_VECTORS)]
    rest = on_stack(builder, double)
    for place in sums:
        builder.store(ir.Constant(wide, [0.0] * _LANES), place)
    builder.store(double(0.0), rest)
    block = _LANES * _VECTORS
    full = builder.and_(count, _I64(-block))
    with for_range(builder, _I64(0), full, block) as start:
        here = builder.add(source, builder.mul(start, _I64(item)))
        for k, place in enumerate(sums):
            where = _at(builder, builder.add(here, _I64(k * _LANES * item)), narrow)
            value = builder.load(where, align=item)
            value = builder.fpext(value, wide) if item == 4 else value
            builder.store(builder.fadd(builder.load(place), builder.fmul(value, value)), place)
    with for_range(builder, full, count) as index:
        value = builder.load(_at(builder, builder.add(source, builder.mul(index, _I64(item))), _FLOATS[item]))
        value = builder.fpext(value, double) if item == 4 else value
        builder.store(builder.fadd(builder.load(rest), builder.fmul(value, value)), rest)
    parts = [builder.load(place) for place in sums]
    total = builder.fadd(builder.fadd(parts[0], parts[1]), builder.fadd(parts[2], parts[3]))
    lanes = [builder.extract_element(total, _I32(lane)) for lane in range(_LANES)]
    while len(lanes) > 1:
        lanes = [builder.fadd(a, b) for a, b in zip(lanes[::2], lanes[1::2], strict=True)]
    builder.store(builder.fadd(lanes[0], builder.load(rest)), _at(builder, result, double))


def compile_update(body: Expression, n_arrays: int, dtype: np.dtype) -> Callable[..., int]:
    """``run(words, numbers, bounds) -> not 0 where tensors were left alone``.

    ``words`` is an int64 array of the addresses of array objects, ``n_arrays`` per tensor; the first one of a
    tensor that was left alone is replaced by 0.  ``numbers`` is an array of the dtype with the body's other inputs.
    ``bounds`` are the numbers of the first tensor of every part, and behind the last: parts run on threads.

    Where the arrays lie is found out by one function for all kernels: a part of every kernel, it would double the time
    to compile them.
    """
    n_in, n_out, item = body.n_inputs, len(body.outputs), dtype.itemsize
    nodes = "\n".join(f"    ({node.op!r}, {node.args!r}, {literal(node.param)})," for node in body.nodes)
    described = "".join(f"    # {line}\n" for line in body.source.splitlines())
    source = f'''"""Generated update of many tensors; {n_arrays} arrays of {dtype.name} each."""
from tinygrad_lstm.kernels.memory import load64, stack
from tinygrad_lstm.kernels.native import elementwise_loop
from tinygrad_lstm.kernels.dialect import exported, external

HEAD = object.__basicsize__
nodes = (
{nodes}
)
loop = elementwise_loop({n_in}, nodes, {body.outputs!r}, {(dtype.name,) * n_in!r})
advance = external({layout_program().symbol("advance")!r}, 7)


@exported
def run(common, part):
{described}    table = stack({4 + 4 * (n_in + n_out)})
    ndarray_type, numbers, plan = load64(common), load64(common + 16), load64(common + 24)
    tile = load64(load64(common + 32) + HEAD) + {TILE_BYTES} * part
    first, last = load64(common + 40 + 8 * part), load64(common + 48 + 8 * part)
    objects = load64(load64(common + 8) + HEAD) + {8 * n_arrays} * first
    skipped = 0
    for tensor in range(first, last):
        position = 0
        while position >= 0:
            position = advance(ndarray_type, plan, table, tile, objects, numbers, position)
            loop(table)
        skipped |= position == -2
        objects += {8 * n_arrays}
    return skipped
'''
    update = codecache.load(source, stem="multi").address("run")
    plan = np.array([n_arrays, n_in, n_out, dtype.num, item], np.int64)
    ndarray_type, where = id(np.ndarray), id(plan)

    def run(words: np.ndarray, numbers: np.ndarray, bounds: Sequence[int]) -> int:
        parts = len(bounds) - 1
        tiles = np.empty(parts * TILE_BYTES // 8)  # not on the native stack, where LLVM would clear it word by word
        table = np.array((ndarray_type, id(words), id(numbers), where, id(tiles), *bounds), np.int64)
        return threads.run(update, table.ctypes.data, parts)

    run.plan = plan  # type: ignore[attr-defined]  # native code reads it by its address
    return run


def _sums() -> str:
    return f'''"""Generated sums of squares."""
from tinygrad_lstm.kernels.memory import load64
from tinygrad_lstm.kernels.multi_native import add_squares
from tinygrad_lstm.kernels.dialect import exported, external

HEAD = object.__basicsize__
inspect = external({layout_program().symbol("inspect")!r}, 6)


@exported
def run(table, part):
    ndarray_type, typenum, itemsize = load64(table), load64(table + 24), load64(table + 32)
    words, sums = load64(load64(table + 8) + HEAD), load64(load64(table + 16) + HEAD)
    skipped = 0
    for tensor in range(load64(table + 40 + 8 * part), load64(table + 48 + 8 * part)):
        found = inspect(ndarray_type, words + 8 * tensor, 1, 0, typenum, itemsize)
        skipped |= found < 0
        if found >= 0:
            add_squares(load64(load64(words + 8 * tensor) + HEAD), found >> 1, sums + 8 * tensor, itemsize)
    return skipped
'''


@functools.cache
def compile_sums() -> Callable[..., int]:
    """``run(words, sums, dtype, bounds) -> not 0 where arrays were left alone``, as in :func:`compile_update`."""
    function = codecache.load(_sums(), stem="sums").address("run")

    def run(words: np.ndarray, sums: np.ndarray, dtype: np.dtype, bounds: Sequence[int]) -> int:
        table = np.array((id(np.ndarray), id(words), id(sums), dtype.num, dtype.itemsize, *bounds), np.int64)
        return threads.run(function, table.ctypes.data, len(bounds) - 1)

    return run
