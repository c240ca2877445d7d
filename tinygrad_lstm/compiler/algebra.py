"""Algebra that is exact in floating point: values that equal a value that exists are not computed.

What remains computes the same numbers, infinities and NaN included.  Two exceptions, where the sign of a zero
may change: a sum of one term, and a sum of parts that becomes a join.  Rules that look right and are not stay
out: ``x + 0.0`` turns -0.0 into 0.0, ``-(a - b)`` and ``b - a`` differ in the sign of zero where a equals b,
``x * 0`` is not 0 for an infinite x, and a sum of sums adds in another order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinygrad_lstm.primitive import REGISTRY, Aval
from tinygrad_lstm.program import Equation, Program

__all__ = ["algebra"]


class _Part(NamedTuple):
    """A value that is ``whole[start:stop]`` along one axis (counted from the end)."""

    whole: int
    axis: int
    start: int
    stop: int


def algebra(program: Program) -> Program:
    """Values that equal a value that exists, and equations with a shorter equal.  No equation is removed here.

    A value with a name (``tg.name``) keeps its equation.
    """
    return _Rewriter(program).run()


class _Rewriter:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.avals = list(program.avals)
        self.same: dict[int, int] = {}  # a slot: the slot that has its value
        self.made: dict[int, Equation] = {}  # equations as rewritten so far
        self.kept: list[Equation] = []
        self.users = program.users()

    def run(self) -> Program:
        for equation in self.program.equations:
            equation = equation._replace(operands=tuple(self.now(operand) for operand in equation.operands))
            found = self.rewritten(equation)
            labelled = any(slot in self.program.labels for slot in equation.outputs)
            if isinstance(found, int):
                found = (found,)
            if isinstance(found, tuple) and not isinstance(found, Equation):
                if not labelled:
                    self.same.update((a, b) for a, b in zip(equation.outputs, found, strict=True) if b is not None)
                    if None not in found:
                        continue
                found = None
            self.keep(equation if found is None else found)
        outputs = tuple(self.now(output) for output in self.program.outputs)
        return self.program.replaced(avals=self.avals, equations=tuple(self.kept), outputs=outputs)

    def now(self, operand: Any) -> Any:
        return self.same.get(operand, operand) if operand.__class__ is int else operand

    def keep(self, equation: Equation) -> None:
        self.kept.append(equation)
        self.made.update((slot, equation) for slot in equation.outputs)

    def new(self, name: str, operands: Sequence[Any], like: Equation, **params: Any) -> int:
        """A new equation with one output, in front of the one that is looked at."""
        primitive = REGISTRY[name]
        known = [self.avals[o] if o.__class__ is int else o.value for o in operands]
        self.avals.append(primitive.abstract(known, params))
        self.keep(Equation(primitive, tuple(operands), params, (len(self.avals) - 1,), like.source))
        return len(self.avals) - 1

    def rewritten(self, equation: Equation) -> Any:
        """Slots that equal the outputs (None for an output without one), or an equation; None: nothing better."""
        rule = _RULES.get(equation.primitive.name)
        found = rule(self, equation) if rule is not None else None
        if isinstance(found, int) and self.avals[found] != self.avals[equation.outputs[0]]:
            return None  # equal numbers, but broadcast or converted
        return found

    # ------------------------------------------------------------------ what is known about an operand

    def by(self, operand: Any, name: str) -> Equation | None:
        """The equation that made an operand, if it is of this primitive."""
        made = self.made.get(operand) if operand.__class__ is int else None
        return made if made is not None and made.primitive.name == name else None

    def number(self, operand: Any) -> Any:
        """The one number that an operand holds everywhere, or None."""
        value = operand.value if operand.__class__ is not int else None
        full = self.by(operand, "full")
        if full is not None:
            value = full.params["value"]
        return value if isinstance(value, (bool, int, float, np.generic)) else None

    def inner(self, slot: int) -> bool:
        """Whether a sum is nothing but a term of another sum of its shape."""
        (user, *others) = self.users.get(slot, [None])
        return (
            user is not None
            and not others
            and user.primitive.name == "add"
            and self.avals[slot] == self.avals[user.outputs[0]]
        )

    def floating(self, *slots: int) -> bool:
        """Whether all are of one floating dtype: then nothing is converted between them."""
        dtypes = {np.dtype(self.avals[slot].dtype) for slot in slots}
        return len(dtypes) == 1 and dtypes.pop().kind == "f"

    def part(self, slot: Any) -> _Part | None:
        """Of which value this one is a slice along one axis."""
        made = self.made.get(slot) if slot.__class__ is int else None
        if made is None:
            return None
        if made.primitive.name == "split":
            place, axis = made.outputs.index(slot), made.params["axis"]
            start = sum(made.params["sizes"][:place])
            return _Part(made.operands[0], axis, start, start + made.params["sizes"][place])
        if made.primitive.name == "getitem" and len(made.operands) == 1:
            found = _one_slice(made.params["template"], self.avals[made.operands[0]].shape)
            return _Part(made.operands[0], *found) if found is not None else None
        return None


def _one_slice(template: Any, shape: Sequence[int]) -> tuple[int, int, int] | None:
    """(axis, start, stop) of an index that takes a slice with step 1 of at most one axis, else None."""
    items = list(template)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [("slice", None, None, None)] * (len(shape) - len(items) + 1)
    found = None
    for k, item in enumerate(items):
        if not isinstance(item, tuple) or item[0] != "slice" or item[3] not in (None, 1):
            return None
        start, stop, _ = slice(*item[1:]).indices(shape[k])
        if (start, stop) != (0, shape[k]):
            if found is not None:
                return None
            found = (k - len(shape), start, max(start, stop))
    if found is None and shape:
        found = (-1, 0, shape[-1])
    return found


# ---------------------------------------------------------------------------- arithmetic


def _is(value: Any, number: float) -> bool:
    """Equality that tells -0.0 from 0.0."""
    return value is not None and value == number and math.copysign(1.0, value) == math.copysign(1.0, number)


def _multiply(r: _Rewriter, equation: Equation) -> Any:
    (a, b), out = equation.operands, equation.outputs[0]
    for x, other in ((a, b), (b, a)):
        if x.__class__ is int and _is(r.number(other), 1):
            return x
        if x.__class__ is int and _is(r.number(other), -1) and r.avals[x] == r.avals[out]:
            return equation._replace(primitive=REGISTRY["negative"], operands=(x,))
    first, second = r.by(a, "negative"), r.by(b, "negative")
    if first is not None and second is not None and r.floating(a, b):
        return equation._replace(operands=(first.operands[0], second.operands[0]))
    return None


def _divide(r: _Rewriter, equation: Equation) -> Any:
    a, b = equation.operands
    return a if a.__class__ is int and _is(r.number(b), 1) else None


def _add(r: _Rewriter, equation: Equation) -> Any:
    (a, b), out = equation.operands, equation.outputs[0]
    whole = np.dtype(r.avals[out].dtype).kind in "iu"
    for x, other in ((a, b), (b, a)):
        zero = r.number(other)
        # -0.0 is the neutral element: -0.0 + 0.0 is 0.0.
        if x.__class__ is int and (_is(zero, -0.0) or (whole and zero is not None and zero == 0)):
            return x
        minus = r.by(other, "negative")
        if minus is not None and r.floating(other, out):
            return equation._replace(primitive=REGISTRY["subtract"], operands=(x, minus.operands[0]))
    return None if r.inner(out) else _joined_puts(r, equation)


def _subtract(r: _Rewriter, equation: Equation) -> Any:
    a, b = equation.operands
    if a.__class__ is int and _is(r.number(b), 0.0):
        return a
    minus = r.by(b, "negative")
    if minus is not None and r.floating(b, equation.outputs[0]):
        return equation._replace(primitive=REGISTRY["add"], operands=(a, minus.operands[0]))
    return None


def _negative(r: _Rewriter, equation: Equation) -> Any:
    twice = r.by(equation.operands[0], "negative")
    return None if twice is None else twice.operands[0]


def _where(r: _Rewriter, equation: Equation) -> Any:
    condition = r.number(equation.operands[0])
    if condition is None:
        return None
    chosen = equation.operands[1 if condition else 2]
    return chosen if chosen.__class__ is int else None


# ---------------------------------------------------------------------------- rearrangements


def _same_shape(r: _Rewriter, equation: Equation) -> Any:
    """Nothing is done where the result has the operand's shape (and dtype, which the rewriter compares)."""
    return equation.operands[0] if r.avals[equation.operands[0]] == r.avals[equation.outputs[0]] else None


