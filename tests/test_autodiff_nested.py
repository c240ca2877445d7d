"""Derivatives of derivatives: no perturbation confusion in any mixture of modes; comparison with jax and autograd."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import ops


def forward(f: Any) -> Any:
    """The derivative of a scalar function of a scalar, by jvp."""
    return lambda x: tg.jvp(f, (x,), (1.0,))[1]


def reverse(f: Any) -> Any:
    return tg.grad(f)


def pulled(f: Any) -> Any:
    return lambda x: tg.vjp(f, x)[1](1.0)[0]


def taped(f: Any) -> Any:
    def slope(x: Any) -> Any:
        x = tg.asarray(x) * 1.0
        with tg.Tape() as tape:
            y = f(x)
        return tape.gradient(y, x)

    return slope


MODES = {"jvp": forward, "grad": reverse, "vjp": pulled}
TWO = [pytest.param(a, b, id=f"{m}-of-{n}") for (m, a), (n, b) in itertools.product(MODES.items(), repeat=2)]
THREE = [pytest.param(*c, id=n) for c, n in zip(itertools.product(MODES.values(), repeat=3),
                                                ("-".join(n) for n in itertools.product(MODES, repeat=3)),
                                                strict=True)]  # fmt: skip


@pytest.mark.parametrize(("outer", "inner"), TWO)
def test_the_classic_confusion(outer, inner):
    """d/dx (x * d/dy (x + y)) = 1, not 2 (Siskind & Pearlmutter 2005)."""
    assert outer(lambda x: x * inner(lambda y: x + y)(1.0))(1.0).item() == 1.0


@pytest.mark.parametrize(("outer", "inner"), TWO)
def test_the_inner_variable_at_the_outer_point(outer, inner):
    assert outer(lambda x: x * inner(lambda y: x * y)(x))(3.0).item() == 6.0
    assert outer(lambda x: inner(lambda y: x * y * y)(x))(3.0).item() == 12.0
    assert outer(lambda x: inner(lambda y: y * y)(2.0) * x)(3.0).item() == 4.0
    assert outer(lambda x: inner(lambda y: x * x)(x))(3.0).item() == 0.0


@pytest.mark.parametrize(("first", "second", "third"), THREE)
def test_three_levels(first, second, third):
    # d/dx [x * d/dy [y * x * d/dz (x * y * z)]] with z at y: x * d/dy (x^2 y^2) = 2 x^3 y; at y = x: 2 x^4 -> 8 x^3
    def f(x: Any) -> Any:
        return x * second(lambda y: y * x * third(lambda z: x * y * z)(y))(x)

    assert first(f)(2.0).item() == 64.0


@pytest.mark.parametrize(("first", "second", "third"), THREE)
def test_third_derivative(first, second, third):
    assert first(second(third(lambda x: x**4)))(2.0).item() == 48.0
    np.testing.assert_allclose(first(second(third(ops.sin)))(np.array(0.7)).item(), -np.cos(0.7), rtol=1e-14)


@pytest.mark.parametrize(("outer", "inner"), TWO)
def test_a_closure_over_the_outer_variable_that_escapes_the_inner_argument(outer, inner):
    """The inner function's result depends on the outer variable only through a closure made outside of it."""

    def f(x: Any) -> Any:
        scale = lambda y: y * ops.exp(x)
        return inner(lambda y: scale(y) * y)(np.array(2.0))  # 4 exp(x)

    np.testing.assert_allclose(outer(f)(np.array(0.3)).item(), 4 * np.exp(0.3), rtol=1e-14)


@pytest.mark.parametrize("inner", MODES.values(), ids=MODES)
def test_inside_backward(inner):
    x = tg.tensor(np.array(3.0), requires_grad=True)
    (x * inner(lambda y: x * y * y)(x)).backward()  # 2 x^3
    assert x.grad == 54.0


@pytest.mark.parametrize("inner", [*MODES.values(), taped], ids=[*MODES, "tape"])
def test_inside_a_tape(inner):
    x = tg.tensor(np.array(3.0))
    with tg.Tape() as tape:
        y = x * inner(lambda t: x * t * t)(x)
    assert tape.gradient(y, x).item() == 54.0


@pytest.mark.parametrize("outer", MODES.values(), ids=MODES)
def test_a_tape_inside(outer):
    assert outer(lambda x: taped(lambda y: y * y * y)(x))(2.0).item() == 12.0


@pytest.mark.parametrize("outer", MODES.values(), ids=MODES)
def test_stop_gradient_and_detach_at_every_level(outer):
    assert outer(lambda x: x * ops.stop_gradient(x))(3.0).item() == 3.0
    assert outer(lambda x: x * x.detach())(3.0).item() == 3.0
    assert outer(lambda x: tg.grad(lambda y: y * ops.stop_gradient(y) * x)(x))(3.0).item() == 6.0 - 3.0


