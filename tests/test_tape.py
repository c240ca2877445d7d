"""Recording and the reverse replay: backward, no_grad, Tape, hooks, provenance."""

from __future__ import annotations

import contextvars
import copy
import gc
import pickle
import weakref

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops
from tinygrad_lstm.program import Program


def leaf(*values: float) -> tg.Tensor:
    return tg.tensor(np.array(values if len(values) != 1 else values[0]), requires_grad=True)


# ---------------------------------------------------------------------------- backward


def test_backward_of_a_scalar():
    x = leaf(2.0)
    y = x * x * x
    assert y.backward() is None
    assert x.grad == 12.0


def test_backward_without_cotangent_needs_a_scalar():
    x = leaf(1.0, 2.0)
    with pytest.raises(tg.ShapeError, match=r"\(2,\)"):
        (x * x).backward()
    assert x.grad is None


@pytest.mark.parametrize(
    "seed", [[1.0, 10.0], np.array([1.0, 10.0]), tg.tensor([1.0, 10.0])], ids=["list", "array", "tensor"]
)
def test_backward_with_a_cotangent(seed):
    x = leaf(1.0, 2.0)
    (x * x).backward(seed)
    assert x.grad.tolist() == [2.0, 40.0]


def test_backward_refuses_a_cotangent_of_another_shape():
    x = leaf(1.0, 2.0)
    with pytest.raises(tg.ShapeError, match=r"\(3,\).*\(2,\)"):
        (x * x).backward(np.ones(3))


def test_backward_of_a_leaf():
    x = leaf(3.0)
    x.backward()
    x.backward(2.0)
    assert x.grad == 3.0


def test_backward_without_any_graph_says_why():
    for t in (tg.tensor(1.0), tg.tensor(1.0) * 2.0, ops.argmax(leaf(1.0, 2.0))):
        with pytest.raises(tg.GraphError, match="requires_grad"):
            t.backward()


def test_second_backward_on_a_freed_graph_names_retain_graph():
    x = leaf(1.0, 2.0)
    y = (x * x).sum()
    y.backward()
    with pytest.raises(tg.GraphError, match="retain_graph=True"):
        y.backward()
    assert x.grad.tolist() == [2.0, 4.0]


def test_retain_graph_allows_any_number_of_calls():
    x = leaf(1.0, 2.0)
    y = (ops.exp(x) * x).sum()
    y.backward(retain_graph=True)
    once = x.grad.copy()
    y.backward(retain_graph=True)
    y.backward()
    np.testing.assert_allclose(x.grad, 3 * once, rtol=1e-15)
    with pytest.raises(tg.GraphError, match="retain_graph=True"):
        y.backward()


def test_two_losses_on_one_trunk():
    x = leaf(1.0, 2.0)
    h = ops.tanh(x)
    first, second = h.sum(), (h * h).sum()
    first.backward(retain_graph=True)
    second.backward()
    t = np.tanh([1.0, 2.0])
    np.testing.assert_allclose(x.grad, (1 - t**2) * (1 + 2 * t), rtol=1e-14)
    y = (ops.tanh(x) * 2.0).sum()
    y.backward()
    with pytest.raises(tg.GraphError, match="retain_graph=True"):
        second.backward()


def test_a_shared_subexpression_counts_every_use():
    x = leaf(3.0)
    h = x * x
    (h + h + h * h).backward()
    assert x.grad == 2 * 2 * 3.0 + 4 * 27.0


def test_the_same_tensor_twice_in_one_op():
    x = leaf(3.0)
    (x * x).backward()
    assert x.grad == 6.0
    y = leaf(2.0)
    ops.concatenate([y.reshape(1), y.reshape(1), y.reshape(1)]).sum().backward()
    assert y.grad == 3.0


def test_backward_never_builds_a_graph_for_gradients():
    x = leaf(1.0, 2.0)
    with tg.Tape() as tape:
        y = (x * x).sum()
        n = len(tape)
        y.backward(retain_graph=True)
        assert len(tape) == n
    assert isinstance(x.grad, np.ndarray)


def test_backward_works_inside_no_grad():
    x = leaf(2.0)
    y = x * x
    with tg.no_grad():
        y.backward()
    assert x.grad == 4.0


def test_absent_gradients_stay_none():
    x, unused = leaf(1.0), leaf(1.0)
    parts = ops.split(ops.concatenate([x.reshape(1), unused.reshape(1)]), 2)
    parts[0].sum().backward()
    assert x.grad == 1.0
    assert unused.grad is None or unused.grad == 0.0
    with_none = leaf(1.0)
    _ = with_none * 2.0
    (x * 2.0).backward()
    assert with_none.grad is None


def test_infinite_derivative_is_silent_and_infinite():
    x = leaf(0.0, 4.0)
    ops.sqrt(x).sum().backward()
    assert x.grad.tolist() == [np.inf, 0.25]


# ---------------------------------------------------------------------------- no_grad


