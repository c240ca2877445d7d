"""NumPy's argument names, positions and options: the ops, the methods and NumPy's own functions on tensors."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import spread
from test_ops_numpy import same

import tinygrad_lstm as tg
from tinygrad_lstm import ops

A = spread((3, 4))
MASK = np.array([[True, False, True, True]] * 2 + [[False] * 4])

# Each entry: a call with np or ops in its place, the array as `a`.
CALLS: dict[str, Any] = {
    "sum_dtype": lambda m, a: m.sum(a, 0, dtype=np.float32),
    "sum_a": lambda m, a: m.sum(a=a, axis=1, keepdims=True),
    "sum_where": lambda m, a: m.sum(a, axis=1, where=MASK, initial=2.0),
    "prod_where": lambda m, a: m.prod(a, 1, where=MASK),
    "prod": lambda m, a: m.prod(a, axis=0, dtype=np.float32, initial=3.0),
    "mean": lambda m, a: m.mean(a, dtype=np.float32),
    "mean_where": lambda m, a: m.mean(a[:2], axis=1, where=MASK[:2]),
    "cumsum": lambda m, a: m.cumsum(a, 0, dtype=np.float32),
    "cumsum_0d": lambda m, a: m.cumsum(a[0, 0]),
    "cumsum_0d_axis": lambda m, a: m.cumsum(a[0, 0], axis=0),
    "max_initial": lambda m, a: m.max(a, axis=1, initial=0.5),
    "min_where": lambda m, a: m.min(a, 1, initial=9.0, where=MASK),
    "max_empty": lambda m, a: m.max(a[:, :0], axis=1, initial=-1.0),
    "max_where": lambda m, a: m.max(a, initial=-9.0, where=MASK),
    "argmax": lambda m, a: m.argmax(a, 1, keepdims=True),
    "var": lambda m, a: m.var(a, 0, ddof=1, keepdims=True),
    "reshape": lambda m, a: m.reshape(a, (4, 3), "C"),
    "ravel": lambda m, a: m.ravel(a, "C"),
    "clip_min": lambda m, a: m.clip(a, 0.1, None),
    "roll": lambda m, a: m.roll(a, (1, 1), axis=0),
    "roll_one": lambda m, a: m.roll(a, 1, axis=(0, 1)),
    "roll_more": lambda m, a: m.roll(a, (1, -2), axis=(0, 1)),
    "take_clip": lambda m, a: m.take(a, [-5, 2, 9], 1, mode="clip"),
    "take_wrap": lambda m, a: m.take(a, [-5, 2, 9], 1, mode="wrap"),
    "take_flat": lambda m, a: m.take(a, [-5, 2, 90], mode="wrap"),
    "tril_1d": lambda m, a: m.tril(a[0]),
    "triu_1d": lambda m, a: m.triu(a[0], 1),
    "concatenate_flat": lambda m, a: m.concatenate([a, a[0], a[0, 0]], axis=None),
    "along": lambda m, a: m.take_along_axis(a, np.array([[1, 2]]), axis=1),
    "along_x": lambda m, a: m.take_along_axis(a[:1], np.array([[1], [2], [0]]), axis=1),
    "along_flat": lambda m, a: m.take_along_axis(a, np.array([1, 11, 5]), axis=None),
    "flip": lambda m, a: m.flip(m=a, axis=0),
    "split": lambda m, a: m.split(a, 2, 1)[1],
    "tile": lambda m, a: m.tile(a, reps=2),
    "repeat": lambda m, a: m.repeat(a, 2, 1),
    "stack": lambda m, a: m.stack((a, a), 1),
    "zeros_like": lambda m, a: m.zeros_like(a),
    "ones_like": lambda m, a: m.ones_like(a, dtype=np.int64),
    "copy": lambda m, a: m.copy(a),
    "all": lambda m, a: m.all(a > -5, axis=0),
    "any": lambda m, a: m.any(a > 1, 1, keepdims=True),
    "isnan": lambda m, a: m.isnan(a / a),
    "isinf": lambda m, a: m.isinf(a),
    "tensordot": lambda m, a: m.tensordot(a, a, axes=2),
    **{
        f"pad_{mode}": lambda m, a, mode=mode: m.pad(a, ((2, 1), (0, 5)), mode=mode)
        for mode in ("edge", "reflect", "symmetric", "wrap")
    },
    "pad_sides": lambda m, a: m.pad(a, ((1, 2), (3, 0)), constant_values=((1.0, 2.0), (3.0, 4.0))),
    "pad_pair": lambda m, a: m.pad(a, 1, "constant", constant_values=(5.0, 6.0)),
}


@pytest.mark.parametrize("name", CALLS)
def test_values(name):
    call, expected = CALLS[name], CALLS[name](np, A)
    rtol = 1e-6 if np.asarray(expected).dtype == np.float32 else 1e-14
    same(call(ops, A), expected, rtol)
    same(call(ops, tg.tensor(A)), expected, rtol)
    same(call(np, tg.tensor(A)), expected, rtol)
    same(tg.compile(lambda a: call(ops, a))(tg.tensor(A)), expected, rtol)


@pytest.mark.parametrize("name", CALLS)
def test_gradients(name):
    if np.asarray(CALLS[name](np, A)).dtype == np.float64 and name not in ("zeros_like", "max_empty"):
        assert tg.gradcheck(lambda a: CALLS[name](ops, a), A, order=2)


def test_numpy_binds_by_its_own_positions():
    t = tg.tensor(A)
    same(np.linalg.norm(t, 1), np.linalg.norm(A, 1))  # ord, not axis
    same(np.sum(t, 0, np.float32), np.sum(A, 0, np.float32), 1e-6)  # dtype, not keepdims
    same(np.sum(t, 0, None, None, True), np.sum(A, 0, keepdims=True))
    same(np.var(t, 0, None, None, 1), np.var(A, 0, ddof=1))
    for call, name in [
        (lambda: np.max(t, 0, np.empty(4)), "out"), (lambda: np.sum(t, out=np.empty(())), "out"),
        (lambda: np.concatenate([t, t], dtype=np.float32), "dtype"),
        (lambda: np.take(t, [0], 0, np.empty((1, 4))), "out"),
        (lambda: np.std(t, where=MASK), "where"), (lambda: np.pad(t, 1, "reflect", reflect_type="odd"), "reflect_type"),
    ]:  # fmt: skip
        with pytest.raises(tg.ArgumentError, match=rf"which takes .*it has no {name}"):
            call()
    with pytest.raises(tg.ArgumentError, match="where"):
        np.where(t > 0)


ORDERS = [None, 1, 2, 3, 0.5, 0, -1, -2, math.inf, -math.inf]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_norms_of_vectors(order):
    for axis, keepdims in [(0, False), (1, True), (-1, False)]:
        same(ops.norm(A, axis, keepdims, ord=order), np.linalg.norm(A, order, axis, keepdims), 1e-13)
        same(np.linalg.norm(tg.tensor(A), order, axis, keepdims), np.linalg.norm(A, order, axis, keepdims), 1e-13)
    if order not in (0,):
        assert tg.gradcheck(lambda x: ops.norm(x, 0, ord=order), A, order=2)
    zero = tg.grad(lambda x: ops.norm(x, 0, ord=order).sum())(np.zeros((2, 2))) if order in (None, 2, 3) else None
    assert zero is None or zero.tolist() == [[0.0, 0.0]] * 2


@pytest.mark.parametrize("order", [None, "fro", 1, -1, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("axis", [None, (0, 1), (1, 0), (-1, 0)], ids=str)
@pytest.mark.parametrize("keepdims", [False, True])
def test_norms_of_matrices(order, axis, keepdims):
    same(ops.norm(A, axis, keepdims, ord=order), np.linalg.norm(A, order, axis, keepdims), 1e-13)
    assert tg.gradcheck(lambda x: ops.norm(x, axis, ord=order), A)


@pytest.mark.parametrize(("order", "axis"), [("nuc", None), (2, None), (3, (0, 1)), ("fro", 0), ("two", 0)], ids=str)
def test_norms_that_there_are_not(order, axis):
    with pytest.raises(tg.ArgumentError, match="ord="):
        ops.norm(A, axis, ord=order)


# ---------------------------------------------------------------------------- einsum

EINSUMS: list[Any] = [
    ("ii", (3, 3)), ("ii->i", (3, 3)), ("ijj->i", (2, 3, 3)), ("iij,j->ij", (2, 2, 3), (3,)), ("iii", (2, 2, 2)),
    ("ij,jk", (2, 1), (3, 4)), ("ij,jk->ik", (2, 3), (1, 4)), ("ij,ij->ij", (1, 3), (2, 1)), ("ij->j", (1, 3)),
    ("...i,...i", (2, 1, 3), (4, 3)), ("bij,bjk", (1, 2, 3), (4, 3, 2)), ("ii,jj", (2, 2), (3, 3)), (",i", (), (3,)),
    ("...ii->...i", (2, 3, 3)), ("i...,j...->ij...", (2, 4), (3, 1)), ("ij,jk,kl->il", (2, 1), (3, 1), (4, 2)),
]  # fmt: skip


@pytest.mark.parametrize("case", EINSUMS, ids=str)
def test_einsum(case):
    subscripts, *shapes = case
    arrays = [spread(shape, seed=k) for k, shape in enumerate(shapes)]
    same(ops.einsum(subscripts, *arrays), np.einsum(subscripts, *arrays), 1e-13)
    same(np.einsum(subscripts, *map(tg.tensor, arrays), optimize=True), np.einsum(subscripts, *arrays), 1e-13)
    assert tg.gradcheck(lambda *xs: ops.einsum(subscripts, *xs), *arrays, order=2)


def test_einsum_with_lists():
    b = spread((4, 2), seed=1)
    same(ops.einsum(A, [0, 1], [1, 0]), A.T)
    same(ops.einsum(A, [0, 1], b, [1, 2]), A @ b, 1e-14)
    same(np.einsum(tg.tensor(A), [7, 30], b, [30, 2], [2, 7]), (A @ b).T, 1e-14)
    same(ops.einsum(A, [..., 1], b, [1, 2], [2, ...]), np.einsum(A, [..., 1], b, [1, 2], [2, ...]), 1e-14)
    for bad in ([0, 1.5], [0, 52], 3):
        with pytest.raises(tg.ArgumentError, match="subscripts"):
            ops.einsum(A, bad)
    for subscripts, shape in [("ii", (2, 3)), ("i->ii", (3,)), ("ijk...", (2, 3)), ("ij", (3,))]:
        with pytest.raises(tg.Error, match="einsum"):
            ops.einsum(subscripts, np.ones(shape))


# ---------------------------------------------------------------------------- clip


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=6))
def test_clip_passes_the_gradient_at_bounds_of_any_kind(values):
    x = np.array(values)
    expected = ((x >= 0) & (x <= 1)).astype(float)
    low, high = np.zeros(x.size), np.ones(x.size)
    for bounds in [(0, 1), (low, high), (tg.tensor(low), tg.tensor(high)), (low, 1.0), (0.0, tg.tensor(high))]:
        found = tg.grad(lambda t, bounds=bounds: (ops.clip(t, *bounds) * 1.0).sum())(x)
        assert found.tolist() == expected.tolist()
    to_low, to_high = tg.grad(lambda a, b: ops.clip(x, a, b).sum(), (0, 1))(low, high)
    assert to_low.tolist() == (x < 0).astype(float).tolist() and to_high.tolist() == (x > 1).astype(float).tolist()


def test_forms_of_clip():
    t = tg.tensor(A)
    same(ops.clip(t, min=0.1, max=0.4), A.clip(0.1, 0.4))
    same(t.clip(min=0), A.clip(min=0))
    same(t.clip(max=np.zeros(4)), A.clip(max=np.zeros(4)))
    same(ops.clip(tg.tensor([1, 5, 9]), np.array([2, 2, 2]), 6), np.array([2, 5, 6]))
    same(ops.clip(t, np.full(4, 0.5), np.full(4, -0.5)), np.clip(A, 0.5, -0.5))
    crossed = tg.grad(lambda *xs: ops.clip(*xs).sum(), (0, 1, 2))(A, np.full(A.shape, 0.5), np.full(A.shape, -0.5))
    assert [g.numpy().sum() for g in crossed] == [0.0, 0.0, A.size]  # the upper bound wins
    with pytest.raises(tg.ArgumentError, match="twice"):
        ops.clip(t, 0.0, min=1.0)


# ---------------------------------------------------------------------------- functions without derivatives


def test_functions_of_numpy_that_have_no_derivative():
    t = tg.tensor(A, requires_grad=True)
    assert (t == A).all() and not (t != A).any() and np.all(t == t) and not np.any(t > 5)
    for function in (np.allclose, np.array_equal):
        assert function(t, A) is True and function(A, t + 1) is False
    assert np.shape(t) == (3, 4) and np.ndim(t) == 2 and np.size(t) == 12 and np.size(t, 1) == 4
    for function in (np.round, np.floor, np.ceil, np.rint, np.argsort, np.signbit):
        found = function(t)
        same(found, function(A))
        assert isinstance(found, tg.Tensor) and not found.requires_grad
    same(np.isclose(t, A + 1e-12), np.isclose(A, A + 1e-12))
    same(t[np.nonzero(t > 0)], A[np.nonzero(A > 0)])
    with pytest.raises(tg.ArgumentError, match="sort"):
        np.sort(t)  # it has one, and there is no such op


def test_copies_are_of_their_own_and_differentiable():
    t = tg.tensor([1.0, 2.0], requires_grad=True)
    copied = np.copy(t)
    copied.sum().backward()
    assert t.grad.tolist() == [1.0, 1.0] and not np.shares_memory(copied, t)
    for array in (np.array([True, False]), np.array([3, -1], np.int8), np.array([-0.0, np.inf])):
        assert np.copy(tg.tensor(array)).numpy().tobytes() == array.tobytes()


def test_shapes_are_known_while_recording():
    f = tg.compile(lambda x: x * float(np.ndim(x)) + float(np.size(x)) + float(np.shape(x)[0]))
    same(f(A), A * 2 + 15)


# ---------------------------------------------------------------------------- smaller ones


def test_variance_without_degrees_of_freedom():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's
        for x, ddof in [(np.ones(1), 1), (np.array([1.0, 3.0]), 2), (np.array([1.0, 3.0]), 5), (np.ones((0, 2)), 0)]:
            expected = np.var(x, axis=0, ddof=ddof), np.std(x, axis=0, ddof=ddof)
            same(ops.var(x, 0, ddof=ddof), expected[0])
            same(ops.std(x, 0, ddof=ddof), expected[1])


@pytest.mark.parametrize(("length", "parts", "expected"), [
    (3, 2, [2, 1]), (7, 5, [2, 2, 2, 1]), (6, 3, [2, 2, 2]), (2, 5, [1, 1]), (5, 1, [5]), (0, 3, [0, 0, 0]),
])  # fmt: skip
def test_chunks_as_in_torch(length, parts, expected):
    x = np.arange(2.0 * length).reshape(2, length)
    found = ops.chunk(x, parts)
    assert [part.shape[1] for part in found] == expected
    np.testing.assert_array_equal(np.concatenate([part.numpy() for part in found], 1), x)
    if length:
        assert tg.gradcheck(lambda t: tuple(part * part for part in ops.chunk(t, parts)), x)


def test_the_gradient_of_an_extremum_that_is_nan():
    x = np.array([[1.0, np.nan, 3.0], [2.0, 2.0, 1.0], [np.nan, 0.0, np.nan]])
    found = tg.grad(lambda t: ops.max(t, axis=1).sum())(x).numpy()
    np.testing.assert_array_equal(found, [[0, 1, 0], [0.5, 0.5, 0], [0.5, 0, 0.5]])
    np.testing.assert_array_equal(tg.jvp(lambda t: ops.min(t, axis=1), (x,), (np.ones((3, 3)),))[1].numpy(), [1, 1, 1])


def test_the_product_of_nothing_still_depends_on_it():
    x = tg.tensor(np.ones((2, 0)), requires_grad=True)
    out = ops.prod(x, axis=1)
    assert out.requires_grad and out.tolist() == [1.0, 1.0]
    out.sum().backward()
    assert x.grad.shape == (2, 0)
    same(ops.prod(np.ones((2, 0), np.int32), axis=1), np.prod(np.ones((2, 0), np.int32), axis=1))


def test_a_known_mask_while_recording():
    mask = np.array([True, False, True])
    f = lambda x: x[mask] * 2.0 + x[:, MASK[0]].sum()
    same(tg.compile(f)(A), f(tg.tensor(A)).numpy(), 1e-14)
    np.testing.assert_allclose(
        tg.grad(lambda x: tg.compile(f)(x).sum())(A).numpy(), tg.grad(lambda x: f(x).sum())(A).numpy()
    )
    _, ys = ops.scan(lambda c, x: (c + x[mask], x[mask]), np.zeros(2), np.arange(6.0).reshape(2, 3))
    assert ys.tolist() == [[0.0, 2.0], [3.0, 5.0]]
    with pytest.raises(tg.GraphError, match="mask"):
        tg.compile(lambda x: x[x > 0])(A)


@pytest.mark.parametrize("name", ["sum", "prod", "mean", "cumsum"])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "bool", "int64", "float32"])
@pytest.mark.parametrize("a", [np.array([[100, 3, 90], [1, 2, 3]]), np.array([[1.5, 2.0, 0.5]], np.float32)])
def test_the_dtype_that_was_asked_for(name, dtype, a):
    for axis in (None, -1):
        expected = getattr(np, name)(a, axis=axis, dtype=dtype)
        same(getattr(ops, name)(a, axis=axis, dtype=dtype), expected)
        same(getattr(np, name)(tg.tensor(a), axis=axis, dtype=dtype), expected)


@pytest.mark.parametrize("name", ["sum", "prod", "max", "min"])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "bool", "float32"])
@pytest.mark.parametrize("initial", [0, 2, 1.5, True])
def test_what_a_reduction_starts_from_takes_its_dtype(name, dtype, initial):
    a = np.array([[1, 0, 3], [2, 2, 1]]).astype(dtype)
    for options in ({}, {"where": a > 1}):
        expected = getattr(np, name)(a, axis=1, initial=initial, **options)
        same(getattr(ops, name)(a, axis=1, initial=initial, **options), expected)


def test_reductions_at_their_edges():
    with pytest.raises(tg.OutOfRangeError, match="initial=-2 does not fit uint8"):
        ops.max(np.ones(2, np.uint8), initial=-2)
    for dtype in (bool, np.int8, np.uint8):
        same(ops.prod(np.ones((2, 3), dtype), axis=()), np.prod(np.ones((2, 3), dtype), axis=()))
    same(ops.max(A, where=True), np.max(A, where=True))
    with pytest.raises(tg.ShapeError, match="0-d array, which has no axes"):
        ops.mean(1.5, axis=0)


@pytest.mark.parametrize("order", [None, 1, 2, 0, -1, -2, math.inf])
def test_norms_of_integers_and_infinities(order):
    for x in (np.array([60000, 60000], np.int32), np.array([100, -100], np.int8), np.full(2, np.inf)):
        with np.errstate(divide="ignore"):
            same(ops.norm(x, ord=order), np.linalg.norm(x, order), 1e-14)


def test_moving_nothing_and_joining_one():
    same(ops.roll(A, (), axis=0), A)
    same(ops.clip(A > 0, 0, 1), np.clip(A > 0, 0, 1))
    for axis, error in ((2, tg.ShapeError), (0.5, tg.DTypeError)):
        with pytest.raises(error, match="axis"):
            ops.concatenate([A], axis)
    with pytest.raises(tg.ShapeError, match="0-d"):
        ops.concatenate([1.0])
    assert ops.scatter_add(np.zeros(3, np.float32), [0], 2).dtype == np.float32


@pytest.mark.parametrize("name", ["sum", "mean", "var", "max", "prod", "any", "argmax", "logsumexp", "norm"])
@pytest.mark.parametrize("wrong", [np.float64, "no"])
def test_a_dtype_in_the_place_of_keepdims(name, wrong):
    with pytest.raises(tg.DTypeError, match="keepdims is True or False"):
        getattr(ops, name)(A, 0, wrong)
    assert getattr(ops, name)(A, 0, np.True_).shape == (1, 4)
