"""The passes: each keeps what a program computes, and does what it is for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cells import B, H, body_of, recipes, run, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

import tinygrad_lstm as tg
from tinygrad_lstm import ops
from tinygrad_lstm.compiler.adjoint import adjoint
from tinygrad_lstm.compiler.fuse import fuse
from tinygrad_lstm.compiler.loop import plan_loop
from tinygrad_lstm.compiler.plan import LoopPlan
from tinygrad_lstm.compiler.simplify import common, dead_code, simplify
from tinygrad_lstm.primitive import Aval
from tinygrad_lstm.program import Program
from tinygrad_lstm.trace import Traced, trace


def recorded(recipe: Any, t: dict[str, Any]) -> Traced:
    body = body_of(recipe, t)

    def flat(h: Any, c: Any, x: Any) -> list[Any]:
        (new_h, new_c), ys = body((h, c), x)
        return [new_h, new_c, *(ys[key] for key in sorted(ys))]

    avals = [Aval(t["h"].shape, t["h"].dtype), Aval(t["c"].shape, t["c"].dtype), Aval(t["x"].shape[1:], t["x"].dtype)]
    return trace(flat, avals, flat=True)


def outputs_of(program: Program, traced: Traced, t: dict[str, Any]) -> tuple[Any, ...]:
    arrays = [t["h"].numpy(), t["c"].numpy(), t["x"].numpy()[0]]
    return program.run(arrays, [capture.numpy() for capture in traced.captures])


def assert_same(a: Any, b: Any) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------------- pass by pass, on the executor


@settings(max_examples=60)
@given(recipe=recipes(), seed=st.integers(0, 999))
def test_every_pass_keeps_the_values(recipe: Any, seed: int) -> None:
    t = tensors(seed, 2)
    traced = recorded(recipe, t)
    with tg.no_grad():
        (h, c), ys = body_of(recipe, t)((t["h"], t["c"]), t["x"][0])
    expected = [h.numpy(), c.numpy(), *(ys[key].numpy() for key in sorted(ys))]
    program = traced.program
    assert_same(outputs_of(program, traced, t), expected)
    for passed in (dead_code(program), common(program), simplify(program), fuse(program), fuse(simplify(program))):
        assert_same(outputs_of(passed, traced, t), expected)


@settings(max_examples=40)
@given(recipe=recipes(), seed=st.integers(0, 999))
def test_the_adjoint_is_the_vjp(recipe: Any, seed: int) -> None:
    """forward gives the body's outputs and the residuals; backward gives what tg.vjp of the body gives."""
    t = tensors(seed, 1)
    traced = recorded(recipe, t)
    n_captures = len(traced.captures)
    pair = adjoint(traced.program, 2, 3, (True,) * 3, (True,) * (1 + n_captures))
    arrays = [t["h"].numpy(), t["c"].numpy(), t["x"].numpy()[0]]
    captures = [capture.numpy() for capture in traced.captures]
    out = pair.forward.run(arrays, captures)
    residuals = out[5:]
    rng = np.random.default_rng(seed)
    seeds = [rng.standard_normal(o.shape) for o in out[:5]]
    reads = [arrays[2 + k] for k in pair.reads]
    found = pair.backward.run([*seeds[:2], *residuals, *reads, *seeds[2:]], captures)
    _, pullback = tg.vjp(lambda *a: tuple(traced.program.apply(a[:3], a[3:])), *arrays, *captures)
    assert_same(found, [g.numpy() for g in pullback(tuple(seeds))])


def test_common_subexpressions_are_computed_once() -> None:
    traced = trace(
        lambda x: [ops.tanh(x) * ops.tanh(x), ops.tanh(x) * 2, ops.tanh(x) * 2.0],
        [Aval((3,), np.dtype("f8"))],
        flat=True,
    )
    program = simplify(traced.program)
    # The literals 2 and 2.0 are different numbers to NumPy: they stay apart.
    assert [e.primitive.name for e in program.equations] == ["tanh", "multiply", "multiply", "multiply"]


def test_dead_code_goes() -> None:
    traced = trace(lambda x: [(ops.exp(x), x + 1.0)[1]], [Aval((3,), np.dtype("f8"))], flat=True)
    assert len(traced.program) == 2
    assert [e.primitive.name for e in dead_code(traced.program).equations] == ["add"]


def test_fusion_does_not_cross_a_product() -> None:
    def f(x: Any) -> list[Any]:
        y = ops.tanh(x * 2.0)
        z = y @ np.ones((3, 3))
        return [ops.exp(z) * y + z]

    program = fuse(trace(f, [Aval((3, 3), np.dtype("f8"))], flat=True).program)
    assert [e.primitive.name for e in program.equations] == ["fused", "matmul", "fused"]
    assert "fused" in str(program)


# ---------------------------------------------------------------------------- hoist and sink


