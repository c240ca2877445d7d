"""Primitives that rearrange: every one is linear, and most are views."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.errors import ArgumentError, DTypeError, ShapeError
from tinygrad_lstm.ops.axes import normal_axes, normal_axis
from tinygrad_lstm.primitive import Aval, Primitive
from tinygrad_lstm.tensor import Tensor, as_dtype, asarray, together


def _lengths(shape: Any, who: str) -> tuple[int, ...]:
    try:
        return (operator.index(shape),) if not isinstance(shape, (list, tuple)) else tuple(map(operator.index, shape))
    except TypeError:
        raise DTypeError(f"{who}: a shape is an int or a tuple of ints, found {shape!r}") from None


# ---------------------------------------------------------------------------- reshape, broadcast, their transposes


_reshape: Primitive = Primitive(
    "reshape",
    lambda x, *, shape: x.reshape(shape),
    (lambda g, shapes: _reshape(g, shape=tuple(shapes[0])),),
    linear="each",
    shape=lambda x, *, shape: Aval(shape, x.dtype),
    view=True,
)


def reshape(x: Any, shape: Any) -> Any:
    """The same elements in another shape (one length may be -1), as numpy.reshape."""
    x = asarray(x)
    lengths = list(_lengths(shape, "reshape"))
    known = 1
    for n in lengths:
        known *= n if n != -1 else 1
    if lengths.count(-1) > 1 or any(n < -1 for n in lengths):
        raise ShapeError(f"reshape to {tuple(lengths)}: at most one length may be -1, the others are not negative")
    if -1 in lengths and known:
        lengths[lengths.index(-1)] = x.size // known
    total = 1
    for n in lengths:
        total *= n
    if total != x.size or -1 in lengths:
        raise ShapeError(f"reshape of {x.shape} ({x.size} elements) to {tuple(_lengths(shape, 'reshape'))}")
    return _reshape(x, shape=tuple(lengths))


def ravel(x: Any) -> Any:
    """Flattened to one axis."""
    return reshape(x, (-1,)) if asarray(x).size else reshape(x, (0,))


def _sum_to_forward(x: np.ndarray, *, shape: tuple[int, ...]) -> np.ndarray:
    extra = x.ndim - len(shape)
    axes = (*range(extra), *(k + extra for k, n in enumerate(shape) if n == 1 and x.shape[k + extra] != 1))
    return np.add.reduce(x, axis=axes).reshape(shape)


sum_to_primitive: Primitive = Primitive(
    "sum_to",
    _sum_to_forward,
    (lambda g, shapes: broadcast_to(g, shapes[0]),),
    linear="each",
    shape=lambda x, *, shape: Aval(shape, x.dtype),
)


def sum_to(x: Any, shape: Sequence[int]) -> Any:
    """The transpose of broadcasting: sum over the axes along which ``shape`` would be broadcast to x.shape."""
    return sum_to_primitive(x, shape=tuple(shape))


def _broadcast_aval(x: Aval, *, shape: tuple[int, ...]) -> Aval:
    if np.broadcast_shapes(x.shape, shape) != shape:
        raise ValueError
    return Aval(shape, x.dtype)


_broadcast_to: Primitive = Primitive(
    "broadcast_to",
    lambda x, *, shape: np.broadcast_to(x, shape),
    (lambda g, shapes: sum_to(g, shapes[0]),),
    linear="each",
    shape=_broadcast_aval,
    view=True,
)


def broadcast_to(x: Any, shape: Any) -> Any:
    """x repeated along new or length-1 axes, as numpy.broadcast_to (a read-only view)."""
    return _broadcast_to(x, shape=_lengths(shape, "broadcast_to"))


# ---------------------------------------------------------------------------- order of the axes


def _transpose_forward(x: np.ndarray, *, axes: tuple[int, ...]) -> np.ndarray:
    lead = x.ndim - len(axes)  # axes count from the end: leading ones beyond them stay in place
    return x.transpose((*range(lead), *(a + x.ndim for a in axes)))


def _transposed(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[: len(shape) - len(axes)], *(shape[a] for a in axes))


def _inverse(axes: tuple[int, ...]) -> tuple[int, ...]:
    n = len(axes)
    inverse = [0] * n
    for k, a in enumerate(axes):
        inverse[a + n] = k - n
    return tuple(inverse)


_transpose: Primitive = Primitive(
    "transpose",
    _transpose_forward,
    (lambda g, axes: _transpose(g, axes=_inverse(axes)),),
    linear="each",
    shape=lambda x, *, axes: Aval(_transposed(x.shape, axes), x.dtype),
    batch="same",
    view=True,
)


def transpose(x: Any, axes: Any = None) -> Any:
    """Axes in another order (reversed by default), as numpy.transpose; a view."""
    x = asarray(x)
    if axes is None:
        order = tuple(range(-1, -x.ndim - 1, -1))
    else:
        order = tuple(normal_axis(a, x.ndim, "transpose") for a in axes)
        if sorted(order) != list(range(-x.ndim, 0)):
            raise ShapeError(f"transpose: axes {tuple(axes)} are no permutation of the {x.ndim} axes of {x.shape}")
    return _transpose(x, axes=order)


def swapaxes(x: Any, axis1: int, axis2: int) -> Any:
    """Two axes exchanged, as numpy.swapaxes; a view."""
    x = asarray(x)
    a, b = normal_axis(axis1, x.ndim, "swapaxes"), normal_axis(axis2, x.ndim, "swapaxes")
    order = list(range(-x.ndim, 0))
    order[a], order[b] = b, a
    return _transpose(x, axes=tuple(order))


def moveaxis(x: Any, source: Any, destination: Any) -> Any:
    """Axes moved to new positions, as numpy.moveaxis; a view."""
    x = asarray(x)
    sources = [normal_axis(a, x.ndim, "moveaxis") for a in (source if isinstance(source, (list, tuple)) else [source])]
    targets = destination if isinstance(destination, (list, tuple)) else [destination]
    goals = [normal_axis(a, x.ndim, "moveaxis") for a in targets]
    if len(sources) != len(goals) or len(set(sources)) != len(sources) or len(set(goals)) != len(goals):
        raise ShapeError(f"moveaxis: source {source} and destination {destination} do not pair up")
    order = [a for a in range(-x.ndim, 0) if a not in sources]
    for goal, origin in sorted(zip(goals, sources, strict=True)):
        order.insert(goal + x.ndim, origin)
    return _transpose(x, axes=tuple(order))


def expand_dims(x: Any, axis: Any) -> Any:
    """New axes of length 1, at positions in the result, as numpy.expand_dims; a view."""
    x = asarray(x)
    count = len(axis) if isinstance(axis, (list, tuple)) else 1
    axes = normal_axes(axis, x.ndim + count, "expand_dims")
    rest = iter(x.shape)
    ndim = x.ndim + count
    return _reshape(x, shape=tuple(1 if k - ndim in axes else next(rest) for k in range(ndim)))


def squeeze(x: Any, axis: Any = None) -> Any:
    """Axes of length 1 removed (all of them by default), as numpy.squeeze; a view."""
    x = asarray(x)
    if axis is None:
        return _reshape(x, shape=tuple(n for n in x.shape if n != 1))
    axes = normal_axes(axis, x.ndim, "squeeze")
    for a in axes:
        if x.shape[a] != 1:
            raise ShapeError(f"squeeze: axis {a} of {x.shape} has length {x.shape[a]}, expected 1")
    return _reshape(x, shape=tuple(n for k, n in enumerate(x.shape) if k - x.ndim not in axes))


# ---------------------------------------------------------------------------- joining and splitting


def _part(g: Any, shapes: Sequence[Any], position: int, axis: int) -> Any:
    start = 0
    for shape in shapes[:position]:
        start += shape[axis]
    index = [slice(None)] * len(shapes[position])
    index[axis] = slice(start, start + shapes[position][axis])
    return g[tuple(index)]


def _concatenate_aval(*xs: Aval, axis: int) -> Aval:
    first = xs[0].shape
    for x in xs:
        if len(x.shape) != len(first) or any(
            m != n for k, (m, n) in enumerate(zip(x.shape, first, strict=True)) if k - len(first) != axis
        ):
            raise ValueError
    shape = list(first)
    shape[axis] = 0
    for x in xs:
        shape[axis] += x.shape[axis]
    return Aval(tuple(shape), np.result_type(*[x.dtype for x in xs]))


_concatenate: Primitive = Primitive(
    "concatenate",
    lambda *xs, axis: np.concatenate(xs, axis),
    (lambda g, shapes, position, axis: _part(g, shapes, position, axis),),
    linear="jointly",
    shape=_concatenate_aval,
    batch="same",
)


def concatenate(xs: Sequence[Any], axis: int = 0) -> Any:
    """Arrays joined along an existing axis, as numpy.concatenate."""
    tensors = together(*xs)
    if not tensors:
        raise ArgumentError("concatenate of an empty list")
    if len(tensors) == 1:
        return tensors[0]
    if tensors[0].ndim == 0:
        raise ShapeError("concatenate of 0-d values; use stack")
    return _concatenate(*tensors, axis=normal_axis(axis, tensors[0].ndim, "concatenate"))


def stack(xs: Sequence[Any], axis: int = 0) -> Any:
    """Arrays of one shape joined along a new axis, as numpy.stack."""
    tensors = together(*xs)
    if not tensors:
        raise ArgumentError("stack of an empty list")
    shapes = {t.shape for t in tensors}
    if len(shapes) > 1:
        raise ShapeError(f"stack needs arrays of one shape, found {sorted(shapes)}")
    place = normal_axis(axis, tensors[0].ndim + 1, "stack")
    opened = [expand_dims(t, place) for t in tensors]
    return opened[0] if len(opened) == 1 else _concatenate(*opened, axis=place)


def _split_aval(x: Aval, *, sizes: tuple[int, ...], axis: int) -> tuple[Aval, ...]:
    def piece(n: int) -> Aval:
        shape = list(x.shape)
        shape[axis] = n
        return Aval(tuple(shape), x.dtype)

    return tuple(piece(n) for n in sizes)


def _split_forward(x: np.ndarray, *, sizes: tuple[int, ...], axis: int) -> tuple[np.ndarray, ...]:
    index: list[Any] = [slice(None)] * x.ndim
    parts, start = [], 0
    for n in sizes:
        index[axis] = slice(start, start + n)
        parts.append(x[tuple(index)])
        start += n
    return tuple(parts)


_split: Primitive = Primitive(
    "split",
    _split_forward,
    (lambda g, axis: concatenate(g, axis),),
    linear="each",
    shape=_split_aval,
    batch="same",
    view=True,
)


def split(x: Any, indices_or_sections: Any, axis: int = 0) -> list[Any]:
    """A list of parts: equal ones for an int, else cut at the given indices, as numpy.split."""
    x = asarray(x)
    place = normal_axis(axis, x.ndim, "split")
    length = x.shape[place]
    if isinstance(indices_or_sections, (list, tuple, np.ndarray)):
        cuts = [0, *(int(i) for i in indices_or_sections), length]
        cuts = [min(max(c + length if c < 0 else c, 0), length) for c in cuts[:-1]] + [length]
        sizes = tuple(max(b - a, 0) for a, b in itertools.pairwise(cuts))
        if sum(sizes) != length:
            raise ShapeError(f"split: indices {indices_or_sections} are not ascending")
    else:
        sections = operator.index(indices_or_sections)
        if sections < 1 or length % sections:
            raise ShapeError(f"split: axis {axis} of length {length} does not divide into {sections} equal parts")
        sizes = (length // sections,) * sections
    if len(sizes) == 1:
        return [alias(x)]
    return list(_split(x, sizes=sizes, axis=place))


def chunk(x: Any, n: int, axis: int = -1) -> list[Any]:
    """A list of n equal parts along an axis.

    >>> from tinygrad_lstm import ops
    >>> [part.tolist() for part in ops.chunk([1.0, 2.0, 3.0, 4.0], 2)]
    [[1.0, 2.0], [3.0, 4.0]]
    """
    return split(x, n, axis)


# ---------------------------------------------------------------------------- repeating and moving elements


_flip: Primitive = Primitive(
    "flip",
    lambda x, *, axis: np.flip(x, axis),
    (lambda g, axis: _flip(g, axis=axis),),
    linear="each",
    shape=lambda x, *, axis: x,
    batch="same",
    view=True,
)


def flip(x: Any, axis: Any = None) -> Any:
    """Elements in reverse order along axes (all by default), as numpy.flip; a view."""
    x = asarray(x)
    return _flip(x, axis=normal_axes(axis, x.ndim, "flip"))


_roll: Primitive = Primitive(
    "roll",
    lambda x, *, shift, axis: np.roll(x, shift, axis),
    (lambda g, shift, axis: _roll(g, shift=tuple(-s for s in shift), axis=axis),),
    linear="each",
    shape=lambda x, *, shift, axis: x,
    batch="same",
)


def roll(x: Any, shift: Any, axis: Any = None) -> Any:
    """Elements moved around cyclically, as numpy.roll."""
    x = asarray(x)
    if axis is None:
        return reshape(roll(ravel(x), shift, 0), x.shape)
    axes = [normal_axis(a, x.ndim, "roll") for a in (axis if isinstance(axis, (list, tuple)) else [axis])]
    shifts = [int(s) for s in (shift if isinstance(shift, (list, tuple)) else [shift] * len(axes))]
    if len(shifts) != len(axes):
        raise ShapeError(f"roll: {len(shifts)} shifts for {len(axes)} axes")
    return _roll(x, shift=tuple(shifts), axis=tuple(axes))


def tile(x: Any, reps: Any) -> Any:
    """x repeated as a whole along axes, as numpy.tile."""
    x = asarray(x)
    counts = _lengths(reps, "tile")
    ndim = max(x.ndim, len(counts))
    shape = (1,) * (ndim - x.ndim) + x.shape
    counts = (1,) * (ndim - len(counts)) + counts
    pairs = list(zip(shape, counts, strict=True))
    opened = reshape(x, tuple(v for n, r in pairs for v in ((n,) if r == 1 else (1, n))))
    spread = broadcast_to(opened, tuple(v for n, r in pairs for v in ((n,) if r == 1 else (r, n))))
    return reshape(spread, tuple(n * r for n, r in pairs))


def repeat(x: Any, repeats: Any, axis: int | None = None) -> Any:
    """Each element repeated (a number, or one number per element), as numpy.repeat."""
    from tinygrad_lstm.ops.indexing import take

    x = asarray(x)
    if axis is None:
        x, axis = ravel(x), 0
    length = x.shape[normal_axis(axis, x.ndim, "repeat")]
    counts = np.asarray(repeats._data if isinstance(repeats, Tensor) else repeats)
    if counts.ndim > 1 or (counts.ndim == 1 and len(counts) not in (1, length)) or (counts < 0).any():
        raise ShapeError(f"repeat: {repeats!r} for an axis of length {length}; expected a count, or one per element")
    return take(x, np.repeat(np.arange(length), counts), axis)


def pad(x: Any, pad_width: Any, mode: str = "constant", constant_values: float = 0.0) -> Any:
    """Constant values added at the edges; ``pad_width`` as in numpy.pad (only ``mode='constant'``)."""
    x = asarray(x)
    if mode != "constant":
        raise ArgumentError(f"pad: mode {mode!r} has no gradient rule here, expected 'constant'")
    try:
        widths = np.broadcast_to(np.asarray(pad_width, int), (x.ndim, 2)).tolist()
    except ValueError:
        raise ShapeError(f"pad: pad_width {pad_width} does not fit the {x.ndim} axes of {x.shape}") from None
    for axis, (before, after) in enumerate(widths):
        if before < 0 or after < 0:
            raise ArgumentError(f"pad: widths are not negative, found {(before, after)}")
        parts = [x]
        for width, place in ((before, 0), (after, len(parts))):
            if width:
                shape = (*x.shape[:axis], width, *x.shape[axis + 1 :])
                block = broadcast_to(asarray(np.asarray(constant_values, x.dtype)), shape)
                parts.insert(0 if place == 0 else len(parts), block)
        x = concatenate(parts, axis)
    return x


# ---------------------------------------------------------------------------- dtype, identity, constants


_astype: Primitive = Primitive(
    "astype",
    lambda x, *, dtype: x.astype(dtype),
    (lambda g, dtypes: _astype(g, dtype=dtypes[0]),),
    linear="each",
    shape=lambda x, *, dtype: Aval(x.shape, np.dtype(dtype)),
    batch="same",
)


def astype(x: Any, dtype: Any) -> Any:
    """Converted to another dtype; the gradient is converted back."""
    x = asarray(x)
    wanted = as_dtype(dtype)
    if wanted.kind not in "fiub":
        raise DTypeError(f"astype: a tensor holds real numbers, integers or booleans, found {wanted}")
    return x if x.dtype == wanted else _astype(x, dtype=wanted)


alias: Primitive = Primitive(
    "alias", lambda x: x, (lambda g: g,), linear="each", shape=lambda x: x, batch="same", view=True,
    doc="The same values as a new node of the graph.",
)  # fmt: skip

stop_gradient: Primitive = Primitive(
    "stop_gradient", lambda x: x, None, shape=lambda x: x, batch="same", view=True,
    doc="The same values; no gradient flows through (forward and reverse mode alike).",
)  # fmt: skip


full: Primitive = Primitive(
    "full",
    lambda *, shape, dtype, value: np.full(shape, value, dtype),
    None,
    shape=lambda *, shape, dtype, value: Aval(tuple(shape), np.dtype(dtype)),
    doc="An array of one value; it has no operands and no gradient.",
)


def zeros_like(x: Any) -> Any:
    """Zeros of x's shape and dtype, without a gradient."""
    from tinygrad_lstm.primitive import zeros

    x = asarray(x)
    return zeros(Aval(x.shape, x.dtype))


__all__ = [
    "alias", "astype", "broadcast_to", "chunk", "concatenate", "expand_dims", "flip", "moveaxis", "pad", "ravel",
    "repeat", "reshape", "roll", "split", "squeeze", "stack", "stop_gradient", "sum_to", "swapaxes", "tile",
    "transpose", "zeros_like",
]  # fmt: skip
