"""Primitives that users declare, in every calling convention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import ops
from tinygrad_lstm.kernels import expression as e


@pytest.fixture
def declare(request):
    """tg.primitive under a fresh name; removed again after the test."""

    def make(*args: Any, **kwargs: Any) -> Any:
        name = f"test_{request.node.name}_{len(made)}"
        made.append(name)
        return tg.primitive(name, *args, **kwargs)

    made: list[str] = []
    yield make
    for name in made:
        tg.REGISTRY.pop(name, None)


X, Y = np.array([0.5, -1.2, 2.0]), np.array([1.5, 0.3, -0.7])


def check(prim: Any, *args: Any) -> None:
    assert tg.gradcheck(prim, *args, order=2)
    v = tuple(np.cos(a) for a in args)
    out, pullback = tg.vjp(prim, *args)
    w = np.sin(np.arange(out.size)).reshape(out.shape)
    pushed = tg.jvp(prim, args, v)[1]
    pulled = pullback(w)
    np.testing.assert_allclose(
        (pushed.numpy() * w).sum(), sum((p.numpy() * t).sum() for p, t in zip(pulled, v, strict=True)), rtol=1e-12
    )


def test_one_argument(declare):
    check(declare(forward=lambda x: np.sin(x), vjp=lambda g, x: g * ops.cos(x)), X)
    check(declare(lambda x: np.sin(x), lambda g, x: (g * ops.cos(x),)), X)
    check(declare(lambda x: np.exp(x), lambda g, out: g * out), X)
    check(declare(lambda x: np.exp(x), lambda g, ans: g * ans), X)


def test_one_rule_per_argument(declare):
    check(declare(lambda x, y: x * y * y, vjp=(lambda g, y: g * y * y, lambda g, x, y: g * 2.0 * x * y)), X, Y)
    check(declare(lambda x, y: x * y * y, vjp=[lambda g, y: g * y * y, lambda g, x, y: g * 2.0 * x * y]), X, Y)


def test_one_rule_for_all_arguments(declare):
    check(declare(lambda x, y: x * y * y, vjp=lambda g, x, y: (g * y * y, g * 2.0 * x * y)), X, Y)


def test_an_argument_without_a_rule_has_no_gradient(declare):
    prim = declare(lambda x, y: x * y, vjp=(lambda g, y: g * y, None))
    gx, gy = tg.grad(lambda x, y: prim(x, y).sum(), (0, 1))(X, Y)
    np.testing.assert_array_equal(gx.numpy(), Y)
    assert not gy.numpy().any()


def test_an_absent_gradient_from_a_joint_rule(declare):
    prim = declare(lambda x, y: x * y, vjp=lambda g, x, y: (g * y, None))
    gx, gy = tg.grad(lambda x, y: prim(x, y).sum(), (0, 1))(X, Y)
    np.testing.assert_array_equal(gx.numpy(), Y)
    assert not gy.numpy().any()


def test_keyword_parameters(declare):
    prim = declare(lambda x, *, k: x**k, vjp=lambda g, x, k: g * (k * x ** (k - 1)))
    for k in (2, 3, 5):
        check(lambda x, k=k: prim(x, k=k), X)


def test_broadcasting_is_undone_by_the_mechanism(declare):
    prim = declare(lambda x, y: x * y, vjp=(lambda g, y: g * y, lambda g, x: g * x))
    gx, gy = tg.grad(lambda x, y: prim(x, y).sum(), (0, 1))(np.ones((2, 3)), np.array([1.0, 2.0, 3.0]))
    assert gx.tolist() == [[1.0, 2.0, 3.0]] * 2
    assert gy.tolist() == [2.0, 2.0, 2.0]


def test_any_number_of_arguments(declare):
    prim = declare(lambda *xs: sum(xs[1:], xs[0]), vjp=lambda g, xs: [g] * len(xs))
    a, b, _c = tg.grad(lambda *xs: (prim(*xs) ** 2).sum(), (0, 1, 2))(X, Y, X)
    np.testing.assert_allclose(a.numpy(), 2 * (2 * X + Y))
    np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_several_outputs(declare):
    prim = declare(lambda x: (np.sin(x), np.cos(x)), vjp=lambda g, x: g[0] * ops.cos(x) - g[1] * ops.sin(x))
    s, c = prim(tg.tensor(X))
    np.testing.assert_allclose(s.numpy() ** 2 + c.numpy() ** 2, 1.0)
    assert tg.gradcheck(prim, X, order=2)
    x = tg.tensor(X, requires_grad=True)
    prim(x)[1].sum().backward()
    np.testing.assert_allclose(x.grad, -np.sin(X))
    np.testing.assert_allclose(tg.jvp(lambda t: prim(t)[0], (X,), (np.ones(3),))[1].numpy(), np.cos(X), rtol=1e-15)


def test_several_arguments_and_several_outputs(declare):
    prim = declare(lambda x, y: (x * y, x + y), vjp=lambda g, x, y: (g[0] * y + g[1], g[0] * x + g[1]))
    assert tg.gradcheck(prim, X, Y, order=2)
    for k, expected in enumerate((Y, np.ones(3))):
        x = tg.tensor(X, requires_grad=True)
        prim(x, Y)[k].sum().backward()
        np.testing.assert_array_equal(x.grad, expected)


def test_saves_with_names_of_ones_own(declare):
    prim = declare(lambda x, y: x * y, vjp=(lambda g, kept: g * kept, lambda g, a, b: g * b), saves=("y", "x"))
    gx, gy = tg.grad(lambda x, y: prim(x, y).sum(), (0, 1))(X, Y)
    np.testing.assert_array_equal(gx.numpy(), Y)
    np.testing.assert_array_equal(gy.numpy(), X)


def test_a_jvp_of_ones_own(declare):
    calls = []

    def jvp(tangents: Any, x: Any, out: Any) -> Any:
        calls.append(1)
        return tangents[0] * ops.cos(x)

    check(declare(lambda x: np.sin(x), lambda g, x: g * ops.cos(x), jvp=jvp), X)
    assert calls


def test_an_expression_makes_it_elementwise(declare):
    prim = declare(
        lambda x, y: np.tanh(x) * y, vjp=(lambda g, x, y: g * y * (1.0 - ops.tanh(x) ** 2), lambda g,
        x: g * ops.tanh(x)),
        expression=lambda x, y: e.tanh(x) * y,
    )  # fmt: skip
    check(prim, X, Y)
    np.testing.assert_array_equal(prim(X, Y).numpy(), np.tanh(X) * Y)


def test_a_name_is_taken_once(declare):
    with pytest.raises(tg.Error, match="tanh"):
        tg.primitive("tanh", forward=np.tanh, vjp=lambda g: g)


@pytest.mark.parametrize("vjp", [(lambda g: g,), (lambda g: g, lambda g: g, lambda g: g)], ids=len)
def test_a_wrong_number_of_rules_is_refused(declare, vjp):
    with pytest.raises(tg.Error, match=r"2 arguments|rules"):
        declare(lambda x, y: x + y, vjp=vjp)


def test_a_rule_that_asks_for_something_unknown_is_refused(declare):
    with pytest.raises(tg.Error, match="banana"):
        declare(lambda x: x, vjp=lambda g, banana: g)


def test_a_failed_declaration_leaves_the_name_free(request):
    name = "test_failed_declaration"
    with pytest.raises(tg.Error):
        tg.primitive(name, forward=lambda x: x, vjp=lambda g, banana: g)
    assert name not in tg.REGISTRY


def test_a_vjp_in_numpy_works_once_and_does_not_lie_about_second_derivatives(declare):
    """A rule that leaves the tape cannot be differentiated again: that must not come out as zero."""
    prim = declare(lambda x: np.sin(x), vjp=lambda g, x: np.asarray(g) * np.cos(np.asarray(x)))
    x = tg.tensor(X, requires_grad=True)
    prim(x).sum().backward()
    np.testing.assert_allclose(x.grad, np.cos(X), rtol=1e-15)
    with pytest.raises(tg.Error):
        tg.jvp(prim, (X,), (np.ones(3),))
    with pytest.raises(tg.Error):
        tg.grad(lambda t: tg.grad(lambda s: prim(s).sum())(t).sum())(X)


def test_a_changed_rule_counts_at_once():
    """Nothing is hand-written elsewhere: doubling tanh's declared derivative doubles every gradient through it."""
    tanh = tg.REGISTRY["tanh"]
    rules = tanh.rules
    x = np.array([0.3, -0.8])
    f = lambda t: (ops.tanh(t) * 3.0).sum()
    before = tg.grad(f)(x).numpy().copy()
    try:
        tanh.set_rules((lambda g, out: g * 2.0 * (1.0 - out * out),))
        np.testing.assert_allclose(tg.grad(f)(x).numpy(), 2 * before, rtol=1e-15)
        np.testing.assert_allclose(tg.jvp(f, (x,), (np.ones(2),))[1].item(), 2 * before.sum(), rtol=1e-15)
    finally:
        tanh.set_rules(rules)
    np.testing.assert_array_equal(tg.grad(f)(x).numpy(), before)