def _outermost(r: _Rewriter, equation: Equation) -> Any:
    """``reshape(reshape(x))`` is one reshape; broadcast_to alike."""
    inner = r.by(equation.operands[0], equation.primitive.name)
    shortest = equation if inner is None else equation._replace(operands=inner.operands)
    same = _same_shape(r, shortest)
    return shortest if same is None else same


def _transpose(r: _Rewriter, equation: Equation) -> Any:
    axes, x = equation.params["axes"], equation.operands[0]
    inner = r.by(x, "transpose")
    if inner is not None:
        first = inner.params["axes"]
        n = max(len(axes), len(first))
        # Axes beyond those that are named stay in place.
        first = (*range(-n, -len(first)), *first)
        axes = tuple(first[axis] for axis in (*range(-n, -len(axes)), *axes))
        x = inner.operands[0]
    if axes == tuple(range(-len(axes), 0)):
        return x
    return None if inner is None else equation._replace(operands=(x,), params={"axes": axes})


def _astype(r: _Rewriter, equation: Equation) -> Any:
    """A conversion to a dtype that holds every value of the first, and back."""
    inner = r.by(equation.operands[0], "astype")
    if inner is None:
        return _same_shape(r, equation)
    first, between = np.dtype(r.avals[inner.operands[0]].dtype), np.dtype(inner.params["dtype"])
    # NumPy calls the way from int64 to float64 safe, but 2**53 + 1 does not survive it.
    rounds = first.kind in "iu" and first.itemsize == 8 and between.kind == "f"
    if rounds or not np.can_cast(first, between, "safe"):
        return _same_shape(r, equation)
    return inner.operands[0]  # where it is the same dtype again: the rewriter compares


