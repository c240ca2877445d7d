"""Norms of vectors and matrices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinygrad_lstm.errors import ArgumentError
from tinygrad_lstm.ops.axes import as_kept, normal_axes, normal_axis
from tinygrad_lstm.ops.elementwise import abs, equal, not_equal, where
from tinygrad_lstm.ops.reduction import Axis, _floating, _open, _weighted, max, min, sum
from tinygrad_lstm.primitive import Primitive
from tinygrad_lstm.tensor import Tensor

_norm: Primitive = Primitive(
    "norm",
    lambda x, *, axis, keepdims: np.sqrt(np.add.reduce(x * x, axis=axis, keepdims=keepdims)),
    (lambda g, x, out, axis, keepdims: _open(g, axis, keepdims) * _direction(x, _open(out, axis, keepdims)),),
    jvp=lambda t, x, out, *, axis, keepdims: _weighted(t[0], _direction(x, _open(out, axis, keepdims)), axis, keepdims),
    batch="same",
)


def _direction(x: Any, length: Any) -> Any:
    return x / where(equal(length, 0), 1.0, length)


def norm(x: Any, axis: Axis = None, keepdims: bool = False, *, ord: Any = None) -> Any:
    """Norm over one or two axes (Euclidean: over any number, all of them by default), as numpy.linalg.norm.

    Parameters
    ----------
    x : (...), floating; integers count as float64
    axis : int, tuple of ints, optional
    keepdims : bool
    ord : number or str, optional
        Of vectors: any number, also 0 (how many are not 0), inf and -inf.  Of matrices: 'fro', 1, -1, inf and -inf.
        The Euclidean (Frobenius) norm by default.  At 0 the derivative of a Euclidean norm, and of powers, is 0.

    Raises
    ------
    ArgumentError
        An order that there is not, or that does not go with so many axes (the matrix norms 2, -2 and 'nuc' need
        singular values).
    """
    x = _floating(x)
    axes = normal_axes(axis, x.ndim, "norm")
    if ord is None or (ord == "fro" and len(axes) == 2) or (ord == 2 and len(axes) == 1):
        return _norm(x, axis=axes, keepdims=as_kept(keepdims))
    if len(axes) == 1 and isinstance(ord, (int, float)):
        return _of_vectors(x, axes[0], keepdims, ord)
    if len(axes) == 2 and not isinstance(ord, str) and ord in (1, -1, math.inf, -math.inf):
        row, column = axes if axis is None else (normal_axis(a, x.ndim, "norm") for a in axis)
        summed, compared = (row, column) if ord in (1, -1) else (column, row)
        found = (max if ord > 0 else min)(sum(abs(x), summed, True), compared, True)
        return found if keepdims else sum(found, axes)
    raise ArgumentError(
        f"norm: ord={ord!r} over {len(axes)} axes; expected a number over one axis, or 'fro', 1, -1, inf, -inf over two"
    )


def _of_vectors(x: Tensor, axis: int, keepdims: bool, order: float) -> Any:
    if order in (math.inf, -math.inf):
        return (max if order > 0 else min)(abs(x), axis, keepdims)
    if order == 0:
        return sum(not_equal(x, 0).astype(x.dtype), axis, keepdims)
    total = sum(abs(x) if order == 1 else abs(x) ** order, axis, keepdims)
    if order == 1:
        return total
    if order < 0:
        return total ** (1.0 / order)
    # The root has an infinite derivative at 0, where the norm is chosen to have none.
    zero = equal(total, 0)
    return where(zero, total, where(zero, np.ones((), x.dtype), total) ** (1.0 / order))


__all__ = ["norm"]
