"""Reductions, and the normalisations that are built on them."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_lstm.errors import ArgumentError, DTypeError, OutOfRangeError, ShapeError
from tinygrad_lstm.ops.axes import as_kept, every_axis, ndim_of, normal_axes, normal_axis
from tinygrad_lstm.ops.elementwise import (
    add,
    divide,
    equal,
    exp,
    isfinite,
    logical_or,
    maximum,
    minimum,
    multiply,
    not_equal,
    sqrt,
    square,
)
from tinygrad_lstm.ops.elementwise import where as select
from tinygrad_lstm.ops.moving import flip
from tinygrad_lstm.ops.shape import astype, broadcast_to, concatenate, expand_dims, reshape
from tinygrad_lstm.primitive import Primitive
from tinygrad_lstm.tensor import Tensor, as_like, asarray

Axis = Any


def _open(value: Any, axis: tuple[int, ...], keepdims: bool) -> Any:
    """Give a reduced value its axes back, with length 1."""
    return value if keepdims or not axis else expand_dims(value, axis)


def _weighted(t: Any, weights: Any, axis: tuple[int, ...], keepdims: bool) -> Any:
    return _sum(t * weights, axis=axis, keepdims=keepdims)


# ---------------------------------------------------------------------------- sums

_add_reduce: Any = np.add.reduce  # takes positions in half a microsecond less than names

_sum: Primitive = Primitive(
    "sum",
    lambda x, *, axis, keepdims: _add_reduce(x, axis, None, None, keepdims),
    (lambda g, shapes, axis, keepdims: broadcast_to(_open(g, axis, keepdims), shapes[0]),),
    linear="each",
    batch="same",
)


def sum(
    a: Any, axis: Axis = None, keepdims: bool = False, *, dtype: Any = None, initial: Any = None, where: Any = None
) -> Any:
    """Sum over axes, as numpy.sum.

    ``dtype`` is that of the elements and the result, ``initial`` is added, ``where`` says which elements count.

    >>> from tinygrad_lstm import ops
    >>> ops.sum([[1.0, 2.0], [3.0, 4.0]], axis=0).tolist()
    [4.0, 6.0]
    """
    if dtype is not None or where is not None:
        a = _chosen(a, dtype, where, 0)
    if axis is None and a.__class__ is Tensor:
        out = _sum.bind((a,), {"axis": every_axis(a._data.ndim), "keepdims": as_kept(keepdims)})
    else:
        out = _sum(a, axis=normal_axes(axis, ndim_of(a), "sum"), keepdims=as_kept(keepdims))
    return _started(add, _in(out, dtype), initial)


def _in(out: Any, dtype: Any) -> Any:
    """A result in the dtype that was asked for: of small integers NumPy makes wide ones."""
    return out if dtype is None else astype(out, dtype)


def _started(pair: Primitive, out: Any, initial: Any) -> Any:
    """A reduced value and the one to start from, which is converted to its dtype as in NumPy."""
    return out if initial is None else pair(out, _initial(initial, out.dtype))


def _initial(value: Any, dtype: np.dtype) -> Any:
    if isinstance(value, int) and dtype.kind in "iu" and not np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
        raise OutOfRangeError(f"initial={value} does not fit {dtype}")
    return as_like(value, dtype)


def _chosen(a: Any, dtype: Any, where: Any, neutral: Any) -> Any:
    """The elements in another dtype, those that do not count replaced."""
    x = asarray(a)
    x = x if dtype is None else astype(x, dtype)
    return x if where is None else select(_mask(where), x, as_like(neutral, x.dtype))


def _mask(where: Any) -> Any:
    mask = asarray(where)
    if mask.dtype.kind != "b":
        raise DTypeError(f"where= is made of booleans, found {mask.dtype}")
    return mask


def _count(x: Any, axes: tuple[int, ...]) -> int:
    shape = np.shape(x) if not isinstance(x, Tensor) else x.shape
    count = 1
    for axis in axes:
        count *= shape[axis]
    return count


def mean(a: Any, axis: Axis = None, keepdims: bool = False, *, dtype: Any = None, where: Any = None) -> Any:
    """Arithmetic mean over axes, as numpy.mean.  NaN for an empty axis."""
    if dtype is not None or where is not None:
        return _mean_of_some(a, axis, keepdims, dtype, where)
    axes = normal_axes(axis, ndim_of(a), "mean")
    if getattr(a, "dtype", None) == np.float16:  # the sum would overflow at 65504
        return mean(asarray(a).astype(np.float32), axis, keepdims).astype(np.float16)
    total = _sum(a, axis=axes, keepdims=as_kept(keepdims))
    count = _count(a, axes)
    return divide(total, count) if count else divide(total, np.nan)


def _mean_of_some(a: Any, axis: Axis, keepdims: bool, dtype: Any, where: Any) -> Any:
    x = asarray(a) if dtype is None else astype(a, dtype)
    if where is None and x.dtype.kind == "f":
        return mean(x, axis, keepdims)
    total = sum(x, axis, keepdims, dtype=dtype, where=where)
    count = sum(broadcast_to(_mask(True if where is None else where), x.shape), axis, keepdims)
    return _in(divide(total, select(equal(count, 0), np.nan, count).astype(divide(total, 1).dtype)), dtype)


def var(a: Any, axis: Axis = None, keepdims: bool = False, ddof: int = 0) -> Any:
    """Variance over axes, divided by ``n - ddof``, as numpy.var.  NaN or inf where that is not positive."""
    axes = normal_axes(axis, ndim_of(a), "var")
    count = _count(a, axes)
    deviation = square(asarray(a) - mean(a, axes, True))
    total = _sum(deviation, axis=axes, keepdims=as_kept(keepdims))
    if count > ddof:
        return divide(total, count - ddof)
    if not count:
        return divide(total, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        return divide(total, 0)


def std(a: Any, axis: Axis = None, keepdims: bool = False, ddof: int = 0) -> Any:
    """Standard deviation over axes, as numpy.std."""
    return sqrt(var(a, axis, keepdims, ddof))


def _cumsum_forward(x: np.ndarray, *, axis: int) -> np.ndarray:
    return np.cumsum(x, axis=axis)


_cumsum: Primitive = Primitive(
    "cumsum",
    _cumsum_forward,
    (lambda g, axis: flip(_cumsum(flip(g, axis), axis=axis), axis),),
    linear="each",
    batch="same",
)


def cumsum(a: Any, axis: int | None = None, *, dtype: Any = None) -> Any:
    """Cumulative sum along an axis; over the flattened array without one, as numpy.cumsum."""
    x = asarray(a) if dtype is None else astype(a, dtype)
    if axis is None or not x.ndim:
        x, axis = reshape(x, (x.size,)), -1 if axis is None else axis
    return _in(_cumsum(x, axis=normal_axis(axis, x.ndim, "cumsum")), dtype)


# ---------------------------------------------------------------------------- extrema


def _shares(x: Any, out: Any, axis: tuple[int, ...], keepdims: bool) -> Any:
    """1 / (number of ties) at every element that equals the extremum (at every NaN, where there is one), else 0."""
    # NaN equals nothing, and where there is one it is the extremum.
    mask = logical_or(equal(x, _open(out, axis, keepdims)), not_equal(x, x))
    hits = select(mask, asarray(np.ones((), x.dtype)), 0.0)
    # Where x was computed again in another order nothing may equal it: 1 in place of the count keeps 0 / 0 away.
    return hits / maximum(_sum(hits, axis=axis, keepdims=True), 1.0)


def _extreme(name: str, ufunc: np.ufunc, x: np.ndarray, axis: tuple[int, ...], keepdims: bool) -> Any:
    try:
        return ufunc.reduce(x, axis=axis, keepdims=keepdims)
    except ValueError:
        axes = [a + x.ndim for a in axis if not x.shape[a]]
        raise ShapeError(
            f"{name} of no elements: axis {', '.join(map(str, axes))} of shape {x.shape} is empty; give initial="
        ) from None


def _extremum(name: str, ufunc: np.ufunc) -> Primitive:
    return Primitive(
        name,
        lambda x, *, axis, keepdims: _extreme(name, ufunc, x, axis, keepdims),
        (lambda g, x, out, axis, keepdims: _open(g, axis, keepdims) * _shares(x, out, axis, keepdims),),
        jvp=lambda t, x, out, *, axis, keepdims: _weighted(t[0], _shares(x, out, axis, keepdims), axis, keepdims),
        batch="same",
    )


_max = _extremum("max", np.maximum)
_min = _extremum("min", np.minimum)


def max(a: Any, axis: Axis = None, keepdims: bool = False, *, initial: Any = None, where: Any = None) -> Any:
    """Largest element over axes, as numpy.max; ties share the gradient equally, NaN takes all of it.

    ``initial`` takes part, and is what an empty axis has; ``where`` says which elements count, and needs it.
    """
    if initial is None and (where is None or where is True):
        return _max(a, axis=normal_axes(axis, ndim_of(a), "max"), keepdims=as_kept(keepdims))
    return _bounded(_max, maximum, a, axis, keepdims, initial, where)


def min(a: Any, axis: Axis = None, keepdims: bool = False, *, initial: Any = None, where: Any = None) -> Any:
    """Smallest element over axes, as numpy.min; ties share the gradient equally, NaN takes all of it.

    ``initial`` takes part, and is what an empty axis has; ``where`` says which elements count, and needs it.
    """
    if initial is None and (where is None or where is True):
        return _min(a, axis=normal_axes(axis, ndim_of(a), "min"), keepdims=as_kept(keepdims))
    return _bounded(_min, minimum, a, axis, keepdims, initial, where)


def _bounded(prim: Primitive, pair: Primitive, a: Any, axis: Axis, keepdims: bool, initial: Any, where: Any) -> Any:
    """An extremum with a value that takes part everywhere."""
    if initial is None:
        raise ArgumentError(f"{prim.name}: where= needs initial=, for what no element counts in")
    x = asarray(a)
    initial = _initial(initial, x.dtype)
    x = _chosen(x, None, where, initial)
    axes = normal_axes(axis, x.ndim, prim.name)
    if not _count(x, axes):
        return add(astype(_sum(x, axis=axes, keepdims=as_kept(keepdims)), x.dtype), initial)
    return pair(prim(x, axis=axes, keepdims=as_kept(keepdims)), initial)


def _flat_or_axis(function: Any) -> Any:
    def forward(x: np.ndarray, *, axis: int | None, keepdims: bool) -> Any:
        return function(x, axis=axis, keepdims=keepdims)

    return forward


_argmax: Primitive = Primitive("argmax", _flat_or_axis(np.argmax), None, batch="same")
_argmin: Primitive = Primitive("argmin", _flat_or_axis(np.argmin), None, batch="same")


def _arg_extremum(prim: Primitive, x: Any, axis: int | None, keepdims: bool, who: str) -> Any:
    x = asarray(x)
    if not (x.size if axis is None else x.shape[normal_axis(axis, x.ndim, who)]):
        raise ShapeError(f"{who} of no elements: the array has shape {x.shape}")
    if axis is not None:
        return prim(x, axis=normal_axis(axis, x.ndim, who), keepdims=as_kept(keepdims))
    found = prim(reshape(x, (x.size,)), axis=-1, keepdims=False)
    return reshape(found, (1,) * x.ndim) if keepdims else found


def argmax(a: Any, axis: int | None = None, keepdims: bool = False) -> Any:
    """Index of the first largest element, as numpy.argmax (int64, no gradient)."""
    return _arg_extremum(_argmax, a, axis, keepdims, "argmax")


def argmin(a: Any, axis: int | None = None, keepdims: bool = False) -> Any:
    """Index of the first smallest element, as numpy.argmin (int64, no gradient)."""
    return _arg_extremum(_argmin, a, axis, keepdims, "argmin")


# ---------------------------------------------------------------------------- products


def _others(x: Any, axis: int) -> Any:
    """The product of all other elements along an axis: no division, so zeros are no special case."""
    n = x.shape[axis]
    ones = asarray(np.ones((), x.dtype)) * broadcast_to(asarray(np.ones((), x.dtype)), (*x.shape[:-1], 1))
    before, after = [ones], [ones]
    for k in range(n - 1):
        before.append(before[-1] * x[..., k : k + 1])
        after.append(after[-1] * x[..., n - 1 - k : n - k])
    return concatenate(before, -1) * concatenate(after[::-1], -1)


_prod: Primitive = Primitive(
    "prod",
    lambda x: np.multiply.reduce(x, axis=-1),
    (lambda g, x: expand_dims(g, -1) * _others(x, -1),),
    jvp=lambda t, x, out: _sum(t[0] * _others(x, -1), axis=(-1,), keepdims=False),
)


def prod(
    a: Any, axis: Axis = None, keepdims: bool = False, *, dtype: Any = None, initial: Any = None, where: Any = None
) -> Any:
    """Product over axes, as numpy.prod; the gradient is right where factors are zero too."""
    x = _chosen(a, dtype, where, 1)
    return _started(multiply, _in(_product(x, axis, as_kept(keepdims)), dtype), initial)


def _product(x: Tensor, axis: Axis, keepdims: bool) -> Any:
    axes = normal_axes(axis, x.ndim, "prod")
    kept = [a for a in range(-x.ndim, 0) if a not in axes]
    lengths = [x.shape[a] for a in kept]
    count = _count(x, axes)
    if count == 0:
        out = _sum(x, axis=axes, keepdims=False) + 1  # of no elements, and still a function of x
    else:
        moved = x.transpose([a + x.ndim for a in (*kept, *axes)])
        out = _prod(moved.reshape((*lengths, count)))
    return expand_dims(out, axes) if keepdims else out


# ---------------------------------------------------------------------------- logic


_all: Primitive = Primitive(
    "all", lambda x, *, axis, keepdims: np.logical_and.reduce(x, axis=axis, keepdims=keepdims), None, batch="same"
)
_any: Primitive = Primitive(
    "any", lambda x, *, axis, keepdims: np.logical_or.reduce(x, axis=axis, keepdims=keepdims), None, batch="same"
)


def all(a: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    """Whether all elements over axes are true (not zero), as numpy.all; boolean, no gradient."""
    return _all(a, axis=normal_axes(axis, ndim_of(a), "all"), keepdims=as_kept(keepdims))


def any(a: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    """Whether any element over axes is true (not zero), as numpy.any; boolean, no gradient."""
    return _any(a, axis=normal_axes(axis, ndim_of(a), "any"), keepdims=as_kept(keepdims))


# ---------------------------------------------------------------------------- log-sum-exp and softmax


def _logsumexp_forward(x: np.ndarray, *, axis: tuple[int, ...], keepdims: bool) -> np.ndarray:
    peak = np.maximum.reduce(x, axis=axis, keepdims=True)
    peak = np.where(np.isfinite(peak), peak, np.zeros((), x.dtype))  # all -inf: log 0, not NaN
    with np.errstate(divide="ignore", over="ignore"):  # log 0; exp(x - 0) beside an infinite peak
        out = np.log(np.add.reduce(np.exp(x - peak), axis=axis, keepdims=True)) + peak
    return out if keepdims else out.reshape([n for k, n in enumerate(out.shape) if k - out.ndim not in axis])


def _probabilities(x: Any, out: Any, axis: tuple[int, ...], keepdims: bool) -> Any:
    total = _open(out, axis, keepdims)
    return exp(x - select(isfinite(total), total, 0.0))


_logsumexp: Primitive = Primitive(
    "logsumexp",
    _logsumexp_forward,
    (lambda g, x, out, axis, keepdims: _open(g, axis, keepdims) * _probabilities(x, out, axis, keepdims),),
    jvp=lambda t, x, out, *, axis, keepdims: _weighted(t[0], _probabilities(x, out, axis, keepdims), axis, keepdims),
    batch="same",
)


def logsumexp(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    """log(sum(exp(x))) over axes without overflow; -inf where all are -inf.

    >>> from tinygrad_lstm import ops
    >>> round(ops.logsumexp([1e4, 1e4]).item(), 3)
    10000.693
    """
    x = _floating(x)
    return _logsumexp(x, axis=normal_axes(axis, x.ndim, "logsumexp"), keepdims=as_kept(keepdims))


def _floating(x: Any) -> Tensor:
    x = asarray(x)
    return x if x.dtype.kind == "f" else x.astype(np.float64)


def _softmax_forward(x: np.ndarray, *, axis: int) -> np.ndarray:
    if x.shape[axis] == 0:
        return x.copy()
    weights = np.exp(x - np.maximum.reduce(x, axis=axis, keepdims=True))
    weights /= np.add.reduce(weights, axis=axis, keepdims=True)
    return weights


def _softmax_rule(g: Any, out: Any, axis: int) -> Any:
    return out * (g - _sum(g * out, axis=(axis,), keepdims=True))


_softmax: Primitive = Primitive(
    "softmax",
    _softmax_forward,
    (_softmax_rule,),
    jvp=lambda t, x, out, *, axis: _softmax_rule(t[0], out, axis),  # its Jacobian is symmetric
    batch="same",
)


def softmax(x: Any, axis: int = -1) -> Any:
    """exp(x) / sum(exp(x)) along one axis, without overflow; same shape, floating dtype."""
    x = _floating(x)
    return _softmax(x, axis=normal_axis(axis, x.ndim, "softmax"))


def _log_softmax_forward(x: np.ndarray, *, axis: int) -> np.ndarray:
    if x.shape[axis] == 0:
        return x.copy()
    shifted = x - np.maximum.reduce(x, axis=axis, keepdims=True)
    shifted -= np.log(np.add.reduce(np.exp(shifted), axis=axis, keepdims=True))
    return shifted


_log_softmax: Primitive = Primitive(
    "log_softmax",
    _log_softmax_forward,
    (lambda g, out, axis: g - exp(out) * _sum(g, axis=(axis,), keepdims=True),),
    jvp=lambda t, x, out, *, axis: t[0] - _sum(exp(out) * t[0], axis=(axis,), keepdims=True),
    batch="same",
)


def log_softmax(x: Any, axis: int = -1) -> Any:
    """Logarithm of :func:`softmax`, computed without underflow."""
    x = _floating(x)
    return _log_softmax(x, axis=normal_axis(axis, x.ndim, "log_softmax"))


__all__ = [
    "all", "any", "argmax", "argmin", "cumsum", "log_softmax", "logsumexp", "max", "mean", "min", "prod", "softmax",
    "std", "sum", "var",
]  # fmt: skip
