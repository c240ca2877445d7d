"""Lower a loop body to operations on views: layout, placement of buffers, and the order of the operations.

A value whose last use is a row of a stack or the next carry is computed in place there; the operands of a
concatenation are computed in their part of it; splits, slices, reshapes and transposes are views.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np

from tinygrad_lstm.compiler.movement import MOVEMENT
from tinygrad_lstm.compiler.rules import RULES
from tinygrad_lstm.compiler.stages import Chain, Copy, Operation, Packed, combine
from tinygrad_lstm.compiler.views import Root, Unsupported, View, contiguous, dense
from tinygrad_lstm.compiler.writer import collapsed
from tinygrad_lstm.program import Equation, Program

__all__ = ["Lowered", "lower_body"]

_DTYPES = frozenset({"float32", "float64", "bool", "int64", "int32"})
_VIEWS = frozenset(
    {"split", "getitem", "reshape", "transpose", "alias", "stop_gradient", "stop_nan", "broadcast_to", "flip"}
)  # fmt: skip


@dataclass
class Lowered:
    """The operations of one step and what they need."""

    operations: list[Operation]
    packs: list[Packed]
    scratch: list[int]  # bytes of a row of every scratch buffer
    # Where the carry lives: in a stack of T + 1 rows that is also a result, or in two rows in turn.
    kept: list[bool]
    # Per stacked output: ("y", k) its own buffer, ("i", c) or ("o", c) the rows of carry c before or after a step.
    stacked: list[tuple[str, int]]
    row_shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)  # inputs without a batch axis


def lower_body(program: Program, n_carry: int, n_stacked: int, split: bool) -> Lowered:
    """Lower a fused loop body (carry..., x...; captures...) -> (carry..., stacked..., sums...).

    With ``split`` axis 0 of every value is a row of the batch (proved before); without, the whole body is one
    row.  Raises Unsupported.
    """
    return Lowering(program, n_carry, n_stacked, split).run()


class Lowering:
    def __init__(self, program: Program, n_carry: int, n_stacked: int, split: bool) -> None:
        self.program, self.n_carry, self.split = program, n_carry, split
        self.skip = 1 if split else 0
        self.made = program.definitions()
        self.carry_in = program.inputs[:n_carry]
        self.carry_out = program.outputs[:n_carry]
        self.stacked_slots = program.outputs[n_carry : n_carry + n_stacked]
        self.sums = program.outputs[n_carry + n_stacked :]
        self.operations: list[Operation] = []
        self.packs: list[Packed] = []
        self.scratch: list[int] = []
        self.home: dict[int, View] = {}
        self.views: dict[int, View] = {}
        # One number a step, without a batch axis, is the same for all rows.
        self.batched: set[int] = {slot for slot in program.inputs if program.avals[slot].shape or not split}
        self.shared: set[str] = set()
        self.shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        self.numbers = count()  # of what moves in inner loops (nested.py)

    # ------------------------------------------------------------------ views of inputs

    def aval(self, slot: int) -> tuple[tuple[int, ...], np.dtype]:
        aval = self.program.avals[slot]
        return tuple(aval.shape[self.skip :]), np.dtype(aval.dtype)

    def _root(self, kind: str, index: int, shape: tuple[int, ...], dtype: np.dtype) -> View:
        root = Root(kind, index)
        self.shapes[root.name] = (shape, dtype)
        return View(root, 0, shape, contiguous(shape, dtype.itemsize), dtype)

    def temporary(self, shape: tuple[int, ...], dtype: Any) -> View:
        dtype = np.dtype(dtype)
        nbytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        self.scratch.append(-(-max(nbytes, 1) // 64) * 64)
        return self._root("t", len(self.scratch) - 1, shape, dtype)

    def _invariant(self, slot: int, rank: int) -> View:
        """An invariant as seen from a row of a value with ``rank`` axes in a row."""
        k = self.program.captures.index(slot)
        aval = self.program.avals[slot]
        shape, dtype = tuple(aval.shape), np.dtype(aval.dtype)
        rowed = self.split and len(shape) == rank + 1
        inner = shape[1:] if rowed else shape
        self.shapes[f"v{k}"] = (shape, dtype)
        return View(Root("v", k), 0, inner, contiguous(inner, dtype.itemsize), dtype, rowed)

    def view(self, slot: int, rank: int | None = None) -> View:
        """The view of a slot; an invariant is seen from a value of so many axes in a row."""
        if slot in self.views:
            found = self.views[slot]
            if slot in self.batched or rank is None or not self.split:
                return found
            # A part of an invariant: with one axis more than a row has, its leading axis is the batch.
            return self._by_rows(found) if len(found.shape) == rank + 1 else found
        if slot in self.program.captures:
            return self._invariant(slot, len(self.program.avals[slot].shape) if rank is None else rank)
        raise KeyError(slot)

    def _by_rows(self, view: View) -> View:
        if view.shape[0] == 1:  # the same for all rows
            return replace(view, shape=view.shape[1:], strides=view.strides[1:])
        shape, dtype = self.shapes[view.root.name]
        if not view.strides or view.strides[0] != contiguous(shape, dtype.itemsize)[0]:
            raise Unsupported(None, "a part of an invariant whose rows are not those of the batch")
        return View(view.root, view.offset, view.shape[1:], view.strides[1:], view.dtype, True)

    # ------------------------------------------------------------------ homes

    def _assign_homes(self) -> Lowered:
        kept, stacked = [], []
        for k, slot in enumerate(self.carry_in):
            out = self.carry_out[k]
            first = out.__class__ is int and out in self.made and self.carry_out.index(out) == k
            keep = slot in self.stacked_slots or (first and out in self.stacked_slots)
            kept.append(keep)
            shape, dtype = self.aval(slot)
            self.views[slot] = self._root("i", k, shape, dtype)
            self.shapes[f"o{k}"] = (shape, dtype)
        for k, slot in enumerate(self.stacked_slots):
            if slot in self.carry_in:
                stacked.append(("i", self.carry_in.index(slot)))
            elif slot in self.carry_out and slot in self.made:
                stacked.append(("o", self.carry_out.index(slot)))
            else:
                stacked.append(("y", k))
                shape, dtype = self.aval(slot)
                self.home.setdefault(slot, self._root("y", k, shape, dtype))
        for k, out in enumerate(self.carry_out):
            if out.__class__ is int and out in self.made and out not in self.home:
                shape, dtype = self.aval(out)
                self.home[out] = self._root("o", k, shape, dtype)
        for k, slot in enumerate(self.program.inputs[self.n_carry :]):
            shape, dtype = self.aval(slot)
            self.views[slot] = self._root("x", k, shape, dtype)
            if slot not in self.batched:
                self.views[slot] = replace(self.views[slot], rowed=False)
                self.shared.add(f"x{k}")
        for equation in reversed(self.program.equations):
            self._share_home(equation)
        return Lowered(self.operations, self.packs, self.scratch, kept, stacked, self.shapes, self.shared)

    def _share_home(self, equation: Equation) -> None:
        """Operands of a concatenation (or of a reshape) are computed in their part of its home."""
        name, out = equation.primitive.name, equation.outputs[0]
        if name == "concatenate":
            shape, dtype = self.aval(out)
            home = self.home.get(out)
            if home is None:
                home = self.home[out] = self.temporary(shape, dtype)
            axis = equation.params["axis"] + len(shape)
            start = 0
            for operand in equation.operands:
                n = self.program.avals[operand].shape[equation.params["axis"]]
                part = list(home.shape)
                part[axis] = n
                if self._free(operand) and np.dtype(self.program.avals[operand].dtype) == dtype:
                    self.home[operand] = home.moved(start * home.strides[axis], tuple(part), home.strides)
                start += n
        elif name in {"reshape", "alias", "stop_gradient", "stop_nan"} and out in self.home:
            operand = equation.operands[0]
            if operand.__class__ is int and self._free(operand):
                shape, _ = self.aval(operand)
                found = self.home[out].reshaped(shape)
                if found is not None:
                    self.home[operand] = found

    def _free(self, operand: Any) -> bool:
        """Whether an operand is computed here and may be computed anywhere."""
        return operand in self.made and operand not in self.home and operand not in self.batched

    # ------------------------------------------------------------------ equations

    def run(self) -> Lowered:
        lowered = self._assign_homes()
        for equation in self.program.equations:
            for slot in (*equation.reads(), *equation.outputs):
                dtype = np.dtype(self.program.avals[slot].dtype)
                if dtype.name not in _DTYPES or not dtype.isnative:
                    raise Unsupported(equation, f"dtype {dtype.str}")
            rule = RULES.get(equation.primitive.name) or MOVEMENT.get(equation.primitive.name)
            if rule is None:
                raise Unsupported(equation, f"no native form of {equation.primitive.name}")
            mapped = any(slot in self.batched for slot in equation.reads())
            computed = equation.primitive.name not in _VIEWS
            if self.split and computed and not mapped and any(self.program.avals[s].shape for s in equation.outputs):
                raise Unsupported(equation, "a value that all rows share and that changes from step to step")
            rule(self, equation)
            if mapped:
                self.batched.update(equation.outputs)
        self._finish()
        return lowered

    def define(self, slot: int, view: View) -> None:
        """A slot that is a view of something; copied where it has to live elsewhere."""
        home = self.home.get(slot)
        if home is None:
            self.views[slot] = view
            return
        if home != view:
            self.operations.append(Copy(view, home))
        self.views[slot] = home

    def target(self, slot: int) -> View:
        """Where a computed slot is written."""
        if slot not in self.home:
            self.home[slot] = self.temporary(*self.aval(slot))
        self.views[slot] = self.home[slot]
        return self.home[slot]

    def rank(self, equation: Equation) -> int:
        """How many axes a row of the result has."""
        return len(self.program.avals[equation.outputs[0]].shape) - self.skip

    def operand(self, equation: Equation, k: int = 0, rank: int | None = None) -> View:
        slot = equation.operands[k]
        if slot.__class__ is not int:
            raise Unsupported(equation, f"a number as operand of {equation.primitive.name}")
        return self.view(slot, rank)

    def chain(
        self, expression: Any, shape: tuple[int, ...], inputs: list[View], reductions: tuple[str, ...],
        targets: list[tuple[View, int]],
    ) -> None:  # fmt: skip
        """Append a chain; operands that are strided along the columns are copied first."""
        inputs = list(inputs)
        whole = shape or (1,)
        for _ in inputs:
            views = [v.broadcast(whole) for v in inputs]
            outs = [v.reshaped((*whole[:-1], 1) if reductions[k] else whole) for v, k in targets]
            shown = [o if o is not None else v for o, (v, _k) in zip(outs, targets, strict=True)]
            _, strides = collapsed(whole, [v.strides for v in (*views, *shown)], last_fixed=any(reductions))
            bad = [k for k, v in enumerate(views) if strides[k][-1] not in (0, v.dtype.itemsize)]
            if not bad:
                break
            k = bad[0]
            copy = self.temporary(inputs[k].shape, inputs[k].dtype)
            self.operations.append(Copy(inputs[k], copy))
            inputs[k] = copy
        behind: list[Copy] = []
        places: list[tuple[View, int]] = []
        for n, (view, k) in enumerate(targets):
            fits = view.reshaped((*whole[:-1], 1) if reductions[k] else whole)
            last = strides[len(inputs) + n][-1] if not reductions[k] else 0
            if fits is None or (last not in (0, view.dtype.itemsize)):
                copy = self.temporary(view.shape, view.dtype)
                behind.append(Copy(copy, view))
                view = copy
            places.append((view, k))
        self.operations.append(Chain(expression, shape, inputs, reductions, places))
        self.operations.extend(behind)

    def dense_target(self, slot: int, operation: Callable[[View], Operation]) -> None:
        """Append an operation that writes whole columns, by way of scratch where the place is strided."""
        home = self.target(slot)
        if dense(home):
            self.operations.append(operation(home))
            return
        copy = self.temporary(home.shape, home.dtype)
        self.operations += [operation(copy), Copy(copy, home)]

    def dense(self, view: View) -> View:
        """The view, or a copy of it where its columns are strided."""
        if dense(view):
            return view
        copy = self.temporary(view.shape, view.dtype)
        self.operations.append(Copy(view, copy))
        return copy

    def _finish(self) -> None:
        """What is stacked or carried or summed and has not been written by its own equation."""
        written = {view.root.name for op in self.operations for view in op.writes()}
        for k, slot in enumerate(self.stacked_slots):
            home = self.home.get(slot)
            if home is not None and home.root.kind == "y" and home.root.number < k:
                # Two results that turned out to be one value: each has an array of its own.
                self.operations.append(Copy(home, self._root("y", k, *self.aval(slot))))
            elif slot not in self.made and slot not in self.carry_in:
                self.operations.append(Copy(self.view(slot), self.home[slot]))
            elif slot in self.made and f"y{k}" not in written and self.home.get(slot) != self.views[slot]:
                self.operations.append(Copy(self.views[slot], self.home[slot]))
        for k, out in enumerate(self.carry_out):
            shape, dtype = self.aval(self.carry_in[k])
            place = self._root("o", k, shape, dtype)
            if out.__class__ is not int:
                raise Unsupported(None, "a carry that becomes a number")
            if out in self.made and self.carry_out.index(out) == k and self.views[out] == place:
                continue
            self.operations.append(Copy(self.view(out, len(shape)).broadcast(shape), place))
        for k, out in enumerate(self.sums):
            if out.__class__ is not int or (self.split and out not in self.batched):
                raise Unsupported(None, "a sum over the steps of something that all rows share")
            shape, dtype = self.aval(out)
            if dtype.kind != "f":
                raise Unsupported(None, f"a sum of {dtype} over the steps")
            total = self._root("s", k, shape, dtype)
            self.chain(combine("sum", dtype), shape, [total, self.view(out)], ("",), [(total, 0)])
