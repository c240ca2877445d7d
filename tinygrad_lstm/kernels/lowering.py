"""Every leaf as branch-free instructions on :class:`.vector.Value`, for any number of lanes.

float32 transcendental functions are polynomials or rationals of our own (:mod:`.fit` derives every
coefficient here), accurate to 4 ulp over the whole range, results in the subnormal range included, with
exact limits: tanh(+-inf) = +-1, exp(-inf) = 0, NaN stays NaN, odd functions keep -0.  Argument reduction
follows Cody & Waite, *Software Manual for the Elementary Functions* (1980): a multiple of ln 2 is taken
off in two parts, the first of which is exact.  What has no such form (float64, the rarer functions) calls
the mathematics library lane by lane.

Arithmetic is never contracted: an expression without transcendental leaves gives NumPy's bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .fit_data import ERF_LARGE, ERF_SMALL, EXP, LOG
from .table import LEAVES
from .vector import Lanes, Value

__all__ = ["apply"]

# ln 2 in two parts; the first has 15 significant bits: a multiple up to 2^9 of it is exact in float32.
_LN2_HIGH = 0.693145751953125
_LN2_LOW = math.log(2.0) - _LN2_HIGH
_ROUND = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, found in the low bits


def _horner(x: Value, coefficients: tuple[float, ...]) -> Value:
    """A polynomial, coefficients from the constant term up."""
    result = x.fma(coefficients[-1], coefficients[-2])
    for coefficient in reversed(coefficients[:-2]):
        result = result.fma(x, coefficient)
    return result


def _round(x: Value, scale: float) -> tuple[Value, Any]:
    """``round(x * scale)`` as a float and as a 32-bit integer; |x * scale| below 2^22."""
    shifted = x.fma(scale, _ROUND)
    lanes = x.lanes
    origin = lanes.literal(lanes.integer(32), 0x4B400000)
    return shifted - _ROUND, lanes.builder.sub(shifted.bits(), origin)


def _power_of_two(n: Any, like: Value) -> Value:
    """2^n for integers n in the range of normal numbers."""
    lanes = like.lanes
    builder, integer = lanes.builder, lanes.integer(32)
    biased = builder.add(n, lanes.literal(integer, 127))
    return like.from_bits(builder.shl(biased, lanes.literal(integer, 23)))


def _scale(x: Value, n: Any) -> Value:
    """x * 2^n in two exact steps, so that subnormal results round once and 2^128 does not overflow early."""
    lanes = x.lanes
    half = lanes.builder.ashr(n, lanes.literal(lanes.integer(32), 1))
    return x * _power_of_two(half, x) * _power_of_two(lanes.builder.sub(n, half), x)


def _clamp(x: Value, low: float, high: float) -> Value:
    """Written so that NaN passes."""
    x = (x > high).choose(high, x)
    return (x < low).choose(low, x)


def _exp(x: Value) -> Value:
    x = _clamp(x, -104.5, 89.0)
    n, integer = _round(x, 1.0 / math.log(2.0))
    r = n.fma(-_LN2_LOW, n.fma(-_LN2_HIGH, x))
    return _scale((r * r).fma(_horner(r, EXP), r) + 1.0, integer)


def _exp2(x: Value) -> Value:
    x = _clamp(x, -151.0, 129.0)
    n, integer = _round(x, 1.0)
    r = (x - n) * math.log(2.0)
    return _scale((r * r).fma(_horner(r, EXP), r) + 1.0, integer)


def _expm1(x: Value) -> Value:
    c = _clamp(x, -20.0, 89.0)
    n, integer = _round(c, 1.0 / math.log(2.0))
    r = n.fma(-_LN2_LOW, n.fma(-_LN2_HIGH, c))
    q = (r * r).fma(_horner(r, EXP), r)
    # e^x - 1 = 2^n q + (2^n - 1), halved on the way: 2^128 does not exist.
    lanes = x.lanes
    half = _power_of_two(lanes.builder.sub(integer, lanes.literal(lanes.integer(32), 1)), x)
    result = half.fma(q, half - 0.5) * 2.0
    return (abs(x) < 2.0**-25).choose(x, result)


def _log_parts(x: Value, positive_normal: bool = False) -> tuple[Value, Value, Value]:
    """Positive x as 2^n (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)): n, f, and log(1 + f) - f."""
    lanes = x.lanes
    builder, integer = lanes.builder, lanes.integer(32)
    small = x < 2.0**-126
    if not positive_normal:
        x = small.choose(x * 2.0**23, x)
    # Subtracting sqrt(1/2) from the raw bits puts the exponent's step at sqrt(1/2) instead of at 1.
    raw = builder.sub(x.bits(), lanes.literal(integer, 0x3F3504F3))
    exponent = builder.ashr(raw, lanes.literal(integer, 23))
    mantissa = builder.sub(x.bits(), builder.shl(exponent, lanes.literal(integer, 23)))
    f = x.from_bits(mantissa) - 1.0
    n = Value(lanes, builder.sitofp(exponent, lanes.type("float32")), "float32")
    if not positive_normal:
        n = small.choose(n - 23.0, n)
    square = f * f
    return n, f, (square * f).fma(_horner(f, LOG), square * -0.5)


def _log_limits(x: Value, result: Value) -> Value:
    result = x.equals(math.inf).choose(x, result)
    result = (x < 0.0).choose(math.nan, result)
    result = x.equals(0.0).choose(-math.inf, result)
    return x.is_nan().choose(x, result)


def _log(x: Value) -> Value:
    n, f, rest = _log_parts(x)
    return _log_limits(x, n.fma(_LN2_HIGH, n.fma(_LN2_LOW, rest) + f))


def _log2(x: Value) -> Value:
    n, f, rest = _log_parts(x)
    # 1 / ln 2 in two parts as well: the product with f stays exact to first order.
    high, low = 1.4423828125, 1.0 / math.log(2.0) - 1.4423828125
    return _log_limits(x, f.fma(high, f.fma(low, rest * (1.0 / math.log(2.0)))) + n)


def _log1p(x: Value) -> Value:
    # u = 1 + x rounds; what was lost comes back to first order (Goldberg 1991, theorem 4).
    u = x + 1.0
    n, f, rest = _log_parts(u)
    lost = (x > 1.0).choose(1.0 - (u - x), x - (u - 1.0)) / u
    lost = (abs(x) < 2.0**24).choose(lost, 0.0)
    result = n.fma(_LN2_HIGH, (n.fma(_LN2_LOW, rest) + lost) + f)
    result = _log_limits(u, result)
    return u.equals(1.0).choose(x, result)


def _log1p_unit(x: Value) -> Value:
    """log1p for x in [0, 1]: no limits to mind."""
    u = x + 1.0
    n, f, rest = _log_parts(u, positive_normal=True)
    lost = (x - (u - 1.0)) / u
    result = n.fma(_LN2_HIGH, (n.fma(_LN2_LOW, rest) + lost) + f)
    return u.equals(1.0).choose(x, result)


def _tanh(x: Value) -> Value:
    # t / (t + 2) with t = e^(2|x|) - 1: relative precision near 0 as well as near 1.
    c = abs(x)
    c = (c > 9.5).choose(9.5, c) * 2.0
    n, integer = _round(c, 1.0 / math.log(2.0))
    r = n.fma(-_LN2_LOW, n.fma(-_LN2_HIGH, c))
    q = (r * r).fma(_horner(r, EXP), r)
    scale = _power_of_two(integer, x)
    t = scale.fma(q, scale - 1.0)
    return (t / (t + 2.0)).intrinsic("copysign", x)


def _erf(x: Value) -> Value:
    # An odd polynomial below 0.95, 1 - exp(-p(|x|)) above; both are computed, one is kept.
    c = abs(x)
    c = (c > 4.0).choose(4.0, c)
    small = x * _horner(x * x, ERF_SMALL)
    large = (1.0 - _exp(-_horner(c, ERF_LARGE))).intrinsic("copysign", x)
    return (c < 0.95).choose(small, large)


def _sigmoid(x: Value) -> Value:
    e = _evaluate("exp", -abs(x))
    return (x < 0.0).choose(e, 1.0) / (e + 1.0)


def _softplus(x: Value) -> Value:
    positive = (x > 0.0).choose(x, 0.0)
    positive = x.is_nan().choose(x, positive)
    e = _evaluate("exp", -abs(x))
    return positive + (_log1p_unit(e) if x.dtype == "float32" else _evaluate("log1p", e))


def _maximum(a: Value, b: Value) -> Value:
    return ((a >= b) | a.is_nan()).choose(a, b)


def _minimum(a: Value, b: Value) -> Value:
    return ((a <= b) | a.is_nan()).choose(a, b)


def _sign(x: Value) -> Value:
    below = (x < 0.0).choose(-1.0, x.is_nan().choose(x, x.lanes.constant(0.0, x.dtype)))
    return (x > 0.0).choose(1.0, below)


def _opposite(a: Value, b: Value) -> Value:
    """Where one is below zero and the other is not."""
    return ((a < 0) & ~(b < 0)) | (~(a < 0) & (b < 0))


def _divisor(b: Value) -> Value:
    """Of integers: 1 in place of 0 and -1, by which the instruction must not divide."""
    return (b.equals(0) | b.equals(-1)).choose(1, b)


def _remainder(a: Value, b: Value) -> Value:
    left = a.remainder(_divisor(b) if b.whole else b)
    result = (left.differs(0) & _opposite(left, b)).choose(left + b, left)
    return result if b.whole else left.equals(0).choose(b.lanes.constant(0, b.dtype).intrinsic("copysign", b), result)


def _floor_divide(a: Value, b: Value) -> Value:
    if b.whole:
        divisor = _divisor(b)
        left, quotient = a.remainder(divisor), a.quotient(divisor)
        quotient = (left.differs(0) & _opposite(left, b)).choose(quotient - 1, quotient)
        return b.equals(0).choose(0, b.equals(-1).choose(-a, quotient))
    left, ratio = a.remainder(b), a / b
    exact = (a - left) / b  # an integer, but for rounding
    exact = (left.differs(0) & _opposite(left, b)).choose(exact - 1, exact)
    below = exact.intrinsic("floor")
    result = (exact - below > 0.5).choose(below + 1, below)
    zero = exact.lanes.constant(0, exact.dtype).intrinsic("copysign", ratio)
    return b.equals(0).choose(ratio, exact.equals(0).choose(zero, result))


_RULES: dict[str, Callable[..., Value]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "remainder": _remainder,
    "floor_divide": _floor_divide,
    "negative": lambda x: -x,
    "reciprocal": lambda x: 1.0 / x,
    "square": lambda x: x * x,
    "absolute": abs,
    "sign": _sign,
    "maximum": _maximum,
    "minimum": _minimum,
    "sqrt": lambda x: x.intrinsic("sqrt"),
    "equal": lambda a, b: a.equals(b),
    "not_equal": lambda a, b: a.differs(b),
    "less": lambda a, b: a < b,
    "less_equal": lambda a, b: a <= b,
    "greater": lambda a, b: a > b,
    "greater_equal": lambda a, b: a >= b,
    "isfinite": lambda x: abs(x) < math.inf,
    "logical_and": lambda a, b: a & b,
    "logical_or": lambda a, b: a | b,
    "logical_not": lambda x: ~x,
    "where": lambda condition, a, b: condition.choose(a, b),
    "exp": _exp,
    "exp2": _exp2,
    "expm1": _expm1,
    "log": _log,
    "log2": _log2,
    "log1p": _log1p,
    "tanh": _tanh,
    "erf": _erf,
    "sigmoid": _sigmoid,
    "softplus": _softplus,
}


def _library(name: str, *args: Value) -> Value:
    """The mathematics library's function, one lane after the other."""
    from llvmlite import ir

    from .instructions import declared

    lanes, dtype = args[0].lanes, args[0].dtype
    builder = lanes.builder
    number = Lanes(builder, 1).type(dtype)
    symbol = name + "f" * (dtype == "float32")

    def call(values: list[Any]) -> Any:
        function = declared(builder.module, ir.FunctionType(number, [number] * len(values)), symbol)
        return builder.call(function, values)

    if lanes.count == 1:
        return Value(lanes, call([arg.ir for arg in args]), dtype)
    result = ir.Constant(lanes.type(dtype), ir.Undefined)
    for lane in range(lanes.count):
        index = ir.Constant(ir.IntType(32), lane)
        values = [builder.extract_element(arg.ir, index) for arg in args]
        result = builder.insert_element(result, call(values), index)
    return Value(lanes, result, dtype)


def _power(x: Value, exponent: float) -> Value | None:
    """Small constant exponents as products; None for the others."""
    if exponent in (2.0, -2.0):
        result = x * x
    elif exponent in (3.0, -3.0):
        result = x * x * x
    elif exponent in (4.0, -4.0):
        result = (x * x) * (x * x)
    elif exponent in (1.0, -1.0):
        result = x
    else:
        return None
    return result if exponent > 0 else 1.0 / result


def _evaluate(name: str, *args: Value) -> Value:
    leaf = LEAVES[name]
    if name in _RULES and (args[0].dtype in (*leaf.vector, "bool") or args[0].whole):
        return _RULES[name](*args)
    return _library(leaf.libm, *args)


def apply(name: str, args: list[Value], constants: list[float | None]) -> Value:
    """The leaf ``name`` on registers of one dtype (``where``: a truth value, then two of one dtype).

    ``constants`` holds the number behind each argument that is a constant, else None.
    """
    if name == "power" and constants[1] is not None:
        product = _power(args[0], constants[1])
        if product is not None:
            return product
    return _evaluate(name, *args)
