"""Move the batch to axis 0 of every value of a loop body that has a loop inside.

The steps of an inner loop are axis 0 of what it reads and stacks, and the batch comes behind them.  Rows can be
shared out where every value has the batch in front, so each value gets a second form with its batch axis moved
there, and equations are written again for these forms.  The result computes the same whatever is assumed about
the inputs: an equation that the rules do not cover gets its operands in their old form.  Nothing is proved here
(:mod:`.rows` does that, on the result).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinygrad_lstm.compiler.simplify import simplify
from tinygrad_lstm.compiler.unnest import has_scans, rewritten
from tinygrad_lstm.ops.loop import INNER
from tinygrad_lstm.ops.shape import reshape, transpose
from tinygrad_lstm.primitive import Aval
from tinygrad_lstm.program import Equation, Program, sourced
from tinygrad_lstm.tensor import Tensor, asarray

__all__ = ["batch_first"]


MIXED = -1


class Value(NamedTuple):
    """A value as a tensor; with a ``place``, that axis of the original is axis 0 of the tensor.

    None: all rows share it.  ``MIXED``: it was computed from rows in a way that the rules do not follow.
    """

    tensor: Any  # or a Python number
    place: int | None

    @property
    def rank(self) -> int:
        return np.ndim(self.tensor) if not isinstance(self.tensor, Tensor) else self.tensor.ndim


def _order(rank: int, place: int) -> tuple[int, ...]:
    return (place, *(k for k in range(rank) if k != place))


def _forwards(t: Any, place: int) -> Any:
    """The batch moved to the front."""
    return t if place == 0 else transpose(t, _order(t.ndim, place))


def _back(value: Value) -> Any:
    """The value in its original form."""
    if value.place is None or value.place <= 0:
        return value.tensor
    return transpose(value.tensor, tuple(int(k) for k in np.argsort(_order(value.rank, value.place))))


def _axis(axis: int, rank: int, place: int) -> int | None:
    """An axis (from the end) of the original as one of the moved form; None for the batch."""
    k = axis + rank
    return None if k == place else (k if k > place else k + 1) - rank


def batch_first(program: Program, n_carry: int) -> Program:
    """The program with the batch moved to the front of what its loops read and stack."""
    if not has_scans(program):
        return program
    avals = program.avals
    leading = {avals[slot].shape[:1] for slot in program.inputs[:n_carry]}
    batch = leading.pop() if len(leading) == 1 else ()
    if not batch:
        return program
    choices: list[list[int]] = []
    for k, slot in enumerate(program.inputs):
        shape = avals[slot].shape
        found = [axis for axis, n in enumerate(shape) if n == batch[0]]
        if shape and not found:
            return program
        choices.append(found[:1] if k < n_carry else found)
    # A batch may be as large as another axis is long: the first guess that leaves no loop over rows is taken.
    first = None
    for guess in itertools.islice(itertools.product(*(found or [-1] for found in choices)), _GUESSES):
        places = {slot: axis for slot, axis in zip(program.inputs, guess, strict=True) if axis >= 0}
        moved = _moved(program, places, batch[0])
        if not has_scans(moved):
            return moved
        first = first or moved
    return first or program


_GUESSES = 16


def _moved(program: Program, places: Mapping[int, int], batch: int) -> Program:
    def equations(environment: dict[int, Any]) -> list[Any]:
        values = {
            slot: Value(_forwards(t, places[slot]), places[slot]) if slot in places else Value(t, None)
            for slot, t in environment.items()
        }
        return [_back(value) for value in _follow(program, values, batch)]

    return simplify(rewritten(program, equations))


def _follow(program: Program, values: dict[int, Value], batch: int) -> list[Value]:
    """Record the program on values in their moved form; returns its results."""

    def read(operand: Any) -> Value:
        return values[operand] if operand.__class__ is int else Value(operand.value, None)

    for equation in program.equations:
        operands = [read(operand) for operand in equation.operands]
        places = {value.place for value in operands} - {None}
        results = None
        if places and MIXED not in places:
            rule = _RULES.get(equation.primitive.name, _elementwise if equation.primitive.is_elementwise else None)
            results = rule(program, equation, operands, batch) if rule is not None else None
        if results is None:
            out = equation.primitive.bind(tuple(_back(value) for value in operands), dict(equation.params))
            place = MIXED if places else None
            results = [Value(t, place) for t in (out if isinstance(out, tuple) else (out,))]
        sourced(results[0].tensor, equation.source)
        values.update(zip(equation.outputs, results, strict=True))
    return [read(output) for output in program.outputs]


# ---------------------------------------------------------------------------- rules: None where one does not apply

Rule = Callable[[Program, Equation, Sequence[Value], int], "list[Value] | None"]


def _bound(equation: Equation, operands: Sequence[Any], place: int, **changes: Any) -> list[Value]:
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
            t = _forwards(reshape(t, ((1,) * missing) + tuple(t.shape)), place)
        found.append(t)
    return place, found


def _elementwise(program: Program, equation: Equation, operands: Sequence[Value], batch: int) -> list[Value] | None:
    shape = program.avals[equation.outputs[0]].shape
    fits = _aligned(operands, len(shape))
    return None if fits is None or shape[fits[0]] != batch else _bound(equation, fits[1], fits[0])


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
    return _bound(equation, tensors, place - gone, axis=tuple(moved) if isinstance(given, tuple) else moved[0])


def _same(program: Program, equation: Equation, operands: Sequence[Value], batch: int) -> list[Value] | None:
    place = operands[0].place
    return None if place is None else _bound(equation, [operands[0].tensor], place)


def _matmul(program: Program, equation: Equation, operands: Sequence[Value], batch: int) -> list[Value] | None:
    left, right = operands
    if left.place is not None and right.place is not None:
        same = left.place == right.place < left.rank - 2 and left.rank == right.rank
        return _bound(equation, [left.tensor, right.tensor], left.place) if same else None
    if left.place is not None:
        fits = left.place < left.rank - 1 and (right.rank == 2 or (left.place == 0 and right.rank <= left.rank))
        return _bound(equation, [left.tensor, right.tensor], left.place) if fits else None
    fits = left.rank == 2 and right.place < right.rank - 2  # type: ignore[operator]
    return _bound(equation, [left.tensor, right.tensor], right.place) if fits else None  # type: ignore[arg-type]


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
    return _bound(equation, [t], place, shape=(batch, *shape[:place], *shape[place + 1 :]))


def _sum_to(program: Program, equation: Equation, operands: Sequence[Value], batch: int) -> list[Value] | None:
    value, goal = operands[0], tuple(equation.params["shape"])
    before, place = program.aval(equation.operands[0]).shape, value.place
    assert place is not None
    extra = len(before) - len(goal)
    if place < extra or goal[place - extra] != batch:
        return None
    ones = [n if k >= extra else 1 for k, n in enumerate((*before[:extra], *goal))]
    summed = _bound(equation, [value.tensor], 0, shape=(batch, *ones[:place], *ones[place + 1 :]))[0].tensor
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
    return None if index is None else _bound(equation, [value.tensor], index[1], template=index[0])


def _put(program: Program, equation: Equation, operands: Sequence[Value], batch: int) -> list[Value] | None:
    value, shape = operands[0], tuple(equation.params["shape"])
    if len(operands) > 1:
        return None
    for place, n in enumerate(shape):
        index = _template(equation.params["template"], len(shape), place) if n == batch else None
        if index is not None and index[1] == value.place:
            moved = (batch, *shape[:place], *shape[place + 1 :])
            return _bound(equation, [value.tensor], place, template=index[0], shape=moved)
    return None


def _take(program: Program, equation: Equation, operands: Sequence[Value], batch: int) -> list[Value] | None:
    table, indices = operands
    if table.place is None and indices.place is not None and equation.params["axis"] == -table.rank:
        return _bound(equation, [table.tensor, indices.tensor], indices.place)
    if table.place == 0 and indices.place is None:
        return _bound(equation, [table.tensor, indices.tensor], 0)
    return None


def _untake(program: Program, equation: Equation, operands: Sequence[Value], batch: int) -> list[Value] | None:
    g, indices = operands
    fits = g.place == 0 and indices.place is None and equation.params["axis"] != -len(equation.params["shape"])
    return _bound(equation, [g.tensor, indices.tensor], 0) if fits else None


def _prod(program: Program, equation: Equation, operands: Sequence[Value], batch: int) -> list[Value] | None:
    (value,) = operands
    return _bound(equation, [value.tensor], value.place) if value.place not in (None, value.rank - 1) else None


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
    return None if axis is None else _bound(equation, [first.tensor, second.tensor], first.place, axis=axis, **changes)


def _scan(program: Program, equation: Equation, operands: Sequence[Value], batch: int) -> list[Value] | None:
    params = equation.params
    body, n_carry, n_ys = params["body"], params["n_carry"], params["n_ys"]
    carry, xs, captures = operands[:n_carry], operands[n_carry : len(body.inputs)], operands[len(body.inputs) :]
    shapes = [body.avals[slot].shape for slot in body.inputs]
    if any(value.place or shape[:1] != (batch,) for value, shape in zip(carry, shapes, strict=False)):
        return None
    if any(value.place == 0 for value in xs):  # the steps are rows
        return None
    # What all rows share may have a row for each of them nevertheless: a sequence that is closed over, a mask.
    guesses = [n for n in (1, 2) if n == 1 or any(v.place is None and v.rank == 2 for v in xs)]
    for rank in guesses:
        turned = [
            value if value.place is not None or value.rank <= rank or shape[:1] != (batch,)
            else Value(_forwards(value.tensor, 1), 1)
            for value, shape in zip(xs, shapes[n_carry:], strict=True)
        ]  # fmt: skip
        found = _inner_body(body, n_carry, [None if v.place is None else v.place - 1 for v in turned], captures, batch)
        if found is not None:
            break
    else:
        return None
    inner, places = found
    out = INNER.bind(
        (*(asarray(v.tensor) for v in (*carry, *turned, *captures)),),
        {
            "body": inner, "n_carry": n_carry, "n_ys": n_ys, "length": params["length"], "reverse": params["reverse"],
            "lead": tuple(int(v.place is not None) for v in turned),
        },
    )  # fmt: skip
    ends = n_carry + n_ys
    return [Value(t, place + (n_carry <= k < ends)) for k, (t, place) in enumerate(zip(out, places, strict=True))]


def _inner_body(
    body: Program, n_carry: int, x_places: Sequence[int | None], captures: Sequence[Value], batch: int
) -> tuple[Program, list[int]] | None:
    """The body of an inner scan on moved forms, and where the batch is in its results; None where it goes under."""
    given = dict(zip(body.inputs, [*(0,) * n_carry, *x_places], strict=True))
    given.update(zip(body.captures, [value.place for value in captures], strict=True))
    avals = list(body.avals)
    for slot, at in given.items():
        if at:
            avals[slot] = Aval(
                tuple(avals[slot].shape[k] for k in _order(len(avals[slot].shape), at)), avals[slot].dtype
            )
    places: list[int] = []
    made = body.definitions()

    def equations(environment: dict[int, Any]) -> list[Any]:
        results = _follow(body, {slot: Value(t, given[slot]) for slot, t in environment.items()}, batch)
        for output, result in zip(body.outputs, results, strict=True):
            shared = result.place is None and output.__class__ is int and output not in made
            at = 0 if shared and body.avals[output].shape[:1] == (batch,) else result.place
            places.append(MIXED if at is None else at)
        return [result.tensor for result in results]

    # The recording starts from the moved shapes of what goes in.
    moved = rewritten(body.replaced(avals=avals), equations)
    if any(places[:n_carry]) or MIXED in places:
        return None
    return simplify(moved), places


_RULES: dict[str, Rule] = {
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
    "scan": _scan,
}
_RULES |= dict.fromkeys(("alias", "stop_gradient", "astype", "one_hot"), _same)
_RULES |= dict.fromkeys(("concatenate", "split", "flip", "roll", "cumsum", "sum", "max", "min", "norm", "argmax",
                         "argmin", "logsumexp", "softmax", "log_softmax"), _along)  # fmt: skip
