"""How each primitive is lowered: one rule a primitive, from an equation to operations on views."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tinygrad_lstm.compiler.fuse import FUSED
from tinygrad_lstm.compiler.stages import Copy, Fold, Gather, Operation, Packed, Product, RowProduct, combine
from tinygrad_lstm.compiler.views import Unsupported, View, contiguous, dense
from tinygrad_lstm.kernels.elementwise import lowerable
from tinygrad_lstm.program import Equation

if TYPE_CHECKING:
    from tinygrad_lstm.compiler.lowering import Lowering

__all__ = ["RULES", "converted", "fill", "not_the_batch"]


def _fused(low: Lowering, equation: Equation) -> None:
    kernel = equation.params["kernel"]
    dtypes = tuple(np.dtype(low.program.avals[slot].dtype) for slot in equation.operands)
    if not lowerable(kernel.expression, dtypes, integers=True):
        raise Unsupported(equation, f"elementwise maths on {', '.join(sorted({d.name for d in dtypes}))}")
    shape = tuple(kernel.shape[low.skip :])
    inputs = [low.view(slot, len(shape)) for slot in equation.operands]
    targets = [(low.target(slot), k) for k, slot in enumerate(equation.outputs)]
    low.chain(kernel.expression, shape, inputs, kernel.reductions, targets)


def _matmul(low: Lowering, equation: Equation) -> None:
    left, right = equation.operands
    if left.__class__ is not int or right.__class__ is not int:
        raise Unsupported(equation, "a number as operand of matmul")
    dtypes = {np.dtype(low.program.avals[slot].dtype) for slot in (left, right, equation.outputs[0])}
    dtype = dtypes.pop()
    if dtypes or dtype.kind != "f":
        raise Unsupported(equation, f"a matrix product of {dtype} with another dtype")
    rank = low.rank(equation)
    b_shape = tuple(low.program.avals[right].shape)
    shared = right not in low.batched and len(b_shape) == 2
    if shared and (view := low.view(right)).root.kind == "v":
        pack = Packed(view.root.number, view.offset, b_shape, view.strides, dtype.name)  # type: ignore[arg-type]
        if pack not in low.packs:
            low.packs.append(pack)
        number = low.packs.index(pack)
        a = low.view(left, rank)

        def product(target: View) -> Operation:
            if rank == 1 and low.split and a.rowed:
                return Product(a, number, pack, target)
            return _row_product(a, None, target, number)

        low.dense_target(equation.outputs[0], product)
        return
    if shared or rank < 2:
        raise Unsupported(equation, "a matrix product with a matrix that is computed in the loop for all rows")
    a, b = low.view(left, rank), low.view(right, rank)
    low.dense_target(equation.outputs[0], lambda target: _row_product(a, b, target))


def _row_product(a: View, b: View | None, target: View, packed: int = -1) -> Operation:
    if len(target.shape) == 1:
        a, target = (
            a.moved(0, (1, *a.shape), (0, *a.strides)),
            target.moved(0, (1, *target.shape), (0, *target.strides)),
        )
    return RowProduct(a, b, target, packed)


def _split(low: Lowering, equation: Equation) -> None:
    source = low.operand(equation)
    axis = equation.params["axis"] + len(source.shape)
    not_the_batch(low, equation, axis)
    start = 0
    for n, slot in zip(equation.params["sizes"], equation.outputs, strict=True):
        shape = list(source.shape)
        shape[axis] = n
        low.define(slot, source.moved(start * source.strides[axis], tuple(shape), source.strides))
        start += n


def not_the_batch(low: Lowering, equation: Equation, axis: int) -> None:
    if axis < 0:
        raise Unsupported(equation, f"{equation.primitive.name} along the batch axis")


def _getitem(low: Lowering, equation: Equation) -> None:
    if len(equation.operands) > 1:
        raise Unsupported(equation, "an index made of arrays")
    source = low.operand(equation)
    view = _indexed(low, equation, source, equation.operands[0])
    low.define(equation.outputs[0], view)


def _indexed(low: Lowering, equation: Equation, source: View, slot: int, missing: int = 0) -> View:
    """A basic index as a view: computed by NumPy on an array without data, whose strides are the view's."""
    template = list(equation.params["template"])
    batched = low.split and (slot in low.batched or missing)
    if batched:
        if template and template[0] == ("slice", None, None, None):
            template = template[1:]
        elif not (template and template[0] is Ellipsis):
            raise Unsupported(equation, "an index into the batch axis")
    index = tuple(slice(*item[1:]) if isinstance(item, tuple) else item for item in template)
    # The byte offset of every element in place of data: what is picked tells offset and strides.
    grid = [np.arange(n) * s for n, s in zip(source.shape, source.strides, strict=True)]
    offsets = np.zeros(source.shape, np.int64)
    for axis, steps in enumerate(grid):
        offsets += steps.reshape([-1 if k == axis else 1 for k in range(len(grid))])
    picked = offsets[index]
    if not picked.size:
        return source.moved(0, picked.shape, contiguous(picked.shape, source.dtype.itemsize))
    first = picked[(0,) * picked.ndim]
    strides = []
    for axis, n in enumerate(picked.shape):
        if n == 1:
            strides.append(0)
        else:
            second = picked[tuple(1 if k == axis else 0 for k in range(picked.ndim))]
            strides.append(int(second - first))
    return source.moved(int(first), picked.shape, tuple(strides))


