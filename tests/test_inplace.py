"""Changes in place: a value that backward needs and that was written to is noticed, and nothing else is."""

from __future__ import annotations

import contextlib
import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops, optim


def leaf(*values: float) -> tg.Tensor:
    return tg.tensor(np.array(values), requires_grad=True)


def notices(y: tg.Tensor, *words: str) -> None:
    """backward() raises, says what and where, and leaves no gradient behind."""
    with pytest.raises(tg.GraphError) as caught:
        y.sum().backward()
    text = str(caught.value)
    for word in ("changed", "test_inplace.py", *words):
        assert word in text


# ---------------------------------------------------------------------------- item assignment and augmented assignment


def test_item_assignment_on_a_recorded_tensor_names_the_alternative():
    x = leaf(1.0, 2.0)
    y = x * x
    constant = tg.tensor([1.0, 2.0])
    _ = x.detach() * 1.0
    used = tg.tensor(np.array([1.0, 2.0]))
    _ = x * used
    for t in (x, y, used):
        with pytest.raises(tg.GraphError, match="where") as caught:
            t[0] = 5.0
        assert "scatter_add" in str(caught.value)
    constant[0] = 5.0
    assert constant.tolist() == [5.0, 2.0]
    y.sum().backward()
    assert x.grad.tolist() == [2.0, 4.0]


@pytest.mark.parametrize("name", ["__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"])
def test_augmented_assignment_rebinds(name):
    x = leaf(1.0, 2.0)
    y = x * 3.0
    kept = y
    if name == "__iadd__":
        y += 1.0
    elif name == "__isub__":
        y -= 1.0
    elif name == "__imul__":
        y *= 2.0
    elif name == "__itruediv__":
        y /= 2.0
    else:
        y **= 2.0
    assert y is not kept
    assert kept.tolist() == [3.0, 6.0]
    (kept * y).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("operator", ["+", "-", "*", "/", "//", "%", "**", "@"])
def test_augmented_assignment_to_a_parameter_names_the_remedy(operator):
    layer = nn.Linear(2, 2)
    before = layer.weight.numpy().copy()
    for target in ("p", "layer.weight"):
        with pytest.raises(tg.GraphError, match=rf"p\.data {re.escape(operator)}= "):
            exec(f"{target} {operator}= 0.5", {"p": layer.weight, "layer": layer})
    np.testing.assert_array_equal(layer.weight.numpy(), before)


def test_the_remedy_for_a_parameter_works():
    layer = nn.Linear(2, 2)
    before = layer.weight.numpy().copy()
    layer(np.ones((1, 2), np.float32)).sum().backward()
    with tg.no_grad():
        for p in layer.parameters():
            p.data -= 0.1 * p.grad
    np.testing.assert_allclose(layer.weight.numpy(), before - np.float32(0.1), rtol=1e-6)


# ---------------------------------------------------------------------------- what is noticed


def test_the_data_setter_bumps_the_version():
    x = leaf(1.0, 2.0)
    y = tg.name(x, "weights") * leaf(3.0, 4.0)
    before = x.version
    x.data -= 0.5
    assert x.version == before + 1
    notices(y, "multiply", "weights")
    assert x.grad is None


def test_a_new_array_through_the_setter_is_noticed():
    x, w = leaf(1.0, 2.0), leaf(3.0, 4.0)
    y = x * w
    w.data = np.array([0.0, 0.0])
    notices(y, "multiply", "y")
    assert x.grad is None


def test_an_array_read_before_it_was_saved():
    x, w = leaf(1.0, 2.0), leaf(3.0, 4.0)
    array = w.data
    y = x * w
    array[0] = 100.0
    notices(y, "multiply")


def test_an_array_read_after_it_was_saved():
    x, w = leaf(1.0, 2.0), leaf(3.0, 4.0)
    y = x * w
    for read in (lambda t: t.data, lambda t: t.numpy(), np.asarray, lambda t: t.detach().data):
        read(w)[0] = 100.0
        notices(y, "multiply")


def test_an_aliased_array():
    array = np.array([3.0, 4.0])
    x = leaf(1.0, 2.0)
    y = ops.sin(x * tg.asarray(array))
    array[1] += 1e-9
    notices(y, "multiply")


def test_an_array_given_to_the_setter():
    array = np.array([3.0, 4.0])
    x, w = leaf(1.0, 2.0), leaf(0.0, 0.0)
    w.data = array
    y = x * w
    array[0] = 7.0
    notices(y)


def test_a_plain_array_among_the_operands():
    array = np.array([3.0, 4.0])
    x = leaf(1.0, 2.0)
    y = x * array
    array[0] = 7.0
    notices(y)


