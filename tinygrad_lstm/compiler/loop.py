"""The plan of a loop: what runs before it, in it, and behind it (hoist and sink).

What does not depend on the carry leaves the loop in front, as one operation on the whole sequence; what
the carry does not depend on leaves it behind.  For an LSTM that makes one product with K = T * B of each weight
gradient; nothing here knows that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.compiler.batch_first import batch_first
from tinygrad_lstm.compiler.batching import TimeSum, can_batch, run_batched
from tinygrad_lstm.compiler.constants import fill
from tinygrad_lstm.compiler.expand import products
from tinygrad_lstm.compiler.fuse import fuse, worth_compiling
from tinygrad_lstm.compiler.merge import merge_matmuls
from tinygrad_lstm.compiler.native import FEW, native_loop, wanted, work_of
from tinygrad_lstm.compiler.plan import LoopPlan
from tinygrad_lstm.compiler.rows import common_batch, mixing
from tinygrad_lstm.compiler.simplify import dead_code, simplify
from tinygrad_lstm.compiler.sums import regroup
from tinygrad_lstm.compiler.unnest import unnest
from tinygrad_lstm.kernels.matmul import THRESHOLD
from tinygrad_lstm.primitive import Aval
from tinygrad_lstm.program import Equation, Program, lower
from tinygrad_lstm.tape import recording
from tinygrad_lstm.tensor import Tensor
from tinygrad_lstm.trace import Trace

__all__ = ["plan_loop"]

INVARIANT, SEQUENCE, LOOP, BEHIND = "invariant", "sequence", "loop", "behind"


# Elementwise operations of about one instruction an element.
_CHEAP = frozenset(
    {"add", "subtract", "multiply", "divide", "negative", "square", "abs", "sign", "maximum", "minimum", "relu",
     "where", "equal", "not_equal", "less", "less_equal", "greater", "greater_equal", "logical_and", "logical_or",
     "logical_not"}
)  # fmt: skip


# What is one large operation in front of the loop or behind it, and many small ones in it.
_APART = frozenset(
    {"matmul", "einsum", "take", "untake", "take_along_axis", "untake_along_axis", "scatter_add", "one_hot", "scan"}
)
# Linear, of one operand, and without a value of their own at every step: they may follow the sum over time.
_SUMMING = frozenset({"sum", "sum_to", "reshape", "transpose", "negative", "alias", "broadcast_to"})


class _Planner:
    def __init__(
        self, body: Program, n_carry: int, n_ys: int, steps: int, native: bool, together: bool = False
    ) -> None:  # fmt: skip
        self.body = body
        self.together = together  # one step, and in the loop stays what can
        self.native = native  # in native code what stays in the loop is free, and what leaves it goes through memory
        self.n_carry = n_carry
        self.n_ys = n_ys
        self.steps = steps
        self.kind: dict[int, str] = {}
        self.mapped: set[int] = set()
        self.mixed: set[int] = set()
        self.apart: set[int] = set()  # runs in front all the same
        if native:
            self._trace_rows()
        self._classify()

    def _kind(self, operand: Any) -> str:
        return self.kind[operand] if operand.__class__ is int else INVARIANT

    def _classify(self) -> None:
        """Where each equation runs."""
        body = self.body
        for slot in body.captures:
            self.kind[slot] = INVARIANT
        for k, slot in enumerate(body.inputs):
            self.kind[slot] = LOOP if k < self.n_carry else SEQUENCE
        carried = {o for o in body.outputs[: self.n_carry] if o.__class__ is int}
        for equation in reversed(body.equations):
            if any(slot in carried for slot in equation.outputs):
                carried.update(equation.reads())
        for equation in body.equations:
            kinds = [self._kind(operand) for operand in equation.operands]
            changing = [kind != INVARIANT for kind in kinds]
            if not any(changing):
                place = INVARIANT
            elif BEHIND in kinds:
                place = BEHIND if can_batch(body, equation, changing) else LOOP
                if place == LOOP:
                    self._pull_into_loop(equation)
            elif LOOP not in kinds:
                place = SEQUENCE if can_batch(body, equation, changing) else LOOP
            elif not any(slot in carried for slot in equation.outputs) and can_batch(body, equation, changing):
                place = LOOP if self._stays(equation) else BEHIND
            else:
                place = LOOP
            for slot in equation.outputs:
                self.kind[slot] = place
        in_loop = (e for e in body.equations if self.kind[e.outputs[0]] == LOOP)
        if self.native:
            self._keep_what_stays()
        elif worth_compiling(body, in_loop, self.steps):
            self._keep_cheap_ones()

    def _trace_rows(self) -> None:
        """Find out what has a row for every row of the batch, and what is computed from several rows at once."""
        avals, xs = self.body.avals, self.body.inputs[self.n_carry :]
        # Batches that were moved to the front (batch_first.py) count as inputs.
        turned = {
            e.operands[0]: e.outputs[0]
            for e in self.body.equations
            if e.primitive.name == "transpose" and e.operands[0] in xs and self._moves_batch(e)
        }
        inputs = [turned.get(slot, slot) for slot in self.body.inputs]
        if common_batch(self.body.replaced(inputs=inputs), self.n_carry) is None:
            self.mixed.update(slot for e in self.body.equations for slot in e.outputs)
            return
        self.mapped.update(slot for slot in inputs if avals[slot].shape)
        self.apart.update(turned.values())
        for equation in self.body.equations:
            reads = equation.reads()
            if equation.outputs[0] in self.apart:
                continue
            if any(slot in self.mixed for slot in reads):
                self.mixed.update(equation.outputs)
            elif any(slot in self.mapped for slot in reads):
                mixes = mixing(self.body, equation, self.mapped)
                (self.mixed if mixes else self.mapped).update(equation.outputs)

    def _moves_batch(self, equation: Equation) -> bool:
        before, after = (self.body.avals[slot].shape for slot in (equation.operands[0], equation.outputs[0]))
        batch = self.body.avals[self.body.inputs[0]].shape[:1] if self.n_carry else before[:1]
        return after[:1] == batch and bool(equation.params["axes"][0] % len(after))

    def _stays(self, equation: Equation) -> bool:
        """Whether native code does this in passing, row by row: anything but products and gathers."""
        out = equation.outputs[0]
        if self.together or self._is_projection(equation):
            return True
        return self.native and equation.primitive.name not in _APART and out not in self.mixed and out not in self.apart

    def _is_projection(self, equation: Equation) -> bool:
        """Whether this is the product of a row of an input with a matrix that stays: made in the loop (see ahead.py),
        it needs no memory for all steps."""
        if not self.native or self.mixed or equation.primitive.name != "matmul":
            return False
        left, right = equation.operands
        if left not in self.body.inputs[self.n_carry :] or self._kind(right) != INVARIANT or right.__class__ is not int:
            return False
        avals = [self.body.avals[slot] for slot in (left, right, *equation.outputs)]
        same = len({np.dtype(aval.dtype) for aval in avals}) == 1 and np.dtype(avals[0].dtype).kind == "f"
        return same and all(len(aval.shape) == 2 for aval in avals)

    def _keep_what_stays(self) -> None:
        """Leave in the loop what nothing in front of it reads; it is stacked where it is a result."""
        outside: set[Any] = set()
        movable = (SEQUENCE, INVARIANT) if self.together else (SEQUENCE,)
        for equation in reversed(self.body.equations):
            if (
                self.kind[equation.outputs[0]] in movable
                and self._stays(equation)
                and not any(slot in outside for slot in equation.outputs)
            ):
                self.kind.update(dict.fromkeys(equation.outputs, LOOP))
            if self.kind[equation.outputs[0]] != LOOP:
                outside.update(equation.reads())

    def _keep_cheap_ones(self) -> None:
        """Leave cheap elementwise operations in the loop: fused there they are free, in front a pass over memory."""
        users: dict[int, set[str]] = {o: {"output"} for o in self.body.outputs if o.__class__ is int}
        for equation in reversed(self.body.equations):
            kinds = set().union(*(users.get(slot, set()) for slot in equation.outputs))
            if self.kind[equation.outputs[0]] == SEQUENCE and equation.primitive.name in _CHEAP and kinds == {LOOP}:
                self.kind[equation.outputs[0]] = LOOP
            here = LOOP if self.kind[equation.outputs[0]] == LOOP and equation.primitive.is_elementwise else "other"
            for slot in equation.reads():
                users.setdefault(slot, set()).add(here)

    def _pull_into_loop(self, equation: Equation) -> None:
        """Something behind the loop is needed in it after all."""
        definitions = self.body.definitions()
        pending = [slot for slot in equation.reads() if self.kind[slot] == BEHIND]
        while pending:
            slot = pending.pop()
            made = definitions[slot]
            for out in made.outputs:
                self.kind[out] = LOOP
            pending.extend(s for s in made.reads() if self.kind[s] == BEHIND)

    # ------------------------------------------------------------------ the three programs

    def plan(self) -> LoopPlan:
        body, kind = self.body, self.kind
        ys = body.outputs[self.n_carry : self.n_carry + self.n_ys]
        sums = body.outputs[self.n_carry + self.n_ys :]
        in_loop = [e for e in body.equations if kind[e.outputs[0]] == LOOP]
        behind = [e for e in body.equations if kind[e.outputs[0]] == BEHIND]
        # Sums of values made in the loop by something that cannot run behind it are accumulated in it.
        loop_sums = [o for o in sums if self._kind(o) == LOOP and self._made_here(o)]
        summing = self._summing(behind)
        loop_sums += [s for s in summing.values() if s not in loop_sums]
        if self.together:
            loop_sums = []  # there is nothing to add up: the value of the one step is written where it belongs
        stacked = sorted(
            {s for e in behind for s in e.reads() if kind[s] == LOOP and e.outputs[0] not in summing}
            | {o for o in ys if o.__class__ is int and kind[o] == LOOP}
            | {o for o in sums if self._kind(o) == LOOP and o not in loop_sums}
        )
        carry_out = body.outputs[: self.n_carry]
        read_in_loop = {s for e in in_loop for s in e.reads()} | {o for o in carry_out if o.__class__ is int}
        read_behind = {s for e in behind for s in e.reads()} | {o for o in (*ys, *sums) if o.__class__ is int}
        sequence = sorted(s for s in read_in_loop | read_behind if kind[s] == SEQUENCE)
        invariant = sorted(s for s in read_in_loop | read_behind if kind[s] == INVARIANT)
        loop_sequence = [s for s in sequence if s in read_in_loop]
        loop_invariant = [s for s in invariant if s in read_in_loop]
        before = self._before(sequence, invariant)
        inner = Program(
            body.avals,
            (*body.inputs[: self.n_carry], *loop_sequence),
            loop_invariant,
            in_loop,
            (*carry_out, *stacked, *loop_sums),
            body.labels,
        )
        return LoopPlan(
            before=before,
            body=fuse(dead_code(inner)),
            behind=self._behind(behind, stacked, loop_sums, sequence, invariant, ys, sums),
            n_carry=self.n_carry,
            n_sequence=len(sequence),
            loop_sequence=[sequence.index(s) for s in loop_sequence],
            loop_invariant=[invariant.index(s) for s in loop_invariant],
            stacked=[body.avals[s] for s in stacked],
            sums=[body.aval(o) for o in loop_sums],
            carry=[body.avals[s] for s in body.inputs[: self.n_carry]],
            inner=simplify(inner),
            steps=self.steps,
        )

    def _summing(self, behind: Sequence[Equation]) -> dict[int, int]:
        """Equations behind the loop that only a sum over time reads, by what they assign, and what they start from.

        They are linear, so the loop can add up what they start from, row by row, and they run once.
        """
        if not self.native:
            return {}
        sums = set(self.body.outputs[self.n_carry + self.n_ys :])
        other: set[Any] = set(self.body.outputs[: self.n_carry + self.n_ys])
        start: dict[int, int] = {}
        linear: list[Equation] = []
        for equation in reversed(behind):
            only = equation.outputs[0] in sums and equation.outputs[0] not in other
            if only and equation.primitive.name in _SUMMING and len(equation.operands) == 1:
                linear.append(equation)
                sums.add(equation.operands[0])
            else:
                other.update(equation.reads())
        for equation in linear:
            slot = equation.operands[0]
            floating = np.dtype(self.body.avals[slot].dtype).kind == "f"
            if self._kind(slot) == LOOP and self._made_here(slot) and slot in self.mapped and floating:
                start[equation.outputs[0]] = slot
        return start

    def _made_here(self, operand: Any) -> bool:
        return operand.__class__ is int and operand not in self.body.inputs

    def _before(self, sequence: Sequence[int], invariant: Sequence[int]) -> Program:
        body = self.body
        recorder = Trace()
        environment: dict[int, Any] = {}
        with recording(enabled=True, tapes=(), names=None, trace=recorder):
            inputs = []
            for slot in body.inputs[self.n_carry :]:
                aval = body.avals[slot]
                environment[slot] = recorder.new(Aval((self.steps, *aval.shape), aval.dtype))
                inputs.append(environment[slot])
            for slot in body.captures:
                environment[slot] = recorder.new(body.avals[slot])
                inputs.append(environment[slot])
            for equation in body.equations:
                place = self.kind[equation.outputs[0]]
                if place == INVARIANT:
                    operands = tuple(environment[o] if o.__class__ is int else o.value for o in equation.operands)
                    out = equation.primitive.bind(operands, dict(equation.params))
                    out = out if isinstance(out, tuple) else (out,)
                elif place == SEQUENCE:
                    out = run_batched(
                        body, equation, [self._value(o, environment) for o in equation.operands], self.steps
                    )
                else:
                    continue
                environment.update(zip(equation.outputs, out, strict=True))
            program, extra = lower(recorder.entries, inputs, [environment[s] for s in (*sequence, *invariant)])
        recorder.close()
        return simplify(fill(program, extra))

    def _value(self, operand: Any, environment: dict[int, Any]) -> tuple[Any, bool]:
        if operand.__class__ is not int:
            return operand.value, False
        return environment[operand], self.kind[operand] != INVARIANT

    def _behind(
        self, behind: Sequence[Equation], stacked: Sequence[int], loop_sums: Sequence[Any], sequence: Sequence[int],
        invariant: Sequence[int], ys: Sequence[Any], sums: Sequence[Any],
    ) -> Program:  # fmt: skip
        body, steps = self.body, self.steps
        recorder = Trace()
        environment: dict[int, Any] = {}
        made: dict[int, Equation] = {slot: e for e in behind for slot in e.outputs}
        with recording(enabled=True, tapes=(), names=None, trace=recorder):
            inputs = []
            for slot in stacked:
                environment[slot] = recorder.new(Aval((steps, *body.avals[slot].shape), body.avals[slot].dtype))
                inputs.append(environment[slot])
            totals: dict[int, Tensor] = {}
            for operand in loop_sums:
                totals[operand] = recorder.new(body.aval(operand))
                inputs.append(totals[operand])
            for slot in (*sequence, *invariant):
                aval = body.avals[slot]
                shape = aval.shape if self.kind[slot] == INVARIANT else (steps, *aval.shape)
                environment[slot] = recorder.new(Aval(shape, aval.dtype))
                inputs.append(environment[slot])

            def value(operand: Any) -> tuple[Any, bool]:
                if operand.__class__ is int and operand not in environment:
                    equation = made[operand]
                    out = run_batched(body, equation, [value(o) for o in equation.operands], steps)
                    environment.update(zip(equation.outputs, out, strict=True))
                return self._value(operand, environment)

            outputs: list[Any] = []
            for operand in ys:
                tensor, has_time = value(operand)
                aval = body.aval(operand)
                if not has_time:
                    from tinygrad_lstm.ops.shape import broadcast_to
                    from tinygrad_lstm.tensor import asarray

                    tensor = broadcast_to(asarray(tensor), (steps, *aval.shape))
                outputs.append(tensor)
            adder = TimeSum(body, made, value, lambda slot: self.kind[slot] != INVARIANT, steps, totals)
            for operand in sums:
                outputs.append(totals[operand] if operand in totals else adder.of(operand))
            program, extra = lower(
                recorder.entries, inputs, [o if isinstance(o, Tensor) else Tensor(np.asarray(o)) for o in outputs]
            )
        recorder.close()
        return simplify(fill(program, extra))


def _is_small(body: Program, n_carry: int) -> bool:
    """Whether products in front of the loop or behind it would take no longer than the calls that make them."""
    if (common_batch(body, n_carry) or FEW + 1) > FEW:
        return False
    products = [e for e in body.equations if e.primitive.name == "matmul"]
    sizes = [math.prod(body.avals[e.outputs[0]].shape) * body.aval(e.operands[0]).shape[-1] for e in products]
    return all(size < THRESHOLD for size in sizes)


def plan_loop(body: Program, n_carry: int, n_ys: int, steps: int, whole: int | None = None) -> LoopPlan:
    """Hoist and sink; the loop's own program is then fused, or lowered to native code.

    ``body`` maps (carry..., x...; captures...) to (carry..., y..., s...): of the last ones the sum over all
    steps is wanted.  ``whole``: the steps of the loop that these are a piece of; its pieces all take one path.
    """
    body = merge_matmuls(simplify(products(body)), n_carry=n_carry)
    why: Any = None
    if wanted((whole or steps) * work_of(body)):
        opened = batch_first(unnest(body, lambda b, c, y, t: _Planner(b, c, y, t, native=True).plan()), n_carry)
        for together in (True, False) if (whole or steps) == 1 and _is_small(body, n_carry) else (False,):
            plan = _Planner(regroup(opened), n_carry, n_ys, steps, native=True, together=together).plan()
            plan.native = why = native_loop(plan.inner, n_carry, len(plan.stacked))
            if plan.compiled:
                return plan
    plan = _Planner(body, n_carry, n_ys, steps, native=False).plan()
    plan.native = why
    return plan
