"""The short ways of a plain backward: rules on arrays, gradients that are taken without a copy, prepared scans."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops
from tinygrad_lstm.arrayrules import ArrayRule
from tinygrad_lstm.shortforms import short_form

FUNCTIONS = {
    "sum": lambda x: (x * x).sum(),
    "sum of an axis": lambda x: (ops.exp(x.sum(axis=0)) * 0.5).sum(),
    "keepdims": lambda x: (x * x.sum(axis=-1, keepdims=True)).sum(),
    "mean": lambda x: (x - x.mean(axis=0)).sum() + (x * x).mean(),
    "matmul": lambda x: ops.tanh(x @ x.T).sum(),
    "stacked matmul": lambda x: ops.tanh(ops.stack([x, x * 2.0]) @ x.T).sum(),
    "reshape": lambda x: (x.reshape(-1) * x.reshape(-1)).sum(),
    "slice": lambda x: (x[1:] * x[:-1]).sum() + x[0, 0] * 3.0,
    "broadcast": lambda x: (ops.broadcast_to(x, (3, *x.shape)) * x).sum(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@given(rows=st.integers(1, 6), columns=st.integers(1, 6), seed=st.integers(0, 9))
@settings(max_examples=15)
def test_a_backward_says_the_same_every_time(name, rows, columns, seed):
    """At first the rules themselves run, later their programs; a Tape's gradient never takes the short way."""
    values = np.random.default_rng(seed).normal(size=(rows, columns))
    with tg.Tape() as tape:
        y = tg.tensor(values)
        out = FUNCTIONS[name](y)
    expected = tape.gradient(out, y).numpy()
    found = []
    for _ in range(ArrayRule.PATIENCE + 2):
        x = tg.tensor(values, requires_grad=True)
        FUNCTIONS[name](x).backward()
        found.append(x.grad)
    for gradient in found:
        np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-12)


def repeated(shape: tuple[int, ...]) -> np.ndarray:
    for _ in range(ArrayRule.PATIENCE + 2):
        x = tg.tensor(np.ones(shape), requires_grad=True)
        x.sum().backward()
    return x.grad


def test_a_rule_that_is_declared_anew_counts_at_once():
    total = tg.REGISTRY["sum"]
    rules = total.rules
    np.testing.assert_array_equal(repeated((2, 3)), np.ones((2, 3)))
    total.set_rules((lambda g, shapes, axis, keepdims: 2.0 * rules[0](g, shapes=shapes, axis=axis, keepdims=keepdims),))
    try:
        np.testing.assert_array_equal(repeated((2, 3)), np.full((2, 3), 2.0))
    finally:
        total.set_rules(rules)
    np.testing.assert_array_equal(repeated((2, 3)), np.ones((2, 3)))


def test_the_programs_of_a_rule_are_few():
    total = tg.REGISTRY["sum"]
    total.set_rules(total.rules)  # forgets the programs
    for n in range(ArrayRule.MOST + 10):
        np.testing.assert_array_equal(repeated((n,)), np.ones(n))
    (rule,) = total._on_arrays
    assert len(rule.functions) == ArrayRule.MOST
    assert all(callable(function) for function in rule.functions.values())


# ---------------------------------------------------------------------------- gradients without a copy


def fresh_gradient(made: list[Any], view: bool = False) -> Any:
    """An op whose cotangent is an array that nobody else has, remembered weakly."""

    def rule(g: Any, x: Any) -> Any:
        array = np.full(6, 7.0)
        made.append(weakref.ref(array))
        return tg.Tensor(array.reshape(2, 3) if view else array)

    shape = (2, 3) if view else (6,)
    name = f"fresh_{view}_{id(made)}"
    op = tg.primitive(name, forward=lambda x: x + 0.0, vjp=rule)
    del tg.REGISTRY[name]
    return op, shape


