"""Rules for what moves elements, or picks them by numbers, and the operations that they need: element by element
where a row kernel does not apply."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tinygrad_lstm.compiler.rules import converted, fill, not_the_batch
from tinygrad_lstm.compiler.stages import Copy, Operation, combine, looped
from tinygrad_lstm.compiler.views import Unsupported, View
from tinygrad_lstm.compiler.writer import Writer, nested
from tinygrad_lstm.kernels import Expression
from tinygrad_lstm.program import Equation

if TYPE_CHECKING:
    from tinygrad_lstm.compiler.lowering import Lowering

__all__ = ["MOVEMENT", "take_inside"]

_LOAD = {"float32": "load_float32", "float64": "load_float64", "int32": "load32", "int64": "load64", "bool": "load8"}
_STORE = {
    "float32": "store_float32", "float64": "store_float64", "int32": "store32", "int64": "store64", "bool": "store8"
}  # fmt: skip


# ---------------------------------------------------------------------------- operations


@dataclass
class Extremum(Operation):
    """Where along an axis the first largest or smallest element is; the first NaN, where there is one."""

    kind: str
    axis: int
    source: View
    target: View  # with length 1 there

    def reads(self) -> list[View]:
        return [self.source]

    def writes(self) -> list[View]:
        return [self.target]

    def emit(self, writer: Writer) -> None:
        load, sign = _LOAD[self.source.dtype.name], ">" if self.kind == "argmax" else "<"
        step = self.source.strides[self.axis]

        def body(moved: list[str]) -> None:
            best, at, j, v = (writer.fresh(prefix) for prefix in ("best", "at", "j", "v"))
            writer.line(f"{best} = {load}({moved[0]})")
            writer.line(f"{at} = 0")
            writer.line(f"for {j} in range(1, {self.source.shape[self.axis]}):")
            writer.line(f"    {v} = {load}({moved[0]} + {j} * {step})")
            writer.line(f"    if {best} == {best} and ({v} {sign} {best} or {v} != {v}):")
            writer.line(f"        {best} = {v}")
            writer.line(f"        {at} = {j}")
            writer.line(f"store64({moved[1]}, {at})")

        addresses = [writer.address(view, "r") for view in (self.source, self.target)]
        nested(writer, self.target.shape, addresses, [self.source.strides, self.target.strides], body)


@dataclass
class Mark(Operation):
    """A one at an index of every row of zeros."""

    index: View
    target: View  # one more axis

    def reads(self) -> list[View]:
        return [self.index]

    def writes(self) -> list[View]:
        return [self.target]

    def emit(self, writer: Writer) -> None:
        one = "1.0" if self.target.dtype.kind == "f" else "1"
        store = _STORE[self.target.dtype.name]

        def body(moved: list[str]) -> None:
            n = writer.fresh("n")
            writer.line(f"{n} = {_LOAD[self.index.dtype.name]}({moved[0]})")
            writer.line(f"if {n} < 0 or {n} >= {self.target.shape[-1]}:")
            writer.line("    return 1")
            writer.line(f"{store}({moved[1]} + {n} * {self.target.strides[-1]}, {one})")

        addresses = [writer.address(view, "r") for view in (self.index, self.target)]
        nested(writer, self.index.shape, addresses, [self.index.strides, self.target.strides[:-1]], body)


@dataclass
class Pick(Operation):
    """Elements at an index along an axis, read from there or added up there, in order.

    All views have one shape; ``place`` stands still along the axis that the index counts along.
    """

    index: View
    fixed: View  # what the index is looked up for
    place: View
    step: int  # bytes along the axis
    length: int
    adds: bool

    def reads(self) -> list[View]:
        return [self.index, self.fixed, self.place] if self.adds else [self.index, self.place]

    def writes(self) -> list[View]:
        return [self.place if self.adds else self.fixed]

    def emit(self, writer: Writer) -> None:
        load, store = _LOAD[self.fixed.dtype.name], _STORE[self.fixed.dtype.name]

        def body(moved: list[str]) -> None:
            n, there = writer.fresh("n"), writer.fresh("a")
            writer.line(f"{n} = {_LOAD[self.index.dtype.name]}({moved[0]})")
            writer.line(f"if {n} < 0:")
            writer.line(f"    {n} += {self.length}")
            writer.line(f"if {n} < 0 or {n} >= {self.length}:")
            writer.line("    return 1")
            writer.line(f"{there} = {moved[2]} + {n} * {self.step}")
            if self.adds:
                writer.line(f"{store}({there}, {load}({there}) + {load}({moved[1]}))")
            else:
                writer.line(f"{store}({moved[1]}, {load}({there}))")

        views = (self.index, self.fixed, self.place)
        addresses = [writer.address(view, "r") for view in views]
        nested(writer, self.fixed.shape, addresses, [view.strides for view in views], body)


@dataclass
class Cumulate(Operation):
    """Partial sums along an axis."""

    axis: int
    source: View
    target: View
    combine: Expression = field(repr=False)

    def reads(self) -> list[View]:
        return [self.source]

    def writes(self) -> list[View]:
        return [self.target]

    def emit(self, writer: Writer) -> None:
        source, target = (_first(view, self.axis) for view in (self.source, self.target))
        Copy(source, target).emit(writer)
        n = self.source.shape[self.axis]
        if n == 1:
            return
        there, here = target.strides[self.axis], source.strides[self.axis]
        looped(
            writer, n, self.combine, source.dtype.name, [target, source, target],
            [(-there, there), (0, here), (0, there)],
        )  # fmt: skip


def _first(view: View, axis: int) -> View:
    shape = tuple(1 if k == axis else n for k, n in enumerate(view.shape))
    return view.moved(0, shape, view.strides)


# ---------------------------------------------------------------------------- rules


def _axis(low: Lowering, equation: Equation, source: View, axis: int) -> int:
    place = axis + len(source.shape)
    not_the_batch(low, equation, place)
    return place


def _flip(low: Lowering, equation: Equation) -> None:
    source = low.operand(equation)
    offset, strides = 0, list(source.strides)
    for axis in equation.params["axis"]:
        place = _axis(low, equation, source, axis)
        offset += max(source.shape[place] - 1, 0) * strides[place]
        strides[place] = -strides[place]
    low.define(equation.outputs[0], source.moved(offset, source.shape, tuple(strides)))


def _roll(low: Lowering, equation: Equation) -> None:
    source, target = low.operand(equation), low.target(equation.outputs[0])
    shifts: dict[int, int] = {}
    for shift, axis in zip(equation.params["shift"], equation.params["axis"], strict=True):
        place = _axis(low, equation, source, axis)
        shifts[place] = shifts.get(place, 0) + shift
    if not source.size:
        return
    # Per axis two pieces: (from, to, length).
    pieces = []
    for place, shift in shifts.items():
        n = source.shape[place]
        shift %= n
        pieces.append([(place, *piece) for piece in ((0, shift, n - shift), (n - shift, 0, shift)) if piece[2]])
    for chosen in itertools.product(*pieces):
        begin = end = 0
        shape = list(source.shape)
        for place, start, stop, n in chosen:
            begin += start * source.strides[place]
            end += stop * target.strides[place]
            shape[place] = n
        part = tuple(shape)
        low.operations.append(Copy(source.moved(begin, part, source.strides), target.moved(end, part, target.strides)))


def _cumsum(low: Lowering, equation: Equation) -> None:
    out = equation.outputs[0]
    source = converted(low, equation, low.operand(equation), np.dtype(low.program.avals[out].dtype))
    place = _axis(low, equation, source, equation.params["axis"])
    target = low.target(out)
    if source.size:
        low.operations.append(Cumulate(place, source, target, combine("sum", source.dtype)))


def _arg(low: Lowering, equation: Equation) -> None:
    source = low.operand(equation)
    place = _axis(low, equation, source, equation.params["axis"])
    if not source.size:
        raise Unsupported(equation, "the largest of nothing")
    kept = tuple(1 if k == place else n for k, n in enumerate(source.shape))

    def extremum(target: View) -> Operation:
        opened = target.reshaped(kept)
        if opened is None:
            raise Unsupported(equation, "a reduction into a strided place")
        return Extremum(equation.primitive.name, place, source, opened)

    low.dense_target(equation.outputs[0], extremum)


def _one_hot(low: Lowering, equation: Equation) -> None:
    index = low.operand(equation)
    target = low.target(equation.outputs[0])
    fill(low, target, 0)
    low.operations.append(Mark(index, target))


def _along(low: Lowering, equation: Equation) -> None:
    """``take_along_axis``, and its transpose, which adds."""
    adds = "shape" in equation.params
    rank = low.rank(equation)
    first, index = (low.operand(equation, k, rank) for k in (0, 1))
    target = low.target(equation.outputs[0])
    place = _axis(low, equation, target, equation.params["axis"])
    fixed, table = (first, target) if adds else (target, first)
    others = [tuple(n for k, n in enumerate(v.shape) if k != place) for v in (fixed, table, index)]
    if len(set(others)) > 1 or fixed.shape != index.shape:
        raise Unsupported(equation, f"{equation.primitive.name} that broadcasts")
    _pick(low, index, fixed, table, place, 1, adds)


def _pick(low: Lowering, index: View, fixed: View, table: View, place: int, count: int, adds: bool) -> None:
    """Append a Pick; ``count`` axes of ``fixed`` from ``place`` on take the place of one of the table."""
    strides = (*table.strides[:place], *(0,) * count, *table.strides[place + 1 :])
    if adds:
        fill(low, table, 0)
    still = table.moved(0, fixed.shape, strides)
    low.operations.append(Pick(index, fixed, still, table.strides[place], table.shape[place], adds))


def take_inside(low: Lowering, equation: Equation) -> None:
    """``take`` along an axis of the rows, and its transpose: the same picks for all rows."""
    slot = equation.operands[1]
    if low.split and slot in low.batched:
        raise Unsupported(equation, "take along an inner axis, at an index per row")
    adds = "shape" in equation.params
    first, index, target = low.operand(equation), low.view(slot), low.target(equation.outputs[0])
    fixed, table = (first, target) if adds else (target, first)
    place = _axis(low, equation, table, equation.params["axis"])
    count = len(index.shape)
    strides = [0] * len(fixed.shape)
    strides[place : place + count] = index.strides
    _pick(low, index.moved(0, fixed.shape, tuple(strides)), fixed, table, place, count, adds)


def _full(low: Lowering, equation: Equation) -> None:
    value = equation.params["value"]
    if low.split or isinstance(value, np.ndarray):
        raise Unsupported(equation, "a constant array that is made in the loop")
    fill(low, low.target(equation.outputs[0]), value)


MOVEMENT: dict[str, Callable[[Lowering, Equation], None]] = {
    "flip": _flip,
    "roll": _roll,
    "cumsum": _cumsum,
    "argmax": _arg,
    "argmin": _arg,
    "one_hot": _one_hot,
    "take_along_axis": _along,
    "untake_along_axis": _along,
    "untake": take_inside,
    "full": _full,
}
