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

from tinygrad_lstm.compiler.schedule import Advance, Memory, Reverse, Schedule, budget_bytes, make_schedule, who_asks
from tinygrad_lstm.errors import ArgumentError, TraceError
from tinygrad_lstm.kernels.pool import empty
from tinygrad_lstm.ops.loop import scan_primitive
from tinygrad_lstm.ops.prepared import Site, _derived, _every_site, _loops, plan_of
from tinygrad_lstm.primitive import Aval, Primitive
from tinygrad_lstm.program import Program
from tinygrad_lstm.tensor import Tensor
from tinygrad_lstm.trace import trace
from tinygrad_lstm.tree import flatten, unflatten

__all__ = ["MemoryPlan", "Segments", "memory_plan", "segmented"]

Arrays = Sequence[np.ndarray]


def _bytes(avals: Sequence[Aval]) -> int:
    return sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in avals)


def _schedule(site: Site, memory: Memory) -> Schedule:
    """What a scan keeps within a budget, as part of what it keeps without one."""
    residual, whole = _residual(site), site.length * _residual(site)
    if memory is None:
        return make_schedule(site.length, residual, 0, whole)
    budget, who = budget_bytes(memory, whole), who_asks(memory, "scan")
    if whole <= budget:
        return make_schedule(site.length, residual, 0, budget, who)
    carry = _bytes([site.body.avals[slot] for slot in site.body.inputs[: site.n_carry]])
    return make_schedule(site.length, _residual(site.within_budget()), carry, budget, who, whole)


def _residual(site: Site) -> int:
    """Bytes of the residuals of a step."""
    return _bytes([site.pair.forward.avals[slot] for slot in site.pair.residuals])


def segmented(site: Site, memory: Memory) -> Segments | None:
    """How a scan runs within a budget; None where that suffices for all that it keeps without one."""
    schedule = _schedule(site, memory)
    return None if schedule.peak >= schedule.whole else Segments(site.within_budget(), schedule)


