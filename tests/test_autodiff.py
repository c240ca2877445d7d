"""grad, value_and_grad, vjp, jvp, hvp, jacobian, hessian: arguments, structures, shapes, values, messages."""

from __future__ import annotations

import re
from collections import namedtuple
from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import ops

# ---------------------------------------------------------------------------- grad and value_and_grad


@pytest.mark.parametrize("x", [3.0, np.float64(3.0), np.array(3.0), tg.tensor(3.0)], ids=lambda x: type(x).__name__)
def test_grad_of_a_scalar_function(x):
    g = tg.grad(lambda t: t * t)(x)
    assert isinstance(g, tg.Tensor)
    assert g.item() == 6.0
    assert g.dtype == (np.float32 if type(x) in (float, tg.Tensor) else np.float64)


def test_grad_does_not_touch_grad_of_its_arguments():
    x = tg.tensor([1.0, 2.0], requires_grad=True)
    w = tg.tensor([1.0, 2.0], requires_grad=True)
    tg.grad(lambda t: (t * t * w).sum())(x)
    assert x.grad is None
    assert w.grad is None


def test_argnums():
    def f(x: Any, y: Any, z: float) -> Any:
        return (x * y * y).sum() * z

    x, y = np.array([1.0, 2.0]), np.array([3.0, 5.0])
    assert tg.grad(f)(x, y, 2.0).tolist() == [18.0, 50.0]
    assert tg.grad(f, 1)(x, y, 2.0).tolist() == [12.0, 40.0]
    assert tg.grad(f, -2)(x, y, 2.0).tolist() == [12.0, 40.0]
    gy, gx = tg.grad(f, (1, 0))(x, y, 2.0)
    assert (gy.tolist(), gx.tolist()) == ([12.0, 40.0], [18.0, 50.0])
    (only,) = tg.grad(f, (0,))(x, y, 2.0)
    assert only.tolist() == [18.0, 50.0]
    assert tg.grad(f, [0, 1])(x, y, 2.0)[1].tolist() == [12.0, 40.0]
    assert tg.grad(f)(x, y, z=2.0).tolist() == [18.0, 50.0]


@pytest.mark.parametrize("argnums", [2, -3, (0, 5)])
def test_argnums_outside_of_the_call(argnums):
    with pytest.raises(tg.Error, match="argnums"):
        tg.grad(lambda x, y: x * y, argnums)(1.0, 2.0)


def test_the_same_array_for_two_arguments():
    x = tg.tensor(3.0, requires_grad=True)
    gx, gy = tg.grad(lambda a, b: a * a * b, (0, 1))(x, x)
    assert (gx.item(), gy.item()) == (18.0, 9.0)


def test_value_and_grad_and_has_aux():
    f = lambda x: (x * x).sum()
    value, g = tg.value_and_grad(f)(np.array([1.0, 2.0]))
    assert (value.item(), g.tolist()) == (5.0, [2.0, 4.0])
    (value, aux), g = tg.value_and_grad(lambda x: (f(x), {"note": "text", "x": x * 2.0}), has_aux=True)(np.ones(2))
    assert value.item() == 2.0
    assert aux["note"] == "text"
    assert aux["x"].tolist() == [2.0, 2.0]
    g, aux = tg.grad(lambda x: (f(x), x), has_aux=True)(np.ones(2))
    assert g.tolist() == [2.0, 2.0]
    assert aux.tolist() == [1.0, 1.0]


Pair = namedtuple("Pair", "w b")


def test_gradients_in_the_structure_of_the_argument():
    tree = {"w": np.array([1.0, 2.0]), "rest": [np.array(3.0), (tg.tensor(4.0), None)], "p": Pair(np.ones(1), 2.0)}

    def f(t: Any) -> Any:
        return (t["w"] * t["rest"][0]).sum() + t["rest"][1][0] ** 2 + (t["p"].w * t["p"].b).sum()

    g = tg.grad(f)(tree)
    assert list(g) == ["w", "rest", "p"]
    assert g["w"].tolist() == [3.0, 3.0]
    assert isinstance(g["rest"], list)
    assert g["rest"][0].item() == 3.0
    assert g["rest"][1][0].item() == 8.0
    assert g["rest"][1][1] is None
    assert isinstance(g["p"], Pair)
    assert (g["p"].w.tolist(), g["p"].b.item()) == ([2.0], 1.0)


