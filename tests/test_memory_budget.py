"""Scans and recurrent layers within a memory budget."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cells import B, H, body_of, recipes, tensors
from cells import run as run_body
from hypothesis import given, settings
from hypothesis import strategies as st

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops
from tinygrad_lstm.compiler import runner
from tinygrad_lstm.kernels import pool

FRACTIONS = (0.6, 0.3, 0.1)

# ---------------------------------------------------------------------------- scans


def cell(t: dict[str, Any]) -> Callable[..., Any]:
    def body(carry: Any, x: Any) -> Any:
        h, n = carry
        early = ops.exp(ops.sin(h * t["row"]))
        h = ops.tanh(x @ t["W"] + h @ t["U0"] + t["bias"]) * 0.9 + 0.1 * h
        return (h, n + 1), {"early": early, "h": h, "gate": ops.sigmoid(h) * t["row"], "n": n}

    return body


def scanned(t: dict[str, Any], memory: Any, **options: Any) -> list[np.ndarray]:
    """Values and gradients of a scan with an integer in its carry."""
    for leaf in t.values():
        leaf.zero_grad()
    counter = np.zeros(B, np.int64)
    (h, n), ys = ops.scan(cell(t), (t["h"], counter), t["x"], memory=memory, **options)
    ((h * 3.0).sum() + ops.square(ys["h"]).sum() + ops.sin(ys["gate"]).sum() + ys["early"].sum()).backward()
    values = [h.numpy(), n.numpy(), *(ys[key].numpy() for key in sorted(ys))]
    return [*values, *(t[key].grad for key in ("x", "h", "W", "U0", "bias", "row"))]


def assert_same(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * max(1.0, np.abs(b).max(initial=0.0)))


OPTIONS: list[dict[str, Any]] = [
    {}, {"reverse": True}, {"lengths": [19, 0, 7]}, {"lengths": [3, 19, 8], "reverse": True},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("memory", [*FRACTIONS, 1.0, 700, 10**9])
def test_the_same_numbers(memory, options):
    t = tensors(3, 19)
    expected = scanned(t, None, **options)
    assert_same(scanned(t, memory, **options), expected)


@given(recipes(), st.integers(0, 1000), st.integers(1, 24), st.sampled_from(FRACTIONS), st.booleans(), st.booleans())
@settings(max_examples=25)
def test_random_bodies(recipe, seed, steps, memory, reverse, padded):
    t = tensors(seed, steps)
    lengths = [steps, steps // 2, 0] if padded and not any(step[1] in ("batch_mean",) for step in recipe) else None
    options: dict[str, Any] = {"reverse": reverse, "lengths": lengths}
    values, gradients = run_body(body_of(recipe, t), t, **options)
    try:
        found, found_gradients = run_body(body_of(recipe, t), t, memory=memory, **options)
    except tg.ArgumentError as error:  # a short loop cannot be cut that small
        least = int(str(error).split("at least ")[1].split()[0])
        found, found_gradients = run_body(body_of(recipe, t), t, memory=least, **options)
    assert_same(found, values)
    assert_same(found_gradients.values(), gradients.values())


@pytest.mark.parametrize("memory", FRACTIONS)
def test_no_xs_no_ys_and_no_carry(memory):
    w = tg.tensor(np.linspace(0.1, 0.9, 4), requires_grad=True)
    x = tg.tensor(np.linspace(-1.0, 1.0, 80).reshape(20, 4), requires_grad=True)

    def grads(memory: Any) -> list[np.ndarray]:
        w.zero_grad()
        x.zero_grad()
        c, _ = ops.scan(lambda c, _: (ops.sin(c * w), None), np.ones(4), None, length=20, memory=memory)
        _, y = ops.scan(lambda c, v: ((), ops.exp(v * w)), (), x, memory=memory)
        (c.sum() + y.sum()).backward()
        return [w.grad, x.grad]

    assert_same(grads(memory), grads(None))


def test_no_steps_and_one_step():
    for steps in (0, 1):
        t = tensors(1, steps)
        assert_same(scanned(t, 1.0), scanned(t, None))


def test_some_cotangents_and_some_gradients_only():
    t = tensors(5, 18)
    for pick in (lambda h, ys: h.sum(), lambda h, ys: ys["gate"].sum(), lambda h, ys: ops.square(ys["h"][3]).sum()):
        for names in (["U0"], ["h", "row"], ["x"]):

            def f(*chosen: Any, names: Any = names, pick: Any = pick, memory: Any = None) -> Any:
                every = {**t, **dict(zip(names, chosen, strict=True))}
                (h, _), ys = ops.scan(cell(every), (every["h"], np.zeros(B, np.int64)), every["x"], memory=memory)
                return pick(h, ys)

            every = tuple(range(len(names)))
            chosen = [t[name] for name in names]
            expected = tg.grad(f, every)(*chosen)
            found = tg.grad(lambda *a, f=f: f(*a, memory=0.2), every)(*chosen)
            assert_same([g.numpy() for g in found], [g.numpy() for g in expected])


def test_a_second_backward_and_a_tape_run_it_again():
    t = tensors(2, 21)
    (h, _), ys = ops.scan(cell(t), (t["h"], np.zeros(B, np.int64)), t["x"], memory=0.1)
    loss = ops.square(ys["h"]).sum() + h.sum()
    loss.backward(retain_graph=True)
    first = {name: t[name].grad.copy() for name in ("x", "W", "bias")}
    loss.backward()
    for name, gradient in first.items():
        np.testing.assert_array_equal(t[name].grad, 2.0 * gradient)
    with tg.Tape() as tape:
        (h, _), ys = ops.scan(cell(t), (t["h"], np.zeros(B, np.int64)), t["x"], memory=0.1)
        loss = ops.square(ys["h"]).sum() + h.sum()
    for _ in range(2):
        for found, name in zip(tape.gradient(loss, [t["x"], t["W"], t["bias"]]), ("x", "W", "bias"), strict=True):
            np.testing.assert_allclose(found.numpy(), first[name], rtol=1e-12, atol=1e-13)


def test_residuals_that_were_not_kept_are_made_again():
    t = tensors(2, 21)
    expected = scanned(t, None)
    for leaf in t.values():
        leaf.zero_grad()
    (h, _), ys = ops.scan(cell(t), (t["h"], np.zeros(B, np.int64)), t["x"], memory=0.3)
    ready = h._node.record.saved[-1].segments._ready
    carries, kept, slots = ready.pop()
    ready.append((carries, [arrays[1:] for arrays in kept], slots[1:]))
    ((h * 3.0).sum() + ops.square(ys["h"]).sum() + ops.sin(ys["gate"]).sum() + ys["early"].sum()).backward()
    assert_same([t[key].grad for key in ("x", "h", "W", "U0", "bias", "row")], expected[-6:])


def test_second_order_and_forward_mode():
    t = tensors(4, 6)

    def loss(u: Any, x: Any, memory: Any = 0.4) -> Any:
        (h, _), ys = ops.scan(cell({**t, "U0": u}), (t["h"], np.zeros(B, np.int64)), x, memory=memory)
        return ops.square(ys["gate"]).sum() + (h * h).sum()

    tg.gradcheck(loss, t["U0"], t["x"], order=2)
    at, v = (t["U0"], t["x"]), (np.ones((H, H)), np.ones(t["x"].shape))
    plain = lambda u, x: loss(u, x, None)
    for found, expected in zip(tg.hvp(loss, at, v)[1], tg.hvp(plain, at, v)[1], strict=True):
        np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(tg.jvp(loss, at, v)[1].item(), tg.jvp(plain, at, v)[1].item(), rtol=1e-12)


def test_inside_of_another_body_the_outer_budget_rules():
    w = tg.tensor(np.array([0.3, -0.2]), requires_grad=True)
    x = tg.tensor(np.linspace(-1, 1, 48).reshape(12, 2, 2), requires_grad=True)

    def grads(outer: Any, inner: Any) -> list[np.ndarray]:
        w.zero_grad()
        x.zero_grad()

        def body(c: Any, v: Any) -> Any:
            c, y = ops.scan(lambda d, u: (ops.tanh(d * w + u), d), c, v, memory=inner)
            return c, y

        c, y = ops.scan(body, np.zeros(2), x, memory=outer)
        (ops.square(y).sum() + c.sum()).backward()
        return [w.grad, x.grad]

    for outer, inner in ((0.4, None), (None, 0.9), (0.4, 0.9)):
        assert_same(grads(outer, inner), grads(None, None))


def test_a_changed_parameter_is_noticed():
    t = tensors(2, 15)
    (h, _), _ = ops.scan(cell(t), (t["h"], np.zeros(B, np.int64)), t["x"], memory=0.2)
    t["U0"].data = t["U0"].data * 2.0
    with pytest.raises(tg.GraphError, match="changed in place"):
        h.sum().backward()


def test_what_is_kept_shares_nothing_with_what_the_user_gets():
    t = tensors(2, 15)
    scan = lambda memory: ops.scan(cell(t), (t["h"], np.zeros(B, np.int64)), t["x"], memory=memory)
    (h, _), ys = scan(None)
    (h * 3.0 + ys["h"][4]).sum().backward()
    expected = {name: leaf.grad for name, leaf in t.items() if leaf.grad is not None}
    for leaf in t.values():
        leaf.zero_grad()
    (h, _), ys = scan(0.2)
    loss = (h * 3.0 + ys["h"][4]).sum()
    h.numpy()[:] = np.nan
    ys["h"].numpy()[:] = np.nan
    loss.backward()
    for name, gradient in expected.items():
        np.testing.assert_allclose(t[name].grad, gradient, rtol=1e-12, atol=1e-13)


def test_budgets_that_make_no_sense():
    t = tensors(2, 15)
    start = (t["h"], np.zeros(B, np.int64))
    for memory, error, said in (
        (0, tg.ArgumentError, "at least one byte"), (1.5, tg.ArgumentError, r"fraction in \(0, 1\]"),
        (0.0, tg.ArgumentError, "fraction"), (True, tg.DTypeError, "number of bytes"),
        ("5%", tg.DTypeError, "number of bytes"), (-3, tg.ArgumentError, "at least one byte"),
        (np.nan, tg.ArgumentError, "fraction"), (1, tg.ArgumentError, "memory=1 bytes do not suffice"),
    ):  # fmt: skip
        with pytest.raises(error, match=said):
            ops.scan(cell(t), start, t["x"], memory=memory)
    with pytest.raises(tg.ArgumentError, match="at least") as caught:
        ops.scan(cell(t), start, t["x"], memory=100)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    assert_same(scanned(t, least), scanned(t, None))
    with pytest.raises(tg.ArgumentError, match=f"at least {least}"):
        scanned(t, least - 1)
    with tg.no_grad():  # keeps nothing, so any budget will do
        ops.scan(cell(t), start, t["x"], memory=1)
    assert_same(scanned(t, np.int64(least)), scanned(t, np.float32(0.25)))


def test_a_body_that_needs_values():
    x = tg.tensor(np.arange(4.0), requires_grad=True)

    def body(c: Any, v: Any) -> Any:
        return (c + v if v.item() > 1 else c), c

    with pytest.raises(tg.ArgumentError, match=r"step by step.*test_memory_budget.py"):
        ops.scan(body, np.zeros(()), x, memory=0.5)
    with tg.no_grad():
        assert ops.scan(body, np.zeros(()), x, memory=0.5)[0].item() == 5.0
    with tg.eager():  # op by op is what was asked for
        assert ops.scan(lambda c, v: (c + v, c), np.zeros(()), x, memory=0.5)[0].item() == 6.0


# ---------------------------------------------------------------------------- beforehand, and in fact


@pytest.mark.parametrize("memory", [None, *FRACTIONS, 0.02])
def test_the_plan_says_what_runs(memory, monkeypatch):
    ran = {False: 0, True: 0}
    plain, in_one = runner.run_loop, runner.loop_in_one

    def counted(plan: Any, operands: Any, reverse: bool) -> Any:
        ran[reverse] += plan.steps
        return plain(plan, operands, reverse)

    def made(plan: Any, reverse: bool) -> Any:
        def call(*operands: Any) -> Any:
            ran[reverse] += plan.steps
            return function(*operands)

        function = in_one(plan, reverse)
        return call

    monkeypatch.setattr(runner, "run_loop", counted)
    monkeypatch.setattr(runner, "loop_in_one", made)  # kept by what was made with it: no other test has this shape
    layer = nn.GRU(3, 5, memory=memory)
    (plan,) = layer.memory_plan(200, 2)
    assert ran == {False: 0, True: 0}  # nothing ran
    assert plan.peak <= (memory or 1.0) * plan.whole
    y, _ = layer(np.ones((200, 2, 3), np.float32))
    y.sum().backward()
    assert ran == {False: 200 + plan.recomputed, True: 200}


def test_plans_of_several_loops():
    layer = nn.LSTM(3, 4, num_layers=2, bidirectional=True, memory=0.25)
    plan = layer.memory_plan(60, 2)
    assert len(plan) == 4
    assert plan.peak == sum(p.peak for p in plan) <= 0.25 * plan.whole
    assert "together:" in str(plan)
    layer.memory = plan.peak  # as bytes, for all loops together
    assert layer.memory_plan(60, 2).peak <= plan.peak
    stack = nn.Stack([nn.GRUCell(3, 4), nn.Bidirectional(nn.RNNCell(4, 2), nn.RNNCell(4, 2))], memory=4000)
    assert len(stack.memory_plan(60, 2)) == 3
    assert stack.memory_plan(60, 2).peak <= 4000
    with pytest.raises(tg.ArgumentError, match="at least"):
        nn.LSTM(3, 4, memory=50).memory_plan(60, 2)
    with pytest.raises(tg.ArgumentError, match="features"):
        nn.Recurrent(Odd()).memory_plan(3, 2)
    assert len(nn.Recurrent(Odd()).memory_plan(3, 2, 4)) == 1


class Odd(nn.Module):
    def initial_state(self, batch: int) -> Any:
        return np.zeros((batch, 4), np.float32)

    def forward(self, x: Any, state: Any) -> Any:
        return (ops.tanh(x + state),) * 2


def test_memory_is_what_the_plan_says(monkeypatch):
    monkeypatch.setattr(pool, "SMALLEST", 1 << 60)  # it would keep what nobody uses, and hand out what is not counted
    steps, width = 400, 64
    layer = nn.LSTM(4, width, dtype=np.float64)
    x = tg.tensor(np.random.default_rng(0).standard_normal((steps, 1, 4)))
    output = steps * width * 8

    def kept(memory: Any) -> tuple[int, int]:
        layer.memory = memory
        layer(x)[0].sum().backward()  # recorded and planned before anything is counted
        gc.collect()
        pool.clear()  # what is taken from there would not be counted
        tracemalloc.start()
        try:
            y, _ = layer(x)
            gc.collect()
            after = tracemalloc.get_traced_memory()[0]
            forward = tracemalloc.get_traced_memory()[1]
            loss = y.sum()
            tracemalloc.reset_peak()
            loss.backward()
            return after - output, max(forward, tracemalloc.get_traced_memory()[1] - output) - output
        finally:
            tracemalloc.stop()

    pool.clear()
    everything, most = kept(None)
    for fraction in (0.1, 0.03):
        after, peak = kept(fraction)
        plan = layer.memory_plan(steps, 1)
        assert plan.whole > 0.8 * everything
        # Python's own objects (two arrays, and a list of them, per carry) and the final state.
        assert after <= plan.peak + 400 * plan[0].kept + 10_000, fraction
        # The working memory of a piece, and the gradients of the parameters, come on top.
        piece = plan[0].longest * 16 * width * 8
        assert peak <= plan.peak + piece + 3 * 4 * width * (width + 6) * 8 + 60_000, fraction
        assert peak < 0.5 * most
    with tg.no_grad():
        layer(x)
        gc.collect()
        tracemalloc.start()
        y, _ = layer(x)
        gc.collect()
        after = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    assert after <= y.size * 8 + 10_000


# ---------------------------------------------------------------------------- layers

LAYERS: dict[str, Callable[[Any], Any]] = {
    "LSTM": lambda memory: nn.LSTM(3, 4, 2, bidirectional=True, dtype=np.float64, memory=memory),
    "GRU": lambda memory: nn.GRU(3, 4, batch_first=True, dtype=np.float64, memory=memory),
    "RNN": lambda memory: nn.RNN(3, 4, nonlinearity="relu", dtype=np.float64, memory=memory),
    "Recurrent": lambda memory: nn.Recurrent(
        nn.PeepholeLSTMCell(3, 4, dtype=np.float64), reverse=True, learn_state=True, memory=memory
    ),
    "Bidirectional": lambda memory: nn.Bidirectional(
        nn.GRUCell(3, 4, dtype=np.float64), nn.LayerNormLSTMCell(3, 4, dtype=np.float64), memory=memory
    ),
    "Stack": lambda memory: nn.Stack(
        [nn.LSTMCell(3, 4, dtype=np.float64), nn.GRU(4, 3, 2, dtype=np.float64)], memory=memory
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    results = []
    for memory in (None, 0.2, 2500 if name == "RNN" else 9000):
        tg.seed(3)
        layer = LAYERS[name](memory)
        assert layer.memory == memory
        rng = np.random.default_rng(1)
        x = tg.tensor(rng.standard_normal((2, 30, 3) if name == "GRU" else (30, 2, 3)), requires_grad=True)
        outputs, _ = layer(x, lengths=[30, 11])
        ops.square(outputs).sum().backward()
        results.append([outputs.numpy(), x.grad, *(p.grad for p in layer.parameters())])
        if memory is not None:
            assert layer.memory_plan(30, 2).recomputed > 0
    for found in results[1:]:
        assert_same(found, results[0])


def test_the_attribute_and_the_argument_of_a_call():
    layer = nn.LSTM(3, 4)
    x = np.ones((40, 2, 3), np.float32)
    assert "memory" not in repr(layer)
    layer.memory = 0.2
    assert "memory=0.2" in repr(layer)
    with pytest.raises(tg.ArgumentError, match="at least"):
        layer(x, memory=5)
    layer(x)
    layer.memory = "little"
    with pytest.raises(tg.DTypeError, match="LSTM: memory"):
        layer(x)
    for make in LAYERS.values():
        with pytest.raises(tg.ArgumentError, match="fraction"):
            make(2.0)
    traj = nn.LSTM(3, 4, memory=0.2)(x, return_gates=True)[2]
    assert set(traj) == set("hcifgo")
