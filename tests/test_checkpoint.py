"""tg.checkpoint: the same numbers, fewer kept values."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import ops


def layer(x: Any, w: Any) -> Any:
    return ops.tanh(ops.matmul(x, w)) + ops.sigmoid(x)


def pair() -> tuple[tg.Tensor, tg.Tensor]:
    rng = np.random.default_rng(1)
    return (tg.tensor(rng.standard_normal((4, 3)), requires_grad=True),
            tg.tensor(rng.standard_normal((3, 3)), requires_grad=True))  # fmt: skip


def test_values_and_gradients_are_the_same_bits():
    x, w = pair()
    y = layer(layer(x, w), w).sum()
    y.backward()
    u, v = pair()
    z = tg.checkpoint(layer)(tg.checkpoint(layer)(u, v), v).sum()
    assert z.item() == y.item()
    z.backward()
    np.testing.assert_array_equal(u.grad, x.grad)
    np.testing.assert_array_equal(v.grad, w.grad)


def test_closures_get_gradients():
    x, w = pair()
    layer(x, w).sum().backward()
    u, v = pair()
    scale = tg.tensor(np.array(2.0), requires_grad=True)
    tg.checkpoint(lambda t: layer(t, v) * (scale * 0.5))(u).sum().backward()
    np.testing.assert_allclose(u.grad, x.grad, rtol=1e-15)
    np.testing.assert_allclose(v.grad, w.grad, rtol=1e-15)
    assert scale.grad is not None


def test_a_closure_over_a_computed_value():
    x = tg.tensor(np.array(2.0), requires_grad=True)
    h = x * x
    tg.checkpoint(lambda t: t * h)(x * 1.0).backward()
    assert x.grad == 12.0


def test_trees_keywords_and_constants():
    def f(state: dict[str, Any], scale: float, *, shift: Any = 0.0) -> dict[str, Any]:
        return {"h": state["h"] * scale + shift, "c": (state["c"],)}

    h, c, shift = (tg.tensor(np.array(float(k)), requires_grad=True) for k in (1, 2, 3))
    out = tg.checkpoint(f)({"h": h, "c": c}, 5.0, shift=shift)
    assert (out["h"].item(), out["c"][0].item()) == (8.0, 2.0)
    (out["h"] * 2.0 + out["c"][0] * 3.0).backward()
    assert (h.grad, c.grad, shift.grad) == (10.0, 3.0, 2.0)


def test_only_one_of_several_outputs_is_used():
    x = tg.tensor(np.array(2.0), requires_grad=True)
    _, b = tg.checkpoint(lambda t: (t * t, t * 5.0))(x)
    b.backward()
    assert x.grad == 5.0


def test_dropout_draws_the_same_masks_and_the_stream_goes_on_undisturbed():
    x = tg.tensor(np.ones(50), requires_grad=True)

    def noisy(t: Any) -> Any:
        return ops.dropout(t * 2.0, 0.5)

    def run(f: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tg.seed(3)
        x.zero_grad()
        y = f(x)
        later = ops.dropout(x.detach(), 0.5)
        y.sum().backward()
        assert (ops.dropout(x.detach(), 0.5).numpy() != later.numpy()).any()
        return y.numpy().copy(), x.grad, later.numpy()

    for plain, saved in zip(run(noisy), run(tg.checkpoint(noisy)), strict=True):
        np.testing.assert_array_equal(plain, saved)


def test_second_order_and_every_mode():
    x, v = np.array([0.5, -1.0]), np.array([1.0, 2.0])
    f = lambda t: (ops.tanh(t) * ops.exp(t)).sum()
    g = tg.checkpoint(f)
    np.testing.assert_allclose(tg.hessian(g)(x).numpy(), tg.hessian(f)(x).numpy(), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(tg.hvp(g, (x,), (v,))[1][0].numpy(), tg.hvp(f, (x,), (v,))[1][0].numpy(), rtol=1e-12)
    np.testing.assert_allclose(tg.jvp(g, (x,), (v,))[1].item(), tg.jvp(f, (x,), (v,))[1].item(), rtol=1e-13)
    assert tg.gradcheck(g, x, order=2)
    assert tg.gradcheck(tg.checkpoint(lambda t: tg.checkpoint(f)(t) * 2.0), x, order=2)


def test_without_a_gradient_it_is_the_function():
    calls = []

    @tg.checkpoint
    def f(t: Any) -> Any:
        """Doc."""
        calls.append(1)
        return t * 2.0

    with tg.no_grad():
        assert f(np.array([1.0])).tolist() == [2.0]
    assert f(tg.tensor([1.0])).tolist() == [2.0]
    assert len(calls) == 2
    assert f.__doc__ == "Doc."
    with pytest.raises(tg.DTypeError):
        tg.checkpoint(lambda t: 3.0)(tg.tensor(1.0, requires_grad=True))


def test_a_changed_closure_is_noticed():
    w = tg.tensor(np.array(2.0), requires_grad=True)
    x = tg.tensor(np.array(3.0), requires_grad=True)
    y = tg.checkpoint(lambda t: t * w)(x)
    w.data = np.array(100.0)
    with pytest.raises(tg.GraphError, match="changed"):
        y.backward()
    assert x.grad is None


def test_memory_is_freed_by_reference_counts_alone():
    gc.collect()
    gc.disable()
    try:
        x = tg.tensor(np.ones(1000), requires_grad=True)
        y = tg.checkpoint(lambda t: ops.exp(ops.sin(t)))(x * 2.0)
        seen = weakref.ref(x)
        y.sum().backward()
        del x, y
        assert seen() is None
    finally:
        gc.enable()


def peak_of_forward(f: Any) -> int:
    x = tg.tensor(np.ones(20_000), requires_grad=True)
    tracemalloc.start()
    y = x
    for _ in range(5):
        y = f(y)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    y.sum().backward()
    assert x.grad is not None
    return kept


def test_intermediate_values_are_not_kept():
    def deep(t: Any) -> Any:
        for _ in range(10):
            t = ops.sin(t)
        return t

    plain, saved = peak_of_forward(deep), peak_of_forward(tg.checkpoint(deep))
    assert plain > 50 * 160_000
    assert saved < 7 * 160_000
