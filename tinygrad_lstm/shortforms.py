"""Short forms of primitives in generated NumPy code: for known shapes, what the forward would find out at every call.

Each one runs the same NumPy function on the same values; only the questions before it are answered beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tinygrad_lstm.kernels.matmul import THRESHOLD, dot
from tinygrad_lstm.kernels.pool import SMALLEST, applied
from tinygrad_lstm.record import Aval

if TYPE_CHECKING:
    from tinygrad_lstm.program import Equation

__all__ = ["ShortForm", "is_small_product", "is_turn", "is_turnable", "short_form"]


PANEL = 64  # columns that a native product computes at a time


class ShortForm(NamedTuple):
    """An expression on the operands (``{0}``, ``{1}``), and the constants that it names."""

    text: str
    constants: dict[str, Any]


def short_form(equation: Equation, avals: Sequence[Aval], tag: str) -> ShortForm | None:
    """The short form of an equation on these shapes, its constants named after ``tag``; None where there is none."""
    name, params = equation.primitive.name, equation.params
    if not equation.operands or any(operand.__class__ is not int for operand in equation.operands):
        return None
    shape = avals[equation.operands[0]].shape
    ufunc = equation.primitive.forward
    if equation.primitive.quick and len(equation.operands) == 2 and not params:
        large = math.prod(shape) * np.dtype(avals[equation.operands[0]].dtype).itemsize >= SMALLEST
        return ShortForm(f"applied({tag}, {{0}}, {{1}})", {"applied": applied, tag: ufunc}) if large else None
    if name == "reshape":
        return ShortForm(f"{{0}}.reshape({tag})", {tag: params["shape"]})
    if name == "transpose":
        rank, axes = len(shape), params["axes"]
        order = (*range(rank - len(axes)), *(axis + rank for axis in axes))
        return ShortForm(f"{{0}}.transpose({tag})", {tag: order})
    if name == "sum":
        constants = {"add_reduce": np.add.reduce, tag: params["axis"], f"{tag}_keep": params["keepdims"]}
        return ShortForm(f"add_reduce({{0}}, {tag}, None, None, {tag}_keep)", constants)
    if name == "sum_to":
        target, extra = params["shape"], len(shape) - len(params["shape"])
        axes = (*range(extra), *(k + extra for k, n in enumerate(target) if n == 1 and shape[k + extra] != 1))
        constants = {"add_reduce": np.add.reduce, tag: axes, f"{tag}_shape": target}
        return ShortForm(f"add_reduce({{0}}, {tag}).reshape({tag}_shape)", constants)
    if name == "broadcast_to" and math.prod(shape) == 1:
        target = params["shape"]
        constants = {"spread": _spread, tag: target, f"{tag}_strides": (0,) * len(target)}
        return ShortForm(f"spread({{0}}, {tag}, {tag}_strides)", constants)
    if name == "matmul" and _is_of_matrices(equation, avals):
        text = "{0}.dot({1})" if is_small_product(equation, avals) else "dot({0}, {1})"
        if len(shape) == 2:
            return ShortForm(text, {"dot": dot})
        constants = {"dot": dot, tag: (-1, shape[-1]), f"{tag}_shape": avals[equation.outputs[0]].shape}
        left = f"{{0}}.reshape({tag})"
        return ShortForm(f"{text.replace('{0}', left)}.reshape({tag}_shape)", constants)
    return None


def _spread(x: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    """One element in every place of a shape: the read-only view of ``np.broadcast_to``, in a fifth of its time."""
    out = np.ndarray(shape, x.dtype, x, 0, strides)
    out.flags.writeable = False
    return out


def is_turnable(equation: Equation, avals: Sequence[Aval]) -> bool:
    """Whether a product may as well be computed transposed: of two matrices of one float dtype, small, or with at least
    a panel of columns then."""
    if any(operand.__class__ is not int for operand in equation.operands):
        return False
    a, b = (avals[operand] for operand in equation.operands)
    floating = np.dtype(a.dtype) in (np.float32, np.float64)
    matrices = len(a.shape) == 2 and len(b.shape) == 2 and a.dtype == b.dtype and floating
    return matrices and 0 not in (*a.shape, *b.shape) and (a.shape[0] >= PANEL or is_small_product(equation, avals))


def _is_of_matrices(equation: Equation, avals: Sequence[Aval]) -> bool:
    """Whether a product is one of rows and a matrix of one float dtype, none of them empty."""
    if any(operand.__class__ is not int for operand in equation.operands):
        return False
    a, b = (avals[operand] for operand in equation.operands)
    floating = a.dtype == b.dtype and np.dtype(a.dtype) in (np.float32, np.float64)
    return floating and len(a.shape) >= 2 and len(b.shape) == 2 and 0 not in (*a.shape, *b.shape)


def is_small_product(equation: Equation, avals: Sequence[Aval]) -> bool:
    """Whether a product is one that :func:`tinygrad_lstm.kernels.matmul` hands to ``ndarray.dot`` as it is."""
    if not _is_of_matrices(equation, avals):
        return False
    a, b = (avals[operand] for operand in equation.operands)
    size = math.prod(a.shape[:-1]) * b.shape[1]
    return size * a.shape[-1] < THRESHOLD and size * np.dtype(a.dtype).itemsize < SMALLEST


def is_turn(equation: Equation, avals: Sequence[Aval]) -> bool:
    """Whether an equation transposes a matrix."""
    return (
        equation.primitive.name == "transpose"
        and len(avals[equation.operands[0]].shape) == 2
        and equation.params["axes"] == (-1, -2)
    )