def test_a_function_of_numpy_is_a_forward_as_it_is():
    """Its ``out`` and ``where`` are no arguments of the primitive."""
    wave = tg.primitive("test_wave", forward=np.sin, vjp=lambda g, x: g * ops.cos(x))
    x = tg.tensor([0.5, 1.0], requires_grad=True)
    wave(x).sum().backward()
    np.testing.assert_allclose(x.grad, np.cos([0.5, 1.0]), rtol=1e-6)
    assert tg.gradcheck(wave, np.array([0.5, 1.0]))


# ---------------------------------------------------------------------------- what a call may contain


def test_operands_that_no_primitive_takes():
    """NumPy's functions behind primitives take more: a third operand of a ufunc would be written to."""
    t, u, c = (tg.tensor(np.full(2, v)) for v in (1.0, 2.0, 0.0))
    for call, found in [
        (lambda: ops.maximum(t, u, c), "takes (x, y), found 3"), (lambda: ops.exp(t, u), "takes (x), found 2"),
        (lambda: ops.exp(t, where=np.array([True, False])), "where"), (lambda: ops.exp(t, out=c.data), "out"),
        (lambda: ops.add(t, u, dtype=np.float32, casting="no"), "casting, dtype"), (lambda: ops.add(t), "y is missing"),
        (lambda: t.exp(u), "found 2"), (lambda: ops.where(t, u), "y is missing"),
    ]:  # fmt: skip
        with pytest.raises(tg.ArgumentError) as caught:
            call()
        assert found in str(caught.value)
    assert c.tolist() == [0.0, 0.0] and t.tolist() == [1.0, 1.0]
    with pytest.raises(tg.ArgumentError):
        tg.compile(lambda a, b: ops.maximum(a, b, a))(t, u)


