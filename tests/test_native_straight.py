"""A native loop as one straight function, against the same plan over NumPy."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import ops
from tinygrad_lstm.compiler import native, runner
from tinygrad_lstm.compiler.loop import plan_loop
from tinygrad_lstm.compiler.plan import LoopPlan
from tinygrad_lstm.compiler.straight import straight
from tinygrad_lstm.primitive import Aval
from tinygrad_lstm.trace import trace

STEPS, ROWS, WIDTH = 6, 3, 4


def body(h: Any, a: Any, b: Any, w: Any) -> list[Any]:
    """Both sequences are read behind the loop."""
    h = ops.tanh(h @ w)
    return [h, h @ a, h @ b]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> LoopPlan:
    monkeypatch.setenv("TINYGRAD_LSTM_COMPILE", "always")
    avals = [Aval((ROWS, WIDTH), np.dtype("f8")), *[Aval((WIDTH, WIDTH), np.dtype("f8"))] * 3]
    program = trace(body, avals, flat=True).program
    found = plan_loop(program.replaced(inputs=program.inputs[:3], captures=program.inputs[3:]), 1, 2, STEPS)
    assert found.compiled and found.n_sequence == 2 and len(found.behind.equations) == 2
    return found


def operands(rng: np.random.Generator) -> list[np.ndarray]:
    stacks = [rng.standard_normal((STEPS, WIDTH, WIDTH)) for _ in range(2)]
    return [rng.standard_normal((ROWS, WIDTH)), *stacks, rng.standard_normal((WIDTH, WIDTH)) / 2]


def check(plan: LoopPlan, reverse: bool, arrays: list[np.ndarray]) -> None:
    otherwise = runner._over_numpy(plan, reverse)
    found = straight(plan, plan.native, reverse, otherwise)(*arrays)
    expected = otherwise(*arrays)
    for a, b in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_same_as_over_numpy(plan: LoopPlan, reverse: bool, rng: np.random.Generator) -> None:
    check(plan, reverse, operands(rng))


def test_a_value_that_is_given_twice(plan: LoopPlan, rng: np.random.Generator) -> None:
    """It is not dropped after its first use."""
    first, _, *rest = plan.before.outputs
    twice = dataclasses.replace(plan, before=plan.before.replaced(outputs=(first, first, *rest)))
    computed = dataclasses.replace(plan, before=trace_twice(plan))
    for changed in (twice, computed):
        check(changed, False, operands(rng))


def trace_twice(plan: LoopPlan) -> Any:
    """The program before the loop, with one computed value in the place of both sequences."""
    avals = [plan.before.avals[slot] for slot in (*plan.before.inputs, *plan.before.captures)]
    return trace(lambda a, b, w: [(c := a * b), c, w], avals, flat=True).program


def test_arrays_in_any_order(plan: LoopPlan, rng: np.random.Generator) -> None:
    arrays = [np.asfortranarray(a) for a in operands(rng)]
    arrays[1] = arrays[1][::-1]
    check(plan, False, arrays)


def test_rows_that_stand_apart(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """What only a product behind the loop reads is spread in memory; what the caller gets is not."""
    monkeypatch.setenv("TINYGRAD_LSTM_COMPILE", "always")
    rows, width = 32, 512
    avals = [Aval((rows, width), np.dtype("f4")), *[Aval((width, width), np.dtype("f4"))] * 2]

    def body(h: Any, w: Any, v: Any) -> list[Any]:
        h = ops.tanh(h @ w)
        return [h, h, ops.sin(h) @ v]

    program = trace(body, avals, flat=True).program
    plan = plan_loop(program.replaced(inputs=program.inputs[:1], captures=program.inputs[1:]), 1, 2, STEPS)
    arrays = [rng.standard_normal(a.shape).astype("f4") / 16 for a in avals]
    made: list[np.ndarray] = []
    spread = native.spread_rows
    monkeypatch.setattr(native, "spread_rows", lambda *given: made.append(spread(*given)) or made[-1])
    otherwise = runner._over_numpy(plan, False)
    found = straight(plan, plan.native, False, otherwise)(*arrays)
    assert [a.shape for a in made] == [(STEPS, rows, width)] and not made[0].flags.c_contiguous
    assert all(a.flags.c_contiguous for part in found for a in part)
    monkeypatch.setattr(native, "ALIASED", 1 << 40)
    close = straight(plan, plan.native, False, otherwise)(*arrays)
    assert len(made) == 1
    for a, b in zip((*found[0], *found[1]), (*close[0], *close[1]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mixing", [True, False])
def test_rows_of_several_axes_stand_together(mixing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the batch is one row, or a row is a matrix: native code reads and writes it as one piece."""
    monkeypatch.setenv("TINYGRAD_LSTM_COMPILE", "always")
    rng = np.random.default_rng(0)
    shape = (16, 512) if mixing else (8, 3, 512)
    state, x, w = rng.standard_normal(shape), rng.standard_normal((STEPS, *shape)), rng.standard_normal((512, 512)) / 30

    def grads() -> list[np.ndarray]:
        def step(h: Any, x: Any) -> tuple[Any, Any]:
            h = x + h @ matrix
            h = ops.tanh(h - h.mean(axis=0, keepdims=True) if mixing else h)
            return h, h

        start, matrix = (tg.tensor(a, requires_grad=True) for a in (state, w))
        final, ys = ops.scan(step, start, x)
        ((ys * ys).sum() + final.sum()).backward()
        return [start.grad.copy(), matrix.grad.copy()]

    found = grads()
    with tg.eager():
        expected = grads()
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
