"""Elementwise primitives: a scalar expression and one rule per argument.

A rule multiplies its first argument by the partial derivative.  The Jacobian of an elementwise function is
diagonal, so the same rule pulls cotangents back and pushes tangents forward.  At kinks: relu'(0) = abs'(0) =
sign' = 0; maximum and minimum share ties equally; clip passes the gradient at its bounds.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinygrad_lstm.declare import elementwise
from tinygrad_lstm.errors import ArgumentError
from tinygrad_lstm.kernels import expression as e
from tinygrad_lstm.primitive import Aval, Primitive, zeros
from tinygrad_lstm.tensor import Tensor, asarray

# ---------------------------------------------------------------------------- arithmetic

add: Primitive = elementwise(
    "add", lambda x, y: x + y, (lambda g: g, lambda g: g), doc="x + y, elementwise with broadcasting."
)
subtract: Primitive = elementwise(
    "subtract", lambda x, y: x - y, (lambda g: g, lambda g: -g), doc="x - y, elementwise with broadcasting."
)
multiply: Primitive = elementwise(
    "multiply",
    lambda x, y: x * y,
    (lambda g, y: g * y, lambda g, x: g * x),
    doc="x * y, elementwise with broadcasting.",
)
divide: Primitive = elementwise(
    "divide",
    lambda x, y: x / y,
    (lambda g, y: g / y, lambda g, y, out: -(g / y * out)),
    doc="x / y (true division), elementwise with broadcasting.",
)
floor_divide: Primitive = elementwise(
    "floor_divide",
    e.floor_divide,
    (lambda g: zeros(Aval(g.shape, g.dtype)), lambda g: zeros(Aval(g.shape, g.dtype))),
    doc="The largest integer that is not above x / y, in the common dtype, x // y; the derivatives are 0 everywhere.",
)
remainder: Primitive = elementwise(
    "remainder",
    e.remainder,
    (lambda g: g, lambda g, x, y: -(g * floor_divide(x, y))),
    doc="x - y * floor(x / y), x % y: it has the sign of y, as numpy.remainder; also called mod.",
)
mod = remainder
negative: Primitive = elementwise("negative", e.negative, (lambda g: -g,), doc="-x, elementwise.")


def _power_base(g: Any, x: Any, y: Any) -> Any:
    if not isinstance(y, Tensor):  # a number: no branch of the formula is left for run time
        return g * (y * x ** (y - 1)) if y not in (0, 1, 2) else (g * y if y < 2 else g * (2 * x))
    # At y = 0, y * x**y / x: it is 0 at x = 0 too, and still a function of y, for the derivatives of this one.
    zero = equal(y, 0)
    return g * (y * x ** where(zero, y, y - 1) / where(zero, where(equal(x, 0), math.inf, x), 1.0))


power: Primitive = elementwise(
    "power",
    e.power,
    (_power_base, lambda g, x, out: g * where(equal(x, 0), 0.0, out * log(where(equal(x, 0), 1.0, x)))),
    doc="x ** y, elementwise with broadcasting.",
)
power.refuses = (
    "an integer to a negative integer power is a fraction; convert the base first, e.g. x.astype(np.float32)"
)
square: Primitive = elementwise("square", e.square, (lambda g, x: g * (2 * x),), doc="x * x, elementwise.")
sqrt: Primitive = elementwise(
    "sqrt", e.sqrt, (lambda g, out: g * 0.5 / out,), doc="Square root; its derivative at 0 is inf."
)
abs: Primitive = elementwise(
    "abs", e.absolute, (lambda g, x: g * sign(x),), doc="|x|, elementwise; the derivative at 0 is 0."
)
sign: Primitive = elementwise(
    "sign", e.sign, (lambda g: zeros(Aval(g.shape, g.dtype)),), doc="-1, 0 or 1; the derivative is 0 everywhere."
)


def _share(g: Any, mine: Any, other: Any, wins: Any) -> Any:
    return where(wins(mine, other), g, where(equal(mine, other), 0.5 * g, 0.0))


maximum: Primitive = elementwise(
    "maximum",
    e.maximum,
    (lambda g, x, y: _share(g, x, y, greater), lambda g, x, y: _share(g, y, x, greater)),
    doc="The larger of x and y (NaN wins); ties share the gradient equally.",
)
minimum: Primitive = elementwise(
    "minimum",
    e.minimum,
    (lambda g, x, y: _share(g, x, y, less), lambda g, x, y: _share(g, y, x, less)),
    doc="The smaller of x and y (NaN wins); ties share the gradient equally.",
)

# ---------------------------------------------------------------------------- exponentials, trigonometry

exp: Primitive = elementwise("exp", e.exp, (lambda g, out: g * out,), doc="e ** x, elementwise.")
expm1: Primitive = elementwise("expm1", e.expm1, (lambda g, out: g * (out + 1.0),), doc="e ** x - 1, exact near 0.")
exp2: Primitive = elementwise("exp2", e.exp2, (lambda g, out: g * (out * math.log(2.0)),), doc="2 ** x, elementwise.")
log: Primitive = elementwise("log", e.log, (lambda g, x: g / x,), doc="Natural logarithm.")
log1p: Primitive = elementwise("log1p", e.log1p, (lambda g, x: g / (x + 1.0),), doc="log(1 + x), exact near 0.")
log2: Primitive = elementwise("log2", e.log2, (lambda g, x: g / (x * math.log(2.0)),), doc="Logarithm to base 2.")
sin: Primitive = elementwise("sin", e.sin, (lambda g, x: g * cos(x),), doc="Sine of x in radians.")
cos: Primitive = elementwise("cos", e.cos, (lambda g, x: -(g * sin(x)),), doc="Cosine of x in radians.")
tan: Primitive = elementwise("tan", e.tan, (lambda g, out: g * (1.0 + out * out),), doc="Tangent of x in radians.")
arcsin: Primitive = elementwise(
    "arcsin", e.arcsin, (lambda g, x: g / sqrt(1.0 - x * x),), doc="Inverse sine, in radians."
)
arccos: Primitive = elementwise(
    "arccos", e.arccos, (lambda g, x: -(g / sqrt(1.0 - x * x)),), doc="Inverse cosine, in radians."
)
arctan: Primitive = elementwise(
    "arctan", e.arctan, (lambda g, x: g / (1.0 + x * x),), doc="Inverse tangent, in radians."
)
arctan2: Primitive = elementwise(
    "arctan2",
    e.arctan2,
    (lambda g, x, y: g * y / (x * x + y * y), lambda g, x, y: -(g * x / (x * x + y * y))),
    doc="Angle of the point (second argument, first argument), in radians, as numpy.arctan2.",
)
sinh: Primitive = elementwise("sinh", e.sinh, (lambda g, x: g * cosh(x),), doc="Hyperbolic sine.")
cosh: Primitive = elementwise("cosh", e.cosh, (lambda g, x: g * sinh(x),), doc="Hyperbolic cosine.")
tanh: Primitive = elementwise("tanh", e.tanh, (lambda g, out: g * (1.0 - out * out),), doc="Hyperbolic tangent.")
arcsinh: Primitive = elementwise(
    "arcsinh", e.arcsinh, (lambda g, x: g / sqrt(x * x + 1.0),), doc="Inverse hyperbolic sine."
)
arccosh: Primitive = elementwise(
    "arccosh", e.arccosh, (lambda g, x: g / sqrt(x * x - 1.0),), doc="Inverse hyperbolic cosine."
)
arctanh: Primitive = elementwise(
    "arctanh", e.arctanh, (lambda g, x: g / (1.0 - x * x),), doc="Inverse hyperbolic tangent."
)
erf: Primitive = elementwise(
    "erf", e.erf, (lambda g, x: g * (2.0 / math.sqrt(math.pi) * exp(-(x * x))),), doc="The error function."
)

# ---------------------------------------------------------------------------- activations

sigmoid: Primitive = elementwise(
    "sigmoid", e.sigmoid, (lambda g, out: g * (out * (1.0 - out)),), doc="1 / (1 + exp(-x)), exact for every x."
)
softplus: Primitive = elementwise(
    "softplus", e.softplus, (lambda g, x: g * sigmoid(x),), doc="log(1 + exp(x)), without overflow."
)
relu: Primitive = elementwise(
    "relu", lambda x: e.maximum(x, 0), (lambda g, out: where(greater(out, 0), g, 0.0),),
    doc="max(x, 0); the derivative at 0 is 0.",
)  # fmt: skip
silu: Primitive = elementwise(
    "silu",
    lambda x: x * e.sigmoid(x),
    (lambda g, x: g * (sigmoid(x) * (1.0 + x * (1.0 - sigmoid(x)))),),
    doc="x * sigmoid(x) (Elfwing, Uchibe & Doya 2018; also called swish).",
)
gelu: Primitive = elementwise(
    "gelu",
    lambda x: 0.5 * x * (1.0 + e.erf(x * math.sqrt(0.5))),
    (lambda g, x: g * (0.5 * (1.0 + erf(x * math.sqrt(0.5))) + x * exp(-0.5 * (x * x)) / math.sqrt(2 * math.pi)),),
    doc="x * Phi(x) with the exact normal distribution function (Hendrycks & Gimpel 2016).",
)
_leaky_relu: Primitive = elementwise(
    "leaky_relu",
    lambda x, *, negative_slope: e.where(x > 0, x, negative_slope * x),
    (lambda g, x, negative_slope: where(greater(x, 0), g, negative_slope * g),),
)
_elu: Primitive = elementwise(
    "elu",
    lambda x, *, alpha: e.where(x > 0, x, alpha * e.expm1(e.minimum(x, 0))),
    (lambda g, x, alpha: where(greater(x, 0), g, g * (alpha * exp(where(greater(x, 0), 0.0, x)))),),
)
_clip: Primitive = elementwise(
    "clip",
    lambda x, *, a_min, a_max: _clip_expression(x, a_min, a_max),
    (lambda g, x, a_min, a_max: where(logical_and(greater_equal(x, a_min), less_equal(x, a_max)), g, 0.0),),
)


def _clip_expression(x: Any, a_min: float, a_max: float) -> Any:
    return e.minimum(e.maximum(x, a_min), a_max)


def leaky_relu(x: Any, negative_slope: float = 0.01) -> Any:
    """x where x > 0, else ``negative_slope * x``; any shape, floating dtype (Maas, Hannun & Ng 2013)."""
    return _leaky_relu(x, negative_slope=float(negative_slope))


def elu(x: Any, alpha: float = 1.0) -> Any:
    """x where x > 0, else ``alpha * (exp(x) - 1)``; any shape, floating dtype (Clevert et al. 2016)."""
    return _elu(x, alpha=float(alpha))


_at_least: Primitive = elementwise(
    "at_least",
    e.maximum,
    (lambda g, x, y: where(greater_equal(x, y), g, 0.0), lambda g, x, y: where(less(x, y), g, 0.0)),
    doc="The larger of x and a bound y; the gradient at the bound is x's.",
)
_at_most: Primitive = elementwise(
    "at_most",
    e.minimum,
    (lambda g, x, y: where(less_equal(x, y), g, 0.0), lambda g, x, y: where(greater(x, y), g, 0.0)),
    doc="The smaller of x and a bound y; the gradient at the bound is x's.",
)


def clip(a: Any, a_min: Any = None, a_max: Any = None, *, min: Any = None, max: Any = None) -> Any:
    """Limited to ``[a_min, a_max]`` (or ``min=``, ``max=``), as numpy.clip; None leaves a side open.

    The gradient passes where ``a_min <= a <= a_max``, bounds included.  Bounds may be arrays or tensors: what lies
    outside passes its gradient to them.

    >>> from tinygrad_lstm import ops
    >>> ops.clip([-2.0, 0.5, 3.0], -1.0, 1.0).tolist()
    [-1.0, 0.5, 1.0]
    """
    if (min is not None and a_min is not None) or (max is not None and a_max is not None):
        raise ArgumentError("clip: a bound is given twice, by a_min or a_max and by min or max")
    x, a_min, a_max = a, min if a_min is None else a_min, max if a_max is None else a_max
    numbers = (int, float, np.number)
    if all(bound is None or isinstance(bound, numbers) for bound in (a_min, a_max)):
        x = x if isinstance(x, e.Expr) else asarray(x)
        integer = not isinstance(x, e.Expr) and x.dtype.kind in "iub"
        if integer or (a_min is None and a_max is None):
            low, high = a_min, a_max
            x = x if low is None else maximum(x, low)
            return x if high is None else minimum(x, high)
        return _clip(
            x, a_min=-math.inf if a_min is None else float(a_min), a_max=math.inf if a_max is None else float(a_max)
        )
    x = x if a_min is None else _at_least(x, a_min)
    return x if a_max is None else _at_most(x, a_max)


def hard_sigmoid(x: Any) -> Any:
    """clip(x / 6 + 1 / 2, 0, 1); any shape, floating dtype."""
    return clip(x * (1.0 / 6.0) + 0.5 if isinstance(x, Tensor) else add(multiply(x, 1.0 / 6.0), 0.5), 0.0, 1.0)


def hard_tanh(x: Any) -> Any:
    """clip(x, -1, 1); any shape, floating dtype."""
    return clip(x, -1.0, 1.0)


# ---------------------------------------------------------------------------- selection and comparison

where: Primitive = elementwise(
    "where",
    lambda condition, x, y: e.where(condition, x, y),
    (None, lambda g, condition: where(condition, g, 0.0), lambda g, condition: where(condition, 0.0, g)),
    doc="x where the condition holds, else y.  The gradient is selected, not multiplied: NaN does not leak.",
)
equal: Primitive = elementwise("equal", e.equal, None, doc="x == y, elementwise; boolean, no gradient.")
not_equal: Primitive = elementwise("not_equal", e.not_equal, None, doc="x != y, elementwise; boolean, no gradient.")
less: Primitive = elementwise("less", e.less, None, doc="x < y, elementwise; boolean, no gradient.")
less_equal: Primitive = elementwise("less_equal", e.less_equal, None, doc="x <= y, elementwise; boolean, no gradient.")
greater: Primitive = elementwise("greater", e.greater, None, doc="x > y, elementwise; boolean, no gradient.")
greater_equal: Primitive = elementwise(
    "greater_equal", e.greater_equal, None, doc="x >= y, elementwise; boolean, no gradient."
)
isfinite: Primitive = elementwise(
    "isfinite", e.isfinite, None, doc="True where x is neither infinite nor NaN; no gradient."
)
isnan: Primitive = elementwise(
    "isnan", lambda x: e.not_equal(x, x), None, doc="True where x is not a number; no gradient."
)
isinf: Primitive = elementwise(
    "isinf", lambda x: e.equal(e.absolute(x), math.inf), None, doc="True where x is infinite; no gradient."
)
logical_and: Primitive = elementwise("logical_and", e.logical_and, None, doc="Both nonzero; boolean, no gradient.")
logical_or: Primitive = elementwise("logical_or", e.logical_or, None, doc="Either nonzero; boolean, no gradient.")
logical_not: Primitive = elementwise("logical_not", e.logical_not, None, doc="Zero; boolean, no gradient.")


def _bits(name: str, ufunc: np.ufunc, doc: str) -> Primitive:
    bits = Primitive(name, ufunc, None, is_elementwise=True, doc=f"{doc} of integers or booleans; no gradient.")
    bits.refuses_dtypes = (
        "it takes integers and booleans; compare first (x > 0), or use logical_and, logical_or, logical_not"
    )
    return bits


bitwise_and: Primitive = _bits("bitwise_and", np.bitwise_and, "The bits that are set in both, x & y,")
bitwise_or: Primitive = _bits("bitwise_or", np.bitwise_or, "The bits that are set in x or y, x | y,")
bitwise_xor: Primitive = _bits("bitwise_xor", np.bitwise_xor, "The bits that are set in one of both, x ^ y,")
invert: Primitive = _bits("invert", np.invert, "All bits flipped, ~x,")

__all__ = [
    "abs", "add", "arccos", "arccosh", "arcsin", "arcsinh", "arctan", "arctan2", "arctanh", "bitwise_and", "bitwise_or",
    "bitwise_xor", "clip", "cos", "cosh",
    "divide", "elu", "equal", "erf", "exp", "exp2", "expm1", "floor_divide", "gelu",
    "greater", "greater_equal", "hard_sigmoid", "hard_tanh", "invert", "isfinite", "isinf", "isnan",
    "leaky_relu", "less", "less_equal", "log", "log1p", "log2", "logical_and",
    "logical_not", "logical_or", "maximum", "minimum", "mod", "multiply", "negative", "not_equal", "power", "relu",
    "remainder", "sigmoid",
    "sign", "silu", "sin", "sinh", "softplus", "sqrt", "square", "subtract", "tan", "tanh", "where",
]  # fmt: skip