def test_defaults_count_in_the_backward_too(declare):
    prim = declare(lambda x, *, k=3: x**k, vjp=lambda g, x, k: g * (k * x ** (k - 1)))
    check(lambda x: prim(x), X)
    np.testing.assert_allclose(tg.grad(lambda x: prim(x).sum())(X).numpy(), 3 * X**2)
    np.testing.assert_allclose(tg.grad(lambda x: prim(x, k=2).sum())(X).numpy(), 2 * X)
    scaled = declare(lambda x, y=2.0: x * y, vjp=lambda g, x, y: (g * y, g * x))
    assert tg.grad(lambda x: scaled(x).sum())(X).tolist() == [2.0, 2.0, 2.0]
    assert scaled(y=X, x=Y).tolist() == (X * Y).tolist()
    with pytest.raises(tg.ArgumentError, match="found the keyword m"):
        prim(X, m=2)
    with pytest.raises(tg.ArgumentError, match="k is missing"):
        declare(lambda x, *, k: x**k, vjp=lambda g, x, k: g * x)(X)


FUNCTIONS = {
    "numpy": lambda x, y: np.tanh(x) * np.where(x > 0, y, 0.5) + np.float64(2.0) * np.absolute(y) + np.clip(x, -1, y),
    "ops": lambda x, y: ops.tanh(x) * ops.where(x > 0, y, 0.5) + 2.0 * ops.abs(y) + ops.minimum(ops.maximum(x, -1), y),
    "clip": lambda x, y: (
        ops.tanh(x) * ops.where(x > 0, y, 0.5) + 2.0 * ops.clip(abs(y), 0, 9) + e.minimum(e.maximum(x, -1), y)
    ),
    "operators": lambda x, y: e.tanh(x) * e.where(x > 0, y, 0.5) + 2.0 * abs(y) + e.minimum(e.maximum(x, -1), y),
}