@pytest.mark.parametrize("view", [False, True])
def test_an_array_that_nobody_else_has_becomes_the_gradient(view):
    made: list[Any] = []
    op, shape = fresh_gradient(made, view)
    x = tg.tensor(np.zeros(shape), requires_grad=True)
    op(x).sum().backward()
    array = made[0]()
    assert array is not None
    assert x.grad is array or x.grad.base is array
    np.testing.assert_array_equal(x.grad, np.full(shape, 7.0))


def test_what_a_hook_kept_is_not_the_gradient():
    kept: list[Any] = []
    x = tg.tensor(np.ones(3), requires_grad=True)
    x.register_hook(lambda g: kept.append(g))
    (x * 2.0).sum().backward()
    assert not np.shares_memory(kept[0].numpy(), x.grad)


def test_an_array_that_a_hook_kept_is_not_the_gradient():
    kept: list[Any] = []
    x = tg.tensor(np.ones((2, 3)), requires_grad=True)
    x.register_hook(lambda g: kept.append(g.numpy()[0]))  # a view of it
    (x * 2.0).sum().backward()
    assert not np.shares_memory(kept[0], x.grad)


@pytest.mark.parametrize("given_as", [np.asarray, tg.asarray])
def test_a_given_cotangent_is_not_the_gradient(given_as):
    cotangent = np.ones(3)
    x, y = tg.tensor(np.ones(3), requires_grad=True), tg.tensor(np.ones(3), requires_grad=True)
    (x + y).backward(given_as(cotangent))
    for one, other in ((x.grad, cotangent), (y.grad, cotangent), (x.grad, y.grad)):
        assert not np.shares_memory(one, other)


def test_gradients_of_a_layer_have_memory_of_their_own():
    layer = nn.LSTM(3, 4)
    x = tg.tensor(np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32), requires_grad=True)
    y, _ = layer(x)
    (y * y).sum().backward(retain_graph=True)
    first = [p.grad.copy() for p in (x, *layer.parameters())]
    held = [p.grad for p in (x, *layer.parameters())]
    for k, one in enumerate(held):
        assert one.flags.c_contiguous and one.flags.writeable
        assert not any(np.shares_memory(one, other) for other in held[:k])
        one[...] = np.nan  # the user's to write to: no later backward reads it
    layer.zero_grad()
    x.zero_grad()
    (y * y).sum().backward()
    for p, expected in zip((x, *layer.parameters()), first, strict=True):
        np.testing.assert_array_equal(p.grad, expected)


def test_a_gradient_that_is_not_contiguous_is_copied():
    x = tg.tensor(np.ones((2, 3)), requires_grad=True)
    (x.T * np.arange(6.0).reshape(3, 2)).sum().backward()
    assert x.grad.flags.c_contiguous
    np.testing.assert_array_equal(x.grad, np.arange(6.0).reshape(3, 2).T)


# ---------------------------------------------------------------------------- prepared scans and modules


def test_a_rule_that_changes_between_forward_and_backward_of_a_scan():
    tanh = tg.REGISTRY["tanh"]
    rules = tanh.rules

    def gradient(early: bool) -> np.ndarray:
        x = tg.tensor(np.linspace(-1.0, 1.0, 4), requires_grad=True)
        change = lambda: tanh.set_rules((lambda g, out: g * 2.0 * (1.0 - out * out),))
        try:
            if early:
                change()
            total, _ = ops.scan(lambda c, v: (ops.tanh(c + v), None), np.zeros(()), x)
            if not early:
                change()
            total.backward()
        finally:
            tanh.set_rules(rules)
        return x.grad

    np.testing.assert_allclose(gradient(early=False), gradient(early=True), rtol=1e-12)


def test_zero_grad_reaches_every_parameter():
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Parameter([1.0])
            self.listed = [nn.Parameter([2.0]), {"deep": nn.Parameter([3.0])}]
            self.part = nn.Linear(2, 2)
            self.again = self.part
            self.layer = nn.LSTM(2, 3, bidirectional=True)
            self.constant = tg.tensor([4.0], requires_grad=True)

    model = Holder()
    for p in (*model.parameters(), model.constant):
        p.grad = np.ones(p.shape, p.dtype)
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert model.constant.grad is not None  # no parameter


