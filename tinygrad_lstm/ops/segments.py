"""Scan within a memory budget: the actions of a :class:`~tinygrad_lstm.compiler.schedule.Schedule`, run.

The forward pass runs the loop in segments and keeps carries between them; the backward pass runs each segment again
with residuals, then scans its adjoint body in reverse.  Both are the loops that an unbudgeted scan runs, on
slices: there is no second derivative rule here.

A gradient that is itself recorded (second order) is not cut in segments: its values are kept anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.compiler.schedule import Advance, Schedule, budget_bytes, check_memory, make_schedule
from tinygrad_lstm.errors import ArgumentError, TraceError
from tinygrad_lstm.kernels.pool import empty
from tinygrad_lstm.ops.loop import _adjoint, _derived, plan_of, scan_primitive
from tinygrad_lstm.primitive import Aval
from tinygrad_lstm.program import Program
from tinygrad_lstm.tensor import Tensor
from tinygrad_lstm.trace import trace
from tinygrad_lstm.tree import flatten, unflatten

__all__ = ["MemoryPlan", "Segments", "memory_plan", "segmented"]

Arrays = Sequence[np.ndarray]


def _bytes(avals: Sequence[Aval]) -> int:
    return sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in avals)


def _sizes(body: Program, n_carry: int, n_ys: int, present: tuple[bool, ...], wanted: tuple[bool, ...]) -> Any:
    """Bytes of the residuals of a step, and of a carry."""
    pair = _adjoint(body, n_carry, n_ys, present, wanted)
    carry = _bytes([body.avals[slot] for slot in body.inputs[:n_carry]])
    return _bytes([pair.forward.avals[slot] for slot in pair.residuals]), carry


def segmented(
    body: Program, n_carry: int, n_ys: int, length: int, reverse: bool, present: tuple[bool, ...],
    wanted: tuple[bool, ...], memory: int | float,
) -> Segments | None:  # fmt: skip
    """How a scan runs within a budget; None where that suffices for all residuals."""
    residual, carry = _sizes(body, n_carry, n_ys, present, wanted)
    whole = length * residual
    budget = budget_bytes(memory, whole)
    if whole <= budget:
        return None
    schedule = make_schedule(length, residual, carry, budget)
    return Segments(body, n_carry, n_ys, reverse, present, wanted, schedule)


class Segments:
    """A scan within a budget, and what it keeps: carries, and the residuals of its last segment.

    Time is counted in the order in which the loop runs; with ``reverse`` step 0 is the last row of xs.
    """

    def __init__(
        self, body: Program, n_carry: int, n_ys: int, reverse: bool, present: tuple[bool, ...],
        wanted: tuple[bool, ...], schedule: Schedule,
    ) -> None:  # fmt: skip
        self.present, self.wanted = present, wanted
        self.body, self.n_carry, self.n_ys, self.reverse = body, n_carry, n_ys, reverse
        self.schedule = schedule
        # (carries, residuals of the last segment, their slots) until a backward takes them; a list's pop is atomic.
        self._ready: list[tuple[list[Arrays], list[Arrays], tuple[int, ...]]] = []

    def _rows(self, start: int, stop: int) -> slice:
        steps = self.schedule.steps
        return slice(steps - stop, steps - start) if self.reverse else slice(start, stop)

    def _run(
        self, program: Program, n_ys: int, at: tuple[int, int], carry: Arrays, xs: Arrays, captures: Arrays,
        adjoint: tuple[Arrays, ...] = (),
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:  # fmt: skip
        """A piece of the loop, or (``adjoint`` holds its residuals) of the adjoint loop: (carry, [ys..., sums...])."""
        from tinygrad_lstm.compiler.runner import run_loop

        rows, length = self._rows(*at), at[1] - at[0]
        inputs = [*(array for arrays in adjoint for array in arrays), *(x[rows] for x in xs)]
        plan = plan_of(program, len(carry), n_ys, length)
        return run_loop(plan, carry, inputs, captures, length, self.reverse != bool(adjoint))

    def _operands(self, operands: Arrays) -> tuple[Arrays, Arrays, Arrays]:
        n_inputs = len(self.body.inputs)
        return operands[: self.n_carry], operands[self.n_carry : n_inputs], operands[n_inputs:]

    # ------------------------------------------------------------------ forward

    def forward(self, operands: Arrays) -> tuple[np.ndarray, ...]:
        """The whole scan; keeps what the schedule says."""
        n_carry, n_ys = self.n_carry, self.n_ys
        carry, xs, captures = self._operands(operands)
        pair = _adjoint(self.body, n_carry, n_ys, self.present, self.wanted)
        more = len(pair.residuals)
        whole = _Whole(self.schedule.steps, n_ys)

        def advance(at: tuple[int, int], start: Arrays) -> Arrays:
            start, outs = self._run(self.body, n_ys, at, start, xs, captures)
            whole.add(self._rows(*at), outs)
            return start

        def keep(at: tuple[int, int], start: Arrays) -> tuple[Arrays, Arrays]:
            start, outs = self._run(pair.forward, n_ys + more, at, start, xs, captures)
            whole.add(self._rows(*at), [*outs[:n_ys], *outs[n_ys + more :]])
            return start, outs[n_ys : n_ys + more]

        carries = [carry]
        _, residuals, final = self._sweep(0, carries, advance, keep)
        self._ready = [(carries, residuals, pair.residuals)]
        return (*final, *whole.arrays)

    def _sweep(
        self, done: int, carries: list[Arrays], advance: Callable[..., Arrays], keep: Callable[..., Any]
    ) -> tuple[int, list[Arrays], Arrays]:
        """Run actions from number ``done`` up to the next run with residuals, whose carry is popped.

        Returns the number of that action, the residuals of its pieces, and the carry behind it.
        """
        actions = self.schedule.actions
        while isinstance(actions[done], Advance):
            carry = carries[-1]
            for at in self.schedule.pieces(actions[done]):
                carry = advance(at, carry)
            # A copy of its own: a row of a larger buffer would keep all of that buffer.
            carries.append([np.array(c) for c in carry])
            done += 1
        carry, residuals = carries.pop(), []
        for at in self.schedule.pieces(actions[done]):
            carry, arrays = keep(at, carry)
            residuals.append(arrays)
        return done, residuals, carry

    # ------------------------------------------------------------------ backward

    def backward(
        self, pair: Any, inputs: Sequence[Tensor], seeds: Sequence[Tensor], y_seeds: Sequence[Tensor],
        s_seeds: Sequence[Tensor], n_dx: int,
    ) -> list[Tensor]:  # fmt: skip
        """What scanning ``pair.backward`` over all steps gives: cotangents of (carry..., xs..., captures...)."""
        first, xs, captures = self._operands([t._data for t in inputs])
        read = [*(xs[k] for k in pair.reads), *(t._data for t in y_seeds)]
        constants = [*captures, *(t._data for t in s_seeds)]
        body, n_carry, n_ys, more = self.body, self.n_carry, self.n_ys, len(pair.residuals)
        # Neither needs ys: those are there already.
        bare = _derived(body, ("carries", n_carry), lambda: _without_ys(body, n_carry, n_carry, 0))
        again = _derived(
            pair.forward, ("again", n_carry, n_ys), lambda: _without_ys(pair.forward, n_carry, n_carry + n_ys, more)
        )

        def advance(at: tuple[int, int], start: Arrays) -> Arrays:
            return self._run(bare, 0, at, start, xs, captures)[0]

        def keep(at: tuple[int, int], start: Arrays) -> tuple[Arrays, Arrays]:
            return self._run(again, more, at, start, xs, captures)

        whole = _Whole(self.schedule.steps, n_dx)
        carry: Arrays = [t._data for t in seeds]
        done, carries, residuals = self._resume(tuple(first), pair.residuals, advance, keep)
        while True:
            for at in reversed(self.schedule.pieces(self.schedule.actions[done])):
                carry, outs = self._run(pair.backward, n_dx, at, carry, read, constants, (residuals.pop(),))
                whole.add(self._rows(*at), outs)
            done += 1
            if done == len(self.schedule.actions):
                return [Tensor(array) for array in (*carry, *whole.arrays)]
            done, residuals, _ = self._sweep(done, carries, advance, keep)

    def _resume(
        self, first: Arrays, slots: tuple[int, ...], advance: Callable[..., Arrays], keep: Callable[..., Any]
    ) -> tuple[int, list[Arrays], list[Arrays]]:
        """Where the forward pass stopped; run again from the first carry where a backward has used that up."""
        try:
            carries, kept, made = self._ready.pop()
        except IndexError:
            carries, kept, made = [], [], ()
        if not kept or not set(slots) <= set(made):
            carries = [first]
            done, residuals, _ = self._sweep(0, carries, advance, keep)
            return done, carries, residuals
        # With fewer cotangents, or fewer gradients asked for, fewer residuals are read than were kept.
        places = [made.index(slot) for slot in slots]
        done = next(k for k, action in enumerate(self.schedule.actions) if not isinstance(action, Advance))
        return done, carries, [[arrays[k] for k in places] for arrays in kept]


def _without_ys(program: Program, n_carry: int, start: int, more: int) -> Program:
    """Only the carries, and ``more`` outputs from ``start`` on."""
    return program.replaced(outputs=(*program.outputs[:n_carry], *program.outputs[start : start + more]))


class _Whole:
    """The results of a whole scan from those of its pieces: rows of ys are written, sums are added up."""

    def __init__(self, steps: int, n_ys: int) -> None:
        self.steps = steps
        self.n_ys = n_ys
        self.arrays: list[np.ndarray] = []

    def add(self, rows: slice, outs: Sequence[np.ndarray]) -> None:
        """The outputs of one piece."""
        ys, sums = outs[: self.n_ys], outs[self.n_ys :]
        if not self.arrays:
            self.arrays = [empty((self.steps, *y.shape[1:]), y.dtype) for y in ys] + [np.array(s) for s in sums]
        else:
            for total, share in zip(self.arrays[self.n_ys :], sums, strict=True):
                total += share
        for y, part in zip(self.arrays, ys, strict=False):
            y[rows] = part


# ---------------------------------------------------------------------------- beforehand


class MemoryPlan(list[Schedule]):
    """What the scans of a function would keep: one :class:`~tinygrad_lstm.compiler.schedule.Schedule` per scan."""

    @property
    def peak(self) -> int:
        """The most bytes of residuals and carries: all scans, each at its own peak."""
        return sum(schedule.peak for schedule in self)

    @property
    def whole(self) -> int:
        """Bytes that keeping everything takes."""
        return sum(schedule.whole for schedule in self)

    @property
    def recomputed(self) -> int:
        """Steps that run again in the backward pass, of all scans together."""
        return sum(schedule.recomputed for schedule in self)

    def __str__(self) -> str:
        lines = [f"scan {k}: {schedule}" for k, schedule in enumerate(self)]
        total = f"{self.peak} of {self.whole} bytes, {self.recomputed} steps run again"
        return "\n".join([*lines, f"together: {total}"] if len(self) > 1 else lines)

    def __repr__(self) -> str:
        return f"<MemoryPlan\n{self}>"


def memory_plan(f: Callable[..., Any], *args: Any) -> MemoryPlan:
    """What the scans and recurrent layers in ``f(*args)`` keep for a backward pass, without running anything.

    Parameters
    ----------
    f : callable
        Runs scans, with or without ``memory=``; it is called once, on tensors without data.
    *args : trees of arrays or tensors
        Only their shapes and dtypes are looked at; gradients of all of them, and of what ``f`` closes over, are
        assumed to be asked for.

    Returns
    -------
    MemoryPlan
        A list of the schedules of all scans, in the order in which they run, with the sums ``peak``, ``whole``
        (bytes) and ``recomputed`` (steps); it prints itself.

    Raises
    ------
    ArgumentError
        A budget that cannot be met; says what is possible.  Or ``f`` needs values, so that it cannot be planned.

    Examples
    --------
    >>> import numpy as np
    >>> from tinygrad_lstm import ops
    >>> def f(x):
    ...     return ops.scan(lambda c, v: (ops.tanh(c + v), None), np.zeros(8), x, memory=0.1)
    >>> plan = ops.memory_plan(f, np.zeros((400, 8)))
    >>> plan.whole, plan.peak, plan.recomputed
    (25600, 2560, 375)
    """
    leaves, treedef = flatten(args, open_modules=False)
    avals = [Aval(tuple(t.shape), t.dtype) if isinstance(t, (Tensor, np.ndarray)) else None for t in leaves]
    abstract = [aval for aval in avals if aval is not None]

    def run(*tensors: Tensor) -> Any:
        given = iter(tensors)
        f(*unflatten(treedef, [t if a is None else next(given) for t, a in zip(leaves, avals, strict=True)]))
        return []

    try:
        program = trace(run, abstract, flat=True).program
    except TraceError as error:
        raise ArgumentError(f"memory_plan: the function needs values, so it cannot be planned: {error}") from None
    scans = [e.params for e in program.equations if e.primitive is scan_primitive]
    return MemoryPlan(_planned(**params) for params in scans)


def _planned(body: Program, n_carry: int, n_ys: int, length: int, reverse: bool, memory: Any = None) -> Schedule:
    floats = tuple(np.dtype(body.aval(o).dtype).kind == "f" for o in body.outputs[n_carry:])
    linked = tuple(np.dtype(body.avals[s].dtype).kind == "f" for s in (*body.inputs[n_carry:], *body.captures))
    residual, carry = _sizes(body, n_carry, n_ys, floats, linked)
    whole = length * residual
    memory = check_memory(memory, "memory_plan")
    return make_schedule(length, residual, carry, whole if memory is None else budget_bytes(memory, whole))
