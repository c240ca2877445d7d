"""Modules as arguments of grad, vjp, jvp, hvp and gradcheck."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops
from tinygrad_lstm.autodiff.standins import opened

# ---------------------------------------------------------------------------- modules as arguments


def small_model() -> tuple[nn.LSTM, np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    layer = nn.LSTM(2, 3, dtype=np.float64)
    direction = {name: rng.standard_normal(p.shape) for name, p in layer.named_parameters()}
    return layer, rng.standard_normal((3, 2, 2)), direction


def test_transforms_take_modules() -> None:
    layer, x, v = small_model()
    before = layer.state_dict()

    def loss(m: nn.LSTM, x: np.ndarray) -> tg.Tensor:
        return ops.square(m(x)[0]).sum()

    gradient = tg.grad(loss)(layer, x)
    value, slope = tg.jvp(lambda m: loss(m, x), (layer,), (v,))
    along = sum(float((gradient[name].numpy() * v[name]).sum()) for name in v)
    np.testing.assert_allclose(slope.numpy(), along, rtol=1e-12)
    out, pullback = tg.vjp(loss, layer, x)
    by_name, by_x = pullback(1.0)
    np.testing.assert_array_equal(out.numpy(), value.numpy())
    for name in v:
        np.testing.assert_allclose(by_name[name].numpy(), gradient[name].numpy(), rtol=1e-12)
    np.testing.assert_allclose(by_x.numpy(), tg.grad(loss, 1)(layer, x).numpy(), rtol=1e-12)
    _, (product,) = tg.hvp(lambda m: loss(m, x), (layer,), (v,))
    step, ends = 1e-5, []
    for sign in (1, -1):
        layer.load_state_dict({name: before[name] + sign * step * v[name] for name in v})
        ends.append(tg.grad(loss)(layer, x))
    layer.load_state_dict(before)
    for name in v:
        numeric = (ends[0][name].numpy() - ends[1][name].numpy()) / (2 * step)
        np.testing.assert_allclose(product[name].numpy(), numeric, rtol=1e-6, atol=1e-7)
    assert tg.gradcheck(loss, layer, x, order=2)
    for name, p in layer.named_parameters():  # they stand where they stood
        assert isinstance(p, nn.Parameter)
        np.testing.assert_array_equal(p.numpy(), before[name])


def test_a_function_that_raises_leaves_the_modules_parameters() -> None:
    layer, x, v = small_model()
    own = list(layer.parameters())

    def failing(m: nn.LSTM) -> tg.Tensor:
        raise RuntimeError("here")

    for run in (
        lambda: tg.jvp(failing, (layer,), (v,)),
        lambda: tg.vjp(failing, layer),
        lambda: tg.gradcheck(failing, layer),
    ):
        with pytest.raises(RuntimeError, match="here"):
            run()
        assert all(a is b for a, b in zip(layer.parameters(), own, strict=True))
    with pytest.raises(tg.ShapeError, match="tangent 0 has leaves"):
        tg.jvp(lambda m: m(x)[0].sum(), (layer,), ({"weight_ih_l0": v["weight_ih_l0"]},))
    with pytest.raises(tg.DTypeError, match="is a Module"):
        tg.hessian(lambda m: m(x)[0].sum())(layer)


def test_another_threads_stand_ins_are_no_parameters() -> None:
    """While one thread differentiates a module, what stands in its parameters' places is not theirs to read."""
    layer, x, _ = small_model()
    own, found, done = dict(layer.named_parameters()), [], threading.Event()

    def look() -> None:
        found.append(opened(lambda m: m, (layer,))[1][0])
        done.set()

    other = threading.Thread(target=look)

    def loss(m: nn.LSTM) -> tg.Tensor:
        other.start()
        assert not done.wait(0.1), "it did not wait"
        return ops.square(m(x)[0]).sum()

    tg.grad(loss)(layer)
    other.join()
    assert found[0].keys() == own.keys()
    assert all(found[0][name] is own[name] for name in own)


def test_modules_inside_of_tree_arguments() -> None:
    """At any depth; what comes back has a dict by parameter name in the place of each module."""
    rng = np.random.default_rng(6)
    first, second = nn.Linear(2, 3).astype("f8"), nn.GRU(3, 2).astype("f8")
    tree: dict[str, Any] = {"a": first, "rest": [second, (np.float64(0.5), None)]}
    x = rng.standard_normal((4, 2, 2))

    def loss(t: Any) -> tg.Tensor:
        assert t["a"] is first
        assert t["rest"][0] is second
        return (t["rest"][0](t["a"](x))[0] ** 2).sum() * t["rest"][1][0]

    first.zero_grad()
    second.zero_grad()
    loss(tree).backward()
    expected = {name: p.grad for name, p in [*first.named_parameters(), *second.named_parameters()]}
    value, gradient = tg.value_and_grad(loss)(tree)
    assert gradient.keys() == {"a", "rest"}
    assert gradient["rest"][1][1] is None
    found = {**gradient["a"], **gradient["rest"][0]}
    assert found.keys() == expected.keys()
    for name, g in expected.items():
        assert np.abs(g).max() > 0
        np.testing.assert_allclose(found[name].numpy(), g, rtol=1e-12)
    assert gradient["rest"][1][0].item() == pytest.approx(value.item() / 0.5)

    pulled = tg.vjp(loss, tree)[1](1.0)[0]
    compiled = tg.compile(tg.grad(loss))(tree)
    for name, g in expected.items():
        for other in (pulled, compiled):
            np.testing.assert_allclose({**other["a"], **other["rest"][0]}[name].numpy(), g, rtol=1e-10)

    def direction(module: Any) -> dict[str, Any]:
        return {name: rng.standard_normal(p.shape) for name, p in module.named_parameters()}

    v = {"a": direction(first), "rest": [direction(second), (0.3, None)]}
    along = sum(float((g * {**v["a"], **v["rest"][0]}[name]).sum()) for name, g in expected.items())
    slope = tg.jvp(loss, (tree,), (v,))[1].item()
    assert slope == pytest.approx(along + 0.3 * gradient["rest"][1][0].item(), rel=1e-10)
    product = tg.hvp(loss, (tree,), (v,))[1][0]
    assert product["rest"][1][0].item() == pytest.approx(along / 0.5, rel=1e-10)  # the loss is linear in it
    assert tg.gradcheck(loss, tree, order=2)
    assert all(isinstance(p, nn.Parameter) for p in (*first.parameters(), *second.parameters()))


