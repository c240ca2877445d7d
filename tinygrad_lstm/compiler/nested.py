"""A loop in a loop body: lowered by the same machinery, to a native loop inside of the outer one's text.

What changes from step to step (carries, the rows of sequences and stacks) is a buffer of kind ``n`` whose address
is set at every inner step; everything else is a view of what the outer loop has.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tinygrad_lstm.compiler.expand import expand
from tinygrad_lstm.compiler.fuse import fuse
from tinygrad_lstm.compiler.lowering import Lowering
from tinygrad_lstm.compiler.narrow import narrow
from tinygrad_lstm.compiler.rules import fill
from tinygrad_lstm.compiler.simplify import simplify
from tinygrad_lstm.compiler.stages import Copy, Operation, combine, emit_all
from tinygrad_lstm.compiler.views import Root, Unsupported, View
from tinygrad_lstm.compiler.writer import Writer
from tinygrad_lstm.ops.loop import INNER
from tinygrad_lstm.program import Equation, Program

__all__ = ["Inner", "lower_inner"]


@dataclass
class Moving:
    """What is somewhere else at every inner step."""

    name: str  # of its root
    base: View  # at step 0
    stride: int  # bytes from step to step
    turn: int = -1  # 0 or 1: in two places in turn, ``stride`` apart, beginning with this one


@dataclass
class Inner(Operation):
    """A loop over so many steps.  With products over all rows in it, it stands outside of the loops over rows."""

    length: int
    reverse: bool
    moving: list[Moving]
    operations: list[Operation] = field(default_factory=list)

    @property
    def alone(self) -> bool:  # type: ignore[override]
        return any(operation.alone for operation in self.operations)

    def parts(self) -> list[Operation]:
        return self.operations

    def repeats(self) -> int:
        return self.length

    def bases(self) -> list[View]:
        return [moving.base for moving in self.moving]

    def reads(self) -> list[View]:
        return [*self.bases(), *(view for operation in self.operations for view in operation.reads())]

    def writes(self) -> list[View]:
        return [view for operation in self.operations for view in operation.writes()]

    def emit(self, writer: Writer) -> None:
        for moving in self.moving:
            root = moving.base.root.name
            writer.line(f"r_{moving.name} = r_{root}" if moving.base.rowed else f"r_{moving.name} = 0")
        count = writer.fresh("q")
        writer.line(f"for {count} in range({self.length}):")
        writer.indent += 1
        step = f"({self.length - 1} - {count})" if self.reverse else count
        for moving in self.moving:
            base = moving.base
            place = step if moving.turn < 0 else f"({count} & 1)" if moving.turn == 0 else f"(1 - ({count} & 1))"
            writer.line(f"b_{moving.name} = b_{base.root.name} + {base.offset} + {place} * {moving.stride}")
        emit_all(self.operations, writer, rows=self.alone)
        if not self.operations:
            writer.line("pass")
        writer.indent -= 1


class InnerLowering(Lowering):
    """The body of an inner loop as seen from the outer one: shares its scratch, packed matrices and invariants."""

    def __init__(self, outer: Lowering, program: Program, n_carry: int, n_stacked: int, outside: list[Any]) -> None:
        super().__init__(program, n_carry, n_stacked, outer.split)
        self.outer = outer
        self.packs, self.scratch, self.shapes, self.numbers = outer.packs, outer.scratch, outer.shapes, outer.numbers
        self.outside = dict(zip(program.captures, outside, strict=True))
        self.moving: list[Moving] = []
        self.places: list[View] = []  # of what is stacked, then of the new carry
        self.totals: list[View] = []
        self.batched = set(program.inputs)
        for slot, other in self.outside.items():
            if other in outer.batched:
                self.batched.add(slot)
                self.views[slot] = outer.view(other)

    def move(self, base: View, shape: tuple[int, ...], strides: tuple[int, ...], stride: int, turn: int = -1) -> View:
        """A view that is set anew at every step."""
        root = Root("n", next(self.numbers))
        self.moving.append(Moving(root.name, base, stride, turn))
        self.shapes[root.name] = (shape, base.dtype)
        return View(root, 0, shape, strides, base.dtype, base.rowed)

    def along(self, base: View, axis: int) -> View:
        """The part of a view at the step's place along an axis."""
        shape = (*base.shape[:axis], *base.shape[axis + 1 :])
        return self.move(base, shape, (*base.strides[:axis], *base.strides[axis + 1 :]), base.strides[axis])

    def turning(self, both: View) -> tuple[View, View]:
        """The carry before and after a step, in two places in turn."""
        shape, strides = both.shape[1:], both.strides[1:]
        before, after = (self.move(both, shape, strides, both.strides[0], turn) for turn in (0, 1))
        return before, after

    def _invariant(self, slot: int, rank: int) -> View:
        return self.outer.view(self.outside[slot], rank)

    def _by_rows(self, view: View) -> View:
        if view.root.kind == "n" and view.shape[0] != 1:
            raise Unsupported(None, "a part of a sequence that all rows share, with a row for each of them")
        return super()._by_rows(view)

    def _assign_homes(self) -> Any:
        for slot, place in zip(self.stacked_slots, self.places, strict=False):
            if slot in self.made:
                self.home.setdefault(slot, place)
        for slot, place in zip(self.carry_out, self.places[len(self.stacked_slots) :], strict=True):
            if slot.__class__ is int and slot in self.made:
                self.home.setdefault(slot, place)
        for equation in reversed(self.program.equations):
            self._share_home(equation)

    def _finish(self) -> None:
        for slot, place in zip((*self.stacked_slots, *self.carry_out), self.places, strict=True):
            if slot.__class__ is not int:
                raise Unsupported(None, "a number as the result of a step")
            if self.views.get(slot) != place:
                rank = len(place.shape)
                self.operations.append(Copy(self.view(slot, rank).broadcast(place.shape), place))
        for out, total in zip(self.sums, self.totals, strict=True):
            if out.__class__ is not int or out not in self.batched:
                raise Unsupported(None, "a sum over the steps of something that all rows share")
            self.chain(combine("sum", total.dtype), total.shape, [total, self.view(out)], ("",), [(total, 0)])


