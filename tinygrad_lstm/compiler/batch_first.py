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
from collections.abc import Mapping, Sequence
from typing import Any

from tinygrad_lstm.compiler.forms import MIXED, RULES, Merged, Value, back, bound, elementwise, forwards, order
from tinygrad_lstm.compiler.simplify import simplify
from tinygrad_lstm.compiler.unnest import has_scans, rewritten
from tinygrad_lstm.ops.loop import INNER
from tinygrad_lstm.ops.shape import reshape, transpose
from tinygrad_lstm.primitive import Aval
from tinygrad_lstm.program import Equation, Program, sourced
from tinygrad_lstm.tensor import asarray

__all__ = ["batch_first"]


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
    # Values with inner steps have more axes than those without, so their last choice is tried together, early.
    ranks = [len(avals[slot].shape) for slot in program.inputs]
    choices = [found or [-1] for found in choices]
    alike = tuple(found[-1] if rank > 2 else found[0] for found, rank in zip(choices, ranks, strict=True))
    guesses = list(itertools.islice(itertools.product(*choices), _GUESSES))
    first = None
    for guess in (guesses[0], alike, *guesses[1:]):
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
            slot: Value(forwards(t, places[slot]), places[slot]) if slot in places else Value(t, None)
            for slot, t in environment.items()
        }
        return [back(value) for value in _follow(program, values, batch)]

    return simplify(rewritten(program, equations))


def _rule(equation: Equation) -> Any:
    if equation.primitive.name == "scan":
        return _scan
    return RULES.get(equation.primitive.name, elementwise if equation.primitive.is_elementwise else None)


def _follow(program: Program, values: dict[int, Value], batch: int) -> list[Value]:
    """Record the program on values in their moved form; returns its results."""

    def read(operand: Any) -> Value:
        return values[operand] if operand.__class__ is int else Value(operand.value, None)

    for equation in program.equations:
        operands = [read(operand) for operand in equation.operands]
        places = {value.place for value in operands} - {None}
        results = None
        if places and MIXED not in places:
            rule = _rule(equation)
            results = rule(program, equation, operands, batch) if rule is not None else None
        if results is None:
            results = _summed_over(equation, operands)
        if results is None:
            out = equation.primitive.bind(tuple(back(value) for value in operands), dict(equation.params))
            place = MIXED if places else None
            results = [Value(t, place) for t in (out if isinstance(out, tuple) else (out,))]
            if places:
                results[0] = results[0]._replace(merged=_merged(program, equation, operands))
        sourced(results[0].tensor, equation.source)
        values.update(zip(equation.outputs, results, strict=True))
    return [read(output) for output in program.outputs]


def _merged(program: Program, equation: Equation, operands: Sequence[Value]) -> Merged | None:
    """The result as a matrix with merged rows: a reshape of what is still in order, or the transpose of another."""
    value, shape = operands[0], program.avals[equation.outputs[0]].shape
    name, place = equation.primitive.name, value.place
    if name == "transpose" and value.merged is not None and equation.params["axes"] == (-1, -2):
        return Merged(transpose(value.merged.tensor, (1, 0)), 1 - value.merged.axis, value.merged.lengths)
    before = program.aval(equation.operands[0]).shape
    if name != "reshape" or not place or len(shape) != 2 or shape[0] != math.prod(before[: place + 1]):
        return None
    return Merged(reshape(value.tensor, shape), 0, before[: place + 1])


def _summed_over(equation: Equation, operands: Sequence[Value]) -> list[Value] | None:
    """A product that sums over steps and batch, in the order that both operands are in: a weight gradient."""
    if equation.primitive.name != "matmul":
        return None
    left, right = (value.merged for value in operands)
    if left is None or right is None or left.axis != 1 or right.axis != 0 or left.lengths != right.lengths:
        return None
    return bound(equation, [left.tensor, right.tensor], MIXED)


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
            else Value(forwards(value.tensor, 1), 1)
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
                tuple(avals[slot].shape[k] for k in order(len(avals[slot].shape), at)), avals[slot].dtype
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
