"""ops.scan: what bodies may close over, need, change and break; absent cotangents; integers; nesting."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
from samples import spread
from test_scan import B, N, T, close, looped, lstm, lstm_arguments, projected, run

import tinygrad_lstm as tg
from tinygrad_lstm import ops


def running(a: Any) -> Any:
    return lambda h, x: (ops.tanh(h * a + x),) * 2


def test_what_is_not_floating_is_not_linked_at_any_call():
    def body(carry, x):
        h, count = carry
        h = ops.tanh(h + x)
        return (h, count + 1), (h, h > 0, count)

    for _ in range(4):
        start = tg.tensor(np.zeros((2, 3)), requires_grad=True), np.array([0, 5])
        (h, count), (hs, signs, counts) = ops.scan(body, start, np.ones((4, 2, 3)))
        assert [t.requires_grad for t in (h, count, hs, signs, counts)] == [True, False, True, False, False]
        assert count.tolist() == [4, 9] and counts.tolist() == [[k, k + 5] for k in range(4)] and signs.numpy().all()
        (h.sum() + hs.sum()).backward()
        assert np.isfinite(start[0].grad).all() and start[0].grad.all()


def test_an_error_of_a_users_own_function_is_the_same_at_every_call():
    wrong: list[Exception] = []

    def cosine(x):
        if wrong:
            raise wrong[0]
        return np.cos(x)

    of_rule = tg.primitive("test_cosine_that_may_fail", cosine, vjp=lambda g, x: -g * ops.sin(x))
    of_body = tg.primitive("test_sine_of_a_scan", lambda x: np.sin(x), vjp=lambda g, x: g * of_rule(x))
    forward = tg.compile(lambda x: ops.scan(lambda h, x: (of_rule(h + x),) * 2, np.zeros(3), x)[1])

    def loss():
        x = tg.tensor(np.ones((4, 3)), requires_grad=True)
        _, ys = ops.scan(lambda h, x: (of_body(h + x),) * 2, np.zeros(3), x)
        return x, (ys * 2.0).sum()

    forward(np.ones((4, 3)))
    for kind in (ValueError, TypeError, IndexError, np.linalg.LinAlgError):
        for _ in range(5):  # the first backwards go another way than the others
            x, total = loss()
            wrong.append(kind("the user's own words"))
            try:
                for run in (total.backward, lambda: forward(np.ones((4, 3)))):
                    with pytest.raises(kind, match="the user's own words"):
                        run()
            finally:
                wrong.clear()
            assert x.grad is None


# ---------------------------------------------------------------------------- captures


@pytest.mark.parametrize("kind", ["register_hook", "retain_grad", "zero_grad"])
def test_hooks_in_a_body_run_at_every_step(kind):
    """Such as the clipping of each step's gradient: dropped at the recording, the gradients would be others."""
    u = tg.tensor(0.5 * np.eye(3), requires_grad=True)
    kept = []

    def body(h, x):
        z = h @ u + x
        if kind == "register_hook":
            z.register_hook(lambda g: ops.clip(g, -0.1, 0.1))
        elif kind == "retain_grad":
            z.retain_grad()
            kept.append(z)
        else:
            u.zero_grad()
        return ops.tanh(z), z

    def gradients():
        u.grad = None
        kept.clear()
        ys = ops.scan(body, np.ones((2, 3)), np.linspace(-1.0, 1.0, 24).reshape(4, 2, 3))[1]
        ops.square(ys).sum().backward()
        return [u.grad, *(z.grad for z in kept)]

    found = gradients()
    with tg.eager():
        expected = gradients()
    assert len(found) == len(expected) == (5 if kind == "retain_grad" else 1)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_a_captured_tensor_that_differs_at_each_call():
    """Attention over a memory that is new every time: the recorded body must read the new one."""
    rng = np.random.default_rng(0)
    xs, init = rng.standard_normal((T, B, N)), np.zeros((B, N))

    def attend(how: Any, memory: Any) -> Any:
        def body(h: Any, x: Any) -> Any:
            weights = ops.softmax(ops.einsum("bn,bmn->bm", h + x, memory))
            h = ops.tanh(ops.einsum("bm,bmn->bn", weights, memory) + x)
            return h, weights

        return how(body, init, xs)

    for _ in range(3):
        memory = rng.standard_normal((B, 6, N))
        close(attend(ops.scan, memory), attend(looped, memory))
        close(
            tg.grad(projected(lambda m: attend(ops.scan, m)))(memory),
            tg.grad(projected(lambda m: attend(looped, m)))(memory),
        )