def test_a_gradient_step_inside_a_loss():
    """Differentiate through an update: x' = x - a f'(x), loss x'^2."""

    def loss(a: Any, x: Any) -> Any:
        x = x - a * tg.grad(lambda t: (t**4).sum())(x)
        return (x * x).sum()

    a, x = np.array(0.1), np.array([0.5, -1.0])
    moved = x - a * 4 * x**3
    ga, gx = tg.grad(loss, (0, 1))(a, x)
    np.testing.assert_allclose(ga.item(), (2 * moved * -4 * x**3).sum(), rtol=1e-13)
    np.testing.assert_allclose(gx.numpy(), 2 * moved * (1 - 12 * a * x**2), rtol=1e-13)


def test_implicit_differentiation_of_sqrt_by_newton_steps():
    def root(a: Any) -> Any:
        x = a * 0.0 + 1.0
        for _ in range(8):
            x = x - (x * x - a) / tg.grad(lambda t: t * t)(x)
        return x

    np.testing.assert_allclose(tg.grad(root)(np.array(2.0)).item(), 0.5 / np.sqrt(2), rtol=1e-12)
    np.testing.assert_allclose(tg.grad(tg.grad(root))(np.array(2.0)).item(), -0.25 * 2**-1.5, rtol=1e-10)


# ---------------------------------------------------------------------------- outside references


def network(m: Any, tanh: Any, x: Any, w: Any, v: Any) -> Any:
    h = tanh(m(x, w))
    return (m(h, v) ** 2).sum() + (h * h * h).mean()


def arguments() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(3)
    return rng.standard_normal((4, 3)), rng.standard_normal((3, 5)), rng.standard_normal((5, 2))


@pytest.mark.conformance
def test_against_jax():
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    ours = lambda *a: network(ops.matmul, ops.tanh, *a)
    theirs = lambda *a: network(jax.numpy.matmul, jax.numpy.tanh, *a)
    args = arguments()
    vectors = tuple(np.cos(np.arange(a.size)).reshape(a.shape) for a in args)
    value, grads = tg.value_and_grad(ours, (0, 1, 2))(*args)
    value_j, grads_j = jax.value_and_grad(theirs, (0, 1, 2))(*args)
    np.testing.assert_allclose(value.item(), float(value_j), rtol=1e-13)
    for g, e in zip(grads, grads_j, strict=True):
        np.testing.assert_allclose(g.numpy(), np.asarray(e), rtol=1e-11)
    _out, tangent = tg.jvp(ours, args, vectors)
    np.testing.assert_allclose(tangent.item(), float(jax.jvp(theirs, args, vectors)[1]), rtol=1e-11)
    _, products = tg.hvp(ours, args, vectors)
    expected = jax.jvp(jax.grad(theirs, (0, 1, 2)), args, vectors)[1]
    for p, e in zip(products, expected, strict=True):
        np.testing.assert_allclose(p.numpy(), np.asarray(e), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(
        tg.hessian(ours, 1)(*args).numpy(), np.asarray(jax.hessian(theirs, 1)(*args)), rtol=1e-9, atol=1e-12
    )
    inner = lambda m, t, x: t(m(x, args[1]))
    np.testing.assert_allclose(
        tg.jacobian(lambda x: inner(ops.matmul, ops.tanh, x))(args[0]).numpy(),
        np.asarray(jax.jacobian(lambda x: inner(jax.numpy.matmul, jax.numpy.tanh, x))(args[0])),
        rtol=1e-11, atol=1e-14,
    )  # fmt: skip


@pytest.mark.conformance
def test_against_autograd():
    autograd = pytest.importorskip("autograd")
    anp = pytest.importorskip("autograd.numpy")
    args = arguments()
    for number in range(3):
        ours = tg.hessian(lambda *a: network(ops.matmul, ops.tanh, *a), number)(*args)
        theirs = autograd.hessian(lambda *a: network(anp.matmul, anp.tanh, *a), number)(*args)
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.conformance
def test_backward_against_torch():
    torch = pytest.importorskip("torch")
    args = arguments()
    ours = [tg.tensor(a, requires_grad=True) for a in args]
    theirs = [torch.tensor(a, requires_grad=True) for a in args]
    for _ in range(2):
        network(ops.matmul, ops.tanh, *ours).backward()
        network(torch.matmul, torch.tanh, *theirs).backward()
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.grad, b.grad.numpy(), rtol=1e-11)


@pytest.mark.parametrize("order", ["ab", "ba", "aab", "abb", "bab"])
@pytest.mark.parametrize("at", [(2.0, 0.0), (0.5, 0.0), (2.0, 1.0), (3.0, -1.0)])
def test_mixed_derivatives_of_powers(order, at):
    x, y = at
    log = math.log(x)
    expected = {
        "ab": x ** (y - 1) * (1 + y * log),
        "aab": x ** (y - 2) * ((y - 1) * (1 + y * log) + y),
        "abb": x ** (y - 1) * log * (2 + y * log),
    }["".join(sorted(order))]
    f = ops.power
    for variable in order:
        f = tg.grad(f, "ab".index(variable))
    assert f(np.array(x), np.array(y)).item() == pytest.approx(expected, rel=1e-12)