def _put(low: Lowering, equation: Equation) -> None:
    if len(equation.operands) > 1:
        raise Unsupported(equation, "an index made of arrays")
    target = low.target(equation.outputs[0])
    source = low.operand(equation, 0, None)
    fill(low, target, 0.0)
    place = _indexed(low, equation, target, -1, missing=1)
    low.operations.append(Copy(source, place))


def fill(low: Lowering, target: View, value: float) -> None:
    """Write one value everywhere."""
    from tinygrad_lstm.kernels import build
    from tinygrad_lstm.kernels import expression as e

    expression = build(lambda x: e.cast(e.constant(value), target.dtype), 1)
    low.chain(expression, target.shape, [target], ("",), [(target, 0)])


def _concatenate(low: Lowering, equation: Equation) -> None:
    out = equation.outputs[0]
    target = low.target(out)
    axis = equation.params["axis"] + len(target.shape)
    not_the_batch(low, equation, axis)
    start = 0
    for operand in equation.operands:
        view = low.view(operand, len(target.shape))
        n = low.program.avals[operand].shape[equation.params["axis"]]
        shape = list(target.shape)
        shape[axis] = n
        place = target.moved(start * target.strides[axis], tuple(shape), target.strides)
        if view != place:
            if view.dtype != target.dtype:
                raise Unsupported(equation, "a concatenation of several dtypes")
            low.operations.append(Copy(view, place))
        start += n


def _reshape(low: Lowering, equation: Equation) -> None:
    out = equation.outputs[0]
    source = low.operand(equation)
    shape, _ = low.aval(out)
    if equation.operands[0] not in low.batched:
        shape = tuple(low.program.avals[out].shape)
    view = source.reshaped(shape)
    if view is None:
        copy = low.temporary(source.shape, source.dtype)
        low.operations.append(Copy(source, copy))
        view = copy.reshaped(shape)
        assert view is not None
    low.define(out, view)


def _broadcast_to(low: Lowering, equation: Equation) -> None:
    shape, _ = low.aval(equation.outputs[0])
    source = low.operand(equation, 0, len(shape))
    low.define(equation.outputs[0], source.broadcast(shape))
    low.batched.add(equation.outputs[0])