def lstm_plan(steps: int = 6) -> tuple[LoopPlan, LoopPlan]:
    def body(h: Any, c: Any, x: Any, W: Any, U: Any, b: Any) -> list[Any]:
        i, f, g, o = ops.chunk(x @ W.T + h @ U.T + b, 4)
        c = ops.sigmoid(f) * c + ops.sigmoid(i) * ops.tanh(g)
        h = ops.sigmoid(o) * ops.tanh(c)
        return [h, c, h]

    shapes = [(B, H), (B, H), (B, 2), (4 * H, 2), (4 * H, H), (4 * H,)]
    traced = trace(body, [Aval(shape, np.dtype("f8")) for shape in shapes], flat=True).program
    program = traced.replaced(inputs=traced.inputs[:3], captures=traced.inputs[3:])
    pair = adjoint(program, 2, 1, (True,), (True,) * 4)
    forward = plan_loop(pair.forward, 2, 1 + len(pair.residuals), steps)
    return forward, plan_loop(pair.backward, 2, 1, steps)


def products(program: Program) -> list[tuple[int, ...]]:
    return [program.avals[e.outputs[0]].shape for e in program.equations if e.primitive.name == "matmul"]


def test_input_projection_leaves_the_loop_in_front() -> None:
    forward, _ = lstm_plan()
    assert products(forward.before) == [(6, B, 4 * H)]
    assert products(forward.body) == [(B, 4 * H)]
    assert products(forward.behind) == []


def test_weight_gradients_leave_the_loop_behind_as_one_product_each() -> None:
    _, backward = lstm_plan()
    assert products(backward.body) == [(B, H)]  # the cotangent of h, which the reverse carry needs
    assert sorted(products(backward.behind)) == sorted([(6, B, 2), (2, 4 * H), (H, 4 * H)])
    assert not backward.sums  # nothing is accumulated step by step
    assert "behind the loop" in str(backward)


def test_a_value_that_cannot_run_on_the_whole_sequence_stays_in_the_loop() -> None:
    table = np.arange(12.0).reshape(4, 3)

    def body(h: Any, x: Any) -> tuple[Any, Any]:
        # take along the last axis of a constant has no rule for a leading time axis
        return h + ops.take(tg.asarray(table), x, axis=1).sum(axis=0), h

    x = np.array([[0, 1], [2, 2], [1, 0]])
    h = tg.tensor(np.zeros(2), requires_grad=True)
    last, ys = ops.scan(body, h, x)
    expected = np.cumsum(table[:, x].sum(axis=0), axis=0)
    np.testing.assert_allclose(last.numpy(), expected[-1])
    np.testing.assert_allclose(ys.numpy()[1:], expected[:-1])


# ---------------------------------------------------------------------------- whole scans


@settings(max_examples=100)
@given(recipe=recipes(), seed=st.integers(0, 999), steps=st.integers(0, 4), reverse=st.booleans(), data=st.data())
def test_scan_agrees_with_the_loop(recipe: Any, seed: int, steps: int, reverse: bool, data: Any) -> None:
    t = tensors(seed, steps)
    options: dict[str, Any] = {"reverse": reverse}
    uses_batch = any(name in ("batch_mean", "transposed") for _, name, _, _ in recipe)
    if not uses_batch and data.draw(st.booleans()):
        options["lengths"] = data.draw(st.lists(st.integers(0, steps), min_size=B, max_size=B))
    body = body_of(recipe, t)
    values, gradients = run(body, t, **options)
    with tg.eager():
        expected, expected_gradients = run(body, t, **options)
    assert_same(values, expected)
    for name in gradients:
        np.testing.assert_allclose(gradients[name], expected_gradients[name], rtol=1e-9, atol=1e-10, err_msg=name)


@settings(max_examples=12)
@given(recipe=recipes(), seed=st.integers(0, 999))
def test_second_order_agrees_with_the_loop(recipe: Any, seed: int) -> None:
    t = tensors(seed, 3)
    names = ["x", "h", "U0", "bias"]
    rng = np.random.default_rng(seed)
    vectors = tuple(rng.standard_normal(t[name].shape) for name in names)

    def loss(*arguments: Any) -> Any:
        body = body_of(recipe, {**t, **dict(zip(names, arguments, strict=True))})
        filled = {**t, **dict(zip(names, arguments, strict=True))}
        (h, c), ys = ops.scan(body, (filled["h"], filled["c"]), filled["x"])
        return ops.sin(ys["h"]).sum() + (h * c).sum()

    primals = tuple(t[name].numpy() for name in names)
    _, found = tg.hvp(loss, primals, vectors)
    with tg.eager():
        _, expected = tg.hvp(loss, primals, vectors)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-8, atol=1e-9)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(recipe=recipes(), seed=st.integers(0, 999))
def test_native_chains_agree_with_the_loop(recipe: Any, seed: int) -> None:
    from tinygrad_lstm.compiler import fuse as module
    from tinygrad_lstm.ops import loop

    before = module.COMPILE_FROM
    loop._known.clear()
    try:
        module.COMPILE_FROM = 0
        t = tensors(seed, 3)
        body = body_of(recipe, t)
        values, gradients = run(body, t)
    finally:
        module.COMPILE_FROM = before
        loop._known.clear()
    with tg.eager():
        expected, expected_gradients = run(body, t)
    assert_same(values, expected)
    for name in gradients:
        np.testing.assert_allclose(gradients[name], expected_gradients[name], rtol=1e-9, atol=1e-10, err_msg=name)