@pytest.mark.parametrize("op", [ops.tanh, ops.exp, ops.sigmoid, ops.sqrt, ops.softmax], ids=lambda op: op.__name__)
def test_a_saved_output(op):
    x = leaf(1.0, 2.0)
    y = op(x)
    z = y * 2.0
    y.data[0] = 0.1
    notices(z)
    assert x.grad is None


@pytest.mark.parametrize("what", ["value", "sign", "swap", "nan"])
def test_every_kind_of_change(what):
    array = np.array([[3.0, 4.0], [5.0, -6.0]])
    x = tg.tensor(np.ones((2, 2)), requires_grad=True)
    y = x * tg.asarray(array)
    if what == "value":
        array[1, 1] = np.nextafter(array[1, 1], 0)
    elif what == "sign":
        array *= -1
    elif what == "swap":
        array[:] = array[::-1].copy()
    else:
        array[0, 0] = np.nan
    notices(y)


def test_a_swap_of_two_distant_elements_of_a_large_array():
    array = np.random.default_rng(0).standard_normal(10_000)
    x = tg.tensor(np.ones(10_000), requires_grad=True)
    y = x * tg.asarray(array)
    array[[3, 9000]] = array[[9000, 3]]
    notices(y)


def test_indices_that_were_changed():
    index = np.array([0, 0, 1])
    x = leaf(1.0, 2.0)
    y = x[index]
    index[0] = 1
    notices(y)


def test_inside_grad_and_tape():
    w = leaf(3.0, 4.0)

    def f(x: Any) -> Any:
        y = (x * w).sum()
        w.data = np.array([0.0, 0.0])
        return y

    with pytest.raises(tg.GraphError, match="changed"):
        tg.grad(f)(np.array([1.0, 2.0]))
    x = tg.tensor(np.array([1.0, 2.0]))
    with tg.Tape() as tape:
        y = (x * x).sum()
    x.data[0] = 5.0
    with pytest.raises(tg.GraphError, match="changed"):
        tape.gradient(y, x)


# ---------------------------------------------------------------------------- views share memory, and so its changes

