"""How an equation of a loop body runs on the whole sequence at once: one more leading (time) axis.

Axes are counted from the end everywhere (ops/axes.py), so most primitives need nothing but aligned ranks;
the few whose parameters speak of a whole shape or index have a rule here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.ops import shape as _shape
from tinygrad_lstm.ops.elementwise import where
from tinygrad_lstm.ops.linalg import _matmul
from tinygrad_lstm.ops.reduction import _sum
from tinygrad_lstm.primitive import Aval, Primitive
from tinygrad_lstm.program import Equation, Program
from tinygrad_lstm.tensor import Tensor

__all__ = ["TimeSum", "can_batch", "run_batched"]

# An operand: (tensor or Python number, whether it has the time axis).
Value = tuple[Any, bool]


def can_batch(program: Program, equation: Equation, stacked: Sequence[bool]) -> bool:
    """Whether the equation can run once for all steps, given which operands change from step to step."""
    primitive = equation.primitive
    if primitive.name in _RULES:
        return _RULES[primitive.name][0](program, equation, stacked)
    return primitive.is_elementwise or primitive.batch == "same"


def run_batched(program: Program, equation: Equation, values: Sequence[Value], steps: int) -> tuple[Any, ...]:
    """Run (or record) an equation for all steps; every output has the time axis."""
    primitive = equation.primitive
    if primitive.name in _RULES:
        out = _RULES[primitive.name][1](program, equation, values, steps)
    else:
        rank = len(program.avals[equation.outputs[0]].shape)
        aligned = primitive.is_elementwise or primitive.name == "matmul"
        operands = []
        for (value, has_time), operand in zip(values, equation.operands, strict=True):
            if primitive.variadic and not has_time:
                value = _shape.broadcast_to(value, (steps, *value.shape))
            elif has_time and aligned and operand.__class__ is int:
                value = _align(value, program.avals[operand], rank, steps)
            operands.append(value)
        out = primitive.bind(tuple(operands), dict(equation.params))
    return out if isinstance(out, tuple) else (out,)


def _align(value: Tensor, aval: Aval, rank: int, steps: int) -> Tensor:
    """Put axes of length 1 behind the time axis, so that broadcasting inside a step stays what it was."""
    missing = rank - len(aval.shape)
    return _shape.reshape(value, (steps, *(1,) * missing, *aval.shape)) if missing else value


# ---------------------------------------------------------------------------- rules of their own


def _always(program: Program, equation: Equation, stacked: Sequence[bool]) -> bool:
    return True


def _with_shape(program: Program, equation: Equation, values: Sequence[Value], steps: int) -> Any:
    params = dict(equation.params)
    params["shape"] = (steps, *params["shape"])
    value = values[0][0]
    if equation.primitive.name == "broadcast_to":
        value = _align(value, program.avals[equation.operands[0]], len(params["shape"]) - 1, steps)
    return equation.primitive.bind((value,), params)


def _sum_to(program: Program, equation: Equation, values: Sequence[Value], steps: int) -> Any:
    inside = program.avals[equation.operands[0]].shape
    goal = equation.params["shape"]
    extra = len(inside) - len(goal)
    axes = [k - len(inside) for k in range(extra)]
    axes += [k - len(goal) for k, n in enumerate(goal) if n == 1 and inside[k + extra] != 1]
    summed = _sum(values[0][0], axis=tuple(sorted(axes)), keepdims=False) if axes else values[0][0]
    return _shape.reshape(summed, (steps, *goal))


def _indexed(program: Program, equation: Equation, values: Sequence[Value], steps: int) -> Any:
    params = dict(equation.params)
    params["template"] = (("slice", None, None, None), *params["template"])
    if "shape" in params:
        params["shape"] = (steps, *params["shape"])
    return equation.primitive.bind((values[0][0],), params)


def _take_is_gather(program: Program, equation: Equation, stacked: Sequence[bool]) -> bool:
    table = program.aval(equation.operands[0])
    return not stacked[0] and equation.params["axis"] == -len(table.shape)


def _take(program: Program, equation: Equation, values: Sequence[Value], steps: int) -> Any:
    return equation.primitive.bind((values[0][0], values[1][0]), dict(equation.params))


def _is_scatter(program: Program, equation: Equation, stacked: Sequence[bool]) -> bool:
    return all(stacked) and equation.params["axis"] == -len(equation.params["shape"])


def _untake(program: Program, equation: Equation, values: Sequence[Value], steps: int) -> Any:
    """A table for every step: the tables one behind the other, and indices that go on counting."""
    shape = equation.params["shape"]
    g, indices = (value[0] for value in values)
    first = np.arange(steps).reshape(-1, *(1,) * (indices.ndim - 1)) * shape[0]
    indices = where(indices < 0, indices + shape[0], indices) + first
    out = equation.primitive.bind((g, indices), {"shape": (steps * shape[0], *shape[1:]), "axis": -len(shape)})
    return _shape.reshape(out, (steps, *shape))


_RULES: dict[str, tuple[Callable[..., bool], Callable[..., Any]]] = {
    "reshape": (_always, _with_shape),
    "broadcast_to": (_always, _with_shape),
    "sum_to": (_always, _sum_to),
    "getitem": (lambda program, equation, stacked: len(equation.operands) == 1, _indexed),
    "put": (lambda program, equation, stacked: len(equation.operands) == 1, _indexed),
    "take": (_take_is_gather, _take),
    "untake": (_is_scatter, _untake),
}


# ---------------------------------------------------------------------------- sums over time


class TimeSum:
    """The sum over all steps of a value of the body, without making the stacked value where that is possible.

    A linear primitive commutes with the sum; the sum of a product of two matrices per step is one product
    whose inner axis is (time, inner): the weight gradient as a single GEMM with K = T * B.
    """

    def __init__(
        self,
        program: Program,
        behind: dict[int, Equation],
        value_of: Callable[[Any], Value],
        changes: Callable[[int], bool],
        steps: int,
        totals: dict[int, Tensor],
    ) -> None:
        self.program = program
        self.totals = totals  # what the loop itself has added up
        self.definitions = behind  # the equations that run behind the loop, by the slots they assign
        self.value_of = value_of
        self.changes = changes  # whether a slot changes from step to step
        self.steps = steps

    def of(self, operand: Any) -> Tensor:
        """The sum over time of an operand."""
        if operand.__class__ is int and operand in self.totals:
            return self.totals[operand]
        equation = self.definitions.get(operand) if operand.__class__ is int else None
        value = self._through(equation, operand) if equation is not None else None
        if value is not None:
            return value
        tensor, has_time = self.value_of(operand)
        if not has_time:
            return tensor * float(self.steps)
        if self.steps == 1:
            return _shape.reshape(tensor, tensor.shape[1:])
        return _sum(tensor, axis=(-tensor.ndim,), keepdims=False)

    def _stacked(self, operand: Any) -> bool:
        return operand.__class__ is int and self.changes(operand)

    def _through(self, equation: Equation, operand: int) -> Tensor | None:
        stacked = [k for k, o in enumerate(equation.operands) if self._stacked(o)]
        primitive: Primitive = equation.primitive
        if primitive.name == "split" and stacked:
            parts = primitive.bind((self.of(equation.operands[0]),), dict(equation.params))
            return parts[equation.outputs.index(operand)]
        if len(equation.outputs) != 1 or not stacked:
            return None
        if primitive.name in ("getitem", "put") and stacked == [0] and len(equation.operands) == 1:
            return primitive.bind((self.of(equation.operands[0]),), dict(equation.params))
        if primitive.name == "untake" and len(stacked) == 2 and can_batch(self.program, equation, (True, True)):
            operands = [self.value_of(o)[0] for o in equation.operands]  # rows of all steps into one table
            return primitive.bind(tuple(operands), dict(equation.params))
        if primitive.name == "matmul" and len(stacked) == 2:
            return self._contracted(equation)
        if (primitive.linear == "each" and stacked == [0] and len(equation.operands) == 1) or (
            primitive.name == "matmul" and len(stacked) == 1
        ):
            operands = [self.of(o) if k in stacked else self.value_of(o)[0] for k, o in enumerate(equation.operands)]
            return primitive.bind(tuple(operands), dict(equation.params))
        if primitive.name == "add" and all(self._same_shape(equation, operand) for operand in equation.operands):
            return self.of(equation.operands[0]) + self.of(equation.operands[1])
        return None

    def _same_shape(self, equation: Equation, operand: Any) -> bool:
        return (
            operand.__class__ is int
            and self.program.avals[operand].shape == self.program.avals[equation.outputs[0]].shape
        )

    def _contracted(self, equation: Equation) -> Tensor | None:
        left, right = equation.operands
        if len(self.program.avals[left].shape) != 2 or len(self.program.avals[right].shape) != 2:
            return None
        a, b = self.value_of(left)[0], self.value_of(right)[0]  # (T, M, K), (T, K, N)
        steps, m, k = a.shape
        n = b.shape[-1]
        # (T, M, K) is usually a transposed view of (T, K, M): turned back, moving T next to K makes no copy.
        flat = _shape.reshape(_shape.transpose(a, (0, 2, 1)), (steps * k, m))
        return _matmul(_shape.transpose(flat, (1, 0)), _shape.reshape(b, (steps * k, n)))
