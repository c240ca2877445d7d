"""Memory budgets inside of tg.compile and in native loops: the numbers, and what is really kept."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops
from tinygrad_lstm.compiler import runner
from tinygrad_lstm.kernels import pool


def loss(layer: Any, x: Any) -> Any:
    y, (h, c) = layer(x)
    return ops.square(y).sum() + (h * c).sum()


def lstm(memory: Any, reverse: bool = False, dtype: Any = np.float64) -> Any:
    tg.seed(1)
    return nn.Recurrent(nn.LSTMCell(3, 4, dtype=dtype), reverse=reverse, memory=memory)


def assert_close(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13 * max(1.0, np.abs(b).max()))


# 0.04 is less than any schedule with equal segments takes: some steps run three times.
@pytest.mark.parametrize("memory", [0.5, 0.15, 0.04, 3000])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_of_any_order(memory, reverse, rng):
    x = rng.standard_normal((80, 2, 3))
    v = rng.standard_normal(x.shape)
    results = []
    for budget in (None, memory):
        layer = lstm(budget, reverse)
        of_x = lambda x, layer=layer: loss(layer, x)
        value, (of_layer, gradient) = tg.compile(tg.value_and_grad(loss, argnums=(0, 1)))(layer, x)
        found = [value.numpy(), gradient.numpy(), *(of_layer[name].numpy() for name in sorted(of_layer))]
        f, given = tg.compile(of_x), tg.tensor(x, requires_grad=True)
        for _ in range(3):  # the first backward runs the forward half again, later ones find residuals
            given.zero_grad()
            f(given).backward()
            found.append(given.grad)
        found.append(tg.compile(lambda x, of_x=of_x: tg.hvp(of_x, (x,), (v,))[1][0])(x).numpy())
        found.append(tg.compile(lambda x, of_x=of_x: tg.jvp(of_x, (x,), (v,))[1])(x).numpy())
        found.append(tg.grad(lambda x, f=f: ops.square(tg.grad(f)(x)).sum())(x).numpy())
        results.append(found)
    assert_close(results[1], results[0])


def test_some_gradients_only_and_an_integer_in_the_carry(rng):
    x, w = rng.standard_normal((40, 2, 3)), rng.standard_normal((3, 3))

    def f(w: Any, x: Any, memory: Any) -> Any:
        body = lambda c, v: ((ops.tanh(c[0] @ w + v), c[1] + 1), c[0])
        (h, n), ys = ops.scan(body, (np.zeros((2, 3)), np.zeros((), np.int64)), x, memory=memory)
        return ys[30].sum() + (h * n).sum()

    for argnums in ((0,), (1,), (0, 1)):
        found, expected = (
            tg.compile(tg.grad(lambda w, x, m=m: f(w, x, m), argnums=argnums))(w, x) for m in (0.2, None)
        )
        assert_close([t.numpy() for t in found], [t.numpy() for t in expected])


@pytest.mark.parametrize("memory", [0.3, 0.1, 0.02])
def test_what_runs_is_what_the_plan_says(memory, monkeypatch):
    ran = {False: 0, True: 0}
    plain = runner.run_loop

    def counted(plan: Any, operands: Any, reverse: bool) -> Any:
        ran[reverse] += plan.steps
        return plain(plan, operands, reverse)

    monkeypatch.setattr(runner, "run_loop", counted)
    layer, steps = lstm(memory), 300
    (plan,) = layer.memory_plan(steps, 2)
    f = tg.compile(tg.grad(loss))
    f(layer, np.ones((steps, 2, 3)))
    simple = plan.kept == plan.segments - 1  # one level: the carries are kept from the forward pass
    last = plan.actions[-1].stop if simple else 0
    again = plan.recomputed + (plan.longest if simple else steps)  # the residuals of no segment are kept
    assert ran == {False: steps + again, True: steps} and (last <= plan.longest or not simple)


@pytest.mark.parametrize("native", [False, True])
def test_memory_of_a_compiled_gradient_is_what_the_plan_says(native, monkeypatch):
    monkeypatch.setenv("TINYGRAD_LSTM_COMPILE", "always" if native else "never")
    steps, width = 400, 64
    layer = nn.LSTM(4, width, dtype=np.float64)
    x = np.random.default_rng(0).standard_normal((steps, 1, 4))

    def most(memory: Any) -> int:
        layer.memory = memory
        f = tg.compile(tg.grad(lambda layer, x: layer(x)[0].sum()))
        f(layer, x)
        pool.clear()
        gc.collect()
        tracemalloc.start()
        try:
            f(layer, x)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    y = steps * width * 8
    everything = most(None)
    for fraction in (0.1, 0.03):
        layer.memory = fraction
        plan = layer.memory_plan(steps, 1)
        assert plan.peak <= fraction * plan.whole
        # y and its cotangent, the gradients of the parameters (native loops pack them too), the work on a piece.
        around = 3 * y + (5 if native else 3) * 4 * width * (width + 6) * 8 + plan[0].longest * 16 * width * 8 + 80_000
        found = most(fraction)
        assert found <= plan.peak + around
        assert everything - found > 0.6 * (plan.whole - plan.peak)


def test_a_budget_that_cannot_be_met_names_the_layer():
    layer = nn.LSTM(3, 4, memory=8)
    for f in (tg.compile(lambda x: layer(x)[0].sum()), lambda x: layer(x)[0].sum(), lambda x: layer.memory_plan(50, 2)):
        with pytest.raises(tg.ArgumentError, match=r"LSTM: memory=8 bytes do not suffice"):
            f(np.ones((50, 2, 3), np.float32))
    model = nn.Sequential(nn.Stack([nn.GRUCell(3, 4), nn.GRUCell(4, 4)], memory=20))
    with pytest.raises(tg.ArgumentError, match=r"Stack '0': memory=10 bytes"):
        model(np.ones((50, 2, 3), np.float32))
    with pytest.raises(tg.ArgumentError, match=r"^scan: memory=3 bytes"):
        ops.scan(
            lambda c, x: (ops.tanh(c * x), c), tg.tensor(1.0, requires_grad=True), np.ones(9, np.float32), memory=3
        )


def test_one_byte_is_not_all_of_it():
    layer = lstm(1.0)
    f = tg.compile(lambda x: layer(x)[0].sum())
    f(np.ones((9, 2, 3)))
    layer.memory = 1
    with pytest.raises(tg.ArgumentError, match="memory=1 bytes"):
        f(np.ones((9, 2, 3)))


def test_scans_that_take_each_others_place():
    # The forward scan of a first derivative is merged with that of a second one, which stands further behind.
    layer = lstm(None)
    x = np.random.default_rng(0).standard_normal((9, 2, 3))
    f = lambda x: ops.square(tg.grad(lambda z: loss(layer, z))(x)).sum()
    assert_close([tg.compile(tg.grad(f))(x).numpy()], [tg.grad(f)(x).numpy()])


# ---------------------------------------------------------------------------- native loops


@pytest.fixture
def always(monkeypatch):
    """Native loops whatever their size; two and more threads share out even small batches."""
    monkeypatch.setenv("TINYGRAD_LSTM_COMPILE", "always")
    before = tg.get_num_threads()
    yield
    tg.set_num_threads(before)


def gradients(layer: Any, x: np.ndarray) -> list[np.ndarray]:
    layer.zero_grad()
    given = tg.tensor(x, requires_grad=True)
    y, _ = layer(given)
    ops.square(y).sum().backward()
    return [y.numpy(), given.grad, *(p.grad for p in layer.parameters())]


def test_native_segments_keep_less_and_are_the_same_bits_for_any_number_of_threads(always, rng):
    x = rng.standard_normal((90, 8, 3)).astype(np.float32)
    layer = lstm(0.2, dtype=np.float32)
    (lean,) = layer.memory_plan(90, 8)
    found = []
    for threads in (1, 2, 3):
        tg.set_num_threads(threads)
        found.append(gradients(layer, x))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
    layer.memory = None
    (plain,) = layer.memory_plan(90, 8)
    assert lean.residual < plain.residual and lean.whole == plain.whole
    assert lean.peak <= 0.2 * lean.whole
    for a, b in zip(found[0], gradients(layer, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_pieces_of_a_native_loop_are_native(monkeypatch, rng):
    # A piece of one step has too little work to be native by itself; numbers must not depend on where borders are.
    monkeypatch.setenv("TINYGRAD_LSTM_COMPILE", "auto")
    monkeypatch.setenv("TINYGRAD_LSTM_NATIVE", "1")
    kinds = set()
    plain = runner.run_loop

    def seen(plan: Any, *rest: Any) -> Any:
        kinds.add(plan.compiled)
        return plain(plan, *rest)

    monkeypatch.setattr(runner, "run_loop", seen)
    layer = lstm(0.1, dtype=np.float32)
    gradients(layer, rng.standard_normal((97, 2, 3)).astype(np.float32))
    assert kinds == {True}