def test_a_module_that_is_in_the_arguments_twice_is_refused() -> None:
    layer = nn.Linear(2, 2)
    x = np.ones((1, 2), np.float32)
    for whole in ([layer, layer], [nn.Sequential(layer), layer]):
        with pytest.raises(tg.ArgumentError, match="in the arguments twice"):
            tg.grad(lambda pair: (pair[0](x) * pair[1](x)).sum())(whole)
    assert isinstance(layer.weight, nn.Parameter)
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    b.weight = a.weight  # a shared parameter is two: each has the derivative of its own uses
    both = tg.grad(lambda pair: pair[0](x).sum() + 2.0 * pair[1](x).sum())([a, b])
    assert both[1]["weight"].tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert both[0]["weight"].tolist() == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("which", ["jacobian", "hessian"])
def test_a_jacobian_is_of_one_array(which):
    transform, pair = getattr(tg, which), (np.ones(2), np.ones(2))
    f = lambda x: (x[0] * x[1]).sum()
    for argument, found in (
        (pair, "a tuple"), ([tg.tensor(p) for p in pair], "a list"), ({0: pair[0], 1: pair[1]}, "a dict"),
        ({0: 1.0, 1: 2.0}, "a dict"), (nn.Linear(2, 1), "a Module"), (None, "None"), ([], r"\[\]"),
    ):  # fmt: skip
        with pytest.raises(tg.DTypeError, match=f"^{which}: argument 0 is {found}, expected one array.*take grad, vjp"):
            transform(f)(argument)
    with pytest.raises(tg.DTypeError, match=f"^{which}: argument 1: .* int64; convert"):
        transform(lambda x, y: (x * y).sum(), 1)(np.ones(2), np.arange(2))
    with pytest.raises(tg.ArgumentError, match=f"^{which}: argnums is one int"):
        transform(f, (0, 1))
    expected = transform(f)(np.array([2.0, 3.0])).numpy()
    for numbers in ([2.0, 3.0], (2.0, 3.0)):  # one array, as in tg.tensor
        np.testing.assert_array_equal(transform(f)(numbers).numpy(), expected)


def test_results_are_plain_where_nobody_can_differentiate_them_again():
    """As those of grad and vjp: a graph behind them would only hold memory."""
    f, x, v = (lambda t: (t**3).sum()), np.array([1.0, 2.0]), np.array([1.0, -1.0])
    value, (product,) = tg.hvp(f, (x,), (v,))
    out, slope = tg.jvp(f, (x,), (v,))
    assert [t.requires_grad or t._node is not None for t in (value, product, out, slope)] == [False] * 4
    for t, expected in ((value, 9.0), (product, 6 * x * v), (out, 9.0), (slope, (3 * x**2 * v).sum())):
        np.testing.assert_allclose(t.numpy(), expected)
    # Whoever can, still can: with respect to the point, the direction, and what the function closes over.
    w = tg.tensor(x, requires_grad=True)
    tg.hvp(f, (w,), (v,))[1][0].sum().backward()
    np.testing.assert_allclose(w.grad, 6 * v)
    np.testing.assert_allclose(tg.grad(lambda d: tg.jvp(f, (x,), (d,))[1])(v).numpy(), 3 * x**2)
    d = tg.tensor(v, requires_grad=True)
    tg.jvp(f, (x,), (d,))[1].backward()
    np.testing.assert_allclose(d.grad, 3 * x**2)
    scale = tg.tensor(2.0, dtype=np.float64, requires_grad=True)
    tg.hvp(lambda t: f(t) * scale, (x,), (v,))[1][0].sum().backward()
    np.testing.assert_allclose(scale.grad, (6 * x * v).sum())
    with tg.Tape() as tape:
        y = tg.tensor(x)
        product = tg.hvp(f, (y,), (v,))[1][0].sum()
    np.testing.assert_allclose(tape.gradient(product, y).numpy(), 6 * v)


def test_argnums_may_be_an_integer_of_numpy():
    found = tg.grad(lambda a, b: (a * b).sum(), np.int64(1))(np.array([2.0]), np.array([3.0]))
    assert isinstance(found, tg.Tensor) and found.tolist() == [2.0]


def test_a_function_with_an_integer_value_has_no_gradient():
    with pytest.raises(tg.DTypeError, match="returned int64"):
        tg.grad(ops.argmax)(np.array([1.0, 2.0]))