def test_no_grad_as_context_manager_and_decorator():
    x = leaf(1.0)
    with tg.no_grad():
        assert not (x * 2.0).requires_grad
    assert (x * 2.0).requires_grad

    @tg.no_grad()
    def double(t: tg.Tensor, depth: int = 3) -> tg.Tensor:
        """Doc."""
        return t * 2.0 if depth == 0 else double(t, depth - 1)

    assert not double(x).requires_grad
    assert double.__name__ == "double"
    assert (x * 2.0).requires_grad


def test_no_grad_is_reentrant_and_restored_by_exceptions():
    x = leaf(1.0)
    guard = tg.no_grad()
    with guard, guard:
        pass
    with pytest.raises(ZeroDivisionError), guard:
        raise ZeroDivisionError
    assert (x * 2.0).requires_grad


def test_one_no_grad_in_several_tasks():
    guard, x = tg.no_grad(), leaf(1.0)
    first, second = contextvars.copy_context(), contextvars.copy_context()
    for task in (first, second):
        task.run(guard.__enter__)
    for task in (first, second):
        assert not task.run(lambda: (x * 2.0).requires_grad)
        task.run(guard.__exit__, None, None, None)
        assert task.run(lambda: (x * 2.0).requires_grad)
    first.run(guard.__enter__)
    with pytest.raises(tg.GraphError, match="another thread or task"):
        second.run(guard.__exit__, None, None, None)


def test_no_grad_wins_over_tape_and_grad():
    x = leaf(3.0)
    with tg.Tape() as tape, tg.no_grad():
        y = x * x
    assert len(tape) == 0
    assert tape.gradient(y, x) is None
    with tg.no_grad(), tg.Tape() as tape:
        _ = x * x
    assert len(tape) == 0

    def half_hidden(t: tg.Tensor) -> tg.Tensor:
        with tg.no_grad():
            h = t * t
        return t * h

    assert tg.grad(half_hidden)(3.0).item() == 9.0


# ---------------------------------------------------------------------------- Tape


def test_tape_records_whatever_requires_grad():
    x = tg.tensor([1.0, 2.0])
    y = leaf(1.0, 2.0)
    with tg.Tape() as tape:
        z = ops.tanh(x * y) + ops.argmax(x, axis=0)
    assert [r.primitive.name for r in tape.records] == ["multiply", "tanh", "argmax", "add"]
    assert len(tape) == 4
    np.testing.assert_allclose(
        tape.gradient(z, x, np.ones(2)).numpy(), (1 - np.tanh([1.0, 4.0]) ** 2) * [1.0, 2.0], rtol=1e-6
    )


def test_nothing_is_recorded_outside_of_the_block():
    x = tg.tensor([1.0])
    with tg.Tape() as tape:
        y = x * x
    _ = y * y
    assert len(tape) == 1


def test_gradient_as_often_as_wanted_and_after_the_block():
    x = tg.tensor(3.0)
    with tg.Tape() as tape:
        y = x * x * x
    assert [tape.gradient(y, x).item() for _ in range(3)] == [27.0] * 3


def test_gradient_after_backward_on_the_same_tape():
    """The tape keeps values until it dies: a backward() in between frees nothing of it."""
    x = leaf(3.0)
    with tg.Tape() as tape:
        y = x * x
    y.backward()
    assert tape.gradient(y, x).item() == 6.0
    assert x.grad == 6.0


def test_gradient_takes_the_structure_of_the_sources():
    a, b, lonely = tg.tensor(2.0), tg.tensor(5.0), tg.tensor(1.0)
    with tg.Tape() as tape:
        y = a * b
    assert tape.gradient(y, a).item() == 5.0
    listed = tape.gradient(y, [a, lonely, b])
    assert [g if g is None else g.item() for g in listed] == [5.0, None, 2.0]
    named = tape.gradient(y, {"a": a, "rest": (b, lonely)})
    assert named["a"].item() == 5.0
    assert named["rest"][0].item() == 2.0
    assert named["rest"][1] is None


def test_gradient_of_intermediate_values_and_of_the_target_itself():
    x = tg.tensor(2.0)
    with tg.Tape() as tape:
        h = x * x
        y = h * h
    gy, gh, gx = tape.gradient(y, [y, h, x])
    assert (gy.item(), gh.item(), gx.item()) == (1.0, 8.0, 32.0)
    assert tape.gradient(x, x).item() == 1.0


def test_gradient_of_outputs_of_a_split():
    x = tg.tensor(np.arange(4.0))
    with tg.Tape() as tape:
        a, b = ops.split(x, 2)
        y = (a * b).sum()
    ga, gb, gx = tape.gradient(y, [a, b, x])
    assert (ga.tolist(), gb.tolist(), gx.tolist()) == ([2.0, 3.0], [0.0, 1.0], [2.0, 3.0, 0.0, 1.0])
    (only,) = tape.gradient(a.sum() if False else y, [b])
    assert only.tolist() == [0.0, 1.0]