def test_zeros_where_there_is_no_path():
    g = tg.grad(lambda x, y: (x * 2.0).sum(), (0, 1))(np.ones(2), np.ones((2, 3), np.float32))
    assert g[1].shape == (2, 3)
    assert g[1].dtype == np.float32
    assert not g[1].numpy().any()
    assert tg.grad(lambda x: tg.tensor(1.0))(2.0).item() == 0.0


@pytest.mark.parametrize(("bad", "error"), [(np.arange(3), tg.DTypeError), (3, tg.DTypeError), (True, tg.DTypeError)])
def test_integers_have_no_gradient(bad, error):
    with pytest.raises(error, match="float"):
        tg.grad(lambda x: ops.sum(x * 2.0))(bad)


def test_the_function_must_return_a_scalar_tensor():
    with pytest.raises(tg.ShapeError, match=r"\(2,\)"):
        tg.grad(lambda x: x * 2.0)(np.ones(2))
    with pytest.raises(tg.DTypeError, match="float"):
        tg.grad(lambda x: 3.0)(1.0)
    with pytest.raises(tg.DTypeError, match="tuple"):
        tg.grad(lambda x: (x, x))(1.0)


def test_results_are_outside_of_any_graph_when_nobody_differentiates_again():
    x = tg.tensor([1.0, 2.0], requires_grad=True)
    value, g = tg.value_and_grad(lambda t: (t * t).sum())(x.detach())
    assert not g.requires_grad
    assert not value.requires_grad


def test_gradients_of_computed_tensors_stay_connected():
    x = tg.tensor(3.0, requires_grad=True)
    g = tg.grad(lambda t: t * t * t)(x * 2.0)
    assert g.item() == 108.0
    g.backward()
    assert x.grad == 6 * 6.0 * 2.0


def test_gradients_stay_connected_to_what_the_function_closes_over():
    w = tg.tensor(3.0, requires_grad=True)
    g = tg.grad(lambda t: t * t * w * w)(2.0)
    assert g.item() == 36.0
    g.backward()
    assert w.grad == 2 * 2.0 * 2 * 3.0


def test_grad_inside_no_grad():
    with tg.no_grad():
        g = tg.grad(lambda t: t * t)(3.0)
        h = tg.grad(tg.grad(lambda t: t * t * t))(3.0)
    assert (g.item(), h.item()) == (6.0, 18.0)
    assert not g.requires_grad


def test_wrapped_functions_keep_their_name():
    def loss(x: Any) -> Any:
        """Doc."""
        return x

    assert tg.grad(loss).__name__ == "loss"
    assert tg.value_and_grad(loss).__doc__ == "Doc."


# ---------------------------------------------------------------------------- vjp and jvp


def test_vjp_gives_one_entry_per_primal_as_often_as_wanted():
    out, pullback = tg.vjp(lambda x, y: x * y, np.array([1.0, 2.0]), np.array(3.0))
    assert out.tolist() == [3.0, 6.0]
    for _ in range(2):
        gx, gy = pullback([1.0, 10.0])
        assert (gx.tolist(), gy.item()) == ([3.0, 30.0], 21.0)
    (single,) = tg.vjp(lambda x: x * 2.0, 3.0)[1](1.0)
    assert single.item() == 2.0


def test_vjp_of_trees():
    out, pullback = tg.vjp(lambda t: {"a": t[0] * 2.0, "b": (t[0] * t[1],)}, [np.array(3.0), np.array(5.0)])
    assert out["b"][0].item() == 15.0
    (g,) = pullback({"a": 1.0, "b": (10.0,)})
    assert [t.item() for t in g] == [52.0, 30.0]
    with pytest.raises(tg.ShapeError):
        pullback({"a": 1.0})


def test_pullback_checks_shape_and_converts_the_dtype():
    _, pullback = tg.vjp(lambda x: x * 2.0, np.ones(2, np.float32))
    assert pullback(np.ones(2))[0].dtype == np.float32
    with pytest.raises(tg.ShapeError):
        pullback(np.ones(3))