@pytest.mark.parametrize("compile", ["never", "always"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_expressions_in_words_of_numpy_and_ops(declare, name, compile, monkeypatch):
    monkeypatch.setenv("TINYGRAD_LSTM_COMPILE", compile)
    forward = lambda x, y: np.tanh(x) * np.where(x > 0, y, 0.5) + 2 * np.abs(y) + np.minimum(np.maximum(x, -1), y)
    prim = declare(forward, vjp=(lambda g, x: g * x, lambda g, y: g * y), expression=FUNCTIONS[name])
    rows = np.stack([X, Y, X - Y, -Y])
    _, ys = ops.scan(lambda c, x: (c, prim(x, c) + 1.0), X, rows)
    np.testing.assert_allclose(ys.numpy(), [forward(row, X) + 1.0 for row in rows], rtol=1e-12)
    np.testing.assert_allclose(tg.compile(lambda x: prim(x, Y) * 2.0)(X).numpy(), forward(X, Y) * 2.0, rtol=1e-12)


def test_expressions_that_cannot_be_right(declare):
    rule = lambda g, x: g
    for expression in (lambda x: np.cbrt(x), lambda x: ops.sum(x), lambda x: np.concatenate([x, x])):
        with pytest.raises(tg.DTypeError, match="expression"):
            declare(lambda x: np.cbrt(x), rule, expression=expression)
    with pytest.raises(tg.DTypeError, match=r"arctan2.*tanh"):  # what there is
        declare(lambda x: np.cbrt(x), rule, expression=lambda x: np.cbrt(x))
    with pytest.raises(tg.ArgumentError, match="forward"):
        declare(lambda x: np.tanh(x), rule, expression=lambda x: e.tanh(x) + 0.01)
    with pytest.raises(tg.DTypeError, match="where"):
        declare(lambda x: np.abs(x), rule, expression=lambda x: x if x > 0 else -x)
    declare(lambda x, *, k: x * k, lambda g, x, k: g * k, expression=lambda x, *, k: x * k)  # seen when it is called


def test_names_and_forwards_of_another_kind():
    with pytest.raises(tg.DTypeError, match="string, found 3"):
        tg.primitive(3, forward=np.tanh, vjp=lambda g: g)  # type: ignore[arg-type]
    with pytest.raises(tg.DTypeError, match="forward is a function"):
        tg.primitive("test_no_forward", forward=3, vjp=lambda g: g)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("vjp", "error", "message"),
    [
        (lambda g, x, y: (g.sum(), g), tg.ShapeError, r"VJP of .* cotangent of shape \(\) for x, expected \(3,\)"),
        (lambda g, x, y: (g, ops.stack([g, g])[:, :2]), tg.ShapeError, r"shape \(2, 2\) for y, expected \(3,\)"),
        ((lambda g, y: g * y, lambda g, x: g[:2]), tg.ShapeError, r"shape \(2,\) for y, expected \(3,\)"),
        (lambda g, x, y: (g * y,), tg.GraphError, r"a tuple of 1, expected a tuple of 2 .* \(x, y\); None for"),
        (lambda g, x, y: g * y, tg.GraphError, r"one Tensor of shape \(3,\), expected a tuple of 2"),
        (lambda g, x, y: None, tg.GraphError, "returned None, expected a tuple of 2"),
        (lambda g, x, y: ("no", g), tg.DTypeError, r"returned a str for x, expected one Tensor of shape \(3,\)"),
        ((lambda g: (g, g), lambda g: g), tg.DTypeError, "returned a tuple of 2 for x, expected one Tensor"),
    ],
)
def test_vjp_rules_that_return_something_else(declare, vjp, error, message):
    prim = declare(lambda x, y: x * y, vjp)
    with pytest.raises(error, match=message):
        prim(tg.tensor(X, requires_grad=True), tg.tensor(Y, requires_grad=True)).sum().backward()


def test_a_pair_of_cotangents_for_one_argument(declare):
    prim = declare(lambda x: 2 * x, lambda g: (2.0 * g, g))
    with pytest.raises(tg.GraphError, match="returned a tuple of 2, expected one cotangent"):
        tg.grad(lambda x: prim(x).sum())(X)


def test_cotangents_and_tangents_are_converted(declare):
    prim = declare(
        lambda x: 2 * x, lambda g: (2 * g).astype(np.float64), jvp=lambda t, x, out: (2 * t[0]).astype(np.float64)
    )
    x = tg.tensor(X, dtype=np.float32)
    assert tg.grad(lambda x: prim(x).sum())(x).dtype == tg.jvp(prim, (x,), (x,))[1].dtype == np.float32


@pytest.mark.parametrize(
    ("jvp", "error", "message"),
    [
        (lambda t, x, out: t[0].sum(), tg.ShapeError, r"jvp of .* of shape \(\) for the output, expected \(3,\)"),
        (lambda t, x, out: (t[0], t[0]), tg.GraphError, "jvp of .* returned 2 tangents, expected 1"),
        (lambda t, x, out: "no", tg.DTypeError, r"jvp of .* returned a str for the output, expected a Tensor"),
    ],
)
def test_jvp_rules_that_return_something_else(declare, jvp, error, message):
    prim = declare(lambda x: 2 * x, lambda g: 2 * g, jvp=jvp)
    with pytest.raises(error, match=message):
        tg.jvp(prim, (X,), (X,))
    with pytest.raises(error, match=message):
        tg.gradcheck(prim, X)


def test_gradcheck_of_what_has_no_forward_mode(declare):
    assert tg.gradcheck(declare(np.sin, lambda g, x: np.asarray(g) * np.cos(np.asarray(x))), X)


@pytest.mark.parametrize(
    ("forward", "found"),
    [
        (lambda x: None, "None"),
        (lambda x: "no", "a str"),
        (lambda x: [x, x], "a list of 2"),
        (lambda x: x + 1j, "an array of complex128"),
        (lambda x: (x, None), "None as output 1"),
    ],
)
def test_forwards_that_return_something_else(declare, forward, found):
    with pytest.raises(tg.DTypeError, match=f"the forward of .* returned {found}, expected an array of real numbers"):
        declare(forward, lambda g: g)(X)


def test_gradcheck_compares_the_jvp_that_was_declared(declare):
    rules = {"forward": lambda x: x**3, "vjp": lambda g, x: g * 3.0 * x * x}
    right = declare(**rules, jvp=lambda t, x, out: t[0] * 3.0 * x * x)
    wrong = declare(**rules, jvp=lambda t, x, out: t[0] * 3.0 * x * abs(x))
    x = np.array([0.5, 1.5, -0.7])
    assert tg.gradcheck(right, x)
    with pytest.raises(tg.GradcheckError, match=r"argument 0, index \(2,\): derivative by jvp"):
        tg.gradcheck(wrong, x)
    assert tg.gradcheck(wrong, np.abs(x))


@pytest.mark.parametrize("given", [{"vjp": "a"}, {"vjp": (3,)}, {"vjp": lambda g: g, "jvp": "a"}])
def test_rules_are_functions(given):
    with pytest.raises(tg.DTypeError, match="made of functions, found"):
        tg.primitive("rules_are_functions", forward=np.sin, **given)