def lower_inner(low: Lowering, equation: Equation) -> None:
    """Lower a scan in a loop body."""
    params = equation.params
    n_carry, n_ys, length = params["n_carry"], params["n_ys"], params["length"]
    if low.split and equation.primitive is not INNER:
        raise Unsupported(equation, "a scan over the rows of a batch")
    if any(operand.__class__ is not int for operand in equation.operands):
        raise Unsupported(equation, "a number as operand of scan")
    body = fuse(simplify(narrow(expand(params["body"]))), at_least=1, reductions=True)
    n_inputs = len(body.inputs)
    lead = params.get("lead", (0,) * (n_inputs - n_carry))
    inner = InnerLowering(low, body, n_carry, n_ys, list(equation.operands[n_inputs:]))
    ends: list[View] = []  # the carry behind the last step
    after: list[View] = []
    for slot, operand in zip(body.inputs[:n_carry], equation.operands, strict=False):
        shape, dtype = inner.aval(slot)
        if low.split and body.avals[slot].shape == ():
            raise Unsupported(equation, "a carry that all rows share")
        both = low.temporary((2, *shape), dtype)
        row = both.moved(0, shape, both.strides[1:])
        low.operations.append(Copy(low.view(operand, len(shape)).broadcast(shape), row))
        inner.views[slot], new = inner.turning(both)
        after.append(new)
        ends.append(both.moved((length & 1) * both.strides[0], shape, both.strides[1:]))
    for slot, operand, at in zip(body.inputs[n_carry:], equation.operands[n_carry:n_inputs], lead, strict=True):
        if low.split and not at:
            if operand in low.batched:
                raise Unsupported(equation, "a scan over the rows of a batch")
            inner.batched.discard(slot)
            inner.views[slot] = replace(inner.along(low.view(operand), 0), rowed=False)
            continue
        rank = len(low.program.avals[operand].shape) - low.skip
        inner.views[slot] = inner.along(low.view(operand, rank), at - low.skip)
    ys = equation.outputs[n_carry : n_carry + n_ys]
    stacks = [low.target(slot) for slot in ys]
    behind = 1 - low.skip if equation.primitive is INNER else 0  # the time axis within a row of ys
    inner.places = [*(inner.along(stack, behind) for stack in stacks), *after]
    for slot in equation.outputs[n_carry + n_ys :]:
        inner.totals.append(low.target(slot))
        fill(low, inner.totals[-1], 0)
    inner.run()
    low.operations.append(Inner(length, params["reverse"], inner.moving, inner.operations))
    for slot, end in zip(equation.outputs, ends, strict=False):
        low.define(slot, end)