def test_a_pullback_is_a_linear_function_that_can_be_differentiated():
    _, pullback = tg.vjp(ops.sin, np.array([0.5, 1.0]))
    g = tg.grad(lambda u: (pullback(u)[0] ** 2).sum())(np.array([1.0, 3.0]))
    np.testing.assert_allclose(g.numpy(), 2 * np.array([1.0, 3.0]) * np.cos([0.5, 1.0]) ** 2, rtol=1e-14)


def test_jvp_values_shapes_and_zero_tangents():
    x, t = np.array([0.3, 0.7]), np.array([1.0, -2.0])
    out, tangent = tg.jvp(lambda a: ops.sin(a) * 2.0, (x,), (t,))
    np.testing.assert_allclose(out.numpy(), 2 * np.sin(x), rtol=1e-15)
    np.testing.assert_allclose(tangent.numpy(), 2 * np.cos(x) * t, rtol=1e-15)
    out, tangent = tg.jvp(lambda a: tg.tensor([1.0]), (1.0,), (1.0,))
    assert tangent.tolist() == [0.0]
    out, tangent = tg.jvp(lambda a: (a, {"k": a * a}), (3.0,), (2.0,))
    assert (tangent[0].item(), tangent[1]["k"].item()) == (2.0, 12.0)


def test_jvp_of_trees_matches_leaves_by_name():
    primal = {"a": np.array(2.0), "b": np.array(5.0)}
    tangent = {"b": np.array(0.0), "a": np.array(1.0)}
    assert tg.jvp(lambda t: t["a"] * t["b"], (primal,), (tangent,))[1].item() == 5.0
    with pytest.raises(tg.ShapeError):
        tg.jvp(lambda t: t["a"] * t["b"], (primal,), ({"a": 1.0, "c": 1.0},))


def test_jvp_arguments_are_checked():
    with pytest.raises(tg.DTypeError, match="tuple"):
        tg.jvp(lambda a: a, 1.0, 1.0)
    with pytest.raises(tg.ShapeError):
        tg.jvp(lambda a: a, (1.0,), (1.0, 2.0))
    with pytest.raises(tg.ShapeError, match=r"\(3,\).*\(2,\)"):
        tg.jvp(lambda a: a, (np.ones(2),), (np.ones(3),))
    with pytest.raises(tg.DTypeError):
        tg.jvp(lambda a: a * 2.0, (np.arange(2),), (np.ones(2),))


def test_jvp_is_silent_where_a_derivative_is_infinite():
    assert tg.jvp(ops.sqrt, (0.0,), (1.0,))[1].item() == np.inf


def test_jvp_through_integers_is_zero_as_in_reverse_mode():
    f = lambda x: x.astype(np.int64).astype(np.float64) * 3.0 + ops.argmax(x)
    x = np.array([1.5, 2.5])
    assert tg.jvp(f, (x,), (np.ones(2),))[1].tolist() == [0.0, 0.0]
    assert tg.vjp(f, x)[1](np.ones(2))[0].tolist() == [0.0, 0.0]


# ---------------------------------------------------------------------------- hvp, jacobian, hessian


def test_hvp_gives_value_and_product():
    a = np.array([[2.0, 1.0], [1.0, 3.0]])
    x, v = np.array([1.0, 2.0]), np.array([1.0, -1.0])
    value, (product,) = tg.hvp(lambda t: 0.5 * (t @ a @ t), (x,), (v,))
    assert value.item() == 0.5 * x @ a @ x
    np.testing.assert_allclose(product.numpy(), a @ v, rtol=1e-14)
    value, (px, py) = tg.hvp(lambda s, t: s * s * t, (2.0, 3.0), (1.0, 10.0))
    assert (value.item(), px.item(), py.item()) == (12.0, 6.0 + 40.0, 4.0)


def test_hvp_can_be_differentiated():
    x = np.array([1.0, 2.0])
    third = tg.grad(lambda t: tg.hvp(lambda s: (s**4).sum(), (t,), (np.ones(2),))[1][0].sum())(x)
    np.testing.assert_allclose(third.numpy(), 24 * x, rtol=1e-13)
    first = tg.grad(lambda t: tg.hvp(lambda s: (s**4).sum(), (t,), (np.ones(2),))[0])(x)
    np.testing.assert_allclose(first.numpy(), 4 * x**3, rtol=1e-13)


