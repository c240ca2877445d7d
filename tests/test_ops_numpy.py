"""Every public op against NumPy: values, dtypes, argument forms, kinks and limits."""

from __future__ import annotations

import contextlib
import math
import operator as operators
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tinygrad_lstm as tg
from tinygrad_lstm import ops

FLOATS = st.floats(-50, 50, width=32).map(float)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


def arrays(dtype: Any = np.float64, shape: Any = SHAPES, elements: Any = FLOATS) -> Any:
    return hnp.arrays(dtype, shape, elements=elements)


def same(found: Any, expected: Any, rtol: float = 1e-14, dtype: bool = True) -> None:
    values = found.numpy()
    expected = np.asarray(expected)
    assert values.shape == expected.shape
    assert not dtype or values.dtype == expected.dtype
    np.testing.assert_allclose(values, expected, rtol=rtol, atol=rtol)


def silently(function: Any, *args: Any, **kwargs: Any) -> Any:
    with np.errstate(all="ignore"):
        return function(*args, **kwargs)


# ---------------------------------------------------------------------------- elementwise

UNARY = {
    "abs": np.abs, "arcsinh": np.arcsinh, "arctan": np.arctan, "cos": np.cos, "exp": np.exp, "exp2": np.exp2,
    "expm1": np.expm1, "isfinite": np.isfinite, "logical_not": np.logical_not, "negative": np.negative,
    "sign": np.sign, "sin": np.sin, "sinh": np.sinh, "cosh": np.cosh, "square": np.square, "tan": np.tan,
    "tanh": np.tanh, "relu": lambda x: np.maximum(x, 0), "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softplus": lambda x: np.logaddexp(x, 0).astype(x.dtype), "hard_tanh": lambda x: np.clip(x, -1, 1),
    "hard_sigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1), "silu": lambda x: x / (1 + np.exp(-x)),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x), "elu": lambda x: np.where(x > 0, x,
    np.expm1(np.minimum(x, 0))),
    "erf": lambda x: np.vectorize(math.erf, otypes=[x.dtype])(x),
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf, otypes=[x.dtype])(x / np.sqrt(2.0).astype(x.dtype))),
}  # fmt: skip
LIMITED = {"arccos": (-1, 1), "arcsin": (-1, 1), "arctanh": (-0.99, 0.99), "arccosh": (1, 50), "log": (1e-3, 50),
           "log2": (1e-3, 50), "log1p": (-0.99, 50), "sqrt": (0, 50)}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", UNARY)
def test_unary(name, dtype):
    rtol = 1e-5 if dtype == np.float32 else 1e-12

    @given(arrays(dtype))
    def check(x: np.ndarray) -> None:
        same(getattr(ops, name)(x), UNARY[name](x), rtol)
        same(getattr(ops, name)(tg.tensor(x)), UNARY[name](x), rtol)

    check()


@pytest.mark.parametrize("name", LIMITED)
def test_unary_with_a_domain(name):
    low, high = LIMITED[name]

    @given(arrays(elements=st.floats(low, high)))
    def check(x: np.ndarray) -> None:
        same(getattr(ops, name)(x), getattr(np, name)(x))

    check()


BINARY = ["add", "subtract", "multiply", "maximum", "minimum", "arctan2", "equal", "not_equal", "less", "less_equal",
          "greater", "greater_equal", "logical_and", "logical_or"]  # fmt: skip


@pytest.mark.parametrize("name", BINARY)
def test_binary_broadcasts_as_numpy(name):
    @given(hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=3, max_side=3, min_side=0), st.data())
    def check(shapes: Any, data: Any) -> None:
        x, y = (data.draw(arrays(shape=s)) for s in shapes.input_shapes)
        same(getattr(ops, name)(x, tg.tensor(y)), getattr(np, name)(x, y))

    check()


NUMBERS = [0, 1, -1, 2, -3, 7, 0.0, 0.5, -2.5, np.float32(1.5), np.float64(-3), np.int64(4), np.int8(-3), True]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.int32, np.int8, np.uint8, np.bool_])
@pytest.mark.parametrize(
    ("op", "name"), [(operators.mod, "remainder"), (operators.floordiv, "floor_divide"), (operators.mod, "mod")]
)
def test_remainder_and_floor_divide_as_numpy(op, name, dtype):
    values = np.array([-7, -6, -1, 0, 0, 1, 5, 6, 100, 3.5, -0.0]).astype(dtype)
    others = np.roll(values, 4)
    same(silently(op, tg.tensor(values), tg.tensor(others)), silently(op, values, others), 0)
    same(silently(op, tg.tensor(values), others), silently(op, values, others), 0)
    same(silently(op, values, tg.tensor(others)), silently(op, values, others), 0)
    same(silently(getattr(np, name), tg.tensor(values), others), silently(op, values, others), 0)
    same(silently(getattr(ops, name), values, others), silently(op, values, others), 0)
    for number in NUMBERS:
        weak = number.item() if isinstance(number, np.generic) else number
        if isinstance(weak, int) and weak < 0 and dtype == np.uint8:
            continue  # NumPy refuses it
        same(silently(op, tg.tensor(values), number), silently(op, values, weak), 0)
        same(silently(op, number, tg.tensor(values)), silently(op, weak, values), 0)