def test_a_python_number_that_changes_between_calls():
    xs = spread((T, B))
    for p in (0.3, 0.7, 1, 1.0, True):
        close(ops.scan(running(p), np.zeros(B), xs), looped(running(p), np.zeros(B), xs))


def test_a_parameter_of_a_users_primitive_that_changes_in_its_last_digits(request):
    request.addfinalizer(lambda: tg.REGISTRY.pop("test_scaled", None))
    scaled = tg.primitive("test_scaled", forward=lambda x, *, k: x * k, vjp=lambda g, k: g * tg.asarray(k))
    xs = np.ones(3)
    for k in (np.array(0.123456789012), np.array(0.123456789013), np.arange(2000.0).sum() * np.ones(()), np.array(2.0)):
        (carry, _) = ops.scan(lambda h, x, k=k: (h + scaled(x, k=k), None), np.array(0.0), xs)
        np.testing.assert_allclose(carry.item(), 3 * float(k), rtol=1e-15)


def test_gradients_of_captures_that_were_computed():
    a = tg.tensor(np.array(0.5), requires_grad=True)
    b = a * a
    xs = spread((T, B))
    ops.scan(running(b), np.zeros(B), xs)[1].sum().backward()
    expected = tg.grad(lambda t: looped(running(t * t), np.zeros(B), xs)[1].sum())(np.array(0.5))
    np.testing.assert_allclose(a.grad, expected.numpy(), rtol=1e-12)


def test_the_same_capture_in_two_scans():
    xs = spread((T, B))
    two = lambda how, a: how(running(a), how(running(a), np.zeros(B), xs)[0], xs, reverse=True)[1].sum()
    a = np.array(0.5)
    close(tg.grad(lambda t: two(ops.scan, t))(a), tg.grad(lambda t: two(looped, t))(a))


def test_a_constant_capture_gets_no_gradient_but_tape_can_ask():
    xs, a = tg.tensor(spread((T, B))), tg.tensor(np.array(0.5))
    with tg.Tape() as tape:
        out = ops.scan(running(a), np.zeros(B), xs)[1].sum()
    ga, gx = tape.gradient(out, [a, xs])
    ea, ex = tg.grad(lambda t, x: looped(running(t), np.zeros(B), x)[1].sum(), (0, 1))(a, xs)
    close([ga, gx], [ea, ex])


def test_a_changed_capture_is_noticed():
    a = tg.tensor(np.array(0.5), requires_grad=True)
    out = ops.scan(running(a), np.zeros(B), spread((T, B)))[1].sum()
    a.data = np.array(0.7)
    with pytest.raises(tg.GraphError, match="changed"):
        out.backward()


# ---------------------------------------------------------------------------- absent cotangents


