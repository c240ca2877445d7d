"""Forms of values with the batch on axis 0, and what each primitive becomes on them (see batch_first.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinygrad_lstm.ops.shape import reshape, transpose
from tinygrad_lstm.program import Equation, Program
from tinygrad_lstm.tensor import Tensor

__all__ = ["MIXED", "RULES", "Merged", "Value", "back", "bound", "elementwise", "forwards", "order"]

MIXED = -1


class Merged(NamedTuple):
    """A matrix one of whose axes is (steps, batch), in the order (batch, steps): good where it is summed over."""

    tensor: Tensor
    axis: int  # 0 or 1
    lengths: tuple[int, ...]


class Value(NamedTuple):
    """A value as a tensor; with a ``place``, that axis of the original is axis 0 of the tensor.

    None: all rows share it.  ``MIXED``: it was computed from rows in a way that the rules do not follow.
    """

    tensor: Any  # or a Python number
    place: int | None
    merged: Merged | None = None

    @property
    def rank(self) -> int:
        return np.ndim(self.tensor) if not isinstance(self.tensor, Tensor) else self.tensor.ndim


def order(rank: int, place: int) -> tuple[int, ...]:
    return (place, *(k for k in range(rank) if k != place))


def forwards(t: Any, place: int) -> Any:
    """The batch moved to the front."""
    return t if place == 0 else transpose(t, order(t.ndim, place))


def back(value: Value) -> Any:
    """The value in its original form."""
    if value.place is None or value.place <= 0:
        return value.tensor
    return transpose(value.tensor, tuple(int(k) for k in np.argsort(order(value.rank, value.place))))


def _axis(axis: int, rank: int, place: int) -> int | None:
    """An axis (from the end) of the original as one of the moved form; None for the batch."""
    k = axis + rank
    return None if k == place else (k if k > place else k + 1) - rank


# ---------------------------------------------------------------------------- rules: None where one does not apply

Rule = Callable[[Program, Equation, Sequence[Value], int], "list[Value] | None"]


def bound(equation: Equation, operands: Sequence[Any], place: int, **changes: Any) -> list[Value]:
    out = equation.primitive.bind(tuple(operands), {**equation.params, **changes})
    return [Value(t, place) for t in (out if isinstance(out, tuple) else (out,))]


def _aligned(operands: Sequence[Value], rank: int) -> tuple[int, list[Any]] | None:
    """Operands that are broadcast to ``rank`` axes in forms that fit, and where their batch is in the result."""
    places = {value.place + rank - value.rank for value in operands if value.place is not None}
    if len(places) != 1:
        return None
    (place,) = places
    found: list[Any] = []
    for value in operands:
        t, missing = value.tensor, rank - value.rank
        if value.place is not None and missing:
            t = reshape(t, (t.shape[0], *(1,) * missing, *t.shape[1:]))
        elif value.place is None and place and value.rank >= rank - place:
            t = forwards(reshape(t, ((1,) * missing) + tuple(t.shape)), place)
        found.append(t)
    return place, found


def elementwise(program: Program, equation: Equation, operands: Sequence[Value], batch: int) -> list[Value] | None:
    shape = program.avals[equation.outputs[0]].shape
    fits = _aligned(operands, len(shape))
    return None if fits is None or shape[fits[0]] != batch else bound(equation, fits[1], fits[0])


def _along(program: Program, equation: Equation, operands: Sequence[Value], batch: int) -> list[Value] | None:
    """Whatever works along one or several axes."""
    rank = operands[0].rank
    fits = _aligned(operands, rank) if len({value.rank for value in operands}) == 1 else None
    if fits is None or equation.params["axis"] is None:
        return None
    place, tensors = fits
    given = equation.params["axis"]
    axes = given if isinstance(given, tuple) else (given,)
    moved = [_axis(axis, rank, place) for axis in axes]
    if None in moved:
        return None
    gone = 0 if equation.params.get("keepdims", True) else sum(axis + rank < place for axis in axes)
    return bound(equation, tensors, place - gone, axis=tuple(moved) if isinstance(given, tuple) else moved[0])


def _same(program: Program, equation: Equation, operands: Sequence[Value], batch: int) -> list[Value] | None:
    place = operands[0].place
    return None if place is None else bound(equation, [operands[0].tensor], place)


def _matmul(program: Program, equation: Equation, operands: Sequence[Value], batch: int) -> list[Value] | None:
    left, right = operands
    if left.place is not None and right.place is not None:
        same = left.place == right.place < left.rank - 2 and left.rank == right.rank
        return bound(equation, [left.tensor, right.tensor], left.place) if same else None
    if left.place is not None:
        fits = left.place < left.rank - 1 and (right.rank == 2 or (left.place == 0 and right.rank <= left.rank))
        return bound(equation, [left.tensor, right.tensor], left.place) if fits else None
    fits = left.rank == 2 and right.place < right.rank - 2  # type: ignore[operator]
    return bound(equation, [left.tensor, right.tensor], right.place) if fits else None  # type: ignore[arg-type]


def _transpose(program: Program, equation: Equation, operands: Sequence[Value], batch: int) -> list[Value] | None:
    value, axes = operands[0], equation.params["axes"]
    rank, place = value.rank, value.place
    assert place is not None
    order = [*range(rank - len(axes)), *(a + rank for a in axes)]
    inner = [k if k > place else k + 1 for k in order if k != place]
    return [Value(transpose(value.tensor, (0, *inner)), order.index(place))]


def _reshape(program: Program, equation: Equation, operands: Sequence[Value], batch: int) -> list[Value] | None:
    value, goal = operands[0], tuple(equation.params["shape"])
    before, place = program.aval(equation.operands[0]).shape, value.place
    for new in range(len(goal)):
        if goal[new] == batch and math.prod(goal[:new]) == math.prod(before[:place]):
            return [Value(reshape(value.tensor, (batch, *goal[:new], *goal[new + 1 :])), new)]
    return None


def _broadcast_to(program: Program, equation: Equation, operands: Sequence[Value], batch: int) -> list[Value] | None:
    shape = tuple(equation.params["shape"])
    fits = _aligned(operands, len(shape))
    if fits is None or shape[fits[0]] != batch:
        return None
    place, (t,) = fits
    return bound(equation, [t], place, shape=(batch, *shape[:place], *shape[place + 1 :]))


def _sum_to(program: Program, equation: Equation, operands: Sequence[Value], batch: int) -> list[Value] | None:
    value, goal = operands[0], tuple(equation.params["shape"])
    before, place = program.aval(equation.operands[0]).shape, value.place
    assert place is not None
    extra = len(before) - len(goal)
    if place < extra or goal[place - extra] != batch:
        return None
    ones = [n if k >= extra else 1 for k, n in enumerate((*before[:extra], *goal))]
    summed = bound(equation, [value.tensor], 0, shape=(batch, *ones[:place], *ones[place + 1 :]))[0].tensor
    left = place - extra
    return [Value(reshape(summed, (batch, *goal[:left], *goal[left + 1 :])), left)]


def _template(template: Sequence[Any], rank: int, place: int) -> tuple[tuple[Any, ...], int] | None:
    """A basic index for the moved form, and where the batch is in the result; None for one into the batch."""
    whole = ("slice", None, None, None)
    items = list(template)
    used = sum(item is not None and item is not Ellipsis for item in items)
    if Ellipsis not in items:
        items.append(Ellipsis)
    at = items.index(Ellipsis)
    items[at : at + 1] = [whole] * (rank - used)
    kept: list[Any] = []
    axis = out = 0
    found = None
    for item in items:
        if item is not None and axis == place:
            if item != whole:
                return None
            found = out
        else:
            kept.append(item)
        out += not isinstance(item, int)
        axis += item is not None
    assert found is not None
    return (whole, *kept), found


def _getitem(program: Program, equation: Equation, operands: Sequence[Value], batch: int) -> list[Value] | None:
    value = operands[0]
    if len(operands) > 1 or value.place is None:
        return None
    index = _template(equation.params["template"], value.rank, value.place)
    return None if index is None else bound(equation, [value.tensor], index[1], template=index[0])


def _put(program: Program, equation: Equation, operands: Sequence[Value], batch: int) -> list[Value] | None:
    value, shape = operands[0], tuple(equation.params["shape"])
    if len(operands) > 1:
        return None
    for place, n in enumerate(shape):
        index = _template(equation.params["template"], len(shape), place) if n == batch else None
        if index is not None and index[1] == value.place:
            moved = (batch, *shape[:place], *shape[place + 1 :])
            return bound(equation, [value.tensor], place, template=index[0], shape=moved)
    return None


def _take(program: Program, equation: Equation, operands: Sequence[Value], batch: int) -> list[Value] | None:
    table, indices = operands
    if table.place is None and indices.place is not None and equation.params["axis"] == -table.rank:
        return bound(equation, [table.tensor, indices.tensor], indices.place)
    if table.place == 0 and indices.place is None:
        return bound(equation, [table.tensor, indices.tensor], 0)
    return None


def _untake(program: Program, equation: Equation, operands: Sequence[Value], batch: int) -> list[Value] | None:
    g, indices = operands
    fits = g.place == 0 and indices.place is None and equation.params["axis"] != -len(equation.params["shape"])
    return bound(equation, [g.tensor, indices.tensor], 0) if fits else None


def _prod(program: Program, equation: Equation, operands: Sequence[Value], batch: int) -> list[Value] | None:
    (value,) = operands
    return bound(equation, [value.tensor], value.place) if value.place not in (None, value.rank - 1) else None


def _pair_along(program: Program, equation: Equation, operands: Sequence[Value], batch: int) -> list[Value] | None:
    """``take_along_axis`` and its transpose: both operands have the batch in one place."""
    first, second = operands
    if first.place is None or first.place != second.place or first.rank != second.rank:
        return None
    axis = _axis(equation.params["axis"], first.rank, first.place)
    changes: Mapping[str, Any] = {}
    if "shape" in equation.params:
        shape = equation.params["shape"]
        changes = {"shape": (shape[first.place], *(n for k, n in enumerate(shape) if k != first.place))}
    return None if axis is None else bound(equation, [first.tensor, second.tensor], first.place, axis=axis, **changes)


RULES: dict[str, Rule] = {
    "matmul": _matmul,
    "transpose": _transpose,
    "reshape": _reshape,
    "broadcast_to": _broadcast_to,
    "sum_to": _sum_to,
    "getitem": _getitem,
    "put": _put,
    "take": _take,
    "untake": _untake,
    "prod": _prod,
    "take_along_axis": _pair_along,
    "untake_along_axis": _pair_along,
}
RULES |= dict.fromkeys(("alias", "stop_gradient", "stop_nan", "astype", "one_hot"), _same)
RULES |= dict.fromkeys(("concatenate", "split", "flip", "roll", "cumsum", "sum", "max", "min", "norm", "argmax",
                         "argmin", "logsumexp", "softmax", "log_softmax"), _along)  # fmt: skip
