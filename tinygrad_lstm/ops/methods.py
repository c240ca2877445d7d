"""Operators and methods of Tensor, and NumPy functions on tensors: all of them the ops of this package."""

from __future__ import annotations

from inspect import signature
from types import FunctionType
from typing import Any

from tinygrad_lstm import ops
from tinygrad_lstm.calls import says_what_it_takes
from tinygrad_lstm.hints import explain_missing
from tinygrad_lstm.operands import as_operands
from tinygrad_lstm.ops.dispatch import array_function, array_ufunc
from tinygrad_lstm.tensor import Tensor


def _reflected(primitive: Any) -> Any:
    return lambda self, other: primitive.bind((other, self), {})


def _binary(primitive: Any) -> Any:
    return lambda self, other: primitive.bind((self, other), {})


def _comparison(primitive: Any) -> Any:
    return lambda self, other: NotImplemented if other is None else primitive.bind((self, other), {})


def _unary(primitive: Any) -> Any:
    return lambda self: primitive.bind((self,), {})


def _bitwise(bits: Any, logic: Any, swapped: bool = False) -> Any:
    """``&`` and the like: of booleans they are logic (which native loops have), of integers bit by bit."""

    def method(self: Tensor, *others: Any) -> Any:
        operands = as_operands((*others, self) if swapped else (self, *others))
        booleans = all(isinstance(o, Tensor) and o.dtype.kind == "b" for o in operands)
        return (logic if booleans else bits).bind(operands, {})

    return method


_BITWISE = {
    "and": (ops.bitwise_and, ops.logical_and), "or": (ops.bitwise_or, ops.logical_or),
    "xor": (ops.bitwise_xor, ops.not_equal),
}  # fmt: skip
_OPERATORS = {
    "add": ops.add, "sub": ops.subtract, "mul": ops.multiply, "truediv": ops.divide, "pow": ops.power,
    "mod": ops.remainder, "floordiv": ops.floor_divide,
}  # fmt: skip


def _shape_argument(function: Any) -> Any:
    """A method that takes its shape or axes as one tuple or as several numbers."""

    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and (args[0] is None or isinstance(args[0], (tuple, list))):
            return function(self, args[0], **kwargs)
        return function(self, *([args] if args else []), **kwargs)

    method.__doc__ = function.__doc__
    return method


def _method(function: Any) -> Any:
    if isinstance(function, FunctionType):
        return function

    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    method.__doc__ = function.__doc__
    method.__name__ = function.__name__
    return method


def install() -> None:
    """Called once, when the ops are imported."""
    for name in ops.__all__:
        function = getattr(ops, name)
        if isinstance(function, FunctionType) and not {"axis", "axes"}.isdisjoint(signature(function).parameters):
            called = says_what_it_takes(
                function, f"ops.{function.__name__}", of_object=False
            )  # for PyTorch an axis is dim
            called.__module__ = ops.__name__  # where it can be found
            setattr(ops, name, called)
    for name, primitive in _OPERATORS.items():
        setattr(Tensor, f"__{name}__", _binary(primitive))
        setattr(Tensor, f"__r{name}__", _reflected(primitive))
    for name, (bits, logic) in _BITWISE.items():
        setattr(Tensor, f"__{name}__", _bitwise(bits, logic))
        setattr(Tensor, f"__r{name}__", _bitwise(bits, logic, swapped=True))
    comparisons = ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal")
    for name, short in zip(comparisons, ("eq", "ne", "lt", "le", "gt", "ge"), strict=True):
        setattr(Tensor, f"__{short}__", _comparison(getattr(ops, name)))
    others: dict[str, Any] = {
        "__neg__": _unary(ops.negative),
        "__pos__": lambda self: self,
        "__abs__": _unary(ops.abs),
        "__invert__": _bitwise(ops.invert, ops.logical_not),
        "__matmul__": lambda self, other: ops.matmul(self, other),
        "__rmatmul__": lambda self, other: ops.matmul(other, self),
        "__getitem__": lambda self, index: ops.getitem(self, index),
        "__iter__": lambda self: (self[k] for k in range(len(self))),
        "__array_ufunc__": array_ufunc,
        "__array_function__": array_function,
        "reshape": _shape_argument(ops.reshape),
        "transpose": _shape_argument(ops.transpose),
        "T": property(lambda self: ops.transpose(self)),
        "flatten": _method(ops.ravel),
    }
    for name, value in others.items():
        setattr(Tensor, name, value)
    for name in _METHODS:
        setattr(Tensor, name, _method(getattr(ops, name)))
    explain_missing(Tensor, "Tensor", ops.__all__)


_METHODS = [
    "all", "any", "sum", "mean", "var", "std", "max", "min", "prod", "argmax", "argmin", "cumsum", "norm", "logsumexp",
    "softmax", "log_softmax", "swapaxes", "moveaxis", "expand_dims", "squeeze", "ravel", "broadcast_to", "repeat",
    "take", "clip", "dot", "astype", "exp", "log", "sqrt", "square", "abs", "tanh", "sigmoid", "relu", "split", "chunk",
    "flip", "copy",
]  # fmt: skip
