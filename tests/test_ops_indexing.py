"""Indexing in all of NumPy's forms, gathers and scatters, NumPy's own functions on tensors, dropout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_ops_numpy import arrays, same, silently

import tinygrad_lstm as tg
from tinygrad_lstm import ops

# ---------------------------------------------------------------------------- indexing


@settings(max_examples=200)
@given(st.data(), arrays(shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=1, max_side=4)))
def test_basic_and_advanced_indexing_with_its_gradient(data, x):
    basic = hnp.basic_indices(x.shape, allow_newaxis=True, allow_ellipsis=True)
    advanced = hnp.integer_array_indices(x.shape) if x.ndim else st.just(())
    mask = hnp.arrays(bool, x.shape)
    check_index(x, data.draw(basic | advanced | mask))


def check_index(x: np.ndarray, index: Any) -> None:
    expected = x[index]
    t = tg.tensor(x, requires_grad=True)
    out = t[index]
    same(out, expected)
    g = np.cos(np.arange(out.size)).reshape(out.shape)
    out.backward(g)
    scattered = np.zeros_like(x)
    np.add.at(scattered, index, g)
    np.testing.assert_allclose(t.grad, scattered, rtol=1e-14, atol=1e-14)
    v = np.sin(np.arange(x.size)).reshape(x.shape)
    same(tg.jvp(lambda a: a[index], (x,), (v,))[1], v[index])


I2 = np.array([[0, 2], [2, 2]])
FORMS = [
    2, -1, slice(None), slice(3, 0, -2), ..., None, (), (0, 1), (..., 0), (None, 1, ..., None), [0, 2, 0], [[0],
    [1]], (0, [1, 1]),
    ([0, 1], [1, 2]), (slice(None), [2, 0]), ([1, 0], slice(None), [0, 0]), (I2, 0), (0, I2), (I2, slice(1, 3)),
    (slice(1), None, I2),
    np.array([], int), [], True, False, np.int64(1), np.array(1), np.uint8(1), np.array([1, 0], np.uint64),
    (np.array([True, False, True]),), (np.array([True, False, True]), 0), (np.array([True, False, True]), [1, 0]),
    (slice(None), np.array([True, False, True, False])), (slice(2, 9), slice(-9, 2)), (I2, I2 - 3, ...),
]  # fmt: skip


@pytest.mark.parametrize("index", FORMS, ids=repr)
def test_index_forms(index):
    check_index(np.random.default_rng(0).standard_normal((3, 4, 2)), index)


def test_tensors_as_indices():
    x = np.arange(12.0).reshape(3, 4)
    t = tg.tensor(x)
    same(t[tg.tensor([2, 0])], x[[2, 0]])
    same(t[tg.tensor(1)], x[1])
    same(t[t > 5.0], x[x > 5.0])
    same(t[tg.tensor(1) : tg.tensor(3)], x[1:3])


@pytest.mark.parametrize(
    "index", [3, -4, (0, 4), [0, 5], (0, 0, 0), 1.5, [0.5], "a", np.ones(5, bool), (..., ...)], ids=repr
)
def test_bad_indices(index):
    with pytest.raises(tg.Error) as caught:
        tg.tensor(np.ones((3, 4)))[index]
    assert "only integers, slices" not in str(caught.value)


def test_take_one_hot_scatter_add():
    x, i = np.arange(12.0).reshape(3, 4), np.array([[0, 2], [-1, 1]])
    for axis in (None, 0, 1, -1):
        same(ops.take(x, i, axis), np.take(x, i, axis))
    same(ops.take_along_axis(x, i[:, :1].repeat(4, 1)[:1], 0), np.take_along_axis(x, i[:, :1].repeat(4, 1)[:1], 0))
    same(ops.one_hot([2, 0], 3), np.eye(3, dtype=np.float32)[[2, 0]])
    assert ops.one_hot(np.array([[1]]), 2, dtype=np.float64).dtype == np.float64
    expected = x.copy()
    np.add.at(expected, [0, 2, 0], np.ones((3, 4)))
    same(ops.scatter_add(x, [0, 2, 0], np.ones((3, 4))), expected)
    for bad in (lambda: ops.take(x, [3], 0), lambda: ops.take(x, [-4], 0), lambda: ops.one_hot([3], 3),
                lambda: ops.one_hot([-1], 3), lambda: ops.scatter_add(x, [3], 1.0)):  # fmt: skip
        with pytest.raises(tg.OutOfRangeError, match=r"3|-4|-1"):
            bad()
    with pytest.raises(tg.DTypeError):
        ops.take(x, [0.5], 0)


# ---------------------------------------------------------------------------- NumPy's own functions on tensors


def test_numpy_functions_are_the_ops():
    x = np.array([[0.1, 0.2], [0.3, 0.4]])
    t = tg.tensor(x, requires_grad=True)
    for f in (np.tanh, np.exp, np.abs, np.sum, np.mean, np.transpose, np.negative, np.max, np.cumsum, np.sqrt, np.ravel,
              lambda a: np.sum(a, axis=0, keepdims=True), lambda a: np.concatenate([a, a]),
              lambda a: np.where(a > 0.2, a, 0.0),
              lambda a: np.add(1.0, a), lambda a: np.multiply(x, a), lambda a: np.matmul(x, a),
              lambda a: np.reshape(a, (4,)),
              lambda a: np.clip(a, 0.2, 0.3), lambda a: np.einsum("ij->j", a), lambda a: np.stack([a, a]),
              lambda a: np.flip(a, 0),
              lambda a: np.squeeze(np.expand_dims(a, 0)), lambda a: np.maximum(a, 0.2), lambda a: np.power(a, 2),
              lambda a: np.dot(a, a),
              lambda a: np.moveaxis(a, 0, 1), lambda a: np.split(a, 2)[0], lambda a: np.argmax(a)):  # fmt: skip
        found = f(t)
        assert isinstance(found, tg.Tensor)
        same(found, f(x))
        assert found.requires_grad == (found.dtype.kind == "f")


def test_numpy_functions_without_a_counterpart_say_so():
    t = tg.tensor([1.0, 2.0], requires_grad=True)
    for f in (np.cbrt, np.sort, np.fft.fft, np.add.reduce, lambda a: np.add(a, a, out=np.zeros(2, np.float32))):
        with pytest.raises(tg.Error, match="numpy"):
            f(t)


def test_dropout():
    x = np.ones((200, 50), np.float32)
    tg.seed(5)
    y = ops.dropout(x, 0.25).numpy()
    assert set(np.unique(y)) == {np.float32(0.0), np.float32(1 / 0.75)}
    assert abs((y == 0).mean() - 0.25) < 0.02
    tg.seed(5)
    np.testing.assert_array_equal(ops.dropout(x, 0.25).numpy(), y)
    g = tg.Generator(1)
    assert (ops.dropout(x, 0.5, g).numpy() != ops.dropout(x, 0.5, g).numpy()).any()
    assert ops.dropout(x, 0.5, training=False).numpy().all()
    assert not ops.dropout(x, 1.0).numpy().any()
    for p in (-0.1, 1.5, float("nan")):
        with pytest.raises(tg.Error):
            ops.dropout(x, p)
    assert silently(lambda: ops.dropout(x, 0.0).numpy().all())


@pytest.mark.parametrize(
    "index",
    [
        lambda i: i, lambda i: (i,), lambda i: (i, ...), lambda i: (..., i), lambda i: (slice(None), i),
        lambda i: (slice(None), i, ...), lambda i: (..., i, slice(None)), lambda i: (i, slice(None), slice(None)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ids", [np.array([2, -1, 0, 2]), np.array([[1], [-3]], np.int32), np.array(1), []])
def test_rows_of_a_table(index: Any, ids: Any) -> None:
    """One array of integers and all of the other axes: a ``take``, which loops know."""
    x = np.random.default_rng(0).standard_normal((3, 3, 3))
    t = tg.tensor(x, requires_grad=True)
    with tg.Tape() as tape:
        found = t[index(ids)]
    assert [record.primitive.name for record in tape.records] == ["take"]
    ids = np.asarray(ids, np.intp)
    np.testing.assert_array_equal(found.numpy(), x[index(ids)])
    weights = np.random.default_rng(1).standard_normal(found.shape)
    (found * weights).sum().backward()
    expected = np.zeros_like(x)
    np.add.at(expected, index(ids), weights)
    np.testing.assert_allclose(t.grad, expected, rtol=1e-13)


@pytest.mark.parametrize("index", [lambda i: (i, 0), lambda i: (i, i), lambda i: (i, None), lambda i: (i, slice(1))])
def test_other_indices_with_an_array(index: Any) -> None:
    x, ids = np.arange(27.0).reshape(3, 3, 3), np.array([2, 0, -1])
    np.testing.assert_array_equal(tg.tensor(x)[index(ids)].numpy(), x[index(ids)])
    with pytest.raises(tg.OutOfRangeError, match="parts for an array"):
        tg.tensor(x)[(*index(ids), *(slice(None),) * 3)]
    with pytest.raises(tg.OutOfRangeError, match="3"):
        tg.tensor(x)[index(np.array([3]))]


@pytest.mark.parametrize("rows", [1, 65535, 65536, 65537, 70000])
def test_rows_of_a_large_table_get_their_gradients(rows: int, rng: np.random.Generator) -> None:
    """Indices are sorted as 16 bits where they fit."""
    ids = np.concatenate([rng.integers(-rows, rows, 500), [rows - 1, -rows, 0, rows - 1, -1]])
    table = tg.tensor(rng.standard_normal((rows, 2)), requires_grad=True)
    weights = rng.standard_normal((len(ids), 2))
    (ops.take(table, ids, axis=0) * weights).sum().backward()
    expected = np.zeros((rows, 2))
    np.add.at(expected, ids, weights)
    np.testing.assert_allclose(table.grad, expected, rtol=1e-12, atol=1e-12)