def _split(r: _Rewriter, equation: Equation) -> Any:
    """Pieces of a concatenation; one piece that is used alone is a slice."""
    x, axis, sizes = equation.operands[0], equation.params["axis"], equation.params["sizes"]
    if len(sizes) == 1:
        return (x,)
    joint = r.by(x, "concatenate")
    if joint is not None and joint.params["axis"] == axis and joint.reads() == list(joint.operands):
        found = []
        start = 0
        for size, output in zip(sizes, equation.outputs, strict=True):
            found.append(_between(r, joint, start, start + size, output))
            start += size
        if any(slot is not None for slot in found):
            return tuple(found)
    used = [k for k, slot in enumerate(equation.outputs) if r.users.get(slot)]
    if len(used) == 1 and not any(slot in r.program.labels for slot in equation.outputs):
        start = sum(sizes[: used[0]])
        template = (Ellipsis, ("slice", start, start + sizes[used[0]], None))
        template += (("slice", None, None, None),) * (-1 - axis)
        primitive, outputs = REGISTRY["getitem"], (equation.outputs[used[0]],)
        return Equation(primitive, (x,), {"template": template}, outputs, equation.source)
    return None


def _between(r: _Rewriter, joint: Equation, start: int, stop: int, like: int) -> int | None:
    """What ``joint[start:stop]`` is made of, where the cuts are between its operands."""
    at = 0
    pieces = []
    for operand in joint.operands:
        length = r.avals[operand].shape[joint.params["axis"]]
        if start <= at and at + length <= stop and length:
            pieces.append(operand)
        elif at < stop and at + length > start and length:
            return None
        at += length
    if not pieces or r.avals[pieces[0]].dtype != r.avals[like].dtype:
        return None
    return pieces[0] if len(pieces) == 1 else r.new("concatenate", pieces, joint, axis=joint.params["axis"])


