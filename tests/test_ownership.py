"""Gradients are handed out without a copy where nobody else has them, and never where somebody does."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import ops
from tinygrad_lstm.kernels import pool

SIZES = [5, pool.SMALLEST]  # in the allocator's memory, in the pool's


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of gradients that had to be copied."""
    module: Any = sys.modules["tinygrad_lstm.leaves"]
    seen: list[tuple[int, ...]] = []
    copied = module.copied
    monkeypatch.setattr(module, "copied", lambda array, dtype: seen.append(array.shape) or copied(array, dtype))
    return seen


@pytest.mark.parametrize("size", SIZES)
def test_what_only_the_replay_has_is_not_copied(size: int, copies: list[Any], rng: Any) -> None:
    x = tg.tensor(rng.standard_normal(size), requires_grad=True)
    (x * x).sum().backward()
    np.testing.assert_array_equal(x.grad, 2.0 * x.numpy())
    assert copies == []
    w = tg.tensor(rng.standard_normal((size // 5, 5)), requires_grad=True)
    (w @ np.ones((5, 3))).sum().backward()
    np.testing.assert_array_equal(w.grad, np.full((size // 5, 5), 3.0))
    assert copies == []


@pytest.mark.parametrize("size", SIZES)
def test_what_is_shared_is(size: int, copies: list[Any], rng: Any) -> None:
    x, y = (tg.tensor(rng.standard_normal(size), requires_grad=True) for _ in range(2))
    weights = rng.standard_normal(size)
    ((x + y) * weights).sum().backward()
    assert copies
    np.testing.assert_array_equal(x.grad, weights)
    x.grad[:] = 0.0
    np.testing.assert_array_equal(y.grad, weights)


@pytest.mark.parametrize("size", SIZES)
def test_hooks_may_keep_what_they_see(size: int, rng: Any) -> None:
    x = tg.tensor(rng.standard_normal(size), requires_grad=True)
    kept = []
    a, b = x * 2.0, x * 3.0
    for value in (a, b, x):
        value.register_hook(lambda gradient: kept.append((gradient, gradient.numpy().copy())) and None)
    a.retain_grad()
    (a * a + b).sum().backward()
    x.grad[:] += 1.0
    a.grad[:] += 1.0
    assert len(kept) == 3
    for gradient, copy in kept:
        np.testing.assert_array_equal(gradient.numpy(), copy)


@pytest.mark.parametrize("size", SIZES)
def test_a_cotangent_of_the_user_stays_as_it_is(size: int, rng: Any) -> None:
    given = rng.standard_normal(size)
    before = given.copy()
    x = tg.tensor(rng.standard_normal(size), requires_grad=True)
    for function in (lambda x: x + x, lambda x: ops.reshape(x, (size,)) + x * 2.0, lambda x: x * x + x):
        for retain in (False, True):
            out = function(x)
            out.backward(given, retain_graph=retain)
            if retain:
                out.backward(given)
            np.testing.assert_array_equal(given, before)
            x.grad[:] = 0.0
            np.testing.assert_array_equal(given, before)


@pytest.mark.parametrize("size", SIZES)
def test_sums_of_many_shares(size: int, rng: Any) -> None:
    values = rng.standard_normal(size)
    x = tg.tensor(values, requires_grad=True)
    y = x * 2.0
    (y * y + y * 3.0 + ops.sin(y) + y).sum().backward()
    expected = 2.0 * (2 * 2 * values + 3.0 + np.cos(2 * values) + 1.0)
    np.testing.assert_allclose(x.grad, expected, rtol=1e-12, atol=1e-12)


def test_a_gradient_is_not_a_part_of_a_larger_array(rng: Any) -> None:
    """Parts of one cotangent are copied: else a gradient would keep all of it alive."""
    a, b = (tg.tensor(rng.standard_normal(3), requires_grad=True) for _ in range(2))
    weights = rng.standard_normal(6)
    for _ in range(6):  # general replays, then known ones
        a.grad = b.grad = None
        (ops.concatenate([a, b]) * weights).sum().backward()
        np.testing.assert_array_equal(np.concatenate([a.grad, b.grad]), weights)
        for gradient in (a.grad, b.grad):
            assert gradient.base is None or gradient.base.nbytes == gradient.nbytes


def test_gradients_are_in_c_order(rng: Any) -> None:
    """At the first backwards and in known replays, also where a rule gives a transposed view."""
    x = rng.standard_normal((7, 3))
    for _ in range(5):
        leaves = [tg.tensor(rng.standard_normal(shape), requires_grad=True) for shape in ((5, 3), (3, 5), (3, 7))]
        a, b, c = leaves
        (ops.square(x @ a.T) + ops.square(x @ b) + (c.T @ b)).sum().backward()
        assert [(leaf.grad.flags.c_contiguous, leaf.grad.flags.writeable) for leaf in leaves] == [(True, True)] * 3
