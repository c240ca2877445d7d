"""Reading and adding at indices.  A read and its transpose (add into zeros) are each other's VJP."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_lstm.dtypes import as_dtype
from tinygrad_lstm.errors import ArgumentError, DTypeError, OutOfRangeError, ShapeError, TraceError
from tinygrad_lstm.kernels.pool import taken
from tinygrad_lstm.kernels.tables import add_rows
from tinygrad_lstm.operands import together
from tinygrad_lstm.ops.axes import as_integer, normal_axis
from tinygrad_lstm.ops.elementwise import maximum, minimum, multiply, where
from tinygrad_lstm.ops.shape import broadcast_to, reshape
from tinygrad_lstm.primitive import Aval, Primitive
from tinygrad_lstm.record import state
from tinygrad_lstm.tensor import Tensor, as_like, asarray

# ---------------------------------------------------------------------------- getitem in all NumPy forms

Template = tuple[Any, ...]  # hashable: ("slice", start, stop, step), ("array",), an int, None or Ellipsis


def _template(index: Any) -> tuple[Template, list[Tensor]]:
    """Split an index into a hashable form and the arrays in it."""
    items = index if isinstance(index, tuple) else (index,)
    template: list[Any] = []
    arrays: list[Tensor] = []
    for item in items:
        if item is None or item is Ellipsis:
            template.append(item)
        elif isinstance(item, slice):
            bounds = [
                None if b is None else as_integer(b, "getitem", "a bound of a slice")
                for b in (item.start, item.stop, item.step)
            ]
            if bounds[2] == 0:
                raise ArgumentError("getitem: the step of a slice is not 0")
            template.append(("slice", *bounds))
        elif isinstance(item, (int, np.integer)) and not isinstance(item, (bool, np.bool_)):
            template.append(int(item))
        else:
            array = asarray(np.asarray(item, dtype=np.intp) if isinstance(item, list) and not item else item)
            if array.dtype.kind not in "iub":
                raise DTypeError(
                    f"an index is an integer, slice, None, ... or an array of integers or booleans, found {item!r:.60}"
                )
            template.append(("array",))
            arrays.append(array)
    if template.count(Ellipsis) > 1:
        raise OutOfRangeError(f"an index holds one ellipsis (...), found {template.count(Ellipsis)}")
    return tuple(template), arrays


def _index(template: Template, arrays: tuple[np.ndarray, ...]) -> Any:
    rest = iter(arrays)
    items = []
    for item in template:
        if isinstance(item, tuple):
            items.append(slice(*item[1:]) if item[0] == "slice" else next(rest))
        else:
            items.append(item)
    return tuple(items)


def _getitem_forward(x: np.ndarray, *arrays: np.ndarray, template: Template) -> np.ndarray:
    try:
        return x[_index(template, arrays)]
    except IndexError as error:
        raise _index_error(x.shape, template, arrays, error) from None


def _index_error(
    shape: tuple[int, ...], template: Template, arrays: tuple[np.ndarray, ...], error: Exception
) -> Exception:
    shown = tuple(a.tolist() if a.size < 8 else f"array {a.shape}" for a in arrays)
    if "too many indices" in str(error):
        return OutOfRangeError(f"index with {len(template)} parts for an array of shape {shape}")
    numbers = [i for i in template if isinstance(i, int)] + list(shown)
    return OutOfRangeError(f"index {numbers} does not fit an array of shape {shape}")


def _getitem_aval(x: Aval, *arrays: Aval, template: Template) -> Aval:
    if any(np.dtype(a.dtype).kind == "b" for a in arrays):
        raise TraceError(
            "indexing with a boolean mask gives a shape that depends on values; use where in a recorded body"
        )
    # Zero strides: no memory for x, and indices of 0 are inside unless the axis is empty.
    stand_in = np.broadcast_to(np.zeros((), x.dtype), x.shape)
    zeros = tuple(np.broadcast_to(np.zeros((), np.intp), a.shape) for a in arrays)
    return Aval(stand_in[_index(template, zeros)].shape, x.dtype)


def _add_at(buffer: np.ndarray, g: np.ndarray, index: Any, unique: bool) -> None:
    if unique:
        buffer[index] += g
    else:
        np.add.at(buffer, index, g)


def _is_basic(template: Template, arrays: tuple[Any, ...]) -> bool:
    return not arrays or all(a.dtype.kind == "b" for a in arrays)  # a mask names every element at most once


def _accumulate_getitem(buffer: np.ndarray, g: np.ndarray, record: Any) -> None:
    arrays = tuple(t._data for t in record.saved[1:-1])
    template = record.params["template"]
    _add_at(buffer, g, _index(template, arrays), _is_basic(template, arrays))


getitem_primitive: Primitive = Primitive(
    "getitem",
    _getitem_forward,
    (lambda g, arrays, shapes, template: put(g, *arrays, template=template, shape=tuple(shapes[0])),),
    jvp=lambda t, x, *rest, template: getitem_primitive(t[0], *rest[:-1], template=template),
    shape=_getitem_aval,
    accumulate=_accumulate_getitem,
    view=True,
)


def _put_forward(g: np.ndarray, *arrays: np.ndarray, template: Template, shape: tuple[int, ...]) -> np.ndarray:
    out = np.zeros(shape, g.dtype)
    _add_at(out, g, _index(template, arrays), _is_basic(template, arrays))
    return out


put: Primitive = Primitive(
    "put",
    _put_forward,
    (lambda g, arrays, template: getitem_primitive(g, *arrays, template=template),),
    jvp=lambda t, g, *rest, template, shape: put(t[0], *rest[:-1], template=template, shape=shape),
    shape=lambda g, *arrays, template, shape: Aval(shape, g.dtype),
    doc="Zeros with g added at an index (the transpose of getitem).",
)


def getitem(x: Any, index: Any) -> Any:
    """``x[index]`` in all forms of NumPy: integers, slices, None, ..., integer and boolean arrays."""
    template, arrays = _template(index)
    x = asarray(x)
    if any(a.dtype.kind == "b" for a in arrays) and state().trace is not None:
        template, arrays = _without_masks(template, arrays)
    if len(arrays) == 1 and arrays[0].dtype.kind in "iu" and (axis := _sole_axis(template, x.ndim)) is not None:
        return _take(x, arrays[0], axis=axis)  # rows of a table: known in loops, and cheaper to transpose
    return getitem_primitive(x, *arrays, template=template)


def _without_masks(template: Template, arrays: list[Tensor]) -> tuple[Template, list[Tensor]]:
    """The index with the places that known masks select; while a function is recorded, shapes have to be known."""
    items: list[Any] = []
    found: list[Tensor] = []
    rest = iter(arrays)
    for item in template:
        if item != ("array",):
            items.append(item)
            continue
        array = next(rest)
        known = array.dtype.kind == "b" and array.ndim > 0 and array.__class__ is Tensor and not array._rg
        places = np.nonzero(array._data) if known and array._node is None else (array,)
        items += [("array",)] * len(places)
        found += map(asarray, places)
    return tuple(items), found


_ALL = ("slice", None, None, None)


def _sole_axis(template: Template, ndim: int) -> int | None:
    """The axis (from the end) of the one array in an index that takes all of the others; None where it does not."""
    place = template.index(("array",))
    before, after = template[:place], template[place + 1 :]
    if any(item not in (_ALL, Ellipsis) for item in (*before, *after)) or template.count(Ellipsis) > 1:
        return None
    if len(template) - template.count(Ellipsis) > ndim:
        return None  # too many: getitem says so
    return -1 - len(after) if Ellipsis in before else place - ndim


# ---------------------------------------------------------------------------- take and scatter_add


def _check_range(indices: np.ndarray, length: int, who: str) -> None:
    if indices.size and (indices.min() < -length or indices.max() >= length):
        bad = indices[(indices < -length) | (indices >= length)].reshape(-1)[0]
        raise OutOfRangeError(
            f"{who}: index {bad} is outside of an axis of length {length} (expected {-length}..{length - 1})"
        )


def _take_forward(x: np.ndarray, indices: np.ndarray, *, axis: int) -> np.ndarray:
    _check_range(indices, x.shape[axis], "take")
    return taken(x, indices, axis)


def _take_aval(x: Aval, indices: Aval, *, axis: int) -> Aval:
    place = axis + len(x.shape)
    return Aval((*x.shape[:place], *indices.shape, *x.shape[place + 1 :]), x.dtype)


def _untake_forward(g: np.ndarray, indices: np.ndarray, *, shape: tuple[int, ...], axis: int) -> np.ndarray:
    out = np.zeros(shape, g.dtype)
    _accumulate_take_arrays(out, g, indices, axis)
    return out


def _accumulate_take_arrays(buffer: np.ndarray, g: np.ndarray, indices: np.ndarray, axis: int) -> None:
    place = axis + buffer.ndim
    if place:
        span = tuple(range(place, place + indices.ndim))
        g = np.moveaxis(g, span, tuple(range(indices.ndim)))
        buffer = np.moveaxis(buffer, place, 0)
    add_rows(buffer, indices, g)


_untake: Primitive = Primitive(
    "untake",
    _untake_forward,
    (lambda g, indices, axis: _take(g, indices, axis=axis), None),
    jvp=lambda t, g, indices, out, *, shape, axis: _untake(t[0], indices, shape=shape, axis=axis),
    shape=lambda g, indices, *, shape, axis: Aval(shape, g.dtype),
)

_take: Primitive = Primitive(
    "take",
    _take_forward,
    (lambda g, indices, shapes, axis: _untake(g, indices, shape=tuple(shapes[0]), axis=axis), None),
    jvp=lambda t, x, indices, out, *, axis: _take(t[0], indices, axis=axis),
    shape=_take_aval,
    accumulate=lambda buffer, g, record: _accumulate_take_arrays(
        buffer, g, record.saved[1]._data, record.params["axis"]
    ),
)


def _integers(indices: Any, who: str) -> Tensor:
    found = asarray(
        np.asarray(indices, np.intp) if isinstance(indices, (list, tuple)) and not len(indices) else indices
    )
    if found.dtype.kind not in "iu":
        raise DTypeError(f"{who}: indices are integers, found dtype {found.dtype}; convert with astype(np.int64)")
    return found


def take(a: Any, indices: Any, axis: int | None = None, mode: str = "raise") -> Any:
    """Elements along an axis (of the flattened array without one), as numpy.take.

    An index outside of the axis raises OutOfRangeError; with ``mode='clip'`` it is limited to 0..n - 1, with ``'wrap'``
    counted from the other end again.
    """
    x = asarray(a)
    if axis is None:
        x, axis = reshape(x, (x.size,)), 0
    found, place = _integers(indices, "take"), normal_axis(axis, x.ndim, "take")
    if mode == "clip":
        found = minimum(maximum(found, 0), x.shape[place] - 1)
    elif mode == "wrap":
        found = asarray(np.remainder(found._data, x.shape[place] or 1))
    elif mode != "raise":
        raise ArgumentError(f"take: mode is 'raise', 'wrap' or 'clip', found {mode!r}")
    return _take(x, found, axis=place)


def _grid(shape: tuple[int, ...], indices: np.ndarray, place: int) -> tuple[np.ndarray, ...]:
    grid = list(np.ogrid[tuple(slice(n) for n in indices.shape)])
    grid[place] = indices
    return tuple(grid)


def _along_forward(x: np.ndarray, indices: np.ndarray, *, axis: int) -> np.ndarray:
    _check_range(indices, x.shape[axis], "take_along_axis")
    return np.take_along_axis(x, indices, axis)


def _unalong_forward(g: np.ndarray, indices: np.ndarray, *, shape: tuple[int, ...], axis: int) -> np.ndarray:
    out = np.zeros(shape, g.dtype)
    np.add.at(out, _grid(shape, indices, axis + out.ndim), g)
    return out


_unalong: Primitive = Primitive(
    "untake_along_axis",
    _unalong_forward,
    (lambda g, indices, axis: _along(g, indices, axis=axis), None),
    jvp=lambda t, g, indices, out, *, shape, axis: _unalong(t[0], indices, shape=shape, axis=axis),
    shape=lambda g, indices, *, shape, axis: Aval(shape, g.dtype),
)

_along: Primitive = Primitive(
    "take_along_axis",
    _along_forward,
    (lambda g, indices, shapes, axis: _unalong(g, indices, shape=tuple(shapes[0]), axis=axis), None),
    jvp=lambda t, x, indices, out, *, axis: _along(t[0], indices, axis=axis),
)


def take_along_axis(arr: Any, indices: Any, axis: int | None = -1) -> Any:
    """One element per position along an axis, as numpy.take_along_axis; the other axes broadcast.

    For ``axis=None`` the array is flattened first, and the indices have one axis.
    """
    x, found = asarray(arr), _integers(indices, "take_along_axis")
    if axis is None:
        x, axis = reshape(x, (x.size,)), 0
    if found.ndim != x.ndim:
        raise ShapeError(f"take_along_axis: indices with {found.ndim} axes for an array with {x.ndim}")
    place = normal_axis(axis, x.ndim, "take_along_axis")
    whole = [None if k - x.ndim == place else pair for k, pair in enumerate(zip(x.shape, found.shape, strict=True))]
    if any(pair is not None and pair[0] != pair[1] for pair in whole):
        try:
            lengths = [np.broadcast_shapes(*pair)[0] if pair else 0 for pair in whole]
        except ValueError:
            raise ShapeError(
                f"take_along_axis: indices of shape {found.shape} for an array of shape {x.shape}: the axes other than "
                f"{axis} do not broadcast"
            ) from None
        x, found = (
            broadcast_to(t, tuple(t.shape[k] if pair is None else lengths[k] for k, pair in enumerate(whole)))
            for t in (x, found)
        )
    return _along(x, found, axis=place)


def _scatter_add_forward(a: np.ndarray, idx: np.ndarray, v: np.ndarray) -> np.ndarray:
    if not a.ndim:
        raise ShapeError("scatter_add into a 0-d array; it needs an axis 0")
    _check_range(idx, len(a), "scatter_add")
    out = a.astype(np.result_type(a, v), copy=True)
    add_rows(out, idx, np.broadcast_to(v, (*idx.shape, *a.shape[1:])))
    return out


_scatter_add: Primitive = Primitive(
    "scatter_add",
    _scatter_add_forward,
    (lambda g: g, None, lambda g, idx: _take(g, idx, axis=-g.ndim)),
    jvp=lambda t, a, idx, v, out: _scatter_add(
        multiply(a, 0.0) if t[0] is None else t[0], idx, multiply(v, 0.0) if t[2] is None else t[2]
    ),
)


def scatter_add(a: Any, idx: Any, v: Any) -> Any:
    """a with v added at ``a[idx]`` along axis 0; duplicate indices accumulate.

    >>> from tinygrad_lstm import ops
    >>> ops.scatter_add([0.0, 0.0, 0.0], [0, 2, 2], [1.0, 2.0, 3.0]).tolist()
    [1.0, 0.0, 5.0]
    """
    a, v = together(a, as_like(v, asarray(a).dtype) if v.__class__ is int else v)
    return _scatter_add(a, _integers(idx, "scatter_add"), v)


# ---------------------------------------------------------------------------- fixed patterns


def _one_hot_forward(idx: np.ndarray, *, n: int, dtype: Any) -> np.ndarray:
    if idx.size and (idx.min() < 0 or idx.max() >= n):
        bad = idx[(idx < 0) | (idx >= n)].reshape(-1)[0]
        raise OutOfRangeError(f"one_hot: class {bad} is outside of 0..{n - 1}")
    out = np.zeros((idx.size, n), dtype)
    out[np.arange(idx.size), idx.reshape(-1)] = 1
    return out.reshape(*idx.shape, n)


_one_hot: Primitive = Primitive(
    "one_hot",
    _one_hot_forward,
    None,
    shape=lambda idx, *, n, dtype: Aval((*idx.shape, n), np.dtype(dtype)),
    batch="same",
)


def one_hot(idx: Any, n: int, dtype: Any = np.float32) -> Any:
    """Integer classes ``(...)`` as vectors ``(..., n)`` with a single 1."""
    count = as_integer(n, "one_hot", "the number of classes")
    if count < 0:
        raise ArgumentError(f"one_hot: the number of classes is not negative, found {count}")
    return _one_hot(_integers(idx, "one_hot"), n=count, dtype=as_dtype(dtype))


def _triangle(x: Any, k: int, lower: bool, who: str) -> Any:
    x, k = asarray(x), as_integer(k, who, "k")
    if not x.ndim:
        raise ShapeError(f"{who} needs at least one axis, found a 0-d array")
    # As in NumPy, a vector stands for a matrix of equal rows.
    mask = np.tri(x.shape[-2] if x.ndim > 1 else x.size, x.shape[-1], k if lower else k - 1, dtype=bool)
    return where(mask if lower else ~mask, x, np.zeros((), x.dtype))


def tril(m: Any, k: int = 0) -> Any:
    """The lower triangle of the last two axes, zeros above diagonal k, as numpy.tril."""
    return _triangle(m, k, True, "tril")


def triu(m: Any, k: int = 0) -> Any:
    """The upper triangle of the last two axes, zeros below diagonal k, as numpy.triu."""
    return _triangle(m, k, False, "triu")


def diag(v: Any, k: int = 0) -> Any:
    """A matrix with v on diagonal k for 1-D v; the diagonal k of a matrix, as numpy.diag."""
    x, k = asarray(v), as_integer(k, "diag", "k")
    if x.ndim == 1:
        n = x.shape[0]
        size = n + abs(k)
        rows = np.arange(n) + max(-k, 0)
        template, arrays = _template((rows, rows + k))
        return put(x, *arrays, template=template, shape=(size, size))
    if x.ndim != 2:
        raise ShapeError(f"diag takes one or two axes, found shape {x.shape}")
    n = max(min(x.shape[0] - max(-k, 0), x.shape[1] - max(k, 0)), 0)
    rows = np.arange(n) + max(-k, 0)
    return getitem(x, (rows, rows + k))


__all__ = [
    "diag", "getitem", "one_hot", "scatter_add", "take", "take_along_axis", "tril", "triu",
]  # fmt: skip
