"""tg.checkpoint: the same numbers, fewer kept values."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops


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


# ---------------------------------------------------------------------------- modules, and tensors without a gradient


def plainly(f: Any) -> Any:
    return f


def with_modules() -> tuple[Any, Any, dict[str, Any]]:
    layer = nn.Linear(2, 2).astype("f8")
    rng = np.random.default_rng(3)
    x = rng.standard_normal((3, 2))
    return layer, x, {name: rng.standard_normal(p.shape) for name, p in layer.named_parameters()}


def same(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert np.abs(expected[name].numpy()).max() > 0
        np.testing.assert_allclose(found[name].numpy(), expected[name].numpy(), rtol=1e-12)


def test_transforms_of_modules_go_through_a_checkpoint() -> None:
    layer, x, direction = with_modules()

    def loss(keep: Any) -> Any:
        return lambda m: (keep(m)(x) ** 2).sum()

    for f, g in ((loss(tg.checkpoint), loss(plainly)), (loss(lambda m: tg.checkpoint(lambda t: m(t))), loss(plainly))):
        same(tg.grad(f)(layer), tg.grad(g)(layer))
        same(tg.hvp(f, (layer,), (direction,))[1][0], tg.hvp(g, (layer,), (direction,))[1][0])
        tangents = [tg.jvp(h, (layer,), (direction,))[1].item() for h in (f, g)]
        assert tangents[0] == pytest.approx(tangents[1], rel=1e-12)
        assert tangents[1] != 0


def test_a_pullback_is_called_when_the_modules_own_parameters_are_back() -> None:
    layer, x, _ = with_modules()
    _, pullback = tg.vjp(lambda m: tg.checkpoint(m)(x), layer)
    _, plain = tg.vjp(lambda m: m(x), layer)
    seed = np.arange(6.0).reshape(3, 2)
    same(pullback(seed)[0], plain(seed)[0])
    # Nor does it matter that others stand in for them meanwhile.
    seen: list[Any] = []
    tg.grad(lambda m: (seen.append(pullback(seed)[0]), (m(x) ** 3).sum())[1])(layer)
    same(seen[0], plain(seed)[0])


def test_weights_that_were_dropped_for_a_call_are_dropped_again() -> None:
    class Outer(nn.Module):
        def __init__(self, keep: Any) -> None:
            super().__init__()
            self.cell, self.keep = nn.RNN(2, 3).astype("f8"), keep

        def forward(self, x: Any) -> Any:
            return self.keep(lambda t: self.cell(t)[0])(x)

    def gradients(keep: Any) -> dict[str, Any]:
        tg.seed(5)
        model = nn.WeightDrop(Outer(keep), p=0.4)
        (model(np.ones((4, 2, 2))) ** 2).sum().backward()
        return {name: tg.tensor(p.grad) for name, p in model.named_parameters()}

    same(gradients(tg.checkpoint), gradients(plainly))


def test_closed_over_tensors_without_requires_grad() -> None:
    _, x, _ = with_modules()
    rng = np.random.default_rng(4)
    w, v = tg.tensor(rng.standard_normal((2, 2))), rng.standard_normal((2, 2))

    def gradient(keep: Any, order: int) -> Any:
        with tg.Tape() as tape:
            value = (keep(lambda t: ops.tanh(t @ w))(x) ** 2).sum()
            for _ in range(order - 1):
                value = (tape.gradient(value, w) ** 2).sum()
        return tape.gradient(value, [w])[0]

    def of(keep: Any) -> Any:
        return lambda u: (keep(lambda t: ops.tanh(t @ u))(x) ** 2).sum()

    for order in (1, 2):
        np.testing.assert_allclose(gradient(tg.checkpoint, order).numpy(), gradient(plainly, order).numpy(), rtol=1e-12)
    assert tg.jvp(of(tg.checkpoint), (w,), (v,))[1].item() == pytest.approx(tg.jvp(of(plainly), (w,), (v,))[1].item())
    np.testing.assert_allclose(
        tg.hvp(of(tg.checkpoint), (w,), (v,))[1][0].numpy(), tg.hvp(of(plainly), (w,), (v,))[1][0].numpy(), rtol=1e-12
    )