def _getitem(r: _Rewriter, equation: Equation) -> Any:
    if len(equation.operands) > 1:
        return None
    x = equation.operands[0]
    found = _one_slice(equation.params["template"], r.avals[x].shape)
    if found is None:
        return None
    axis, start, stop = found
    joint = r.by(x, "concatenate")
    if joint is not None and joint.params["axis"] == axis and joint.reads() == list(joint.operands):
        return _between(r, joint, start, stop, equation.outputs[0])
    return x  # where it is all of x: the rewriter compares the shapes


def _concatenate(r: _Rewriter, equation: Equation) -> Any:
    """Adjacent slices of one value, put together again."""
    axis = equation.params["axis"]
    parts = [r.part(operand) for operand in equation.operands]
    first = parts[0]
    if first is None or first.axis != axis:
        return None
    at = 0
    for part in parts:
        if part is None or (part.whole, part.axis, part.start) != (first.whole, axis, at):
            return None
        at = part.stop
    return first.whole


def _joined_puts(r: _Rewriter, equation: Equation) -> Any:
    """A sum of values that were each put into zeros, at slices of one axis that do not overlap: a concatenation."""
    goal = r.avals[equation.outputs[0]]
    terms: list[Any] = []
    pending = list(reversed(equation.operands))
    while pending:
        operand = pending.pop()
        inner = r.by(operand, "add")
        if inner is not None and r.inner(operand):
            pending.extend(reversed(inner.operands))
        else:
            terms.append(operand)
    places: dict[int, dict[tuple[int, int], int]] = {}  # by axis: which term is put where
    for term in terms:
        found = _put_at(r, term, goal)
        if found is not None:
            places.setdefault(found[0], {})[found[1:]] = term
    for axis, at in places.items():
        cuts = sorted(at)
        if len(cuts) < 2 or any(a[1] > b[0] for a, b in itertools.pairwise(cuts)):
            continue
        rest = [term for term in terms if term not in set(at.values())]
        if len(rest) + len(cuts) < len(terms):
            continue  # one term stands twice in the sum
        blocks: list[int] = []
        end = 0
        for start, stop in (*cuts, (goal.shape[axis],) * 2):
            if start > end:  # nothing was put here
                shape = list(goal.shape)
                shape[axis] = start - end
                blocks.append(r.new("full", (), equation, shape=tuple(shape), dtype=goal.dtype, value=0.0))
            if (start, stop) in at:
                blocks.append(r.made[at[start, stop]].operands[0])
            end = stop
        total = r.new("concatenate", blocks, equation, axis=axis)
        for term in rest[:-1]:
            total = r.new("add", (total, term), equation)
        return equation._replace(operands=(total, rest[-1])) if rest else total
    return None


def _put_at(r: _Rewriter, term: Any, goal: Aval) -> tuple[int, int, int] | None:
    """(axis, start, stop) where a term of a sum was put into zeros, if it is a slice of one axis."""
    put = r.by(term, "put")
    if put is None or len(put.operands) > 1 or r.avals[term] != goal or not r.floating(term, put.operands[0]):
        return None
    found = _one_slice(put.params["template"], goal.shape)
    return found if found is not None and found[1] < found[2] else None


Rule = Callable[[_Rewriter, Equation], Any]
_RULES: dict[str, Rule] = {
    "multiply": _multiply,
    "divide": _divide,
    "add": _add,
    "subtract": _subtract,
    "negative": _negative,
    "where": _where,
    "reshape": _outermost,
    "broadcast_to": _outermost,
    "sum_to": _same_shape,
    "alias": _same_shape,
    "transpose": _transpose,
    "astype": _astype,
    "split": _split,
    "getitem": _getitem,
    "concatenate": _concatenate,
}
