"""Hooks, retain_grad, names and scopes, exceptions in the middle, threads and tasks."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import ops


def leaf(*values: float) -> tg.Tensor:
    return tg.tensor(np.array(values if len(values) != 1 else values[0]), requires_grad=True)


# ---------------------------------------------------------------------------- hooks


def test_a_hook_sees_the_complete_gradient_once():
    x = leaf(2.0)
    h = x * 1.0
    seen = []
    h.register_hook(lambda g: seen.append(float(g.item())))
    (h * 3.0 + h * 4.0).backward()
    assert seen == [7.0]
    assert x.grad == 7.0


@pytest.mark.parametrize("on_leaf", [True, False])
def test_a_returned_value_replaces_the_gradient(on_leaf):
    x = leaf(2.0)
    h = x if on_leaf else x * 1.0
    h.register_hook(lambda g: g * 10.0)
    h.register_hook(lambda g: None)
    h.register_hook(lambda g: g + 1.0)
    (h * 3.0).backward()
    assert x.grad == 31.0


@pytest.mark.parametrize("on_leaf", [True, False])
def test_hooks_are_removed(on_leaf):
    x = leaf(2.0)
    h = x if on_leaf else x * 1.0
    calls = []
    remove = h.register_hook(lambda g: calls.append(1))
    y = h * 3.0
    y.backward(retain_graph=True)
    remove()
    remove()
    y.backward(retain_graph=True)
    assert calls == [1]


def test_the_same_hook_registered_twice_runs_twice():
    x = leaf(2.0)
    double = lambda g: g * 2.0
    first = x.register_hook(double)
    x.register_hook(double)
    (x * 1.0).backward()
    assert x.grad == 4.0
    first()
    x.zero_grad()
    (x * 1.0).backward()
    assert x.grad == 2.0


def test_a_hook_on_one_output_of_several():
    x = leaf(1.0, 2.0, 3.0, 4.0)
    a, b = ops.split(x, 2)
    b.register_hook(lambda g: g * 100.0)
    (a.sum() + (b * 2.0).sum()).backward()
    assert x.grad.tolist() == [1.0, 1.0, 200.0, 200.0]
    y = leaf(1.0, 2.0)
    a, b = ops.split(y, 2)
    b.register_hook(lambda g: pytest.fail("no gradient reaches b"))
    a.sum().backward()
    assert y.grad.tolist() == [1.0, 0.0]


def test_a_hook_must_keep_the_shape():
    x = leaf(1.0, 2.0)
    x.register_hook(lambda g: g.sum())
    with pytest.raises(tg.ShapeError, match=r"\(\).*\(2,\)"):
        (x * x).sum().backward()
    assert x.grad is None


def test_a_hook_may_not_be_put_on_a_constant():
    with pytest.raises(tg.GraphError):
        tg.tensor(1.0).register_hook(print)


# ---------------------------------------------------------------------------- retain_grad


def test_retain_grad_of_computed_values():
    x = leaf(2.0)
    h = x * x
    unretained = h * 1.0
    h.retain_grad()
    h.retain_grad()
    y = unretained * h
    y.backward()
    assert h.grad == 8.0
    assert unretained.grad is None
    assert x.grad == 32.0
    leaf(1.0).retain_grad()
    with pytest.raises(tg.GraphError):
        tg.tensor(1.0).retain_grad()


def test_retained_gradients_accumulate_and_come_after_hooks():
    x = leaf(2.0)
    h = x * x
    h.retain_grad()
    y = h * 3.0
    y.backward(retain_graph=True)
    y.backward()
    assert h.grad == 6.0
    assert x.grad == 24.0


def test_retain_grad_does_not_keep_the_value_alive():
    x = leaf(2.0)
    h = x * x
    h.retain_grad()
    y = h * 3.0
    del h
    y.backward()
    assert x.grad == 12.0


def test_tape_gradient_and_grad_do_not_fill_retained_gradients():
    x = leaf(2.0)
    with tg.Tape() as tape:
        h = x * x
        h.retain_grad()
        y = h * 3.0
    assert tape.gradient(y, x).item() == 12.0
    assert h.grad is None


# ---------------------------------------------------------------------------- exceptions in the middle


class Boom(Exception):
    pass


def boom(*args: object, **kwargs: object) -> None:
    raise Boom


def test_exception_in_the_middle_of_recording():
    x = leaf(2.0)
    for context in (tg.no_grad, tg.Tape, tg.eager, lambda: tg.scope("a")):
        with pytest.raises(Boom), context():
            _ = x * x
            boom()
    with pytest.raises(Boom):
        tg.grad(lambda t: boom(t * t))(2.0)
    with pytest.raises(Boom):
        tg.jvp(lambda t: boom(t * t), (2.0,), (1.0,))
    with pytest.raises(Boom):
        tg.vjp(lambda t: boom(t * t), 2.0)
    with pytest.raises(Boom):
        tg.checkpoint(lambda t: boom(t * t))(x)
    (x * x).backward()
    assert x.grad == 4.0


@pytest.mark.parametrize("on_leaf", [True, False])
def test_exception_in_a_hook(on_leaf):
    x, w = leaf(2.0), leaf(3.0)
    h = x if on_leaf else x * 1.0
    remove = h.register_hook(boom)
    y = h * w
    with pytest.raises(Boom):
        y.backward(retain_graph=True)
    assert x.grad is None
    assert w.grad is None
    remove()
    y.backward()
    assert (x.grad, w.grad) == (3.0, 2.0)


def test_exception_after_a_retained_gradient_was_found():
    x = leaf(2.0)
    x.register_hook(boom)
    h = x * x
    h.retain_grad()
    with pytest.raises(Boom):
        (h * 3.0).backward()
    assert h.grad is None
    assert x.grad is None


def test_exception_in_a_users_vjp(request):
    request.addfinalizer(lambda: tg.REGISTRY.pop("test_failing_vjp", None))
    failing = tg.primitive("test_failing_vjp", forward=lambda x: x + 0.0, vjp=lambda g, x: boom())
    x, w = leaf(2.0), leaf(3.0)
    y = failing(x * 2.0) * w
    with pytest.raises(Boom):
        y.backward()
    assert x.grad is None
    assert w.grad is None
    with pytest.raises(Boom):
        tg.grad(lambda t: failing(t))(2.0)
    (x * w).backward()
    assert (x.grad, w.grad) == (3.0, 2.0)


@pytest.mark.parametrize("error", [Boom, ValueError, TypeError, IndexError, AttributeError, ZeroDivisionError])
def test_exception_in_a_custom_forward_shows_the_users_own_message(request, error):
    def forward(x: np.ndarray) -> np.ndarray:
        raise error("the user's own words")

    request.addfinalizer(lambda: tg.REGISTRY.pop("test_failing_forward", None))
    failing = tg.primitive("test_failing_forward", forward=forward, vjp=lambda g: g)
    x = leaf(2.0)
    with pytest.raises(error, match="the user's own words"):
        failing(x)
    (x * x).backward()
    assert x.grad == 4.0


def test_a_vjp_that_returns_a_wrong_shape_is_an_error(request):
    request.addfinalizer(lambda: tg.REGISTRY.pop("test_wrong_shape", None))
    wrong = tg.primitive("test_wrong_shape", forward=lambda x: x * 1.0, vjp=lambda g, x: ops.concatenate([g, g]))
    x = leaf(1.0, 2.0)
    with pytest.raises(tg.Error):
        wrong(x).sum().backward()
    assert x.grad is None


# ---------------------------------------------------------------------------- names, scopes, source lines


def test_names_scopes_and_source_lines():
    x = tg.tensor([1.0])
    with tg.Tape() as tape, tg.scope("encoder"):
        a = ops.tanh(x)
        with tg.scope("lstm.l0"):
            b = tg.name(ops.sigmoid(a), "i")
        c = a * b
    first, second, third = tape.records
    assert [r.place.where for r in tape.records] == ["encoder", "encoder.lstm.l0", "encoder"]
    assert (first.label, second.label, third.label) == (None, "i", None)
    assert tg.name(c, "o") is c
    assert third.label == "o"
    for record in tape.records:
        path, line = record.source_line().rsplit(":", 1)
        assert path == __file__
        assert int(line) > 1
    assert int(second.source_line().rsplit(":", 1)[1]) == int(first.source_line().rsplit(":", 1)[1]) + 2
    text = second.describe()
    for word in ("sigmoid", "'i'", "encoder.lstm.l0", __file__):
        assert word in text


def test_the_source_line_is_the_users_also_behind_composed_ops_and_operators():
    x = tg.tensor([[1.0, 2.0]])
    with tg.Tape() as tape:
        _ = ops.var(x), x.mean(), x @ x.T, 2.0 / x, np.tanh(x), x[0], ops.dropout(x, 0.5)
    assert {record.source_line().rsplit(":", 1)[0] for record in tape.records} == {__file__}


def test_names_in_messages():
    x = leaf(1.0, 2.0)
    y = tg.name(ops.exp(x), "gate")
    z = y.sum()
    z.backward()
    with pytest.raises(tg.GraphError, match=r"test_tape_hooks\.py"):
        z.backward()


# ---------------------------------------------------------------------------- threads and tasks


def test_two_threads_record_at_once():
    start = threading.Barrier(4)
    results: dict[int, float] = {}
    states: dict[int, bool] = {}

    def work(k: int) -> None:
        x = leaf(float(k))
        start.wait()
        for _ in range(200):
            x.zero_grad()
            if k % 2:
                with tg.no_grad():
                    states[k] = (x * x).requires_grad
            y = x
            for _ in range(3):
                y = y * x
            y.backward()
        results[k] = float(x.grad)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {k: 4.0 * k**3 for k in range(4)}
    assert states == {1: False, 3: False}


def test_a_tape_records_its_own_thread_only():
    x = tg.tensor(2.0)
    with tg.Tape() as tape:
        thread = threading.Thread(target=lambda: x * x)
        thread.start()
        thread.join()
        _ = x + x
    assert [r.primitive.name for r in tape.records] == ["add"]


def test_no_grad_in_one_task_does_not_reach_another():
    async def quiet(x: tg.Tensor, gate: asyncio.Event, done: asyncio.Event) -> bool:
        with tg.no_grad():
            gate.set()
            await done.wait()
            return (x * x).requires_grad

    async def recording(x: tg.Tensor, gate: asyncio.Event, done: asyncio.Event) -> bool:
        await gate.wait()
        result = (x * x).requires_grad
        done.set()
        return result

    async def main() -> list[bool]:
        x, gate, done = leaf(1.0), asyncio.Event(), asyncio.Event()
        return await asyncio.gather(quiet(x, gate, done), recording(x, gate, done))

    assert asyncio.run(main()) == [False, True]


def test_a_hook_is_a_function() -> None:
    x = tg.tensor([1.0], requires_grad=True)
    for t in (x, x * 2.0):
        with pytest.raises(tg.DTypeError, match="takes a function of the gradient, found 3"):
            t.register_hook(3)