def test_gradient_with_a_cotangent():
    x = tg.tensor([1.0, 2.0])
    with tg.Tape() as tape:
        y = x * x
    assert tape.gradient(y, x, [1.0, 10.0]).tolist() == [2.0, 40.0]
    with pytest.raises(tg.ShapeError):
        tape.gradient(y, x)
    with pytest.raises(tg.DTypeError):
        tape.gradient(3.0, x)


def test_nested_tapes_both_record():
    x = tg.tensor(3.0)
    with tg.Tape() as outer:
        a = x * x
        with tg.Tape() as inner:
            b = a * x
        c = b * 2.0
    assert (len(outer), len(inner)) == (3, 1)
    assert inner.gradient(b, a).item() == 3.0
    assert outer.gradient(c, x).item() == 54.0
    del outer
    gc.collect()
    assert inner.gradient(b, a).item() == 3.0


def test_gradient_inside_an_outer_tape_gives_second_derivatives():
    x = tg.tensor(3.0)
    with tg.Tape() as outer:
        with tg.Tape() as inner:
            y = x * x * x
        g = inner.gradient(y, x)
    assert g.item() == 27.0
    assert outer.gradient(g, x).item() == 18.0


def test_a_second_derivative_from_one_tape():
    x = tg.tensor(3.0)
    with tg.Tape() as tape:
        y = x * x * x
        g = tape.gradient(y, x)
    assert tape.gradient(g, x).item() == 18.0


def test_a_tape_does_not_set_grad():
    x = leaf(3.0)
    with tg.Tape() as tape:
        y = x * x
    tape.gradient(y, x)
    assert x.grad is None


def test_values_from_a_dead_tape_are_constants():
    x, w = tg.tensor(2.0), tg.tensor(3.0)
    with tg.Tape() as first:
        y = x * x
    del first
    with tg.Tape() as second:
        z = y * w
    assert second.gradient(z, w).item() == 4.0
    assert second.gradient(z, y).item() == 3.0


def test_a_tape_keeps_values_until_it_dies():
    x = tg.tensor(np.ones(3))
    with tg.Tape() as tape:
        y = ops.exp(ops.sin(x))
    seen = weakref.ref(tape.outputs(tape.records[0])[0])
    assert seen() is not None
    del tape, y
    gc.collect()
    assert seen() is None


def test_a_tape_cannot_be_entered_twice_at_once():
    tape = tg.Tape()
    with tape, pytest.raises(tg.GraphError):
        tape.__enter__()


def test_printing_and_program_of_a_tape():
    x = tg.tensor([1.0, 2.0])
    with tg.Tape() as tape:
        h = tg.name(ops.tanh(x * 3.0), "gate")
        y = h.sum()
    text = str(tape)
    for word in ("multiply", "tanh", "sum", "gate", "float32[2]"):
        assert word in text
    program = tape.to_program([x], [y])
    assert isinstance(program, Program)
    (out,) = program.run([np.array([0.5, 0.25], np.float32)])
    np.testing.assert_allclose(out, np.tanh([1.5, 0.75]).sum(), rtol=1e-6)
    (default,) = tape.to_program([x]).run([np.array([1.0, 2.0], np.float32)])
    np.testing.assert_allclose(default, y.numpy(), rtol=1e-7)


def test_tape_in_a_loop_is_left_by_exceptions():
    x = tg.tensor(1.0)
    with pytest.raises(ZeroDivisionError), tg.Tape() as tape:
        y = x * 2.0
        raise ZeroDivisionError
    _ = x * 3.0
    assert len(tape) == 1
    assert tape.gradient(y, x).item() == 2.0


def test_the_line_of_a_function_of_axes_is_the_users():
    with tg.Tape() as tape:
        ops.sum(np.ones((2, 3)), axis=1)
        tg.tensor([1.0]).mean()
    assert all("test_tape.py" in record.source_line() for record in tape.records)


def test_sources_may_come_from_an_iterator():
    layer = nn.Linear(2, 1)
    with tg.Tape() as tape:
        loss = layer(np.ones((1, 2), np.float32)).sum()
    assert [g.shape for g in tape.gradient(loss, layer.parameters())] == [(1, 2), (1,)]


def test_no_grad_decorates_without_parentheses():
    x = tg.tensor([1.0], requires_grad=True)

    @tg.no_grad
    def double(x):
        return x * 2

    assert not double(x).requires_grad and (x * 2).requires_grad and double.__name__ == "double"
    with pytest.raises(tg.DTypeError, match="found int"):
        tg.no_grad(3)

    class Doubler:
        @tg.no_grad
        def of(self, x):
            return x * 2

        @tg.no_grad
        def several(self, x):
            yield x * 2
            yield x * 3

    doubler = Doubler()
    assert not doubler.of(x).requires_grad and not Doubler.of(doubler, x=x).requires_grad
    assert [y.requires_grad for y in doubler.several(x)] == [False, False]


@tg.no_grad
def tripled(x):
    return x * 3


def test_what_no_grad_decorates_is_pickled_as_a_function():
    assert pickle.loads(pickle.dumps(tripled)) is tripled and copy.deepcopy(tripled) is tripled
