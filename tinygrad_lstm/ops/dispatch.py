"""NumPy's functions on tensors: ``np.sum(t, 0)`` is ``ops.sum(t, 0)``.

A call is read by the signature of NumPy's function (its third argument may not be ours) and handed on by name.  A
function that has no derivative at all and no counterpart among the ops (:data:`ON_ARRAYS`) runs on the arrays.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from tinygrad_lstm import ops
from tinygrad_lstm.errors import ArgumentError
from tinygrad_lstm.tensor import Tensor

__all__ = ["array_function", "array_ufunc"]

_UFUNC_NAMES = {"absolute": "abs", "true_divide": "divide", "fabs": "abs", "bitwise_not": "invert"}
_NAMES = {"amax": "max", "amin": "min"}
# Piecewise constant, or not of numbers: what they return is the same whether or not a tensor requires a gradient.
ON_ARRAYS = frozenset({
    "allclose", "argpartition", "argsort", "argwhere", "array2string", "array_equal", "array_equiv", "array_repr",
    "array_str", "around", "ceil", "count_nonzero", "empty_like", "fix", "flatnonzero", "floor", "histogram", "isclose",
    "iscomplexobj", "isin", "isneginf", "isposinf", "isrealobj", "left_shift", "logical_xor", "may_share_memory",
    "nonzero", "right_shift", "rint", "round", "searchsorted", "shares_memory", "signbit", "trunc", "unique",
})  # fmt: skip
_OF_SHAPES: dict[str, Callable[..., Any]] = {
    "shape": lambda a: a.shape,
    "ndim": lambda a: a.ndim,
    "size": lambda a, axis=None: a.size if axis is None else np.size(np.broadcast_to(0, a.shape), axis),
}
# NumPy 2.0 does not tell the signatures of its functions in C.
_SIGNATURES = {
    "concatenate": lambda arrays, /, axis=0, out=None, *, dtype=None, casting="same_kind": None,
    "dot": lambda a, b, out=None: None,
    "inner": lambda a, b, /: None,
    "where": lambda condition, x, y, /: None,
}


def array_ufunc(self: Tensor, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
    """``np.tanh(t)`` is ``ops.tanh(t)``; a ufunc without a counterpart raises and says so."""
    name = _UFUNC_NAMES.get(ufunc.__name__, ufunc.__name__)
    if method == "__call__" and ufunc.__name__ in ON_ARRAYS:
        return _on_arrays(ufunc, inputs, kwargs)
    function = getattr(ops, name, None)
    if method != "__call__" or function is None or name not in ops.__all__:
        raise ArgumentError(
            f"numpy.{ufunc.__name__} ({method}) has no differentiable counterpart in ops; use t.numpy()"
        )
    if kwargs:
        raise ArgumentError(f"numpy.{ufunc.__name__} on a Tensor takes no keyword arguments, found {sorted(kwargs)}")
    return function(*inputs)


def array_function(self: Tensor, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Any other function of NumPy's on tensors."""
    found = function.__name__
    if found in _OF_SHAPES:
        return _OF_SHAPES[found](*args, **kwargs)
    if found in ON_ARRAYS:
        return _on_arrays(function, args, kwargs)
    name = _NAMES.get(found, found)
    counterpart = getattr(ops, name, None)
    if counterpart is None or name not in ops.__all__:
        raise ArgumentError(f"{function.__module__}.{found} has no counterpart in ops; use t.numpy()")
    signature, taken = _signature(function), _signature(counterpart).parameters
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentError(f"numpy.{found}{signature}: {error}") from None
    operands: list[Any] = []
    given: dict[str, Any] = {}
    for key, value in bound.arguments.items():
        parameter = signature.parameters[key]
        if parameter.kind is parameter.VAR_POSITIONAL:
            operands.extend(value)
        elif parameter.kind is parameter.VAR_KEYWORD:
            given.update(value)
        elif parameter.default is parameter.empty:
            operands.append(value)
        elif key in taken or not _is_default(value, parameter.default):
            given[key] = value
    unknown = sorted(given.keys() - taken.keys())
    if unknown:
        raise ArgumentError(
            f"numpy.{found} on a Tensor is ops.{name}, which takes {', '.join(taken)}; it has no {', '.join(unknown)}"
        )
    return counterpart(*operands, **given)


def _is_default(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, type(default)) and bool(value == default))


@functools.cache
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(_SIGNATURES.get(function.__name__, function) if function in _of_numpy() else function)


@functools.cache
def _of_numpy() -> frozenset[Any]:
    return frozenset(getattr(np, name) for name in _SIGNATURES)


def _on_arrays(function: Any, args: Any, kwargs: Any) -> Any:
    """The function on the arrays of all tensors; arrays that it returns become tensors."""
    return _wrapped(function(*_bare(args), **_bare(kwargs)))


def _bare(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value._data
    if isinstance(value, (list, tuple)):
        return type(value)(_bare(item) for item in value)
    return {key: _bare(item) for key, item in value.items()} if isinstance(value, dict) else value


def _wrapped(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_wrapped(item) for item in value)
    return Tensor(value) if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" else value