@given(arrays(elements=st.floats(allow_nan=True)), st.floats(allow_nan=True))
def test_remainder_and_floor_divide_of_all_floats(x, y):
    for name in ("remainder", "floor_divide"):
        same(silently(getattr(ops, name), x, y), silently(getattr(np, name), x, y), 0)


@given(arrays(), st.floats(0.5, 9.0), st.sampled_from([0, 1, 2, 3, -1, -2, 0.5, 1.5, -0.5, 2.0]))
def test_power_and_divide(x, offset, p):
    x = np.asarray(np.abs(x) + offset)
    same(tg.tensor(x) ** p, x**p, 1e-13)
    same(ops.divide(p, x), p / x)
    same(p / tg.tensor(x), p / x)
    same(2.0 ** tg.tensor(x * 0.1), 2.0 ** (x * 0.1), 1e-13)


@pytest.mark.parametrize("shapes", [((2, 3), (4,)), ((2,), (3,)), ((2, 2), (3, 2))], ids=str)
@pytest.mark.parametrize("name", ["add", "multiply", "maximum", "less"])
def test_shapes_that_do_not_broadcast_are_named(name, shapes):
    with pytest.raises(tg.ShapeError) as caught:
        getattr(ops, name)(np.ones(shapes[0]), np.ones(shapes[1]))
    text = str(caught.value).replace("[", "(").replace("]", ")")
    assert name in text
    assert "broadcast together" not in text  # NumPy's own words
    for shape in shapes:
        assert ", ".join(map(str, shape)) in text


def test_operators_are_the_ops():
    a, b = np.array([5.0, -2.0]), np.array([2.0, 4.0])
    t = tg.tensor(a)
    for found, expected in [
        (t + b, a + b), (b + t, b + a), (t - b, a - b), (b - t, b - a), (t * b, a * b), (b * t, b * a), (t / b, a / b),
        (b / t, b / a), (t**2, a**2), (-t, -a), (+t, +a), (abs(t), abs(a)), (t < b, a < b), (t <= b, a <= b),
        (t > b, a > b), (t >= b, a >= b), (t == b, a == b), (t != b, a != b), (t @ b, a @ b), (b @ t, b @ a),
        ((t > 0) & (t < 3), (a > 0) & (a < 3)), ((t > 0) | (t < -3), (a > 0) | (a < -3)), (~(t > 0), ~(a > 0)),
        (3 - t, 3 - a), (2 / t, 2 / a), (2 * t, 2 * a), (1 + t, 1 + a), ([1.0, 1.0] + t, a + 1),
    ]:  # fmt: skip
        assert isinstance(found, tg.Tensor)
        same(found, expected)


# ---------------------------------------------------------------------------- dtypes

DTYPES = [np.bool_, np.int8, np.uint8, np.int32, np.int64, np.float16, np.float32, np.float64]


