"""Expressions: building, NumPy's meaning, dtypes, silence."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys

import numpy as np
import pytest

from tinygrad_lstm.errors import ArgumentError, DTypeError
from tinygrad_lstm.kernels import build
from tinygrad_lstm.kernels import expression as e
from tinygrad_lstm.kernels.special import erf, sigmoid, softplus
from tinygrad_lstm.kernels.table import LEAVES


def test_import_needs_no_compiler() -> None:
    code = (
        "import sys, tinygrad_lstm.kernels as k, numpy as np\n"
        "k.evaluate(k.build(lambda x: k.expression.tanh(x) + 1, 1), [np.ones(3)])\n"
        "assert 'llvmlite' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", sorted(LEAVES))
def test_a_single_leaf_is_the_numpy_callable(name: str) -> None:
    leaf = LEAVES[name]
    assert build(getattr(e, name), leaf.arity).numpy is leaf.numpy


def test_operands_out_of_order_are_not_the_ufunc() -> None:
    reverse = build(lambda a, b: b - a, 2)
    assert reverse.numpy(np.array([1.0]), np.array([5.0])) == 4.0
    assert build(lambda a, b: e.square(a), 2).ufunc is None


@pytest.mark.parametrize(
    ("function", "reference"),
    [
        (lambda x: 2 + x, lambda x: 2 + x),
        (lambda x: 2 - x, lambda x: 2 - x),
        (lambda x: 2 / x, lambda x: 2 / x),
        (lambda x: x / 2 - 1, lambda x: x / 2 - 1),
        (lambda x: -x * 3, lambda x: -x * 3),
        (lambda x: abs(x - 2), lambda x: abs(x - 2)),
        (lambda x: x**2, lambda x: x**2),
        (lambda x: x**0.5, lambda x: x**0.5),
        (lambda x: x**3, lambda x: x**3),
        (lambda x: 2**x, lambda x: 2**x),
        (lambda x: (x < 2) | (x >= 3), lambda x: (x < 2) | (x >= 3)),
        (lambda x: ~(x > 2) & (x <= 1), lambda x: ~(x > 2) & (x <= 1)),
        (lambda x: e.where(x > 2, x, 0), lambda x: np.where(x > 2, x, 0)),
        (lambda x: np.float64(3.0) * x, lambda x: 3.0 * x),
        (lambda x: e.cast(x, "float64") + 1, lambda x: x.astype("float64") + 1),
        (lambda x: e.cast(1, "float64") * x, lambda x: np.float64(1) * x),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_operators_match_numpy(function, reference, dtype: str) -> None:
    x = np.array([1, 2, 3, 4], dtype)
    found, expected = build(function, 1).numpy(x), reference(x)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype
    assert build(function, 1).result_dtypes([dtype]) == (expected.dtype,)


def test_common_subexpressions_are_computed_once() -> None:
    built = build(lambda x: (e.exp(x) + 1) * (e.exp(x) + 1), 1)
    assert [node.op for node in built.nodes].count("exp") == 1
    deep = build(lambda x: _nested(x, 60), 1)  # a tree of 2^60 nodes, a graph of 60
    assert len(deep.nodes) == 61


def _nested(x: e.Expr, depth: int) -> e.Expr:
    for _ in range(depth):
        x = x + x
    return x


def test_a_long_chain_needs_no_recursion() -> None:
    def chain(x: e.Expr) -> e.Expr:
        for i in range(5000):
            x = x + i
        return x

    assert build(chain, 1).numpy(np.zeros(2, np.float32))[0] == 5000 * 4999 / 2


def test_constants_fold_and_stay_weak() -> None:
    built = build(lambda x: x * (e.constant(2) * e.exp(1.0)), 1)
    assert built.numpy(np.ones(1, np.float32)).dtype == np.float32
    assert built.numpy(np.ones(1))[0] == pytest.approx(2 * math.e)
    assert len(built.nodes) == 3


def test_key_tells_constants_apart() -> None:
    keys = {build(lambda x, c=c: x + c, 1).key for c in (0.0, -0.0, 0, False, math.nan, math.inf, -math.inf, 1, True)}
    assert len(keys) == 9
    assert build(lambda x: x + 0.1, 1) == build(lambda y: y + 0.1, 1)
    assert len({build(lambda x: x + 0.1, 1), build(lambda y: y + 0.1, 1)}) == 1


def test_infinite_constants_print() -> None:
    built = build(lambda x: (e.minimum(x, -math.inf), e.where(x > 0, math.nan, math.inf), e.add(x, math.nan)), 1)
    low, high, nan = built.numpy(np.zeros(1))
    assert low[0] == -math.inf and high[0] == math.inf and math.isnan(nan[0])


def test_outputs_that_are_inputs_or_constants() -> None:
    x, y = np.arange(3.0), np.ones((2, 1), np.float32)
    built = build(lambda a, b: (a, 2, a * b), 2)
    first, second, third = built.numpy(x, y)
    assert first is not x and not np.shares_memory(first, x)
    assert second.shape == third.shape == (2, 3) and second.dtype == np.float64
    assert not built.uses_every_input and not built.single


def test_expression_survives_pickling() -> None:
    built = build(lambda a, b: (e.tanh(a) * 0.1, b), 2)
    again = pickle.loads(pickle.dumps(built))
    assert again == built and hash(again) == hash(built) and again.source == built.source


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["sigmoid", "softplus", "erf"])
def test_special_functions_are_silent_with_exact_limits(name: str, dtype: str) -> None:
    x = np.array([-np.inf, -1e4, -100, 0, 100, 1e4, np.inf, np.nan], dtype)
    value = build(getattr(e, name), 1).numpy(x)
    assert value.dtype == dtype and np.isnan(value[-1]) and np.isfinite(value[1:-2]).all()
    limits = {"sigmoid": (0, 1), "softplus": (0, np.inf), "erf": (-1, 1)}[name]
    assert (value[0], value[-2]) == limits


def _ulp(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.max(np.abs(found - exact) / np.spacing(np.abs(exact))))


def test_erf_float64_against_the_mathematics_library() -> None:
    x = np.concatenate([np.linspace(-6.5, 6.5, 40001), np.geomspace(1e-300, 1, 3001), [0.84375, 1.25, 1 / 0.35, 6]])
    assert _ulp(erf(x), np.array([math.erf(v) for v in x])) <= 2
    assert np.signbit(erf(np.array([-0.0]))[0]) and erf(0.5).shape == () and erf(np.ones((2, 0))).shape == (2, 0)


def test_sigmoid_and_softplus_float64() -> None:
    x = np.linspace(-700, 700, 20001)
    exact = np.array([math.exp(v) / (1 + math.exp(v)) if v < 0 else 1 / (1 + math.exp(-v)) for v in x])
    assert _ulp(sigmoid(x), exact) <= 4
    exact = np.array([max(v, 0) + math.log1p(math.exp(-abs(v))) for v in x])
    assert _ulp(softplus(x), exact) <= 4


def test_errors_say_what_to_do() -> None:
    with pytest.raises(DTypeError, match="where"):
        build(lambda x: x if x > 0 else -x, 1)
    with pytest.raises(DTypeError, match="pass arrays as inputs"):
        build(lambda x: e.add(x, [1.0]), 1)
    with pytest.raises(DTypeError, match="ndarray"):
        build(lambda x: e.add(x, np.ones(3)), 1)
    with pytest.raises(ArgumentError, match="empty tuple"):
        build(lambda x: (), 1)
    with pytest.raises(ArgumentError, match="2 argument"):
        build(lambda x: e.add(x), 1)
    with pytest.raises(ArgumentError, match="at least one input"):
        build(lambda: 1.0, 0)
    with pytest.raises(AttributeError):
        e.Expr("input", (), 0).op = "exp"
    leaked: list[e.Expr] = []
    build(lambda a, b: leaked.append(b) or a, 2)
    with pytest.raises(ArgumentError, match="does not belong"):
        build(lambda a: a + leaked[0], 1)
