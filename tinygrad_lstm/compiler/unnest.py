"""Scans in a loop body, opened: what can leave the inner loop becomes part of the outer one's body.

The planner's three programs of an inner loop (before it, in it, behind it) take the place of its equation, so an
inner input projection is one product in the outer body, where it may be hoisted once more, and an inner weight
gradient is one product behind both loops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinygrad_lstm.compiler.constants import fill
from tinygrad_lstm.compiler.merge import merge_matmuls
from tinygrad_lstm.compiler.simplify import simplify
from tinygrad_lstm.primitive import Aval, zeros
from tinygrad_lstm.program import Equation, Program, lower, sourced
from tinygrad_lstm.tape import recording
from tinygrad_lstm.tensor import Tensor, asarray
from tinygrad_lstm.trace import Trace

__all__ = ["has_scans", "rewritten", "unnest"]

# (body, n_carry, n_ys, steps) -> the plan of the loop
Planner = Callable[[Program, int, int, int], Any]


def has_scans(program: Program) -> bool:
    """Whether a body has a loop of its own."""
    return any(equation.primitive.name == "scan" for equation in program.equations)


def unnest(program: Program, plan: Planner) -> Program:
    """The same program with every scan as its hoisted part, a scan of what has to stay, and its sunk part."""
    if not has_scans(program):
        return program

    def equations(environment: dict[int, Any]) -> list[Any]:
        def read(operand: Any) -> Any:
            return environment[operand] if operand.__class__ is int else operand.value

        for equation in program.equations:
            operands = [read(operand) for operand in equation.operands]
            if equation.primitive.name == "scan":
                values = _opened(equation, [asarray(o) for o in operands], plan)
            else:
                out = equation.primitive.bind(tuple(operands), dict(equation.params))
                values = list(out) if isinstance(out, tuple) else [out]
                sourced(values[0], equation.source)
            environment.update(zip(equation.outputs, values, strict=True))
        return [read(output) for output in program.outputs]

    return simplify(rewritten(program, equations))


def rewritten(program: Program, equations: Callable[[dict[int, Any]], list[Any]]) -> Program:
    """A program with these inputs and captures that records what ``equations`` does with their tensors."""
    recorder = Trace()
    with recording(enabled=True, tapes=(), names=None, trace=recorder):
        sources = [recorder.new(program.avals[slot]) for slot in (*program.inputs, *program.captures)]
        results = equations(dict(zip((*program.inputs, *program.captures), sources, strict=True)))
        tensors = [r if isinstance(r, Tensor) else Tensor(np.asarray(r)) for r in results]
        made, constants = lower(recorder.entries, sources, tensors)
    recorder.close()
    n = len(program.inputs)
    made = made.replaced(inputs=made.inputs[:n], captures=(*made.inputs[n:], *made.captures))
    return fill(made, constants)


def _opened(equation: Equation, operands: list[Tensor], plan: Planner) -> list[Any]:
    """Record the three parts of a scan; returns its results."""
    params = equation.params
    body, n_carry, n_ys, length = params["body"], params["n_carry"], params["n_ys"], params["length"]
    if not length:
        later = [Aval((0, *a.shape), a.dtype) for a in body.output_avals()[n_carry : n_carry + n_ys]]
        return [*operands[:n_carry], *map(zeros, (*later, *body.output_avals()[n_carry + n_ys :]))]
    body = merge_matmuls(simplify(unnest(simplify(body), plan)), n_carry=n_carry)
    parts = plan(body, n_carry, n_ys, length)
    found = [asarray(value) for value in parts.before.apply(operands[n_carry:])]
    sequence, invariant = found[: parts.n_sequence], found[parts.n_sequence :]
    outs: tuple[Any, ...] = ()
    if parts.inner.outputs:
        outs = equation.primitive.bind(
            (
                *operands[:n_carry],
                *(sequence[k] for k in parts.loop_sequence),
                *(invariant[k] for k in parts.loop_invariant),
            ),
            {
                "body": parts.inner, "n_carry": n_carry, "n_ys": len(parts.stacked), "length": length,
                "reverse": params["reverse"],
            },
        )  # fmt: skip
        sourced(outs[0], equation.source)
    return [*outs[:n_carry], *parts.behind.apply([*outs[n_carry:], *sequence, *invariant])]
