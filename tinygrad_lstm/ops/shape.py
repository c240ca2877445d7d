"""Primitives that rearrange: every one is linear, and most are views."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.dtypes import as_dtype
from tinygrad_lstm.errors import ArgumentError, DTypeError, ShapeError
from tinygrad_lstm.operands import together
from tinygrad_lstm.ops.axes import as_integer, as_lengths, normal_axes, normal_axis
from tinygrad_lstm.ops.elementwise import equal, multiply, where
from tinygrad_lstm.primitive import Aval, Primitive
from tinygrad_lstm.tensor import Tensor, asarray

# ---------------------------------------------------------------------------- reshape, broadcast, their transposes


_reshape: Primitive = Primitive(
    "reshape",
    lambda x, *, shape: x.reshape(shape),
    (lambda g, shapes: _reshape(g, shape=tuple(shapes[0])),),
    linear="each",
    shape=lambda x, *, shape: Aval(shape, x.dtype),
    view=True,
)


def reshape(a: Any, shape: Any, order: str = "C") -> Any:
    """The same elements in another shape (one length may be -1), as numpy.reshape (in C order only)."""
    _check_order(order, "reshape")
    x = asarray(a)
    lengths = list(as_lengths(shape, "reshape"))
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
        raise ShapeError(f"reshape of {x.shape} ({x.size} elements) to {tuple(as_lengths(shape, 'reshape'))}")
    return _reshape(x, shape=tuple(lengths))


def ravel(a: Any, order: str = "C") -> Any:
    """Flattened to one axis, as numpy.ravel (in C order only)."""
    _check_order(order, "ravel")
    x = asarray(a)
    return reshape(x, (x.size,))


def _check_order(order: Any, who: str) -> None:
    if order != "C":
        raise ArgumentError(f"{who}: order is 'C' (the last axis changes fastest), found {order!r}; transpose first")


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


def broadcast_to(array: Any, shape: Any) -> Any:
    """Repeated along new or length-1 axes, as numpy.broadcast_to (a read-only view)."""
    return _broadcast_to(array, shape=as_lengths(shape, "broadcast_to"))


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


def transpose(a: Any, axes: Any = None) -> Any:
    """Axes in another order (reversed by default), as numpy.transpose; a view."""
    x = asarray(a)
    if axes is None:
        order = tuple(range(-1, -x.ndim - 1, -1))
    else:
        order = tuple(normal_axis(a, x.ndim, "transpose") for a in as_lengths(axes, "transpose"))
        if sorted(order) != list(range(-x.ndim, 0)):
            swap = f"; swapaxes({axes[0]}, {axes[1]}) exchanges two" if len(order) == 2 else ""
            raise ShapeError(f"transpose: axes {axes} are no permutation of the {x.ndim} axes of {x.shape}{swap}")
    return _transpose(x, axes=order)


def swapaxes(a: Any, axis1: int, axis2: int) -> Any:
    """Two axes exchanged, as numpy.swapaxes; a view."""
    x = asarray(a)
    a, b = normal_axis(axis1, x.ndim, "swapaxes"), normal_axis(axis2, x.ndim, "swapaxes")
    order = list(range(-x.ndim, 0))
    order[a], order[b] = b, a
    return _transpose(x, axes=tuple(order))


def moveaxis(a: Any, source: Any, destination: Any) -> Any:
    """Axes moved to new positions, as numpy.moveaxis; a view."""
    x = asarray(a)
    sources = [normal_axis(a, x.ndim, "moveaxis") for a in (source if isinstance(source, (list, tuple)) else [source])]
    targets = destination if isinstance(destination, (list, tuple)) else [destination]
    goals = [normal_axis(a, x.ndim, "moveaxis") for a in targets]
    if len(sources) != len(goals) or len(set(sources)) != len(sources) or len(set(goals)) != len(goals):
        raise ShapeError(f"moveaxis: source {source} and destination {destination} do not pair up")
    order = [a for a in range(-x.ndim, 0) if a not in sources]
    for goal, origin in sorted(zip(goals, sources, strict=True)):
        order.insert(goal + x.ndim, origin)
    return _transpose(x, axes=tuple(order))


def expand_dims(a: Any, axis: Any) -> Any:
    """New axes of length 1, at positions in the result, as numpy.expand_dims; a view."""
    x = asarray(a)
    count = len(axis) if isinstance(axis, (list, tuple)) else 1
    axes = normal_axes(axis, x.ndim + count, "expand_dims")
    rest = iter(x.shape)
    ndim = x.ndim + count
    return _reshape(x, shape=tuple(1 if k - ndim in axes else next(rest) for k in range(ndim)))


def squeeze(a: Any, axis: Any = None) -> Any:
    """Axes of length 1 removed (all of them by default), as numpy.squeeze; a view."""
    x = asarray(a)
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


def _joinable(shape: Sequence[Any], other: Sequence[Any], axis: int) -> bool:
    """Whether two shapes are the same but for their lengths along the axis."""
    if len(shape) != len(other):
        return False
    return all(m == n for k, (m, n) in enumerate(zip(shape, other, strict=True)) if k - len(other) != axis)


def _concatenate_aval(*xs: Aval, axis: int) -> Aval:
    first = xs[0].shape
    for x in xs:
        if not _joinable(x.shape, first, axis):
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


def _several(arrays: Any, who: str) -> list[Tensor]:
    """What is to be joined, as tensors."""
    if not isinstance(arrays, (list, tuple)):
        ndim = getattr(arrays, "ndim", None)  # an array is joined along its first axis
        if ndim == 0 or (ndim is None and not isinstance(arrays, Iterable)):
            raise DTypeError(f"{who}: expected a list of arrays, found {arrays!r:.80}")
    tensors = together(*arrays)
    if not tensors:
        raise ArgumentError(f"{who} of an empty list")
    return tensors


def concatenate(arrays: Sequence[Any], axis: int | None = 0) -> Any:
    """Arrays joined along an existing axis (flattened first for ``axis=None``), as numpy.concatenate."""
    tensors = _several(arrays, "concatenate")
    if axis is None:
        tensors, axis = [ravel(t) for t in tensors], 0
    if tensors[0].ndim == 0:
        raise ShapeError("concatenate of 0-d values; use stack")
    place = normal_axis(axis, tensors[0].ndim, "concatenate")
    if len(tensors) == 1:
        return tensors[0]
    first = tensors[0].shape
    for k, t in enumerate(tensors):
        if not _joinable(t.shape, first, place):
            raise ShapeError(
                f"concatenate along axis {axis}: array {k} has shape {t.shape}, array 0 has {first}; they have to "
                f"agree in the number of axes and in every length but that of axis {axis}"
            )
    return _concatenate(*tensors, axis=place)


def stack(arrays: Sequence[Any], axis: int = 0) -> Any:
    """Arrays of one shape joined along a new axis, as numpy.stack."""
    tensors = _several(arrays, "stack")
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


def split(ary: Any, indices_or_sections: Any, axis: int = 0) -> list[Any]:
    """A list of parts: equal ones for an int, else cut at the given indices, as numpy.split."""
    x = asarray(ary)
    place = normal_axis(axis, x.ndim, "split")
    length = x.shape[place]
    if isinstance(indices_or_sections, (list, tuple, np.ndarray)):
        cuts = [0, *(as_integer(i, "split", "an index") for i in indices_or_sections), length]
        cuts = [min(max(c + length if c < 0 else c, 0), length) for c in cuts[:-1]] + [length]
        sizes = tuple(max(b - a, 0) for a, b in itertools.pairwise(cuts))
        if sum(sizes) != length:
            raise ShapeError(f"split: indices {indices_or_sections} are not ascending")
    else:
        sections = as_integer(indices_or_sections, "split", "the number of parts")
        if sections < 1 or length % sections:
            raise ShapeError(f"split: axis {axis} of length {length} does not divide into {sections} equal parts")
        sizes = (length // sections,) * sections
    if len(sizes) == 1:
        return [alias(x)]
    return list(_split(x, sizes=sizes, axis=place))


def chunk(x: Any, n: int, axis: int = -1) -> list[Any]:
    """A list of n equal parts along an axis.

    Where the length does not divide, the last part is shorter, as in torch.chunk (and there may be fewer parts).

    >>> from tinygrad_lstm import ops
    >>> [part.tolist() for part in ops.chunk([1.0, 2.0, 3.0, 4.0], 2)]
    [[1.0, 2.0], [3.0, 4.0]]
    """
    x = asarray(x)
    count, length = as_integer(n, "chunk", "the number of parts"), x.shape[normal_axis(axis, x.ndim, "chunk")]
    if count < 1:
        raise ArgumentError(f"chunk: the number of parts is at least 1, found {count}")
    size = -(-length // count)
    return split(x, count if size * count == length else list(range(size, length, size)), axis)


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
    return x if x.dtype == wanted else _astype(x, dtype=wanted)


alias: Primitive = Primitive(
    "alias", lambda x: x, (lambda g: g,), linear="each", shape=lambda x: x, batch="same", view=True,
    doc="The same values as a new node of the graph.",
)  # fmt: skip

stop_gradient: Primitive = Primitive(
    "stop_gradient", lambda x: x, None, shape=lambda x: x, batch="same", view=True,
    doc="The same values; no gradient flows through (forward and reverse mode alike).",
)  # fmt: skip

stop_nan: Primitive = Primitive(
    "stop_nan", lambda x: x, (lambda g: where(equal(g, g), g, 0.0),), jvp=lambda tangents, x, out: tangents[0],
    shape=lambda x: x, batch="same", view=True,
    doc="The same values; of a cotangent, all but what is NaN flows through.",
)  # fmt: skip


full: Primitive = Primitive(
    "full",
    lambda *, shape, dtype, value: np.full(shape, value, dtype),
    None,
    shape=lambda *, shape, dtype, value: Aval(tuple(shape), np.dtype(dtype)),
    doc="An array of one value; it has no operands and no gradient.",
)


def zeros_like(a: Any, dtype: Any = None) -> Any:
    """Zeros of the shape (and dtype) of an array, without a gradient, as numpy.zeros_like."""
    return _filled_like(a, dtype, 0)


def ones_like(a: Any, dtype: Any = None) -> Any:
    """Ones of the shape (and dtype) of an array, without a gradient, as numpy.ones_like."""
    return _filled_like(a, dtype, 1)


def _filled_like(a: Any, dtype: Any, value: int) -> Any:
    x = asarray(a)
    return full(shape=x.shape, dtype=x.dtype if dtype is None else as_dtype(dtype), value=value)


def copy(a: Any) -> Any:
    """The same values in memory of their own; gradients flow through, as of numpy.copy."""
    x = asarray(a)
    return where(ones_like(x, bool), x, x) if x.dtype.kind == "b" else multiply(x, 1)


__all__ = [
    "alias", "astype", "broadcast_to", "chunk", "concatenate", "copy", "expand_dims", "moveaxis", "ones_like", "ravel",
    "reshape", "split", "squeeze", "stack", "stop_gradient", "sum_to", "swapaxes", "transpose", "zeros_like",
]  # fmt: skip
