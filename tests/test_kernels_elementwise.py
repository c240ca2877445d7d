"""Native elementwise loops against NumPy: accuracy, every leaf, layouts, aliasing."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinygrad_lstm.errors import ArgumentError, ShapeError
from tinygrad_lstm.kernels import Expression, build, elementwise, evaluate, fused
from tinygrad_lstm.kernels import expression as e
from tinygrad_lstm.kernels.table import LEAVES

SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1e-38, 3.4e38, -3.4e38, 1e4, -1e4]


def floats() -> np.ndarray:
    """float32 numbers: a comb through all bit patterns, and dense where the functions bend."""
    comb = np.arange(0, 2**32, 16381, dtype=np.uint64).astype(np.uint32).view(np.float32)
    dense = np.linspace(-20, 20, 100001, dtype=np.float32)
    # where exp and exp2 overflow, become subnormal, vanish
    edges = [88.72283, 88.72284, -87.33654, -103.27893, -103.97208, 127.99999, 128, -126, -149, -149.99999, -150, -151]
    near = np.float32(2.0) ** np.arange(-30, 1, dtype=np.float32)
    return np.concatenate([comb, dense, dense / 16, near, -near, np.float32(edges), np.float32(SPECIAL)])


REFERENCES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "log": np.log,
    "log2": np.log2,
    "log1p": np.log1p,
    "tanh": np.tanh,
    "erf": lambda x: np.array([math.erf(v) for v in x]),
    "sigmoid": lambda x: np.where(x < 0, np.exp(np.minimum(x, 0)), 1) / (1 + np.exp(-np.abs(x))),
    "softplus": lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))),
    "sqrt": np.sqrt,
    "sin": np.sin,
}


@functools.lru_cache
def accuracy_run() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    x = floats()
    names = list(REFERENCES)
    outputs = [np.empty_like(x) for _ in names]
    kernel = fused(build(lambda v: tuple(getattr(e, name)(v) for name in names), 1), ["float32"])
    before = taken_by_numpy.count
    kernel([x], outputs)
    assert taken_by_numpy.count == before
    return x, dict(zip(names, outputs, strict=True))


class taken_by_numpy:
    """Counts the calls that fell back, so that a test of native code cannot pass on NumPy."""

    count = 0


@pytest.fixture(autouse=True)
def count_fallbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    original = np.copyto

    def counted(*args: Any, **kwargs: Any) -> None:
        taken_by_numpy.count += 1
        original(*args, **kwargs)

    monkeypatch.setattr(elementwise.np, "copyto", counted)


def native(kernel: Any, inputs: Any, outputs: Any) -> None:
    before = taken_by_numpy.count
    kernel(inputs, outputs)
    assert taken_by_numpy.count == before, "fell back to NumPy"


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_float32_leaves_within_4_ulp(name: str) -> None:
    x, found = accuracy_run()
    with np.errstate(all="ignore"):
        exact = REFERENCES[name](x.astype(np.float64))
        nearest = exact.astype(np.float32)
        ulp = np.spacing(np.minimum(np.abs(nearest), np.finfo(np.float32).max)).astype(np.float64)
        same = (found[name] == nearest) | (np.isnan(found[name]) & np.isnan(nearest))
        error = np.where(same, 0.0, np.abs(found[name].astype(np.float64) - exact) / ulp)
    worst = int(np.argmax(np.where(np.isnan(error), np.inf, error)))
    assert error[worst] <= 4, (name, x[worst], found[name][worst], nearest[worst])
    zero = nearest == 0
    np.testing.assert_array_equal(np.signbit(found[name][zero]), np.signbit(nearest[zero]))


def every_leaf(dtype: str) -> tuple[Expression, list[str]]:
    names = sorted(LEAVES)

    def function(x: e.Expr, y: e.Expr, b: e.Expr) -> tuple[e.Expr, ...]:
        results = []
        for name in names:
            leaf = LEAVES[name]
            args = (b, x, y) if name == "where" else (b, x) if leaf.kind == "logic" else (x, y)
            results.append(getattr(e, name)(*args[: leaf.arity]))
        return (*results, e.cast(x, "bool"), e.cast(b, dtype), b, 3, x * b, x > 0.1, e.equal(b, 1), x**-2, x**3)

    return build(function, 3), names + ["cast bool", "cast", "copy", "fill", "x*b", "x>.1", "b==1", "x**-2", "x**3"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_leaf_against_its_numpy_twin(dtype: str) -> None:
    expression, names = every_leaf(dtype)
    rng = np.random.default_rng(0)
    x = np.concatenate([SPECIAL, rng.standard_normal(300) * 3, rng.standard_normal(30) * 50]).astype(dtype)
    y = rng.permutation(x)
    b = rng.random(x.size) < 0.5
    with np.errstate(all="ignore"):
        expected = expression.numpy(x, y, b)
    outputs = [np.empty(x.shape, d) for d in expression.result_dtypes([dtype, dtype, "bool"])]
    native(fused(expression, [dtype, dtype, "bool"]), [x, y, b], outputs)
    epsilon = np.finfo(dtype).eps
    for name, found, value in zip(names, outputs, expected, strict=True):
        assert found.dtype == value.dtype, name
        exact = name in LEAVES and LEAVES[name].kind != "float"
        tolerance = 0 if exact else 8 * epsilon
        tiny = 0 if exact else 4 * np.finfo(dtype).smallest_subnormal
        np.testing.assert_allclose(found, value, rtol=tolerance, atol=tiny, err_msg=name)


def test_comparison_of_float32_with_a_weak_constant_is_in_float32() -> None:
    x = np.full(5, 0.1, np.float32)
    out = np.empty(5, bool)
    native(fused(build(lambda v: e.equal(v, 0.1) & (v <= 0.1), 1), ["float32"]), [x], [out])
    assert out.all()


def gates(zi: e.Expr, zf: e.Expr, zg: e.Expr, zo: e.Expr, c: e.Expr, bias: e.Expr, mask: e.Expr) -> tuple[e.Expr, ...]:
    i, f, o = e.sigmoid(zi + bias), e.sigmoid(zf), e.sigmoid(zo)
    new = e.where(mask, f * c + i * e.tanh(zg), c)
    return i, f, new, o * e.tanh(new)


CELL = build(gates, 7)
CELL_DTYPES = ["float32"] * 6 + ["bool"]


def cell_inputs(batch: int, width: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((batch, 4 * width)).astype(np.float32)
    c, bias = rng.standard_normal((batch, width)).astype(np.float32), rng.standard_normal(width).astype(np.float32)
    return [*np.split(z, 4, axis=1), c, bias, rng.random((batch, 1)) < 0.5]


def close(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("width", [1, 5, 15, 16, 17, 31, 32, 100])
def test_gates_on_column_slices_and_time_slices(batch: int, width: int) -> None:
    inputs = cell_inputs(batch, width)
    wide = np.full((batch, 3 * width), 7, np.float32)
    steps = np.full((4, batch, width), 7, np.float32)
    outputs = [wide[:, :width], wide[:, 2 * width :], steps[2], np.empty((batch, width), np.float32)]
    native(fused(CELL, CELL_DTYPES), inputs, outputs)
    close(outputs, CELL.numpy(*inputs))
    assert (wide[:, width : 2 * width] == 7).all() and (steps[[0, 1, 3]] == 7).all(), "wrote outside of its output"


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("width", [3, 16, 40])
def test_in_place_on_the_gate_buffer(batch: int, width: int) -> None:
    inputs = cell_inputs(batch, width)
    expected = CELL.numpy(*inputs)
    # i over zi, f over zf, c over c, h over zg: inputs that other outputs still need
    outputs = [inputs[0], inputs[1], inputs[4], inputs[2]]
    native(fused(CELL, CELL_DTYPES), inputs, outputs)
    close(outputs, expected)


def blend(a: e.Expr, b: e.Expr) -> e.Expr:
    return e.tanh(a) * 2 + b


BLEND = build(blend, 2)


@pytest.mark.parametrize(
    ("left", "right", "shape"),
    [
        ((4, 5), (4, 5), (4, 5)),
        ((4, 5), (5,), (4, 5)),
        ((4, 1), (1, 5), (4, 5)),
        ((), (4, 5), (4, 5)),
        ((), (), ()),
        ((1,), (1,), (1,)),
        ((3, 1, 5), (4, 1), (3, 4, 5)),
        ((1, 4, 5), (3, 1, 1), (3, 4, 5)),
        ((2, 3, 1, 5), (2, 1, 4, 5), (2, 3, 4, 5)),
        ((0, 5), (1, 5), (0, 5)),
        ((5, 0), (), (5, 0)),
        ((4, 5), (4, 5), (2, 4, 5)),
        ((33,), (33,), (33,)),
    ],
)
def test_broadcasting(left, right, shape) -> None:
    rng = np.random.default_rng(0)
    a, b = (np.asarray(rng.standard_normal(s), np.float32) for s in (left, right))
    out = np.full(shape, 7, np.float32)
    fused(BLEND, ["float32"] * 2)([a, b], [out])
    close([out], [np.broadcast_to(BLEND.numpy(a, b), shape)])


@pytest.mark.parametrize(
    ("view", "is_native"),
    [
        (lambda x: x, True),
        (lambda x: x[:, :, 2:7], True),
        (lambda x: x[::2], True),
        (lambda x: x[::-1], True),
        (lambda x: x.transpose(2, 0, 1), True),
        (lambda x: x.T, True),
        (lambda x: x.swapaxes(0, 1), True),
        (lambda x: x[:, :, ::2], False),
        (lambda x: x[:, :, ::-1], False),
        (lambda x: x[1:2, :, :1], True),
        (lambda x: x[0, :, 0], True),
    ],
)
def test_layouts(view, is_native: bool) -> None:
    rng = np.random.default_rng(0)
    a, b, out = (view(rng.standard_normal((6, 7, 20)).astype(np.float32)) for _ in range(3))
    expected = BLEND.numpy(a, b)
    before = taken_by_numpy.count
    fused(BLEND, ["float32"] * 2)([a, b], [out])
    assert (taken_by_numpy.count == before) == is_native
    close([out], [expected])
    out_of_order = np.empty(a.shape, np.float32)
    fused(BLEND, ["float32"] * 2)([a, b], [out_of_order])
    close([out_of_order], [expected])


@pytest.mark.parametrize("shift", [-17, -1, 1, 3, 17])
def test_overlap_that_is_not_the_same_place(shift: int) -> None:
    buffer = np.random.default_rng(0).standard_normal(200).astype(np.float32)
    a, out = buffer[50:150], buffer[50 + shift : 150 + shift]
    b = np.ones(100, np.float32)
    expected = BLEND.numpy(a.copy(), b)
    fused(BLEND, ["float32"] * 2)([a, b], [out])
    close([out], [expected])


def test_a_broadcast_input_inside_the_output() -> None:
    buffer = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    expected = BLEND.numpy(buffer.copy(), buffer[2].copy())
    fused(BLEND, ["float32"] * 2)([buffer, buffer[2]], [buffer])
    close([buffer], [expected])


def test_operands_that_native_code_must_refuse() -> None:
    kernel = fused(BLEND, ["float32"] * 2)
    a = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    expected = BLEND.numpy(a, a)
    swapped = a.astype(a.dtype.newbyteorder())
    raw = np.zeros(a.nbytes + 1, np.uint8)
    unaligned = raw[1:].view(np.float32).reshape(a.shape)
    unaligned[...] = a
    for other in (swapped, unaligned, a.astype(np.float64), a.tolist()):
        out = np.empty_like(a)
        kernel([a, other], [out])
        close([out], [expected])
    double = np.empty(a.shape)
    kernel([a, a], [double])
    close([double], [expected])
    frozen = np.zeros_like(a)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        kernel([a, a], [frozen])
    assert not frozen.any()


def test_read_only_inputs_are_native() -> None:
    a = np.ones((4, 5), np.float32)
    a.flags.writeable = False
    native(fused(BLEND, ["float32"] * 2), [a, a], [np.empty_like(a)])


def test_errors() -> None:
    a = np.ones((4, 5), np.float32)
    kernel = fused(BLEND, ["float32"] * 2)
    with pytest.raises(ArgumentError, match="found 3 inputs and 1 outputs, expected 2 and 1"):
        kernel([a, a, a], [a])
    with pytest.raises(ShapeError, match=r"\(4, 6\)"):
        kernel([a, a], [np.ones((4, 6), np.float32)])
    with pytest.raises(ArgumentError, match="2 inputs, found 1 dtypes"):
        fused(BLEND, ["float32"])


def test_integers_are_left_to_numpy() -> None:
    total = build(lambda a, b: a + b * 2, 2)
    out = np.empty(3, np.int64)
    fused(total, ["int64", "int64"])([np.arange(3), np.arange(3)], [out])
    assert out.tolist() == [0, 3, 6]
    assert not elementwise.lowerable(build(e.maximum, 2), (np.dtype(bool), np.dtype(bool)))


def test_evaluate_takes_native_code_and_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    original = elementwise._fused
    monkeypatch.setattr(elementwise, "_fused", lambda *args: taken.append(1) or original(*args))
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((128, 128)).astype(np.float32), rng.standard_normal(128).astype(np.float32)
    close([evaluate(BLEND, [a, b])], [BLEND.numpy(a, b)])
    assert len(taken) == 1
    for few in (a[:2], a.astype(np.float64)):  # small; a dtype whose tanh NumPy does better
        assert evaluate(BLEND, [few, b]).dtype == few.dtype
    assert evaluate(BLEND, [a, 2.0]).dtype == np.float32
    assert len(taken) == 1
    expected = BLEND.numpy(a, b)
    assert evaluate(BLEND, [a, b], out=a) is a
    close([a], [expected])
    monkeypatch.setenv("TINYGRAD_LSTM_NATIVE", "0")
    assert evaluate(BLEND, [a, b]).dtype == np.float32 and len(taken) == 2


def test_evaluate_keeps_the_shapes_of_numpy() -> None:
    pair = build(lambda x, y: (e.sigmoid(x) * 2, e.sigmoid(y) * 2, x * y), 2)
    x, y = np.ones((128, 128), np.float32), np.ones(128, np.float32)
    assert [v.shape for v in evaluate(pair, [x, y])] == [v.shape for v in pair.numpy(x, y)]


def test_many_threads_on_one_kernel() -> None:
    inputs = [cell_inputs(16, 33, seed) for seed in range(4)]
    outputs = [[np.empty((16, 33), np.float32) for _ in range(4)] for _ in range(4)]
    kernel = fused(CELL, CELL_DTYPES)

    def work(k: int) -> None:
        for _ in range(200):
            kernel(inputs[k], outputs[k])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(4):
        close(outputs[k], CELL.numpy(*inputs[k]))


UNARY = ["negative", "absolute", "square", "sign", "tanh", "sigmoid", "exp", "softplus", "sqrt"]
BINARY = ["add", "subtract", "multiply", "maximum", "minimum", "divide"]


@st.composite
def programs(draw: st.DrawFn) -> Callable[..., tuple[e.Expr, ...]]:
    """A random function of two floats and a mask, with two outputs."""
    steps = draw(st.lists(st.tuples(st.sampled_from(UNARY + BINARY + ["where", "less"]), *[st.integers(0, 99)] * 3),
                          min_size=2, max_size=12))  # fmt: skip
    numbers = draw(st.lists(st.sampled_from([0.5, -1.0, 2, 0, 1.25]), min_size=1, max_size=3))

    def function(x: e.Expr, y: e.Expr, mask: e.Expr) -> tuple[e.Expr, ...]:
        values: list[Any] = [x, y, *numbers]
        for name, i, j, k in steps:
            a, b = values[i % len(values)], values[j % len(values)]
            condition = e.logical_and(mask, e.less(a, b))
            if name == "where":
                values.append(e.where(mask, a, b))
            elif name == "less":
                values.append(e.where(condition, values[k % len(values)], x))
            else:
                values.append(getattr(e, name)(*(a, b)[: LEAVES[name].arity]))
        return values[-1], values[-2]

    return function


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(programs())
def test_random_expressions(function: Callable[..., tuple[e.Expr, ...]]) -> None:
    expression = build(function, 3)
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-2, 2, (3, 21)), rng.uniform(-2, 2, 21)
    mask = rng.random((3, 1)) < 0.5
    # float64: what differs by rounding alone stays far from what is wrong
    outputs = [np.empty((3, 21), d) for d in expression.result_dtypes(["float64", "float64", "bool"])]
    native(fused(expression, ["float64", "float64", "bool"]), [x, y, mask], outputs)
    with np.errstate(all="ignore"):
        expected = expression.numpy(x, y, mask)
    for found, value in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(found, np.broadcast_to(value, found.shape), rtol=1e-9, atol=1e-12)
