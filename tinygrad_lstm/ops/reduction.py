"""Reductions, and the normalisations that are built on them."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_lstm.errors import ArgumentError
from tinygrad_lstm.ops.axes import every_axis, ndim_of, normal_axes, normal_axis
from tinygrad_lstm.ops.elementwise import divide, equal, exp, maximum, sqrt, square, where
from tinygrad_lstm.ops.shape import broadcast_to, expand_dims, flip, reshape, sum_to
from tinygrad_lstm.primitive import Primitive
from tinygrad_lstm.tensor import Tensor, asarray

Axis = Any


def _open(value: Any, axis: tuple[int, ...], keepdims: bool) -> Any:
    """Give a reduced value its axes back, with length 1."""
    return value if keepdims or not axis else expand_dims(value, axis)


def _weighted(t: Any, weights: Any, axis: tuple[int, ...], keepdims: bool) -> Any:
    return _sum(t * weights, axis=axis, keepdims=keepdims)


# ---------------------------------------------------------------------------- sums

_sum: Primitive = Primitive(
    "sum",
    lambda x, *, axis, keepdims: np.add.reduce(x, axis=axis, keepdims=keepdims),
    (lambda g, shapes, axis, keepdims: broadcast_to(_open(g, axis, keepdims), shapes[0]),),
    linear="each",
    batch="same",
)


def sum(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    """Sum over axes, as numpy.sum.

    >>> from tinygrad_lstm import ops
    >>> ops.sum([[1.0, 2.0], [3.0, 4.0]], axis=0).tolist()
    [4.0, 6.0]
    """
    if axis is None and x.__class__ is Tensor:
        return _sum.bind((x,), {"axis": every_axis(x._data.ndim), "keepdims": bool(keepdims)})
    return _sum(x, axis=normal_axes(axis, ndim_of(x), "sum"), keepdims=bool(keepdims))


def _count(x: Any, axes: tuple[int, ...]) -> int:
    shape = np.shape(x) if not isinstance(x, Tensor) else x.shape
    count = 1
    for axis in axes:
        count *= shape[axis]
    return count


def mean(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    """Arithmetic mean over axes, as numpy.mean.  NaN for an empty axis."""
    axes = normal_axes(axis, ndim_of(x), "mean")
    if getattr(x, "dtype", None) == np.float16:  # the sum would overflow at 65504
        return mean(asarray(x).astype(np.float32), axis, keepdims).astype(np.float16)
    total = _sum(x, axis=axes, keepdims=bool(keepdims))
    count = _count(x, axes)
    return divide(total, count) if count else divide(total, np.nan)


def var(x: Any, axis: Axis = None, keepdims: bool = False, ddof: int = 0) -> Any:
    """Variance over axes, divided by ``n - ddof``, as numpy.var."""
    axes = normal_axes(axis, ndim_of(x), "var")
    count = _count(x, axes) - ddof
    if count <= 0:
        raise ArgumentError(f"var of {_count(x, axes)} elements with ddof={ddof}: nothing left to divide by")
    deviation = square(asarray(x) - mean(x, axes, True))
    return divide(_sum(deviation, axis=axes, keepdims=bool(keepdims)), count)


def std(x: Any, axis: Axis = None, keepdims: bool = False, ddof: int = 0) -> Any:
    """Standard deviation over axes, as numpy.std."""
    return sqrt(var(x, axis, keepdims, ddof))


_norm: Primitive = Primitive(
    "norm",
    lambda x, *, axis, keepdims: np.sqrt(np.add.reduce(x * x, axis=axis, keepdims=keepdims)),
    (lambda g, x, out, axis, keepdims: _open(g, axis, keepdims) * _direction(x, _open(out, axis, keepdims)),),
    jvp=lambda t, x, out, *, axis, keepdims: _weighted(t[0], _direction(x, _open(out, axis, keepdims)), axis, keepdims),
    batch="same",
)


def _direction(x: Any, length: Any) -> Any:
    return x / where(equal(length, 0), 1.0, length)


def norm(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    """Euclidean norm over axes (all of them by default); its derivative at 0 is 0."""
    x = asarray(x)
    return _norm(x, axis=normal_axes(axis, x.ndim, "norm"), keepdims=bool(keepdims))


def _cumsum_forward(x: np.ndarray, *, axis: int) -> np.ndarray:
    return np.cumsum(x, axis=axis)


_cumsum: Primitive = Primitive(
    "cumsum",
    _cumsum_forward,
    (lambda g, axis: flip(_cumsum(flip(g, axis), axis=axis), axis),),
    linear="each",
    batch="same",
)


def cumsum(x: Any, axis: int | None = None) -> Any:
    """Cumulative sum along an axis; over the flattened array without one, as numpy.cumsum."""
    x = asarray(x)
    if axis is None:
        x, axis = x.reshape(-1), -1
    return _cumsum(x, axis=normal_axis(axis, x.ndim, "cumsum"))


# ---------------------------------------------------------------------------- extrema


def _shares(x: Any, out: Any, axis: tuple[int, ...], keepdims: bool) -> Any:
    """1 / (number of ties) at every element that equals the extremum, else 0."""
    mask = equal(x, _open(out, axis, keepdims))
    hits = where(mask, asarray(np.ones((), x.dtype)), 0.0)
    # An all-NaN slice equals nothing; 1 in place of its count keeps 0 / 0 away.
    return hits / maximum(_sum(hits, axis=axis, keepdims=True), 1.0)


def _extremum(name: str, ufunc: np.ufunc) -> Primitive:
    return Primitive(
        name,
        lambda x, *, axis, keepdims: ufunc.reduce(x, axis=axis, keepdims=keepdims),
        (lambda g, x, out, axis, keepdims: _open(g, axis, keepdims) * _shares(x, out, axis, keepdims),),
        jvp=lambda t, x, out, *, axis, keepdims: _weighted(t[0], _shares(x, out, axis, keepdims), axis, keepdims),
        batch="same",
    )


_max = _extremum("max", np.maximum)
_min = _extremum("min", np.minimum)


def max(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    """Largest element over axes, as numpy.max; ties share the gradient equally."""
    return _max(x, axis=normal_axes(axis, ndim_of(x), "max"), keepdims=bool(keepdims))


def min(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    """Smallest element over axes, as numpy.min; ties share the gradient equally."""
    return _min(x, axis=normal_axes(axis, ndim_of(x), "min"), keepdims=bool(keepdims))


def _flat_or_axis(function: Any) -> Any:
    def forward(x: np.ndarray, *, axis: int | None, keepdims: bool) -> Any:
        return function(x, axis=axis, keepdims=keepdims)

    return forward


_argmax: Primitive = Primitive("argmax", _flat_or_axis(np.argmax), None, batch="same")
_argmin: Primitive = Primitive("argmin", _flat_or_axis(np.argmin), None, batch="same")


def _arg_extremum(prim: Primitive, x: Any, axis: int | None, keepdims: bool, who: str) -> Any:
    x = asarray(x)
    if axis is not None:
        return prim(x, axis=normal_axis(axis, x.ndim, who), keepdims=bool(keepdims))
    found = prim(reshape(x, (x.size,)), axis=-1, keepdims=False)
    return reshape(found, (1,) * x.ndim) if keepdims else found


def argmax(x: Any, axis: int | None = None, keepdims: bool = False) -> Any:
    """Index of the first largest element, as numpy.argmax (int64, no gradient)."""
    return _arg_extremum(_argmax, x, axis, keepdims, "argmax")


def argmin(x: Any, axis: int | None = None, keepdims: bool = False) -> Any:
    """Index of the first smallest element, as numpy.argmin (int64, no gradient)."""
    return _arg_extremum(_argmin, x, axis, keepdims, "argmin")


# ---------------------------------------------------------------------------- products


def _others(x: Any, axis: int) -> Any:
    """The product of all other elements along an axis: no division, so zeros are no special case."""
    from tinygrad_lstm.ops.shape import concatenate

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


def prod(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    """Product over axes, as numpy.prod; the gradient is right where factors are zero too."""
    x = asarray(x)
    axes = normal_axes(axis, x.ndim, "prod")
    if not axes:
        return x
    kept = [a for a in range(-x.ndim, 0) if a not in axes]
    lengths = [x.shape[a] for a in kept]
    count = _count(x, axes)
    if count == 0:
        out = broadcast_to(asarray(np.ones((), x.dtype)), tuple(lengths))
    else:
        moved = x.transpose([a + x.ndim for a in (*kept, *axes)])
        out = _prod(moved.reshape((*lengths, count)))
    return expand_dims(out, axes) if keepdims else out


# ---------------------------------------------------------------------------- log-sum-exp and softmax


def _logsumexp_forward(x: np.ndarray, *, axis: tuple[int, ...], keepdims: bool) -> np.ndarray:
    peak = np.maximum.reduce(x, axis=axis, keepdims=True)
    peak = np.where(np.isfinite(peak), peak, np.zeros((), x.dtype))  # all -inf: log 0, not NaN
    with np.errstate(divide="ignore", over="ignore"):  # log 0; exp(x - 0) beside an infinite peak
        out = np.log(np.add.reduce(np.exp(x - peak), axis=axis, keepdims=True)) + peak
    return out if keepdims else out.reshape([n for k, n in enumerate(out.shape) if k - out.ndim not in axis])


def _probabilities(x: Any, out: Any, axis: tuple[int, ...], keepdims: bool) -> Any:
    from tinygrad_lstm.ops.elementwise import isfinite

    total = _open(out, axis, keepdims)
    return exp(x - where(isfinite(total), total, 0.0))


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
    return _logsumexp(x, axis=normal_axes(axis, x.ndim, "logsumexp"), keepdims=bool(keepdims))


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
    "argmax", "argmin", "cumsum", "log_softmax", "logsumexp", "max", "mean", "min", "norm", "prod", "softmax",
    "std", "sum", "sum_to", "var",
]  # fmt: skip
