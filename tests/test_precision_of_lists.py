"""Python floats, alone and in lists, are as precise as the tensors beside them (0.1 is not float32(0.1))."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import ops

L = [0.1, 0.7]
A = np.array([0.3, 0.9])

OPERATIONS: dict[str, tuple[Any, Any]] = {
    "add": (lambda t: t + L, A + L), "reflected": (lambda t: L - t, L - A),
    "multiply": (lambda t: ops.multiply(t, L), A * L),
    "power": (lambda t: t**L, A**L),
    "matmul": (lambda t: t @ L, A @ L), "rmatmul": (lambda t: L @ t, L @ A),
    "dot": (lambda t: ops.dot(L, t), A @ L), "inner": (lambda t: ops.inner(t, L), A @ L),
    "outer": (lambda t: ops.outer(t, L), np.outer(A, L)),
    "outer_number": (lambda t: ops.outer(t, 0.1), np.outer(A, 0.1)),
    "tensordot": (lambda t: ops.tensordot(t, L, 1), A @ L), "einsum": (lambda t: ops.einsum("i,i", t, L), A @ L),
    "where": (lambda t: ops.where([True, False], t, L), np.where([True, False], A, L)),
    "concatenate": (lambda t: ops.concatenate([L, t]), np.concatenate([L, A])),
    "stack": (lambda t: ops.stack([t, L]), np.stack([A, L])), "numpy": (lambda t: np.add(t, L), A + L),
    "clip": (lambda t: ops.clip(t, [0.1, 0.2], [0.2, 0.7]), np.array([0.2, 0.7])),
    "scatter_add": (lambda t: ops.scatter_add(t, [0, 1], L), A + L),
    "maximum": (lambda t: ops.maximum(t, L), A.clip(L)),
}  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_lists_beside_float64(name, compiled):
    function, expected = OPERATIONS[name]
    found = (tg.compile(function) if compiled else function)(tg.tensor(A))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-15)


@pytest.mark.parametrize("name", OPERATIONS)
def test_lists_beside_float32(name):
    function, expected = OPERATIONS[name]
    found = function(tg.tensor(A, dtype=np.float32))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_comparisons_and_integers():
    assert (tg.tensor(np.array(L)) == L).tolist() == [True, True]
    found = tg.tensor([1, 2]) + L  # NumPy: int64 with float64
    np.testing.assert_array_equal(found.numpy(), np.array([1, 2]) + L)
    assert (tg.tensor([1, 2], dtype=np.int8) + L).dtype == np.float32
    assert ops.add(0.1, L).dtype == np.float32  # nothing says otherwise
    assert ops.where([1, 0], tg.tensor([1.0, 2.0]), L).dtype == np.float32


def test_cotangents_and_tangents():
    t = tg.tensor(A, requires_grad=True)
    ops.sum(t * 1).backward(0.1)
    np.testing.assert_array_equal(t.grad, [0.1, 0.1])
    t.grad = None
    (t * 1).backward(L)
    np.testing.assert_array_equal(t.grad, L)
    assert tg.vjp(ops.sum, A)[1](0.1)[0].tolist() == [0.1, 0.1]
    assert tg.vjp(lambda x: x * 1, A)[1](L)[0].tolist() == L
    assert tg.jvp(lambda a: a * 1, (np.float64(1),), (0.1,))[1].item() == 0.1
    assert tg.jvp(lambda a, b: a[0] * b, ([A], A), ([np.zeros(2)], np.array(L)))[1].tolist() == (A * L).tolist()
    assert tg.hvp(lambda x: (x * x).sum(), (A,), (L,))[1][0].tolist() == [0.2, 1.4]
    with tg.Tape() as tape:
        y = t * 1
    assert tape.gradient(y, t, L).tolist() == L


def test_a_gradient_that_a_hook_returns():
    t = tg.tensor(A, requires_grad=True)
    y = t * 1
    y.register_hook(lambda g: L)
    y.sum().backward()
    assert t.grad.tolist() == L


def test_a_cotangent_with_a_past_keeps_it():
    f = lambda c: tg.vjp(lambda x: x * x, A)[1](c.astype(np.float32))[0].sum()
    np.testing.assert_allclose(tg.grad(f)(np.ones(2)).numpy(), 2 * A, rtol=1e-6)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("eager", [False, True])
def test_what_a_scan_body_returns(steps, eager):
    def f() -> Any:
        return ops.scan(lambda c, x: (0.1, [0.1, 0.7]), np.zeros(()), np.ones((steps, 2)))

    if eager:
        with tg.eager():
            carry, ys = f()
    else:
        carry, ys = f()
    assert carry.dtype == ys[0].dtype == ys[1].dtype == np.float64
    assert carry.item() == (0.1 if steps else 0.0)
    np.testing.assert_array_equal(np.array(ys), [[0.1] * steps, [0.7] * steps])