def _transpose(low: Lowering, equation: Equation) -> None:
    source = low.operand(equation)
    n = len(source.shape)
    axes = [a for a in equation.params["axes"] if a >= -n]
    lead = n - len(axes)
    order = [*range(lead), *(a + n for a in axes)]
    view = source.moved(0, tuple(source.shape[k] for k in order), tuple(source.strides[k] for k in order))
    low.define(equation.outputs[0], view)


def _alias(low: Lowering, equation: Equation) -> None:
    low.define(equation.outputs[0], low.operand(equation))


def _reduce(low: Lowering, equation: Equation) -> None:
    (axis,) = equation.params.get("axis", (-1,))  # a product is always of the last axis
    source = low.operand(equation)
    if source.dtype.kind != "f":
        source = converted(low, equation, source, np.dtype(low.program.avals[equation.outputs[0]].dtype))
    place = axis + len(source.shape)
    not_the_batch(low, equation, place)
    if not source.shape[place]:
        raise Unsupported(equation, "a reduction of nothing")
    source = low.dense(source)
    kept = list(source.shape)
    kept[place] = 1
    name = equation.primitive.name

    def fold(target: View) -> Operation:
        opened = target.reshaped(tuple(kept))
        if opened is None or not dense(opened):
            raise Unsupported(equation, "a reduction into a strided place")
        return Fold(name, place, source, opened, combine(name, source.dtype))

    low.dense_target(equation.outputs[0], fold)


def converted(low: Lowering, equation: Equation, source: View, goal: np.dtype) -> View:
    """The view in the dtype of a sum: NumPy adds bools and short integers as long ones."""
    if goal.kind not in "fi":
        raise Unsupported(equation, f"{equation.primitive.name} of {source.dtype}")
    if source.dtype == goal:
        return source
    target = low.temporary(source.shape, goal)
    _cast(low, equation, source, target)
    return target


def _cast(low: Lowering, equation: Equation, source: View, target: View) -> None:
    from tinygrad_lstm.kernels import build
    from tinygrad_lstm.kernels import expression as e

    expression = build(lambda x: e.cast(x, target.dtype), 1)
    if not lowerable(expression, (source.dtype,), integers=True):
        raise Unsupported(equation, f"conversion from {source.dtype} to {target.dtype}")
    low.chain(expression, target.shape, [source], ("",), [(target, 0)])


def _take(low: Lowering, equation: Equation) -> None:
    table, index = equation.operands
    shape = tuple(low.program.avals[table].shape)
    if table in low.batched or equation.params["axis"] != -len(shape):
        from tinygrad_lstm.compiler.movement import take_inside

        take_inside(low, equation)
        return
    if index not in low.batched and low.split:
        raise Unsupported(equation, "an index that all rows share")
    indices = low.view(index)
    if indices.dtype.name not in {"int64", "int32"}:
        raise Unsupported(equation, f"an index of dtype {indices.dtype}")
    rows = low.view(table)
    low.dense_target(equation.outputs[0], lambda target: Gather(rows, indices, target))


def _astype(low: Lowering, equation: Equation) -> None:
    source = low.operand(equation)
    _cast(low, equation, source, low.target(equation.outputs[0]))


def _scan(low: Lowering, equation: Equation) -> None:
    from tinygrad_lstm.compiler.nested import lower_inner  # which lowers the inner body by these rules

    lower_inner(low, equation)


RULES: dict[str, Callable[[Lowering, Equation], None]] = {
    FUSED.name: _fused,
    "matmul": _matmul,
    "split": _split,
    "getitem": _getitem,
    "put": _put,
    "concatenate": _concatenate,
    "reshape": _reshape,
    "broadcast_to": _broadcast_to,
    "transpose": _transpose,
    "alias": _alias,
    "stop_gradient": _alias,
    "stop_nan": _alias,
    "sum": _reduce,
    "max": _reduce,
    "min": _reduce,
    "prod": _reduce,
    "take": _take,
    "astype": _astype,
    "scan": _scan,
    "inner_scan": _scan,
}
