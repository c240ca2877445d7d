"""Elementwise primitives as ONNX nodes: from their scalar expressions, leaf by leaf.

Every elementwise primitive, a user's own too, has an expression of the leaves in ``kernels/table.py``.  A leaf is one
operator of ONNX, or else an expression of other leaves (:data:`COMPOSED`) that stays exact where the obvious formula
loses digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.errors import UnsupportedError
from tinygrad_lstm.interop.graph import Builder, Value
from tinygrad_lstm.interop.sizes import Size
from tinygrad_lstm.kernels import expression as e
from tinygrad_lstm.kernels.table import LEAVES
from tinygrad_lstm.primitive import Aval
from tinygrad_lstm.program import Literal

__all__ = ["OPERATORS", "elementwise"]

OPERATORS = {
    "add": "Add", "subtract": "Sub", "multiply": "Mul", "divide": "Div", "negative": "Neg", "reciprocal": "Reciprocal",
    "absolute": "Abs", "sign": "Sign", "maximum": "Max", "minimum": "Min", "sqrt": "Sqrt", "power": "Pow",
    "equal": "Equal", "less": "Less", "less_equal": "LessOrEqual", "greater": "Greater",
    "greater_equal": "GreaterOrEqual", "logical_and": "And", "logical_or": "Or", "logical_not": "Not",
    "where": "Where", "exp": "Exp", "log": "Log", "sin": "Sin", "cos": "Cos", "tan": "Tan", "arcsin": "Asin",
    "arccos": "Acos", "arctan": "Atan", "sinh": "Sinh", "cosh": "Cosh", "tanh": "Tanh", "arcsinh": "Asinh",
    "arccosh": "Acosh", "arctanh": "Atanh", "erf": "Erf", "sigmoid": "Sigmoid", "softplus": "Softplus",
    "remainder": "Mod",
}  # fmt: skip
# NumPy's arithmetic on booleans is logic.
_ON_BOOLEANS = {"add": "Or", "maximum": "Or", "multiply": "And", "minimum": "And", "equal": "Equal", "where": "Where"}


def _log1p(x: Any) -> Any:
    """log(1 + x): what rounding took from 1 + x is given back as a factor (Kahan; Higham 2002, section 1.14.1)."""
    whole = 1.0 + x
    seen = whole - 1.0
    exact, lost = e.equal(seen, x), e.equal(seen, 0.0)
    return e.where(exact, e.log(whole), e.where(lost, x, e.log(whole) * (x / e.where(lost, 1.0, seen))))


def _arctan2(y: Any, x: Any) -> Any:
    """By quadrants."""
    turned = e.where(y < 0.0, -math.pi, math.pi)
    slope = e.arctan(y / e.where(e.equal(x, 0.0), 1.0, x))
    upright = 0.5 * math.pi * e.sign(y)
    return e.where(x > 0.0, slope, e.where(x < 0.0, slope + turned, upright))


def _floor_divide(x: Any, y: Any) -> Any:
    """What is left after the remainder is a multiple of y, but for rounding."""
    half_above = (x - e.remainder(x, y)) / y + 0.5
    return half_above - e.remainder(half_above, 1.0)


COMPOSED: dict[str, Callable[..., Any]] = {
    "square": lambda x: x * x,
    "not_equal": lambda x, y: e.logical_not(e.equal(x, y)),
    "isfinite": lambda x: e.less(e.absolute(x), math.inf),  # false for NaN, too
    "exp2": lambda x: e.power(2.0, x),
    "expm1": lambda x: e.tanh(0.5 * x) * (e.exp(x) + 1.0),
    "log2": lambda x: e.log(x) * (1.0 / math.log(2.0)),
    "log1p": _log1p,
    "arctan2": _arctan2,
    "floor_divide": _floor_divide,
}


def elementwise(
    b: Builder, name: str, expression: Any, operands: Sequence[Value | Literal], params: Any, out: Aval
) -> Value:
    """The nodes of one elementwise equation."""
    if expression is None:
        raise UnsupportedError(f"'{name}' is a primitive without a scalar expression, so it has no ONNX form")
    arrays: list[Value | np.ndarray] = []

    def scalars(*inputs: Any) -> Any:
        rest = iter(inputs)
        return expression(*[next(rest) if k in places else o.value for k, o in enumerate(operands)], **params)  # type: ignore[union-attr]

    places = set()
    floats = [o.dtype for o in operands if isinstance(o, Value)]
    for k, operand in enumerate(operands):
        if isinstance(operand, Value):
            arrays.append(operand)
            places.add(k)
        elif isinstance(operand.value, Size):  # a number that depends on a length: weak, as every Python number
            scalar = b.reshape(b.length(operand.value), ())
            arrays.append(b.cast(scalar, np.result_type(*floats, 1)))
            places.add(k)
    built = e.build(scalars, len(arrays))
    result = _emitted(b, built, arrays)
    result = b.cast(result, out.dtype)
    if not built.uses_every_input or isinstance(result, np.ndarray):
        result = b.expand(result, out.shape)
    return result


def _emitted(b: Builder, built: e.Expression, arrays: Sequence[Value | np.ndarray]) -> Value | np.ndarray:
    dtypes = e.node_dtypes(built, tuple(a.dtype for a in arrays))
    values: list[Any] = []
    for node, dtype in zip(built.nodes, dtypes, strict=True):
        if node.op == "input":
            values.append(arrays[node.param])
        elif node.op == "constant":
            values.append(Literal(node.param))
        elif node.op == "cast":
            values.append(b.cast(_strong(values[node.args[0]], np.dtype(node.param)), node.param))
        else:
            values.append(_leaf(b, node.op, [values[i] for i in node.args], np.dtype(dtype)))
    (output,) = built.outputs
    result = values[output]
    return (
        _strong(result, np.result_type(*[a.dtype for a in arrays], result.value))
        if isinstance(result, Literal)
        else result
    )


def _strong(operand: Any, dtype: Any) -> Any:
    """A weak Python number as an array of the dtype."""
    return np.asarray(operand.value, dtype) if isinstance(operand, Literal) else operand


def _leaf(b: Builder, name: str, operands: list[Any], dtype: np.dtype) -> Value:
    """One leaf: its operands in the dtype in which NumPy computes it."""
    kind = LEAVES[name].kind
    if kind == "compare":
        common = np.result_type(*[o.value if isinstance(o, Literal) else o.dtype for o in operands])
    elif kind == "logic":
        common = np.dtype(bool)
    else:
        common = dtype
    kinds = [np.dtype(bool), common, common] if kind == "select" else [common] * len(operands)
    cast = [b.cast(_strong(o, k), k) for o, k in zip(operands, kinds, strict=True)]
    if all(isinstance(value, np.ndarray) for value in cast):
        cast[0] = b.constant(cast[0])
    if common == np.bool_ and kind != "logic":
        if name not in _ON_BOOLEANS and name not in COMPOSED:
            cast = [b.cast(value, np.int32) for value in cast]  # comparisons: False < True
        else:
            return _node(b, _ON_BOOLEANS.get(name), name, cast, dtype)
    return _node(b, OPERATORS.get(name), name, cast, dtype)


def _node(b: Builder, operator: str | None, name: str, operands: list[Any], dtype: np.dtype) -> Value:
    if name == "remainder" and dtype.kind == "f":  # Mod of floats has the sign of the dividend
        divisor = operands[1]
        left = b.one("Mod", operands, dtype, fmod=1)
        zero = b.constant(np.zeros((), dtype))
        below = [b.one("Less", [value, zero], bool) for value in (left, divisor)]
        moved = b.one(
            "And", [b.one("Xor", below, bool), b.one("Not", [b.one("Equal", [left, zero], bool)], bool)], bool
        )
        return b.one("Where", [moved, b.one("Add", [left, divisor], dtype), left], dtype)
    if name == "floor_divide" and dtype.kind in "iu":
        multiple = b.one("Sub", [operands[0], b.one("Mod", operands, dtype)], dtype)
        return b.one("Div", [multiple, operands[1]], dtype)
    if operator is not None:
        return b.one(operator, operands, dtype)
    built = e.build(COMPOSED[name], len(operands))
    arrays = [operand if isinstance(operand, Value) else b.constant(operand) for operand in operands]
    made = _emitted(b, built, arrays)
    assert isinstance(made, Value)
    return made
