"""Dead code and common subexpressions: what is not used goes, what is computed twice is computed once."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from tinygrad_lstm.program import Equation, Program, content

__all__ = ["dead_code", "simplify"]


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


def simplify(program: Program) -> Program:
    """Both passes.  Exact: the remaining equations compute the same floating-point numbers."""
    return dead_code(common(program))
