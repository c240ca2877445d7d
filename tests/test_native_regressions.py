"""Loops that native code once got wrong, each against the loop step by step in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from native_cells import runs  # noqa: F401  (a fixture)

import tinygrad_lstm as tg
from tinygrad_lstm import ops
from tinygrad_lstm.tree import flatten

STEPS, B, H = 4, 3, 5


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape)


def square_product(c: Any, x: Any, w: Any) -> Any:
    new = ops.tanh(ops.einsum("bi,ij->bj", c, w) + x)
    return new, new


def transposed_product(c: Any, x: Any, w: Any) -> Any:
    new = ops.tanh(ops.einsum("bi,ji->bj", c, w) + x)
    return new, new


def slice_of_a_matrix(c: Any, x: Any, w: Any) -> Any:
    new = ops.tanh(c @ w[::-1, ::-1] + c @ w.T + x)
    return new, new


def no_carry(c: Any, x: Any, w: Any) -> Any:
    return c, ops.tanh(x) * w[0]


def counted(c: Any, x: Any, w: Any) -> Any:
    return c, ops.tanh(x * w[0])


def two_axes(c: Any, x: Any, w: Any) -> Any:
    new = ops.tanh(c + x + ops.sum(c * x, axis=(2, 3), keepdims=True) + ops.logsumexp(x, axis=(2, 3), keepdims=True))
    return new, new


def last_axis_of_one(c: Any, x: Any, w: Any) -> Any:
    new = ops.tanh(c + ops.max(c * x, axis=2, keepdims=True))
    return new, new


def unsplit_two_axes(c: Any, x: Any, w: Any) -> Any:
    new = ops.tanh(c + ops.sum(c * x, axis=(1, 2), keepdims=True) + ops.mean(c, axis=0))
    return new, new


def broadcast_back(c: Any, x: Any, w: Any) -> Any:
    new = ops.tanh(c * (x[:, :, :1, :1] * w[:2, :1, None]))
    return new, new


CASES = {
    "einsum, square": (square_product, draw(B, H), draw(STEPS, B, H)),
    "einsum, transposed": (transposed_product, draw(B, H), draw(STEPS, B, H)),
    "a matrix turned round": (slice_of_a_matrix, draw(B, H), draw(STEPS, B, H)),
    "no carry": (no_carry, (), draw(STEPS, B, H)),
    "a carry of None": (no_carry, None, draw(STEPS, B, H)),
    "a carry of integers": (counted, np.arange(B), draw(STEPS, B, H)),
    "two axes at once": (two_axes, draw(B, 2, 3, 4), draw(STEPS, B, 2, 3, 4)),
    "a last axis of length 1": (last_axis_of_one, draw(B, 2, 3, 1), draw(STEPS, B, 2, 3, 1)),
    "two axes, rows mixed": (unsplit_two_axes, draw(B, 2, 3), draw(STEPS, B, 2, 3)),
    "broadcasting undone": (broadcast_back, draw(B, 2, 3, 4), draw(STEPS, B, 2, 3, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_against_the_loop_step_by_step(name: str, runs: list[bool]) -> None:  # noqa: F811
    body, init, steps = CASES[name]

    def outcome() -> list[np.ndarray]:
        x, w = tg.tensor(steps, requires_grad=True), tg.tensor(draw(H, H) / 4, requires_grad=True)
        start = init
        if isinstance(init, np.ndarray) and init.dtype.kind == "f":
            start = tg.tensor(init, requires_grad=True)
        carry, ys = ops.scan(lambda c, row: body(c, row, w), start, x)
        leaves = flatten((carry, ys))[0]
        loss = ops.sum(ops.sin(ys))
        loss.backward()
        found = [leaf.numpy().copy() for leaf in leaves]
        sources = [x, w, start] if isinstance(start, tg.Tensor) else [x, w]
        return found + [t.grad.copy() for t in sources if t.grad is not None]

    natively = outcome()
    assert runs
    with tg.eager():
        expected = outcome()
    assert len(natively) == len(expected)
    for a, b in zip(natively, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("f", [ops.softmax, ops.log_softmax])
def test_a_softmax_of_no_elements(f: Any, runs: list[bool]) -> None:  # noqa: F811
    """Over an empty batch: there is no maximum to subtract."""
    x = tg.tensor(np.zeros((3, 0, 2)), requires_grad=True)
    _, ys = ops.scan(lambda h, v: (ops.tanh(f(h, axis=0) + v),) * 2, np.zeros((0, 2)), x)
    ys.sum().backward()
    assert ys.shape == x.grad.shape == (3, 0, 2)


def test_integers_beyond_2_to_the_53_are_rounded_on_the_way_through_a_float() -> None:
    x = np.array([2**53 + 1])
    compiled = tg.compile(lambda t: ops.add(t.astype(np.float64).astype(np.int64), 0))
    assert compiled(x).tolist() == (x.astype(np.float64).astype(np.int64)).tolist()


@pytest.mark.parametrize("start", [(), {}, None])
def test_a_loop_without_a_carry_of_which_everything_leaves(start: Any, runs: Any, rng: Any) -> None:  # noqa: F811
    """Nothing is left to do in the loop, forward or backward."""
    w = tg.tensor(0.1 * rng.standard_normal((64, 64)), requires_grad=True)
    x = tg.tensor(rng.standard_normal((6, 4, 64)), requires_grad=True)

    def both() -> list[np.ndarray]:
        w.grad = x.grad = None
        _, y = ops.scan(lambda c, v: (c, (ops.tanh(v @ w), v @ ops.tanh(v).T)), start, x)
        (y[0].sum() + (y[1] * y[1]).sum()).backward()
        return [y[0].numpy(), y[1].numpy(), w.grad, x.grad]

    found = both()
    with tg.eager():
        expected = both()
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_results_that_turn_out_to_be_one_value(runs: Any) -> None:  # noqa: F811
    """A softmax, and the same one written out: every result is an array of its own, and filled."""
    w, x = draw(H, H), draw(STEPS, B, H)

    def body(c: Any, t: Any) -> Any:
        z = c @ w + t
        weights = ops.exp(z - ops.max(z, axis=-1, keepdims=True))
        return ops.tanh(z), (ops.softmax(z), weights / ops.sum(weights, axis=-1, keepdims=True), ops.softmax(z))

    _, ys = ops.scan(body, np.zeros((B, H)), x)
    assert runs
    with tg.eager():
        _, expected = ops.scan(body, np.zeros((B, H)), x)
    for found, wanted in zip(ys, expected, strict=True):
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=1e-10)
    assert not np.shares_memory(ys[0].numpy(), ys[1].numpy())


@pytest.mark.parametrize("name", ["sum", "mean", "max", "min", "prod", "logsumexp", "norm", "var"])
def test_reductions_of_a_single_number(name: str, runs: Any) -> None:  # noqa: F811
    reduction = getattr(ops, name)

    def f(w: Any, x: Any) -> Any:
        def body(c: Any, t: Any) -> Any:
            counted = ops.sum((t > 0).astype(np.int32)) + ops.max((t * 10).astype(np.int32))
            return ops.tanh(c * 0.5 + reduction(w * t + c) * 0.3 + 0.01 * counted), c

        carry, ys = ops.scan(body, np.array(0.3), x)
        return carry + ys.sum()

    args = np.array(1.3), np.array([0.5, -1.2, 0.7, 0.9])
    found = tg.grad(f, (0, 1))(*args)
    assert runs
    with tg.eager():
        expected = tg.grad(f, (0, 1))(*args)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-10)