class Segments:
    """A scan within a budget, and what it keeps: carries, and the residuals of its last segment.

    Time is counted in the order in which the loop runs; with ``reverse`` step 0 is the last row of xs.
    """

    def __init__(self, site: Site, schedule: Schedule) -> None:
        self.site, self.schedule = site, schedule
        self.body, self.n_carry, self.n_ys, self.reverse = site.body, site.n_carry, site.n_ys, site.reverse
        self._plans: dict[tuple[Program, int], Any] = {}  # of the few kinds of pieces
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
        rows, length = self._rows(*at), at[1] - at[0]
        inputs = [x[rows] for x in xs]
        if adjoint:
            inputs = [*adjoint[0], *inputs]
        key = (program, length)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = plan_of(program, len(carry), n_ys, length, self.schedule.steps)
        return _loops().run_loop(plan, (*carry, *inputs, *captures), self.reverse != bool(adjoint))

    def _operands(self, operands: Arrays) -> tuple[Arrays, Arrays, Arrays]:
        n_inputs = len(self.body.inputs)
        return operands[: self.n_carry], operands[self.n_carry : n_inputs], operands[n_inputs:]

    # ------------------------------------------------------------------ forward

    def forward(self, operands: Arrays) -> tuple[np.ndarray, ...]:
        """The whole scan; keeps what the schedule says."""
        pair, carries = self.site.pair, [self._operands(operands)[0]]
        outs, residuals = self._first(operands, pair, carries, _copies)
        carries.pop()
        self._ready = [(carries, residuals, pair.residuals)]
        return outs

    @property
    def border_avals(self) -> list[Aval]:
        """The carries between segments, stacked: what :meth:`forward_with_borders` returns beside the results.

        None where later segments keep further carries in place of earlier ones: those run from the start again.
        """
        actions = self.schedule.actions
        count = self.schedule.kept if all(isinstance(a, Reverse) for a in actions[self._first_reversed() :]) else 0
        carry = [self.body.avals[slot] for slot in self.body.inputs[: self.n_carry]]
        return [Aval((count, *aval.shape), aval.dtype) for aval in carry] if count else []

    def forward_with_borders(self, operands: Arrays) -> tuple[np.ndarray, ...]:
        """The whole scan, and the carries at which its segments begin."""
        stacks = [empty(aval.shape, aval.dtype) for aval in self.border_avals]
        carries = [self._operands(operands)[0]]

        def hold(carry: Arrays) -> Arrays:
            row = len(carries) - 1
            for stack, value in zip(stacks, carry, strict=False):
                stack[row] = value
            return [stack[row, ...] for stack in stacks] or _copies(carry)

        outs, _ = self._first(operands, None, carries, hold)
        return (*outs, *stacks)

    def _first(
        self, operands: Arrays, pair: Any, carries: list[Arrays], hold: Callable[[Arrays], Arrays]
    ) -> tuple[tuple[np.ndarray, ...], list[Arrays]]:
        """The forward pass: its results, and the residuals of the pieces that are reversed first (with a ``pair``)."""
        _, xs, captures = self._operands(operands)
        body, n_ys, more = (self.body, self.n_ys, 0) if pair is None else (pair.forward, self.n_ys, len(pair.residuals))
        whole = _Whole(self.schedule.steps, n_ys)

        def advance(at: tuple[int, int], start: Arrays) -> Arrays:
            start, outs = self._run(self.body, n_ys, at, start, xs, captures)
            whole.add(self._rows(*at), outs)
            return start

        def keep(at: tuple[int, int], start: Arrays) -> tuple[Arrays, Arrays]:
            start, outs = self._run(body, n_ys + more, at, start, xs, captures)
            whole.add(self._rows(*at), [*outs[:n_ys], *outs[n_ys + more :]])
            return start, outs[n_ys : n_ys + more]

        _, residuals, final = self._sweep(0, carries, advance, keep, hold)
        return (*final, *whole.arrays), residuals

    def _first_reversed(self) -> int:
        """The number of the first action that runs with residuals."""
        return next(k for k, action in enumerate(self.schedule.actions) if not isinstance(action, Advance))

    def _sweep(
        self, done: int, carries: list[Arrays], advance: Callable[..., Arrays], keep: Callable[..., Any],
        hold: Callable[[Arrays], Arrays],
    ) -> tuple[int, list[Arrays], Arrays]:  # fmt: skip
        """Run actions from number ``done`` up to the next run with residuals, from the carry on top.

        Returns the number of that action, the residuals of its pieces, and the carry behind it.
        """
        actions = self.schedule.actions
        while isinstance(actions[done], Advance):
            carry = carries[-1]
            for at in self.schedule.pieces(actions[done]):
                carry = advance(at, carry)
            carries.append(hold(carry))
            done += 1
        carry, residuals = carries[-1], []
        for at in self.schedule.pieces(actions[done]):
            carry, arrays = keep(at, carry)
            residuals.append(arrays)
        return done, residuals, carry

    # ------------------------------------------------------------------ backward

    def backward(
        self, present: tuple[bool, ...], asked: tuple[bool, ...], operands: Arrays, seeds: Arrays, y_seeds: Arrays,
        s_seeds: Arrays, borders: Arrays = (),
    ) -> list[np.ndarray]:  # fmt: skip
        """What scanning the adjoint over all steps gives: cotangents of (carry..., xs..., captures...).

        ``borders``: what :meth:`forward_with_borders` returned, where it was not :meth:`forward` that ran.
        """
        site = self.site if self.site.generation == Primitive.generation else self.site.anew()
        pair = site.pair_of(present, asked)
        first, xs, captures = self._operands(operands)
        n_dx = sum(asked[: len(xs)])
        read = [*(xs[k] for k in pair.reads), *y_seeds]
        constants = [*captures, *s_seeds]
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
        carry = seeds
        done, carries, residuals = self._resume(tuple(first), pair.residuals, borders, advance, keep)
        while True:
            for at in reversed(self.schedule.pieces(self.schedule.actions[done])):
                carry, outs = self._run(pair.backward, n_dx, at, carry, read, constants, (residuals.pop(),))
                whole.add(self._rows(*at), outs)
            done += 1
            if done == len(self.schedule.actions):
                return [*carry, *whole.arrays]
            done, residuals, _ = self._sweep(done, carries, advance, keep, _copies)
            carries.pop()

    def _resume(
        self, first: Arrays, slots: tuple[int, ...], borders: Arrays, advance: Callable[..., Arrays],
        keep: Callable[..., Any],
    ) -> tuple[int, list[Arrays], list[Arrays]]:  # fmt: skip
        """Where the forward pass stopped; run again from the first carry where a backward has used that up."""
        done, carries = 0, [first]
        if borders:
            done = self._first_reversed()
            carries += [[stack[k, ...] for stack in borders] for k in range(len(borders[0]))]
        else:
            try:
                held, kept, made = self._ready.pop()
            except IndexError:
                held, kept, made = [], [], ()
            if kept and set(slots) <= set(made):
                # With fewer cotangents, or fewer gradients asked for, fewer residuals are read than were kept.
                places = [made.index(slot) for slot in slots]
                return self._first_reversed(), held, [[arrays[k] for k in places] for arrays in kept]
        done, residuals, _ = self._sweep(done, carries, advance, keep, _copies)
        carries.pop()
        return done, carries, residuals


def _copies(carry: Arrays) -> Arrays:
    """A carry of its own: a row of a larger buffer would keep all of that buffer."""
    return [np.array(c) for c in carry]


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


def _planned(body: Program, n_carry: int, n_ys: int, length: int, reverse: bool, memory: Memory = None) -> Schedule:
    return _schedule(_every_site(body, n_carry, n_ys, length, reverse), memory)
