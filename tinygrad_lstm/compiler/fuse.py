"""Fuse elementwise equations of one shape, and reductions of their rows, into one loop over the elements.

Every equation gets a level: one more than what it reads whenever something stands between them that cannot
be fused (or has another shape).  Elementwise equations of one level and one shape then have no path between
each other through anything outside, and become one ``fused`` equation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.compiler.simplify import dead_code
from tinygrad_lstm.errors import GraphError
from tinygrad_lstm.kernels import Expression, build, fused
from tinygrad_lstm.kernels import expression as e
from tinygrad_lstm.primitive import Aval, Primitive
from tinygrad_lstm.program import Equation, Program

__all__ = ["FUSED", "FusedKernel", "fuse", "worth_compiling"]


# A chain is compiled when the whole loop does at least this many elementwise operations: below, the first call
# would wait longer for the compiler than NumPy needs for thousands of calls.
COMPILE_FROM = 2_000_000


def worth_compiling(program: Program, equations: Iterable[Equation], steps: int) -> bool:
    """Whether the elementwise part of a loop is large enough for native code."""
    total = 0
    for equation in equations:
        size = math.prod(program.avals[equation.outputs[0]].shape)
        if equation.primitive is FUSED:
            total += size * len(equation.params["kernel"].expression.nodes)
        elif equation.primitive.is_elementwise:
            total += size
    return steps * total >= COMPILE_FROM


REDUCTIONS: dict[str, Any] = {"sum": np.add, "max": np.maximum, "min": np.minimum}


class FusedKernel:
    """The scalar expression of a fused chain; runs on NumPy or, where it pays, natively."""

    def __init__(
        self, expression: Expression, avals: Sequence[Aval], operands: Sequence[Aval | None],
        shape: tuple[int, ...] = (), reductions: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.expression = expression
        self.avals = list(avals)  # of the outputs
        self.shape = tuple(shape)  # of the loop
        # What is done with each output along the last axis: nothing (""), or "sum", "max", "min".
        self.reductions = tuple(reductions) or ("",) * len(self.avals)
        self.dtypes = [None if a is None else np.dtype(a.dtype) for a in operands]
        self.native: Any = None

    def __repr__(self) -> str:
        folded = [f"{k}:{kind}" for k, kind in enumerate(self.reductions) if kind]
        return self.expression.key + (f" {' '.join(folded)}" if folded else "")

    def compile(self) -> Any:
        """The native loop: a function (inputs, outputs)."""
        if self.native is None:
            self.native = fused(self.expression, self.dtypes)
        return self.native

    def on_numpy(self, *arrays: Any) -> tuple[np.ndarray, ...]:
        """Every output by NumPy, in the shape of the chain."""
        out = self.expression.numpy(*arrays)
        out = out if isinstance(out, tuple) else (out,)
        results = []
        for o, aval, kind in zip(out, self.avals, self.reductions, strict=True):
            if kind:
                keep = len(aval.shape) == len(self.shape)
                o = REDUCTIONS[kind].reduce(np.broadcast_to(o, self.shape), axis=-1, keepdims=keep)
            results.append(o if np.shape(o) == aval.shape else np.broadcast_to(o, aval.shape))
        return tuple(results)


def _no_rule(*args: Any) -> Any:
    raise GraphError("fused equations are made after differentiation")


FUSED: Primitive = Primitive(
    "fused",
    lambda *arrays, kernel: kernel.on_numpy(*arrays),
    (lambda g, position: _no_rule(g, position),),
    shape=lambda *operands, kernel: tuple(kernel.avals),
    always_tuple=True,
    register=False,  # made by a pass, never called by anybody
    doc="A chain of elementwise primitives as one loop.",
)


def _is_elementwise(equation: Equation) -> bool:
    return equation.primitive.is_elementwise and equation.primitive.expression is not None


def _folds(program: Program, equation: Equation) -> bool:
    """Whether the equation reduces the last axis of a floating value."""
    if equation.primitive.name not in REDUCTIONS or equation.params["axis"] != (-1,):
        return False
    return np.dtype(program.aval(equation.operands[0]).dtype).kind == "f"


def fuse(program: Program, at_least: int = 2, reductions: bool = False) -> Program:
    """Fuse chains of ``at_least`` elementwise equations; with ``reductions`` also sums and extrema of the last axis."""
    program = dead_code(program)  # a loop whose results nobody reads has no outputs
    made = program.definitions()
    level: dict[int, int] = {}
    groups: dict[tuple[int, tuple[int, ...]], list[Equation]] = {}
    rest: dict[int, list[Equation]] = {}

    def folds(equation: Equation) -> bool:
        return reductions and _folds(program, equation)

    def fusible(equation: Equation) -> bool:
        return _is_elementwise(equation) or folds(equation)

    for equation in program.equations:
        # A reduction belongs to the loop over what it reduces.
        shape = program.aval(equation.operands[0] if folds(equation) else equation.outputs[0]).shape
        own = 0
        for slot in equation.reads():
            if slot not in made:
                continue
            source = made[slot]
            together = _is_elementwise(source) and fusible(equation) and program.avals[slot].shape == shape
            step = 0 if together or (not fusible(equation) and not fusible(source)) else 1
            # A plain equation runs behind the groups of its level, so it may read them at the same level.
            if not fusible(equation):
                step = 0
            own = max(own, level[slot] + step)
        for slot in equation.outputs:
            level[slot] = own
    _late(program, level, made, folds)
    for equation in program.equations:
        own = level[equation.outputs[0]]
        shape = program.aval(equation.operands[0] if folds(equation) else equation.outputs[0]).shape
        if fusible(equation):
            groups.setdefault((own, shape), []).append(equation)
        else:
            rest.setdefault(own, []).append(equation)
    equations: list[Equation] = []
    uses = _users(program)
    for depth in range(max(level.values(), default=-1) + 1):
        for (own, _), members in groups.items():
            if own == depth:
                equations.extend([_fused(program, members, uses)] if len(members) >= at_least else members)
        equations.extend(rest.get(depth, ()))
    return program.replaced(equations=tuple(equations))


def _late(
    program: Program, level: dict[int, int], made: dict[int, Equation], folds: Callable[[Equation], bool]
) -> None:
    """Move what reads inputs alone to the last level that is early enough: it would only wait in memory."""
    latest: dict[int, int] = {output: 0 for output in program.outputs if output.__class__ is int}
    for equation in reversed(program.equations):
        own = [latest[slot] for slot in equation.outputs if slot in latest]
        if _is_elementwise(equation) and own and not any(slot in made for slot in equation.reads()):
            level[equation.outputs[0]] = max(level[equation.outputs[0]], min(own))
        shape = (
            program.aval(equation.operands[0] if folds(equation) else equation.outputs[0]).shape
            if equation.operands
            else ()
        )
        for slot in equation.reads():
            here = level[equation.outputs[0]]
            if (_is_elementwise(equation) or folds(equation)) and program.avals[slot].shape != shape:
                here -= 1  # another loop of the same level may run before
            latest[slot] = min(latest.get(slot, here), here)


def _users(program: Program) -> dict[int, set[int]]:
    users: dict[int, set[int]] = {}
    for equation in program.equations:
        for slot in equation.reads():
            users.setdefault(slot, set()).add(id(equation))
    for output in program.outputs:
        if output.__class__ is int:
            users.setdefault(output, set()).add(0)
    return users


def _fused(program: Program, members: Sequence[Equation], uses: dict[int, set[int]]) -> Equation:
    inside = {id(equation) for equation in members}
    own = [slot for equation in members for slot in equation.outputs]
    results = [slot for slot in own if uses.get(slot, set()) - inside]
    operands: list[int] = []
    for equation in members:
        for slot in equation.reads():
            if slot not in own and slot not in operands:
                operands.append(slot)

    folded = {e.outputs[0]: e.primitive.name for e in members if not _is_elementwise(e)}
    loop = next(program.aval(e.operands[0] if e.outputs[0] in folded else e.outputs[0]).shape for e in members)

    def chain(*scalars: Any) -> Any:
        values: dict[int, Any] = dict(zip(operands, scalars, strict=True))
        for equation in members:
            arguments = [values[o] if o.__class__ is int else o.value for o in equation.operands]
            if equation.outputs[0] in folded:  # what is reduced; the loop does the rest
                values[equation.outputs[0]] = arguments[0]
                continue
            value = equation.primitive.expression(*arguments, **equation.params)  # type: ignore[misc]
            goal = np.dtype(program.avals[equation.outputs[0]].dtype)
            values[equation.outputs[0]] = value if isinstance(value, e.Expr) else e.cast(e.constant(value), goal)
        return tuple(values[slot] for slot in results)

    kernel = FusedKernel(
        build(chain, len(operands)), [program.avals[s] for s in results], [program.avals[s] for s in operands],
        loop, [folded.get(s, "") for s in results],
    )  # fmt: skip
    return Equation(FUSED, tuple(operands), {"kernel": kernel}, tuple(results), members[0].source)