@pytest.mark.parametrize("part", ["h only", "c only", "ys only", "first y", "last y", "nothing of xs"])
def test_absent_cotangents(part):
    pick = {
        "h only": lambda carry, ys: carry[0], "c only": lambda carry, ys: carry[1], "ys only": lambda carry, ys: ys,
        "first y": lambda carry, ys: ys[0], "last y": lambda carry, ys: ys[-1], "nothing of xs": lambda carry,
        ys: ys * 0.0,
    }[part]  # fmt: skip
    args = lstm_arguments()
    make = lambda how: projected(lambda *a: pick(*run(how, lstm)(*a)))
    numbers = tuple(range(5))
    close(tg.grad(make(ops.scan), numbers)(*args), tg.grad(make(looped), numbers)(*args))
    leaves = [tg.tensor(a, requires_grad=True) for a in args[1:]]
    make(ops.scan)(args[0], *leaves).backward()
    for leaf, e in zip(leaves, tg.grad(make(looped), (1, 2, 3, 4))(*args), strict=True):
        np.testing.assert_allclose(leaf.grad, e.numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("wanted", range(5))
def test_one_wanted_gradient_at_a_time(wanted):
    args = lstm_arguments()
    close(tg.grad(projected(run(ops.scan, lstm)), wanted)(*args), tg.grad(projected(run(looped, lstm)), wanted)(*args))


def test_retain_graph_and_a_freed_graph():
    a = tg.tensor(np.array(0.5), requires_grad=True)
    out = ops.scan(running(a), np.zeros(B), spread((T, B)))[1].sum()
    out.backward(retain_graph=True)
    once = a.grad.copy()
    out.backward()
    np.testing.assert_allclose(a.grad, 2 * once, rtol=1e-15)
    with pytest.raises(tg.GraphError, match="retain_graph=True"):
        out.backward()


def test_called_twice_before_backward():
    """Residuals belong to their call."""
    a = tg.tensor(np.array(0.5), requires_grad=True)
    x1, x2 = spread((T, B)), spread((T, B), seed=1)
    first = ops.scan(running(a), np.zeros(B), x1)[1].sum()
    second = ops.scan(running(a), np.ones(B), x2)[1].sum()
    kept = first.numpy().copy()
    (first * 1.0 + second * 10.0).backward()
    f = lambda t: looped(running(t), np.zeros(B), x1)[1].sum() + 10.0 * looped(running(t), np.ones(B), x2)[1].sum()
    np.testing.assert_allclose(a.grad, tg.grad(f)(np.array(0.5)).numpy(), rtol=1e-12)
    np.testing.assert_array_equal(first.numpy(), kept)


def test_outputs_of_an_earlier_call_are_not_overwritten():
    xs = spread((T, B))
    carry, ys = ops.scan(running(0.5), np.zeros(B), xs)
    copies = carry.numpy().copy(), ys.numpy().copy()
    for k in range(5):
        ops.scan(running(0.5), np.zeros(B) + k, xs * k)
    np.testing.assert_array_equal(carry.numpy(), copies[0])
    np.testing.assert_array_equal(ys.numpy(), copies[1])
    assert not np.shares_memory(xs, ys.numpy())


def test_memory_is_freed_by_reference_counts_alone():
    gc.collect()
    gc.disable()
    try:
        x = tg.tensor(spread((T, B)), requires_grad=True)
        out = ops.scan(running(x[0].sum()), np.zeros(B), x)[1].sum()
        seen = weakref.ref(x)
        out.backward()
        del x, out
        assert seen() is None
    finally:
        gc.enable()


# ---------------------------------------------------------------------------- bodies that need values


def test_a_body_that_needs_values_runs_step_by_step():
    def body(h: Any, x: Any) -> Any:
        h = h * 2.0 if float(x) > 0 else h + x
        return h, h * x

    xs = np.array([1.0, -2.0, 3.0, -1.0])
    close(ops.scan(body, np.array(1.0), xs), looped(body, np.array(1.0), xs))
    g = tg.grad(lambda t: ops.scan(body, t[0], t)[1].sum())(xs)
    close(g, tg.grad(lambda t: looped(body, t[0], t)[1].sum())(xs))
    close(ops.scan(body, np.array(1.0), xs, reverse=True), looped(body, np.array(1.0), xs, reverse=True))
    carry, ys = ops.scan(body, np.array(1.0), np.zeros(0))
    assert (carry.item(), ys.shape) == (1.0, (0,))


def test_a_boolean_mask_in_a_body():
    body = lambda h, x: (h + x[x > 0].sum(), None)
    xs = spread((T, B))
    close(ops.scan(body, np.array(0.0), xs)[0], looped(lambda h, x: (h + x[x > 0].sum(), h), np.array(0.0), xs)[0])


def test_dropout_in_a_body_draws_anew_at_every_step():
    tg.seed(1)
    _, ys = ops.scan(lambda h, x: (h, ops.dropout(x, 0.5)), np.array(0.0), np.ones((8, 64)))
    assert len({row.tobytes() for row in ys.numpy()}) == 8


def test_an_escaped_tensor_is_an_error():
    kept: list[Any] = []

    def body(h: Any, x: Any) -> Any:
        h = ops.tanh(h + x)
        kept.append(h)
        return h, h

    ops.scan(body, np.zeros(B), spread((T, B)))
    for use in (
        lambda t: t + 1.0,
        lambda t: t.numpy(),
        lambda t: float(t.sum()),
        lambda t: ops.scan(running(t), np.zeros(B), spread((T, B))),
    ):
        with pytest.raises(tg.GraphError, match=r"test_scan_bodies\.py"):
            use(kept[0])


def test_exceptions_of_a_body_leave_nothing_behind():
    def body(h: Any, x: Any) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ops.scan(body, np.zeros(B), spread((T, B)))
    x = tg.tensor(2.0, requires_grad=True)
    (x * x).backward()
    assert x.grad == 4.0


# ---------------------------------------------------------------------------- what is refused


def test_a_carry_that_changes():
    xs = spread((T, B))
    for init, body, words in (
        (np.zeros(B), lambda h, x: (ops.stack([h, h]), x), "carry"),
        (np.zeros(B, np.float32), lambda h, x: (h + x, x), "float32"),
        ((np.zeros(B), np.zeros(B)), lambda h, x: (h[0], x), "carry"),
        ({"h": np.zeros(B)}, lambda h, x: ({"g": h["h"]}, x), "carry"),
        (np.zeros(B), lambda h, x: h, "pair"),
    ):
        with pytest.raises(tg.Error, match=words):
            ops.scan(body, init, xs)


def test_carry_keys_in_another_order_are_not_mixed_up():
    body = lambda s, x: ({"b": s["b"] * 2.0, "a": s["a"] + x}, None)
    try:
        carry, _ = ops.scan(body, {"a": np.array(0.0), "b": np.array(1.0)}, np.ones(3))
    except tg.ShapeError:
        return
    assert (carry["a"].item(), carry["b"].item()) == (3.0, 8.0)


def test_bad_arguments():
    with pytest.raises(tg.ShapeError):
        ops.scan(running(0.5), np.zeros(B), (np.zeros((3, B)), np.zeros((4, B))))
    with pytest.raises(tg.ShapeError):
        ops.scan(running(0.5), np.zeros(B), np.zeros((3, B)), length=4)
    with pytest.raises(tg.ShapeError):
        ops.scan(running(0.5), np.zeros(B), np.array(1.0))
    with pytest.raises(tg.Error):
        ops.scan(running(0.5), np.zeros(B), None, length=-1)


# ---------------------------------------------------------------------------- integers, nesting, reductions


def test_integers_in_carry_xs_and_ys():
    table = spread((6, N))

    def body(state: Any, token: Any) -> Any:
        count, h = state
        h = ops.tanh(h + ops.take(tw, token, 0))
        return (count + 1, h), (ops.argmax(h), count, h)

    tokens = np.array([[1, 2], [5, 1], [0, 0]])
    tw = tg.tensor(table, requires_grad=True)
    init = (np.array(0), np.zeros((2, N)))
    found, expected = ops.scan(body, init, tokens), looped(body, init, tokens)
    close(found, expected)
    assert found[0][0].dtype == np.int64
    found[1][2].sum().backward()
    g = tw.grad.copy()
    tw.zero_grad()
    expected[1][2].sum().backward()
    np.testing.assert_allclose(g, tw.grad, rtol=1e-12)


@pytest.mark.parametrize("name", ["argmax", "sum", "max", "cumsum", "ravel", "flip", "norm", "roll", "softmax", "take"])
def test_axis_free_ops_of_a_step_do_not_see_the_time_axis(name):
    """These run behind or before the loop on the whole sequence, where None must still mean one step's axes."""
    op = {"take": lambda x: ops.take(x, np.array([5, 0])), "roll": lambda x: ops.roll(x, 2)}.get(
        name, getattr(ops, name)
    )
    body = lambda h, x: (h + 1.0, (op(x * 2.0), op(x + h)))
    xs = spread((T, 2, 3))
    close(ops.scan(body, np.array(0.0), xs), looped(body, np.array(0.0), xs))
    if name != "argmax":
        loss = lambda how: projected(lambda x: how(body, np.array(0.0), x)[1])
        close(tg.grad(loss(ops.scan))(xs), tg.grad(loss(looped))(xs))


def test_nested_scans():
    def outer(how: Any, a: Any) -> Any:
        def body(h: Any, row: Any) -> Any:
            h, inner = how(lambda c, x: (ops.tanh(c * a + x), c * x), h, row)
            return h, inner

        return body

    xs = spread((3, 4, B))
    f = lambda how: projected(lambda a, x: how(outer(how, a), np.zeros(B), x))
    a = np.array(0.6)
    close(tg.value_and_grad(f(ops.scan), (0, 1))(a, xs), tg.value_and_grad(f(looped), (0, 1))(a, xs))
    close(tg.grad(lambda t: tg.grad(f(ops.scan))(t, xs))(a), tg.grad(lambda t: tg.grad(f(looped))(t, xs))(a), 1e-9)


def test_a_gradient_inside_a_body():
    """Gradient descent as a recurrence: the body calls tg.grad."""
    body = lambda h, x: (h - 0.1 * tg.grad(lambda t: ((t - x) ** 4).sum())(h), h)
    xs = spread((T, B))
    f = lambda how: projected(lambda h, x: how(body, h, x))
    close(
        tg.value_and_grad(f(ops.scan), (0, 1))(np.zeros(B), xs), tg.value_and_grad(f(looped), (0, 1))(np.zeros(B), xs)
    )


def test_stop_gradient_and_detached_values_in_a_body():
    body = lambda h, x: (ops.tanh(ops.stop_gradient(h) + x), h * x)
    xs = spread((T, B))
    f = lambda how: projected(lambda h, x: how(body, h, x))
    close(tg.grad(f(ops.scan), (0, 1))(np.ones(B), xs), tg.grad(f(looped), (0, 1))(np.ones(B), xs))


def test_a_scan_under_checkpoint_and_no_grad():
    args = lstm_arguments()
    f = projected(run(ops.scan, lstm))
    close(tg.grad(tg.checkpoint(f), (1, 2))(*args), tg.grad(f, (1, 2))(*args))
    with tg.no_grad():
        w = tg.tensor(args[2], requires_grad=True)
        (h, _), _ = ops.scan(lstm(w, *args[3:]), args[0], args[1])
        assert not h.requires_grad


# ---------------------------------------------------------------------------- users' primitives in a body


@pytest.fixture
def declare(request):
    def make(name: str, *args: Any, **kwargs: Any) -> Any:
        request.addfinalizer(lambda: tg.REGISTRY.pop(name, None))
        return tg.primitive(name, *args, **kwargs)

    return make


def test_a_rule_with_an_array_of_its_own(declare):
    scale = np.array([1.0, 2.0, 3.0])
    scaled = declare("test_scale", forward=lambda x: x * scale, vjp=lambda g: g * scale)
    body = lambda h, x: (ops.tanh(h * scaled(x)) + x, h)
    f = lambda how: projected(lambda h, x: how(body, h, x))
    xs = spread((T, 3))
    close(tg.value_and_grad(f(ops.scan), (0, 1))(np.ones(3), xs), tg.value_and_grad(f(looped), (0, 1))(np.ones(3), xs))


def test_a_rule_in_numpy(declare):
    sine = declare("test_sine", forward=lambda x: np.sin(x), vjp=lambda g, x: np.asarray(g) * np.cos(np.asarray(x)))
    body = lambda h, x: (h + sine(x + h), h)
    f = lambda how: projected(lambda h, x: how(body, h, x))
    xs = spread((T, 3))
    close(tg.value_and_grad(f(ops.scan), (0, 1))(np.ones(3), xs), tg.value_and_grad(f(looped), (0, 1))(np.ones(3), xs))
    leaf = tg.tensor(xs, requires_grad=True)
    f(ops.scan)(np.ones(3), leaf).backward()
    np.testing.assert_allclose(leaf.grad, tg.grad(f(looped), 1)(np.ones(3), xs).numpy(), rtol=1e-12)


def test_gathers_from_axes_of_length_one():
    carry, _ = ops.scan(lambda h, i: (ops.scatter_add(h, i, 1.0), None), np.zeros(1), np.zeros((3, 1), int))
    assert carry.tolist() == [3.0]
    body = lambda h, i: (h, ops.take_along_axis(h, i, -1))
    assert ops.scan(body, np.ones((2, 1)), np.zeros((3, 2, 1), int))[1].shape == (3, 2, 1)