@pytest.mark.parametrize(("n_in", "n_out"), [(2, 5), (5, 2), (3, 3), (1, 4), (4, 1)])
def test_jacobian_in_both_modes(n_in, n_out):
    rng = np.random.default_rng(0)
    a, x = rng.standard_normal((n_out, n_in)), rng.standard_normal(n_in)
    jac = tg.jacobian(lambda t: ops.tanh(a @ t))(x)
    np.testing.assert_allclose(jac.numpy(), (1 - np.tanh(a @ x) ** 2)[:, None] * a, rtol=1e-13)


@pytest.mark.parametrize("in_shape", [(), (2,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("out_shape", [(), (1,), (4,), (0, 2)])
def test_shape_of_a_jacobian(in_shape, out_shape):
    w = np.ones(out_shape)
    jac = tg.jacobian(lambda t: w * (t * t).sum())(np.full(in_shape, 3.0))
    assert jac.shape == out_shape + in_shape
    np.testing.assert_array_equal(jac.numpy(), np.full(out_shape + in_shape, 6.0))


def test_jacobian_and_hessian_argnums():
    f = lambda x, y: x * y * y
    x, y = np.array([1.0, 2.0]), np.array([3.0, 4.0])
    np.testing.assert_allclose(tg.jacobian(f, 1)(x, y).numpy(), np.diag(2 * x * y))
    np.testing.assert_allclose(tg.jacobian(f, -2)(x, y).numpy(), np.diag(y * y))
    scalar = lambda x, y: f(x, y).sum()
    np.testing.assert_allclose(tg.hessian(scalar, 1)(x, y).numpy(), np.diag(2 * x))
    assert tg.hessian(lambda t: (t**3).sum())(np.full((2, 3), 2.0)).shape == (2, 3, 2, 3)


def test_hessian_of_rosenbrock():
    def rosenbrock(x: Any) -> Any:
        return (100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2).sum()

    x, y = 0.7, -0.4
    expected = [[1200 * x * x - 400 * y + 2, -400 * x], [-400 * x, 200.0]]
    np.testing.assert_allclose(tg.hessian(rosenbrock)(np.array([x, y])).numpy(), expected, rtol=1e-13)


# ---------------------------------------------------------------------------- gradcheck


def test_gradcheck_returns_true_and_takes_functions_of_plain_arrays():
    assert tg.gradcheck(lambda x: x * x, np.array([1.0, 2.0])) is True
    assert tg.gradcheck(lambda x, y: {"a": ops.sin(x) * y, "b": [y]}, [0.3, 1.0], tg.tensor([2.0, 3.0]), order=2)
    assert tg.gradcheck(lambda t, i: t["w"][i], {"w": np.ones(3)}, np.array([0, 2, 2]))


def test_gradcheck_names_the_argument_the_index_and_both_values():
    def f(x: Any, tree: Any) -> Any:
        hidden = ops.stop_gradient(tree["w"]) if isinstance(tree["w"], tg.Tensor) else tree["w"]
        return ops.sum(x) + ops.sum(hidden * 3.0)

    with pytest.raises(tg.GradcheckError) as caught:
        tg.gradcheck(f, np.ones(2), {"w": np.ones((1, 2))})
    text = str(caught.value)
    for piece in ("argument 1", "'w'", "(0, 0)"):
        assert piece in text
    analytic, numeric = (float(re.search(rf"{word}[a-z ]* (-?[0-9.]+)", text)[1]) for word in ("analytic", "numeric"))
    assert analytic == 0.0
    assert 1.5 <= abs(numeric) <= 4.5  # 3 times a projection in +-[0.5, 1.5]


def test_gradcheck_refuses_what_it_cannot_check():
    with pytest.raises(tg.DTypeError):
        tg.gradcheck(lambda i: i, np.arange(3))
    with pytest.raises(tg.Error, match="order"):
        tg.gradcheck(lambda x: x * x, 1.0, order=3)