def test_zero_grad_follows_parameters_of_a_subclass():
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter([1.0]), nn.Parameter([2.0])

        def parameters(self) -> Any:
            yield self.a

    model = Frozen()
    model.a.grad = model.b.grad = np.ones(1, np.float32)
    model.zero_grad()
    assert model.a.grad is None
    assert model.b.grad is not None


# ---------------------------------------------------------------------------- short forms

PROGRAMS = {
    "sum": ([(3, 4)], lambda x: x.sum(axis=0)),
    "whole sum": ([(3, 4)], lambda x: x.sum()),
    "sum_to": ([(2, 3, 4)], lambda x: tg.REGISTRY["sum_to"](x, shape=(1, 4))),
    "sum_to the same": ([(3, 1)], lambda x: tg.REGISTRY["sum_to"](x, shape=(3, 1))),
    "spread": ([(1, 1)], lambda x: ops.broadcast_to(x, (2, 3, 4))),
    "spread to nothing": ([(1,)], lambda x: ops.broadcast_to(x, (0, 1))),
    "product": ([(3, 4), (4, 5)], lambda a, b: a @ b),
    "stacked product": ([(2, 3, 4), (4, 5)], lambda a, b: a @ b),
    "turned product": ([(3, 4), (4, 5)], lambda a, b: (a @ b).T),
    "turned, and read twice": ([(3, 4), (4, 5)], lambda a, b: ops.concatenate([(a @ b).T, ops.reshape(a @ b, (5, 3))])),
    "a large product": ([(2, 60, 70), (70, 80)], lambda a, b: a @ b),
    "an empty product": ([(0, 4), (4, 5)], lambda a, b: a @ b),
    "transpose": ([(2, 3, 4)], lambda x: ops.swapaxes(x, -1, -2)),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_short_forms_say_what_the_forwards_say(name, dtype):
    shapes, function = PROGRAMS[name]
    rng = np.random.default_rng(3)
    arrays = [rng.normal(size=shape).astype(dtype) for shape in shapes]
    inputs = [tg.tensor(a) for a in arrays]
    with tg.Tape() as tape:
        expected = function(*inputs)
    program = tape.to_program(inputs, [expected])
    (found,) = program.run(arrays)
    expected = expected.numpy()
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    tolerance = {np.float16: 1e-2, np.float32: 1e-5, np.float64: 1e-12}[dtype]
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
    assert np.asarray(found).flags.writeable or "spread" in name


def test_a_turned_product_is_contiguous():
    a, b = tg.tensor(np.ones((3, 4))), tg.tensor(np.ones((4, 5)))
    with tg.Tape() as tape:
        out = (a @ b).T
    assert tape.to_program([a, b], [out]).run([a.numpy(), b.numpy()])[0].flags.c_contiguous


def test_a_number_among_the_operands_has_no_short_form():
    x = tg.tensor(np.ones(3))
    with tg.Tape() as tape:
        out = x * 2.0
    program = tape.to_program([x], [out])
    assert short_form(program.equations[0], program.avals, "p") is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("an empty product", None),
        ("a large product", "dot({0}.reshape(p), {1}).reshape(p_shape)"),  # by the kernels
        ("stacked product", "{0}.reshape(p).dot({1}).reshape(p_shape)"),
        ("product", "{0}.dot({1})"),
    ],
)
def test_short_forms_of_products(name, expected):
    shapes, function = PROGRAMS[name]
    inputs = [tg.tensor(np.ones(shape)) for shape in shapes]
    with tg.Tape() as tape:
        out = function(*inputs)
    program = tape.to_program(inputs, [out])
    (product,) = (equation for equation in program.equations if equation.primitive.name == "matmul")
    found = short_form(product, program.avals, "p")
    assert (None if found is None else found.text) == expected
