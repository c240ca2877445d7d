"""Axis arguments in one form: counted from the end, so that one more leading axis changes nothing.

Every primitive stores its axes this way; that is what lets the compiler lift an operation out of a time
loop by giving it the whole sequence (one leading axis more) with the same parameters.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.errors import DTypeError, ShapeError

__all__ = ["as_integer", "as_kept", "as_lengths", "every_axis", "ndim_of", "normal_axes", "normal_axis"]


def ndim_of(x: Any) -> int:
    """Number of axes of a tensor, array, number or nested list."""
    from tinygrad_lstm.tensor import to_array

    found = getattr(x, "ndim", None)
    return to_array(x).ndim if found is None else found


def as_integer(value: Any, who: str, what: str) -> int:
    """An argument that has to be an integer."""
    try:
        return operator.index(value)
    except TypeError:
        raise DTypeError(f"{who}: {what} is an integer, found {value!r}") from None


def as_lengths(shape: Any, who: str) -> tuple[int, ...]:
    """A shape, given as an int or a sequence of ints."""
    try:
        return (operator.index(shape),) if not isinstance(shape, (list, tuple)) else tuple(map(operator.index, shape))
    except TypeError:
        raise DTypeError(f"{who}: a shape is an int or a tuple of ints, found {shape!r}") from None


def as_kept(keepdims: Any) -> bool:
    """``keepdims``: NumPy has a dtype in its place among the positions, which would count as true."""
    if keepdims is True or keepdims is False:
        return keepdims
    if keepdims is None or isinstance(keepdims, (int, np.bool_)):
        return bool(keepdims)
    raise DTypeError(f"keepdims is True or False, found {keepdims!r}; a dtype is given by its name, dtype=")


def normal_axis(axis: Any, ndim: int, who: str) -> int:
    """One axis as a negative number; ShapeError when the array has no such axis."""
    number = as_integer(axis, who, "axis")
    if not -ndim <= number < ndim:
        if not ndim:
            raise ShapeError(f"{who}: axis {number} for a 0-d array, which has no axes")
        raise ShapeError(f"{who}: axis {number} for an array with {ndim} axes; expected {-ndim}..{ndim - 1}")
    return number if number < 0 else number - ndim


@functools.cache
def every_axis(ndim: int) -> tuple[int, ...]:
    """All axes."""
    return _EVERY[ndim]


_EVERY = [tuple(range(-ndim, 0)) for ndim in range(65)]  # NumPy has no more


def normal_axes(axis: Any, ndim: int, who: str) -> tuple[int, ...]:
    """None (all axes), one axis or several, as sorted negative numbers."""
    if axis is None:
        return every_axis(ndim)
    if not isinstance(axis, Sequence):
        return (normal_axis(axis, ndim, who),)
    axes = tuple(sorted(normal_axis(a, ndim, who) for a in axis))
    if len(set(axes)) != len(axes):
        raise ShapeError(f"{who}: axis {tuple(axis)} names an axis twice")
    return axes
