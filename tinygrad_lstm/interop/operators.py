"""One table: operator of ONNX -> ops.

A value of a graph is a Tensor, or an array where it is known before the model runs (constants, shapes and what is
computed of them): what tells shapes and axes must be known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tinygrad_lstm import ops
from tinygrad_lstm.errors import UnsupportedError
from tinygrad_lstm.tensor import Tensor, asarray

__all__ = ["OPERATORS", "Call", "Value", "operator"]

Value = Any  # a Tensor or an array


class Call(NamedTuple):
    """One node with the values of its inputs (None where one is left out)."""

    op: str
    args: list[Any]
    attributes: dict[str, Any]
    n_outputs: int
    version: int  # of the operator set
    inner: Callable[..., list[Value]]  # runs a graph that is an attribute

    @property
    def static(self) -> bool:
        """Whether everything is known beforehand."""
        return not any(isinstance(arg, Tensor) for arg in self.args) and not any(
            hasattr(part, "nodes") for part in self.attributes.values()
        )

    def run(self) -> list[Value]:
        """The outputs."""
        return OPERATORS[self.op](self)

    def arg(self, k: int) -> Any:
        """Input k, or None."""
        return self.args[k] if k < len(self.args) else None

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        return self.attributes.get(name, default)

    def known(self, k: int, name: str) -> np.ndarray | None:
        """Input k as an array, or else the attribute (older operator sets); None where there is neither."""
        value = self.arg(k)
        if value is None:
            return None if self.get(name) is None else np.asarray(self.get(name))
        return value._data if isinstance(value, Tensor) else value

    def ints(self, k: int, name: str) -> list[int] | None:
        """The same as a list of ints."""
        found = self.known(k, name)
        return None if found is None else [int(v) for v in found.reshape(-1)]

    def only(self, **expected: Any) -> None:
        """Raise where an attribute has another value than the ones that are known here."""
        for name, values in expected.items():
            found = self.get(name, values[0])
            if found not in values:
                raise UnsupportedError(f"{name}={found!r} is not supported, only {' or '.join(map(repr, values))}")


Operator = Callable[[Call], list[Value]]
OPERATORS: dict[str, Operator] = {}


def operator(*names: str) -> Callable[[Callable[[Call], Any]], Callable[[Call], Any]]:
    """Enter a function that returns one value, or a list of them, into the table."""

    def enter(function: Callable[[Call], Any]) -> Callable[[Call], Any]:
        def listed(call: Call) -> list[Value]:
            made = function(call)
            return made if isinstance(made, list) else [made]

        OPERATORS.update(dict.fromkeys(names, listed))
        return function

    return enter


# ---------------------------------------------------------------------------- elementwise

_PLAIN: dict[str, Callable[..., Any]] = {
    "Add": ops.add, "Sub": ops.subtract, "Mul": ops.multiply, "Pow": ops.power, "Neg": ops.negative, "Abs": ops.abs,
    "Sign": ops.sign, "Sqrt": ops.sqrt, "Exp": ops.exp, "Log": ops.log, "Sin": ops.sin, "Cos": ops.cos, "Tan": ops.tan,
    "Asin": ops.arcsin, "Acos": ops.arccos, "Atan": ops.arctan, "Sinh": ops.sinh, "Cosh": ops.cosh, "Tanh": ops.tanh,
    "Asinh": ops.arcsinh, "Acosh": ops.arccosh, "Atanh": ops.arctanh, "Erf": ops.erf, "Sigmoid": ops.sigmoid,
    "Softplus": ops.softplus, "Relu": ops.relu, "Equal": ops.equal, "Less": ops.less, "LessOrEqual": ops.less_equal,
    "Greater": ops.greater, "GreaterOrEqual": ops.greater_equal, "And": ops.logical_and, "Or": ops.logical_or,
    "BitwiseAnd": ops.bitwise_and, "BitwiseOr": ops.bitwise_or, "BitwiseXor": ops.bitwise_xor,
    "BitwiseNot": ops.invert, "Not": ops.logical_not, "Where": ops.where, "Identity": lambda x: x,
    "Reciprocal": lambda x: 1.0 / asarray(x), "Softsign": lambda x: x / (1.0 + ops.abs(x)),
    "IsNaN": lambda x: ops.not_equal(x, x),
    "Xor": lambda x, y: ops.not_equal(x, y), "PRelu": lambda x, slope: ops.where(ops.greater(x, 0), x, slope * x),
}  # fmt: skip
# Functions without a gradient: of what is known beforehand.
_KNOWN: dict[str, Callable[..., Any]] = {
    "Floor": np.floor, "Ceil": np.ceil, "Round": np.rint, "NonZero": lambda x: np.array(np.nonzero(x)),
    "Range": lambda start, stop, step: np.arange(start, stop, step, dtype=np.asarray(start).dtype),
}  # fmt: skip


def _plain(name: str, function: Callable[..., Any]) -> None:
    operator(name)(lambda call: function(*call.args))


def _of_known(name: str, function: Callable[..., Any]) -> None:
    @operator(name)
    def _(call: Call) -> Any:
        if not call.static:
            raise UnsupportedError("is supported for constants and shapes only, and has no gradient")
        return function(*call.args)


for _name, _function in _PLAIN.items():
    _plain(_name, _function)
for _name, _function in _KNOWN.items():
    _of_known(_name, _function)


@operator("Div")
def _div(call: Call) -> Any:
    x, y = call.args
    if x.dtype.kind == "f":
        return ops.divide(x, y)
    if call.static:
        return np.trunc(np.divide(x, y)).astype(x.dtype)  # towards zero
    return ops.sign(x) * ops.sign(y) * ops.floor_divide(ops.abs(x), ops.abs(y))


@operator("Mod")
def _mod(call: Call) -> Any:
    if call.static:
        return (np.fmod if call.get("fmod") else np.mod)(*call.args)
    x, y = call.args
    if not call.get("fmod"):
        return ops.remainder(x, y)
    left = ops.remainder(ops.abs(x), ops.abs(y))  # it has the sign of the dividend
    return ops.where(ops.less(x, 0), -left, left)


def _folded(name: str, function: Callable[..., Any]) -> None:
    @operator(name)
    def _(call: Call) -> Any:
        total = call.args[0]
        for arg in call.args[1:]:
            total = function(total, arg)
        return total / float(len(call.args)) if name == "Mean" else total


for _name, _function in {"Max": ops.maximum, "Min": ops.minimum, "Sum": ops.add, "Mean": ops.add}.items():
    _folded(_name, _function)


@operator("Clip")
def _clip(call: Call) -> Any:
    low, high = call.known(1, "min"), call.known(2, "max")
    return ops.clip(call.args[0], *[None if bound is None else bound.item() for bound in (low, high)])


@operator("IsInf")
def _is_inf(call: Call) -> Any:
    x = call.args[0]
    hits = [s * np.inf for s, way in ((1, "detect_positive"), (-1, "detect_negative")) if call.get(way, 1)]
    found = [ops.equal(x, hit) for hit in hits]
    return ops.logical_or(*found) if len(found) == 2 else found[0]


@operator("LeakyRelu")
def _leaky_relu(call: Call) -> Any:
    return ops.leaky_relu(call.args[0], call.get("alpha", 0.01))


@operator("Elu")
def _elu(call: Call) -> Any:
    return ops.elu(call.args[0], call.get("alpha", 1.0))


@operator("Selu")
def _selu(call: Call) -> Any:
    alpha, gamma = call.get("alpha", 1.6732632423543772), call.get("gamma", 1.0507009873554805)
    return ops.elu(call.args[0], alpha) * gamma


@operator("HardSigmoid")
def _hard_sigmoid(call: Call) -> Any:
    return ops.clip(asarray(call.args[0]) * call.get("alpha", 0.2) + call.get("beta", 0.5), 0.0, 1.0)


@operator("HardSwish")
def _hard_swish(call: Call) -> Any:
    return call.args[0] * ops.hard_sigmoid(call.args[0])


@operator("Gelu")
def _gelu(call: Call) -> Any:
    x = asarray(call.args[0])
    if call.get("approximate", "none") == "none":
        return ops.gelu(x)
    return 0.5 * x * (1.0 + ops.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


@operator("Dropout")
def _dropout(call: Call) -> list[Any]:
    x = asarray(call.args[0])
    return [x, np.ones(x.shape, bool)][: call.n_outputs]


@operator("Cast")
def _cast(call: Call) -> Any:
    from tinygrad_lstm.interop.package import onnx_library

    helper = onnx_library("from_onnx").helper
    try:
        wanted = np.dtype(helper.tensor_dtype_to_np_dtype(call.get("to")))
    except KeyError:
        wanted = np.dtype(object)
    if wanted.kind not in "fiub":
        raise UnsupportedError(f"converts to {wanted}; real numbers, integers and booleans are supported")
    return asarray(call.args[0]).astype(wanted)


@operator("CastLike")
def _cast_like(call: Call) -> Any:
    return asarray(call.args[0]).astype(call.args[1].dtype)


# ---------------------------------------------------------------------------- reductions

_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceSum": ops.sum, "ReduceMean": ops.mean, "ReduceMax": ops.max, "ReduceMin": ops.min, "ReduceProd": ops.prod,
    "ReduceL2": ops.norm, "ReduceLogSumExp": ops.logsumexp,
    "ReduceL1": lambda x, axis, keepdims: ops.sum(ops.abs(x), axis, keepdims),
    "ReduceSumSquare": lambda x, axis, keepdims: ops.sum(ops.square(x), axis, keepdims),
    "ReduceLogSum": lambda x, axis, keepdims: ops.log(ops.sum(x, axis, keepdims)),
}  # fmt: skip


def _reduction(name: str, function: Callable[..., Any]) -> None:
    @operator(name)
    def _(call: Call) -> Any:
        axes = call.ints(1, "axes")
        if not axes and call.get("noop_with_empty_axes"):
            return call.args[0]
        made = function(call.args[0], tuple(axes) if axes else None, bool(call.get("keepdims", 1)))
        return made if made.dtype == call.args[0].dtype else made.astype(call.args[0].dtype)


for _name, _function in _REDUCTIONS.items():
    _reduction(_name, _function)


@operator("ArgMax", "ArgMin")
def _arg_extremum(call: Call) -> Any:
    call.only(select_last_index=(0,))
    find = ops.argmax if call.op == "ArgMax" else ops.argmin
    return find(call.args[0], call.get("axis", 0), bool(call.get("keepdims", 1)))


@operator("CumSum")
def _cumsum(call: Call) -> Any:
    call.only(exclusive=(0,))
    (axis,) = call.ints(1, "axis") or [0]
    if not call.get("reverse"):
        return ops.cumsum(call.args[0], axis)
    return ops.flip(ops.cumsum(ops.flip(call.args[0], axis), axis), axis)


@operator("Softmax", "LogSoftmax")
def _softmax(call: Call) -> Any:
    x = asarray(call.args[0])
    function = ops.softmax if call.op == "Softmax" else ops.log_softmax
    if call.version >= 13:
        return function(x, call.get("axis", -1))
    axis = call.get("axis", 1) % max(x.ndim, 1)
    rows = math.prod(x.shape[:axis])
    return ops.reshape(function(ops.reshape(x, (rows, math.prod(x.shape[axis:]))), -1), x.shape)


@operator("LayerNormalization")
def _layer_normalization(call: Call) -> list[Any]:
    x = asarray(call.args[0])
    axes = tuple(range(call.get("axis", -1) % x.ndim, x.ndim))
    mean = ops.mean(x, axes, keepdims=True)
    centred = x - mean
    scale = 1.0 / ops.sqrt(ops.mean(ops.square(centred), axes, keepdims=True) + call.get("epsilon", 1e-5))
    y = centred * scale * call.args[1]
    bias = call.arg(2)
    return [y if bias is None else y + bias, mean, scale][: call.n_outputs]


# ---------------------------------------------------------------------------- products


@operator("MatMul")
def _matmul(call: Call) -> Any:
    return ops.matmul(*call.args)


@operator("Gemm")
def _gemm(call: Call) -> Any:
    a, b = (asarray(x).T if call.get(flag) else x for x, flag in zip(call.args, ("transA", "transB"), strict=False))
    y = ops.matmul(a, b)
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    y = y if alpha == 1.0 else y * alpha
    c = call.arg(2)
    return y if c is None else y + (c if beta == 1.0 else c * beta)


@operator("Einsum")
def _einsum(call: Call) -> Any:
    return ops.einsum(call.get("equation"), *call.args)


@operator("If")
def _if(call: Call) -> list[Any]:
    condition = call.args[0]
    if isinstance(condition, Tensor):
        raise UnsupportedError("the condition depends on the inputs; only one that is known beforehand is supported")
    return call.inner(call.get("then_branch" if condition.item() else "else_branch"), [])
