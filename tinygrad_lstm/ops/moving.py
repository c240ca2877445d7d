"""Elements repeated, moved around, and added at the edges."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_lstm.errors import ArgumentError, DTypeError, ShapeError
from tinygrad_lstm.ops.axes import as_integer, as_lengths, normal_axes, normal_axis
from tinygrad_lstm.ops.indexing import take
from tinygrad_lstm.ops.shape import broadcast_to, concatenate, ravel, reshape
from tinygrad_lstm.primitive import Primitive
from tinygrad_lstm.tensor import Tensor, asarray

_flip: Primitive = Primitive(
    "flip",
    lambda x, *, axis: np.flip(x, axis),
    (lambda g, axis: _flip(g, axis=axis),),
    linear="each",
    shape=lambda x, *, axis: x,
    batch="same",
    view=True,
)


def flip(m: Any, axis: Any = None) -> Any:
    """Elements in reverse order along axes (all by default), as numpy.flip; a view."""
    x = asarray(m)
    return _flip(x, axis=normal_axes(axis, x.ndim, "flip"))


_roll: Primitive = Primitive(
    "roll",
    lambda x, *, shift, axis: np.roll(x, shift, axis),
    (lambda g, shift, axis: _roll(g, shift=tuple(-s for s in shift), axis=axis),),
    linear="each",
    shape=lambda x, *, shift, axis: x,
    batch="same",
)


def roll(a: Any, shift: Any, axis: Any = None) -> Any:
    """Elements moved around cyclically, as numpy.roll."""
    x = asarray(a)
    if axis is None:
        return reshape(roll(ravel(x), shift, 0), x.shape)
    axes = [normal_axis(a, x.ndim, "roll") for a in (axis if isinstance(axis, (list, tuple)) else [axis])]
    shifts = [as_integer(s, "roll", "shift") for s in (shift if isinstance(shift, (list, tuple)) else [shift])]
    if not shifts or not axes:
        return x
    if len(shifts) != len(axes) and 1 not in (len(shifts), len(axes)):
        raise ShapeError(f"roll: {len(shifts)} shifts for {len(axes)} axes")
    total: dict[int, int] = {}  # an axis may be named twice: its shifts add up
    for k in range(max(len(shifts), len(axes))):
        place = axes[k % len(axes)]
        total[place] = total.get(place, 0) + shifts[k % len(shifts)]
    return _roll(x, shift=tuple(total.values()), axis=tuple(total))


def tile(A: Any, reps: Any) -> Any:
    """An array repeated as a whole along axes, as numpy.tile."""
    x = asarray(A)
    counts = as_lengths(reps, "tile")
    ndim = max(x.ndim, len(counts))
    shape = (1,) * (ndim - x.ndim) + x.shape
    counts = (1,) * (ndim - len(counts)) + counts
    pairs = list(zip(shape, counts, strict=True))
    opened = reshape(x, tuple(v for n, r in pairs for v in ((n,) if r == 1 else (1, n))))
    spread = broadcast_to(opened, tuple(v for n, r in pairs for v in ((n,) if r == 1 else (r, n))))
    return reshape(spread, tuple(n * r for n, r in pairs))


def repeat(a: Any, repeats: Any, axis: int | None = None) -> Any:
    """Each element repeated (a number, or one number per element), as numpy.repeat."""
    x = asarray(a)
    if axis is None:
        x, axis = ravel(x), 0
    length = x.shape[normal_axis(axis, x.ndim, "repeat")]
    counts = asarray(repeats)._data
    if counts.dtype.kind not in "iu" and counts.size:
        raise DTypeError(f"repeat: counts are integers, found {repeats!r:.80}")
    counts = counts.astype(np.intp)
    if counts.ndim > 1 or (counts.ndim == 1 and len(counts) not in (1, length)) or (counts < 0).any():
        raise ShapeError(f"repeat: {repeats!r} for an axis of length {length}; expected a count, or one per element")
    return take(x, np.repeat(np.arange(length), counts), axis)


_PADS = ("constant", "edge", "reflect", "symmetric", "wrap")


def pad(array: Any, pad_width: Any, mode: str = "constant", constant_values: Any = 0.0) -> Any:
    """More elements at the edges, as numpy.pad.

    Parameters
    ----------
    array : (...)
    pad_width : int, pair or one pair per axis
        How many before and after each axis, as in numpy.pad.
    mode : str
        ``'constant'``, ``'edge'``, ``'reflect'``, ``'symmetric'`` or ``'wrap'``.
    constant_values : number, pair or one pair per axis
        What is added; for ``'constant'`` only.
    """
    x = asarray(array)
    if mode not in _PADS:
        raise ArgumentError(f"pad: mode {mode!r} has no gradient rule here, expected one of {', '.join(_PADS)}")
    widths = _per_side(pad_width, x, "pad_width")
    if widths.dtype.kind not in "iu":
        raise DTypeError(f"pad: pad_width is made of integers, found {pad_width!r:.80}")
    values = _per_side(constant_values, x, "constant_values")
    for axis, (before, after) in enumerate(widths.tolist()):
        if before < 0 or after < 0:
            raise ArgumentError(f"pad: widths are not negative, found {(before, after)}")
        if not (before or after):
            continue
        if mode != "constant":
            if not x.shape[axis]:
                raise ShapeError(f"pad: axis {axis} of {x.shape} is empty, so mode {mode!r} has nothing to repeat")
            places = np.pad(np.arange(x.shape[axis]), (before, after), mode)  # type: ignore[call-overload]
            x = take(x, places, axis)
            continue
        parts = [x]
        for width, place, value in ((before, 0, values[axis, 0]), (after, len(parts), values[axis, 1])):
            if width:
                shape = (*x.shape[:axis], width, *x.shape[axis + 1 :])
                block = broadcast_to(asarray(np.asarray(value, x.dtype)), shape)
                parts.insert(0 if place == 0 else len(parts), block)
        x = concatenate(parts, axis)
    return x


def _per_side(given: Any, x: Tensor, what: str) -> np.ndarray:
    """An argument of pad as one pair per axis."""
    try:
        return np.broadcast_to(np.asarray(given), (x.ndim, 2))
    except ValueError:
        raise ShapeError(f"pad: {what} {given} does not fit the {x.ndim} axes of {x.shape}") from None


__all__ = ["flip", "pad", "repeat", "roll", "tile"]