@pytest.mark.parametrize("left", DTYPES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("right", [*DTYPES, int, float, bool], ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", ["add", "multiply", "divide", "maximum", "less", "where"])
def test_result_dtypes_are_numpys(name, left, right):
    x = np.ones(2, left)
    y = right(1) if right in (int, float, bool) else np.ones(2, right)
    if name == "where":
        found, expected = ops.where(x > 0, x, y), np.where(x > 0, x, y)
    else:
        found, expected = getattr(ops, name)(tg.tensor(x), y), getattr(np, name)(x, y)
    assert found.dtype == expected.dtype


@pytest.mark.parametrize("scalar", [np.sqrt(64), np.float64(2), np.float32(2), np.int64(2), np.bool_(True)], ids=repr)
@pytest.mark.parametrize("dtype", [np.float16, np.float32], ids=["float16", "float32"])
def test_numpy_scalars_are_weak(scalar, dtype):
    """The one deviation from NEP 50."""
    x = tg.tensor(np.ones(2, dtype))
    for result in (x * scalar, scalar * x, x + scalar, x / scalar, x - scalar, ops.maximum(x, scalar)):
        assert result.dtype == dtype
    assert (x * np.array(2.0)).dtype == np.float64  # an array, even 0-d, is strong
    assert (x * tg.tensor(2.0, dtype=np.float64)).dtype == np.float64


def test_python_numbers_that_do_not_fit():
    with pytest.raises(tg.Error):
        tg.tensor(np.ones(2, np.uint8)) + 300


def test_long_doubles_are_refused_or_computed_but_do_not_recurse():
    x = tg.tensor([1.0, 2.0])
    with contextlib.suppress(tg.Error):
        assert np.isfinite((x * np.longdouble(2)).numpy()).all()


# ---------------------------------------------------------------------------- kinks


def slopes(f: Any, *values: float) -> list[float]:
    return tg.grad(lambda x: ops.sum(f(x)))(np.array(values)).tolist()


def test_kinks():
    assert slopes(ops.relu, -1.0, 0.0, 1.0) == [0.0, 0.0, 1.0]
    assert slopes(ops.relu, -0.0) == [0.0]
    assert slopes(ops.abs, -2.0, 0.0, 2.0) == [-1.0, 0.0, 1.0]
    assert slopes(ops.sign, -2.0, 0.0, 2.0) == [0.0, 0.0, 0.0]
    assert slopes(ops.sqrt, 0.0, 4.0) == [np.inf, 0.25]
    assert slopes(ops.norm, 0.0, 0.0) == [0.0, 0.0]
    assert slopes(ops.norm, 3.0, 4.0) == [0.6, 0.8]
    assert slopes(lambda x: ops.clip(x, -1.0, 1.0), -2.0, -1.0, 0.0, 1.0, 2.0) == [0.0, 1.0, 1.0, 1.0, 0.0]
    assert slopes(ops.hard_tanh, -1.0, 1.0, 1.5) == [1.0, 1.0, 0.0]
    assert slopes(ops.hard_sigmoid, 0.0, 9.0) == [pytest.approx(1 / 6), 0.0]


@pytest.mark.parametrize(("f", "values", "expected"), [
    (lambda x: ops.maximum(x, 1.0), (1.0, 2.0, 0.0), [0.5, 1.0, 0.0]),
    (lambda x: ops.minimum(1.0, x), (1.0, 2.0, 0.0), [0.5, 0.0, 1.0]),
    (lambda x: ops.maximum(x, x), (1.0, -1.0), [1.0, 1.0]),
    (ops.max, (3.0, 1.0, 3.0, 3.0), [1 / 3, 0.0, 1 / 3, 1 / 3]),
    (ops.min, (3.0, 1.0, 1.0, 3.0), [0.0, 0.5, 0.5, 0.0]),
    (ops.max, (2.0,), [1.0]),
])  # fmt: skip
def test_ties_are_shared_equally(f, values, expected):
    np.testing.assert_allclose(slopes(f, *values), expected, rtol=1e-15)
    forward = [tg.jvp(f, (np.array(values),), (np.eye(len(values))[k],))[1].numpy().sum() for k in range(len(values))]
    np.testing.assert_allclose(forward, expected, rtol=1e-15)


def test_ties_along_axes():
    x = np.array([[1.0, 2.0], [2.0, 2.0]])
    g = tg.grad(lambda t: (ops.max(t, axis=0) * np.array([1.0, 10.0])).sum())(x)
    assert g.tolist() == [[0.0, 5.0], [1.0, 5.0]]


def test_second_derivatives_at_kinks_are_zero():
    for f in (ops.relu, ops.abs, ops.sign, lambda x: ops.clip(x, 0.0, 1.0), lambda x: ops.leaky_relu(x)):
        assert tg.grad(lambda x, f=f: tg.grad(lambda y: f(y).sum())(x).sum())(np.zeros(2)).tolist() == [0.0, 0.0]


# ---------------------------------------------------------------------------- far out, with warnings as errors


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("name", "expected"), [
    ("sigmoid", [0.0, 0.5, 1.0]), ("softplus", [0.0, math.log(2), 1e4]), ("tanh", [-1.0, 0.0, 1.0]),
    ("silu", [0.0, 0.0, 1e4]), ("gelu", [0.0, 0.0, 1e4]), ("elu", [-1.0, 0.0, 1e4]), ("erf", [-1.0, 0.0, 1.0]),
    ("hard_sigmoid", [0.0, 0.5, 1.0]), ("relu", [0.0, 0.0, 1e4]),
])  # fmt: skip
def test_activations_far_out(name, expected, dtype):
    x = np.array([-1e4, 0.0, 1e4], dtype)
    f = getattr(ops, name)
    np.testing.assert_allclose(f(x).numpy(), np.array(expected, dtype), rtol=1e-6)
    for g in (tg.grad(lambda t: f(t).sum())(x), tg.jvp(f, (x,), (np.ones(3),))[1]):
        assert g.dtype == dtype
        assert np.isfinite(g.numpy()).all()
    second = tg.grad(lambda t: tg.grad(lambda s: f(s).sum())(t).sum())(x)
    assert np.isfinite(second.numpy()).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_softmax_family_far_out(dtype):
    x = np.array([[1e4, -1e4, 0.0], [1e4, 1e4, -1e4], [-1e4, -1e4, -1e4]], dtype)
    np.testing.assert_allclose(ops.softmax(x).numpy(), [[1, 0, 0], [0.5, 0.5, 0], [1 / 3] * 3], rtol=1e-6)
    half, third = math.log(2), math.log(3)
    np.testing.assert_allclose(ops.logsumexp(x, axis=-1).numpy(), [1e4, 1e4 + half, -1e4 + third], rtol=1e-6)
    found = ops.log_softmax(x).numpy()
    np.testing.assert_allclose(found, [[0, -2e4, -1e4], [-half, -half, -2e4 - half], [-third] * 3], rtol=1e-5)
    for f in (ops.softmax, ops.log_softmax, lambda t: ops.logsumexp(t, axis=-1)):
        g = tg.grad(lambda t, f=f: (f(t) ** 2).sum() * 1e-4)(x)
        assert np.isfinite(g.numpy()).all()


def test_logsumexp_of_infinities():
    x = np.array([[-np.inf, -np.inf], [-np.inf, 1.0], [np.inf, 1e4], [np.inf, 0.0]])
    assert ops.logsumexp(x, axis=1).tolist() == [-np.inf, 1.0, np.inf, np.inf]
    g = tg.grad(lambda t: ops.logsumexp(t, axis=1).sum())(x[:2]).numpy()
    np.testing.assert_array_equal(g, [[0.0, 0.0], [0.0, 1.0]])


def test_where_does_not_leak_nan():
    x = np.array([0.0, 1.0])
    g = tg.grad(lambda t: ops.where(t > 0, ops.sqrt(ops.where(t > 0, t, 1.0)), 0.0).sum())(x)
    assert g.tolist() == [0.0, 0.5]
    bad = tg.tensor(np.array([np.nan, 2.0]), requires_grad=True)
    good = tg.tensor(np.array([1.0, 3.0]), requires_grad=True)
    ops.where(np.array([False, True]), bad, good).sum().backward()
    assert (bad.grad.tolist(), good.grad.tolist()) == ([0.0, 1.0], [1.0, 0.0])


BITS = [np.array([12, 5, -3]), np.array([10, 6, 7], np.int8), np.array([True, False, True]), 6, True, np.True_]


@pytest.mark.parametrize("x", BITS, ids=repr)
@pytest.mark.parametrize("y", BITS, ids=repr)
@pytest.mark.parametrize("operator", ["and_", "or_", "xor"])
def test_bits_of_integers_and_logic_of_booleans(operator, x, y):
    f = getattr(operators, operator)
    for left, right in [(tg.tensor(x), y), (x, tg.tensor(y)), (tg.tensor(x), tg.tensor(y))]:
        if isinstance(left, tg.Tensor) and isinstance(x, int) and isinstance(right, int):
            continue  # NumPy has no weak numbers alone
        a, b = (v.numpy() if isinstance(v, tg.Tensor) else v for v in (left, right))
        if isinstance(x, np.ndarray) or isinstance(y, np.ndarray):
            same(f(left, right), f(a, b))
            ufunc = {"and_": np.bitwise_and, "or_": np.bitwise_or, "xor": np.bitwise_xor}[operator]
            same(ufunc(left, right), f(a, b))


def test_flipped_bits_and_floats():
    for x in BITS[:3]:
        same(~tg.tensor(x), ~x)
        same(np.invert(tg.tensor(x)), ~x)
        same(np.bitwise_not(tg.tensor(x)), ~x)
    t = tg.tensor(BITS[0])
    for call in (lambda: t & 1.5, lambda: np.ones(3) | t, lambda: ~tg.tensor([1.0]), lambda: t ^ tg.tensor([1.0])):
        with pytest.raises(tg.DTypeError, match=r"integers and booleans.*logical_and"):
            call()
    _, ys = ops.scan(lambda c, x: (c ^ x, c & x), np.zeros(3, int), np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(ys.numpy(), [[0, 0, 0], [0 & 3, 1 & 4, 2 & 5]])