VIEWS = {
    "transpose": lambda t: t.T,
    "reshape": lambda t: t.reshape(-1),
    "slice": lambda t: t[:1],
    "split": lambda t: ops.split(t, 2)[0],
    "expand_dims": lambda t: ops.expand_dims(t, 0),
    "flip": lambda t: ops.flip(t),
    "broadcast_to": lambda t: ops.broadcast_to(t, (2, 2, 2)),
    "stop_gradient": lambda t: ops.stop_gradient(t),
    "view of a view": lambda t: t.T[1:],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_saved_view_of_an_aliased_array(view):
    array = np.array([[3.0, 4.0], [5.0, 6.0]])
    w = tg.asarray(array)
    x = tg.tensor(np.array(2.0), requires_grad=True)
    y = x * view(w)
    array += 1.0
    notices(y)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_saved_view_of_a_parameter_that_was_stepped(view):
    """``x @ w.T`` saves the transpose; ``w.data -= u`` before backward must not go unnoticed."""
    w = tg.tensor(np.array([[3.0, 4.0], [5.0, 6.0]]), requires_grad=True)
    x = tg.tensor(np.array(2.0), requires_grad=True)
    y = x * view(w)
    w.data -= 1.0
    notices(y)


def test_a_view_of_a_saved_tensor_that_was_written_to():
    x = tg.tensor(np.array([1.0, 2.0]), requires_grad=True)
    y = x * x
    with tg.no_grad():
        v = x[:1]
    with contextlib.suppress(tg.GraphError):
        v[0] = 50.0
    if x.tolist() == [1.0, 2.0]:
        y.sum().backward()
        assert x.grad.tolist() == [2.0, 4.0]
    else:
        notices(y)


def test_writing_to_a_stopped_tensor_does_not_reach_a_saved_one():
    x = tg.tensor(np.array([1.0, 2.0]), requires_grad=True)
    y = x * x
    s = ops.stop_gradient(x)
    with contextlib.suppress(tg.GraphError):
        s[0] = 50.0
    if x.tolist() == [1.0, 2.0]:
        y.sum().backward()
        assert x.grad.tolist() == [2.0, 4.0]
    else:
        notices(y)


def test_a_returned_value_does_not_alias_what_was_saved():
    """grad and vjp hand out tensors outside of any graph; writing to one must not corrupt another."""
    value, pullback = tg.vjp(ops.exp, np.array([0.0, 1.0]))
    with contextlib.suppress(tg.GraphError):
        value[0] = 50.0
    try:
        (g,) = pullback(np.ones(2))
    except tg.GraphError:
        return
    np.testing.assert_allclose(g.numpy(), np.exp([0.0, 1.0]), rtol=1e-15)


# ---------------------------------------------------------------------------- what must not raise


def test_a_training_loop_with_updates_between_backward_and_forward():
    w = leaf(1.0, 2.0)
    x = np.array([0.5, -1.0])
    for _ in range(5):
        loss = ((w * x - 1.0) ** 2).sum()
        w.zero_grad()
        loss.backward()
        w.data -= 0.1 * w.grad
    loop = w.tolist()
    v = np.array([1.0, 2.0])
    for _ in range(5):
        v = v - 0.1 * 2 * (v * x - 1.0) * x
    np.testing.assert_allclose(loop, v, rtol=1e-14)


def test_updates_written_through_the_array_itself():
    w = leaf(1.0, 2.0)
    for _ in range(3):
        loss = (w * w).sum()
        w.zero_grad()
        loss.backward()
        w.data[...] -= 0.1 * w.grad
    np.testing.assert_allclose(w.tolist(), np.array([1.0, 2.0]) * 0.8**3, rtol=1e-14)


def test_a_reused_input_buffer():
    buffer = np.empty(2)
    x = tg.asarray(buffer)
    w = leaf(1.0, 2.0)
    for k in range(3):
        buffer[:] = k + 1.0
        w.zero_grad()
        (w * x).sum().backward()
        assert w.grad.tolist() == [k + 1.0] * 2


def test_reading_values_is_harmless():
    w, x = leaf(1.0, 2.0), leaf(3.0, 4.0)
    y = ops.tanh(w * x)
    _ = y.numpy().sum(), w.data.copy(), repr(y), y.tolist(), np.asarray(x).mean(), x.detach()
    y.sum().backward()
    assert w.grad is not None


def test_changing_what_is_not_needed():
    x, w = leaf(1.0, 2.0), leaf(3.0, 4.0)
    y = x + w
    w.data[0] = 100.0
    x.data = np.array([0.0, 0.0])
    y.sum().backward()
    assert x.grad.tolist() == w.grad.tolist() == [1.0, 1.0]


def test_changing_a_copy():
    x = leaf(1.0, 2.0)
    y = x * x
    x.copy().data[0] = 9.0
    np.array(x)[0] = 9.0
    tg.tensor(x).data[0] = 9.0
    y.sum().backward()
    assert x.grad.tolist() == [2.0, 4.0]


def test_a_change_after_backward_and_a_second_forward():
    x = leaf(1.0, 2.0)
    (x * x).sum().backward()
    x.data[0] = 10.0
    x.zero_grad()
    (x * x).sum().backward()
    assert x.grad.tolist() == [20.0, 4.0]


def test_a_change_undone_before_backward():
    x, array = leaf(1.0, 2.0), np.array([3.0, 4.0])
    y = x * tg.asarray(array)
    array[0] = 9.0
    array[0] = 3.0
    y.sum().backward()
    assert x.grad.tolist() == [3.0, 4.0]


def test_truncated_backpropagation_carries_detached_state():
    w = tg.tensor(np.eye(2) * 0.5, requires_grad=True)
    h = tg.tensor(np.ones((1, 2)))
    for _ in range(4):
        h = h.detach()
        for _ in range(3):
            h = ops.tanh(h @ w.T)
        h.sum().backward()
        w.data -= 0.01 * w.grad
        w.zero_grad()
    assert np.isfinite(h.numpy()).all()


def test_a_change_noted_in_the_middle_of_another_is_not_forgotten(monkeypatch):
    """A finalizer may expose an array at any moment: the later of the two serials stays."""
    from tinygrad_lstm import storage

    now, later = storage.now, []

    def interrupted() -> int:
        serial = now()
        if not later:
            later.append(None)
            storage._note()
            later[0] = storage.last_change[0]
        return serial

    monkeypatch.setattr(storage, "now", interrupted)
    storage._note()
    assert storage.last_change[0] == later[0]


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["copy", "pickle"])
def test_a_copy_of_a_parameter_is_watched_as_the_parameter(twin_of: Callable[[Any], Any]) -> None:
    parameter = nn.Parameter(np.ones(400))
    ops.square(parameter).sum().backward()
    optim.SGD([parameter], 0.1).step()
    parameter.grad = None
    twin = twin_of(parameter)
    loss = ops.square(twin).sum()
    twin.data[0] = 7.0
    with pytest.raises(tg.GraphError, match="changed in place"):
        loss.backward()
    ops.square(parameter).sum().backward()  # the copy is another one


def test_a_pickle_holds_a_parameter_once() -> None:
    parameter = nn.Parameter(np.ones(400))
    size = parameter.numpy().nbytes
    assert size < len(pickle.dumps(parameter)) < 1.5 * size
