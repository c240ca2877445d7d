"""What is not used goes, what is computed twice is computed once, and what cancels is not computed at all."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from typing import Any

from tinygrad_lstm.compiler.algebra import algebra
from tinygrad_lstm.program import Equation, Program, content

__all__ = ["common", "dead_code", "in_order", "simplify", "unguarded"]


def dead_code(program: Program) -> Program:
    """Drop equations that no output depends on, and captures that are then unused are kept in place.

    Captures keep their positions, because callers pass values by position.
    """
    live = {output for output in program.outputs if output.__class__ is int}
    kept: list[Equation] = []
    for equation in reversed(program.equations):
        if any(slot in live for slot in equation.outputs):
            kept.append(equation)
            live.update(equation.reads())
    return program.replaced(equations=tuple(reversed(kept)))


def common(program: Program, fixed: Collection[int] = ()) -> Program:
    """Compute equal equations once.  ``fixed`` slots keep their own equation (they are looked up by number)."""
    seen: dict[Any, tuple[int, ...]] = {}
    same: dict[int, int] = {}
    kept: list[Equation] = []

    def now(operand: Any) -> Any:
        return same.get(operand, operand) if operand.__class__ is int else operand

    for equation in program.equations:
        operands = tuple(now(operand) for operand in equation.operands)
        # repr tells 1 from 1.0 and True, which compare equal.
        key = (
            equation.primitive.name,
            tuple(o if o.__class__ is int else (type(o.value), repr(o.value)) for o in operands),
            tuple((k, content(v)) for k, v in sorted(equation.params.items())),
        )
        twin = seen.get(key)
        if twin is not None and not any(slot in fixed for slot in equation.outputs):
            same.update(zip(equation.outputs, twin, strict=True))
            continue
        seen.setdefault(key, equation.outputs)
        kept.append(equation._replace(operands=operands))
    return program.replaced(equations=tuple(kept), outputs=tuple(now(o) for o in program.outputs))


def unguarded(program: Program) -> Program:
    """Read x in place of ``where(condition, x, stop_nan(x))``, which is x but for what is NaN in the gradient.

    For a program that is run, or whose gradient is taken already: in any other one it is what keeps NaN out of it.
    It stands in the padding of sequences (:func:`~tinygrad_lstm.ops.scan` with ``lengths``).
    """
    stopped = {e.outputs[0]: e.operands[0] for e in program.equations if e.primitive.name == "stop_nan"}
    same: dict[int, Any] = {}

    def now(operand: Any) -> Any:
        return same.get(operand, operand) if operand.__class__ is int else operand

    equations = []
    for equation in program.equations:
        if equation.primitive.name == "where":
            _, x, other = equation.operands
            if x.__class__ is int and other.__class__ is int and stopped.get(other) == x:
                same[equation.outputs[0]] = now(x)
        equations.append(equation._replace(operands=tuple(map(now, equation.operands))))
    if not same:
        return program
    return program.replaced(equations=tuple(equations), outputs=tuple(map(now, program.outputs)))


def simplify(program: Program) -> Program:
    """:func:`dead_code`, :func:`common` and :func:`~tinygrad_lstm.compiler.algebra.algebra`, until nothing changes.

    Exact: the remaining equations compute the same floating-point numbers, up to the sign of a zero.

    Examples
    --------
    >>> import numpy as np
    >>> from tinygrad_lstm import ops
    >>> from tinygrad_lstm.primitive import Aval
    >>> from tinygrad_lstm.trace import trace
    >>> def f(x):
    ...     a, b = ops.split(x.T.T * 1.0, 2, axis=-1)
    ...     return [ops.concatenate([a, b], axis=-1) + -ops.exp(x)]
    >>> program = trace(f, [Aval((2, 4), np.dtype("f4"))], flat=True).program
    >>> len(program), len(simplify(program))
    (8, 2)
    >>> print(simplify(program))
    program(%0 float32[2,4])
      %7 float32[2,4] = exp(%0)
      %9 float32[2,4] = subtract(%0, %7)
      return %9
    """
    # What was returned here before is known to be simple: passes that find nothing to change hand it on.
    while not program.derived.get(("simple",)):
        before = len(program.equations)
        program = dead_code(common(algebra(program)))
        program.derived["simple",] = len(program.equations) == before
    return program


def in_order(equations: Sequence[Equation]) -> tuple[Equation, ...] | None:
    """An order in which every slot is assigned before it is read, near the given one; None where there is none."""
    maker = {slot: k for k, equation in enumerate(equations) for slot in equation.outputs}
    waits = [{maker[slot] for slot in equation.reads() if slot in maker} for equation in equations]
    followers: dict[int, list[int]] = {}
    for k, before in enumerate(waits):
        for other in before:
            followers.setdefault(other, []).append(k)
    missing = [len(before) for before in waits]
    ready = [k for k, count in enumerate(missing) if not count]
    order: list[Equation] = []
    while ready:
        k = heapq.heappop(ready)
        order.append(equations[k])
        for other in followers.get(k, ()):
            missing[other] -= 1
            if not missing[other]:
                heapq.heappush(ready, other)
    return tuple(order) if len(order) == len(equations) else None
