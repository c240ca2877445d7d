"""Reductions, products, shape ops and indexing against NumPy in every argument form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_ops_numpy import SHAPES, arrays, same

import tinygrad_lstm as tg
from tinygrad_lstm import ops

NONEMPTY = hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=4)

# ---------------------------------------------------------------------------- reductions


def axis_forms(ndim: int) -> Any:
    """None, an axis (negative ones too), a tuple of axes, the empty tuple."""
    one = st.integers(-ndim, ndim - 1) if ndim else st.nothing()
    several = st.lists(st.integers(0, ndim - 1), unique=True, max_size=ndim).map(tuple) if ndim else st.just(())
    return st.none() | one | several


@pytest.mark.parametrize("name", ["sum", "mean", "max", "min", "prod", "var", "std"])
def test_reductions(name):
    @given(st.data(), arrays(shape=NONEMPTY), st.booleans())
    def check(data: Any, x: np.ndarray, keepdims: bool) -> None:
        axis = data.draw(axis_forms(x.ndim))
        if name in ("var", "std") and axis == ():
            return
        expected = getattr(np, name)(x, axis=axis, keepdims=keepdims)
        same(getattr(ops, name)(x, axis=axis, keepdims=keepdims), expected, 1e-11)
        same(getattr(tg.tensor(x), name)(axis, keepdims), expected, 1e-11)

    check()


@given(st.data(), arrays(shape=NONEMPTY))
def test_argmax_argmin_cumsum_norm(data, x):
    axis = data.draw(st.none() | st.integers(-x.ndim, x.ndim - 1))
    for keepdims in (False, True):
        same(ops.argmax(x, axis, keepdims), np.argmax(x, axis, keepdims=keepdims))
        same(ops.argmin(x, axis, keepdims), np.argmin(x, axis, keepdims=keepdims))
    same(ops.cumsum(x, axis), np.cumsum(x, axis), 1e-12)
    same(ops.norm(x, axis), np.sqrt((x * x).sum(axis)), 1e-13)
    same(ops.logsumexp(x, axis), np.logaddexp.reduce(x, axis if axis is not None else tuple(range(x.ndim))), 1e-13)


@pytest.mark.parametrize(
    "dtype", [np.bool_, np.int8, np.int32, np.uint8, np.float16, np.float32], ids=lambda d: d.__name__
)
@pytest.mark.parametrize("name", ["sum", "mean", "max", "prod", "cumsum", "argmax"])
def test_reduction_dtypes(name, dtype):
    x = np.array([[1, 0], [1, 1]], dtype)
    kwargs = {"axis": 0}
    same(getattr(ops, name)(x, **kwargs), getattr(np, name)(x, **kwargs), 1e-3)


@pytest.mark.parametrize("ddof", [0, 1])
def test_ddof(ddof):
    x = np.array([[1.0, 2.0, 4.0], [0.0, 5.0, 5.0]])
    same(ops.var(x, axis=1, ddof=ddof), np.var(x, axis=1, ddof=ddof))
    same(ops.std(x, ddof=ddof), np.std(x, ddof=ddof))


def test_empty_reductions():
    x = np.zeros((0, 3))
    same(ops.sum(x, axis=0), np.sum(x, axis=0))
    same(ops.prod(x, axis=0), np.prod(x, axis=0))
    assert np.isnan(ops.mean(x).item())
    with pytest.raises(tg.ShapeError):
        ops.max(x, axis=0)
    assert ops.max(x, axis=1).shape == (0,)


@pytest.mark.parametrize("axis", [2, -3, (0, 5), (0, 0), 1.5, "x"], ids=repr)
@pytest.mark.parametrize("name", ["sum", "mean", "max", "softmax", "logsumexp", "var", "flip"])
def test_axes_that_do_not_exist(name, axis):
    with pytest.raises(tg.Error):
        getattr(ops, name)(np.ones((2, 3)), axis=axis)


def test_softmax_axes():
    x = np.random.default_rng(0).standard_normal((2, 3, 4))
    for axis in (-3, -2, -1, 0, 1, 2):
        e = np.exp(x - x.max(axis, keepdims=True))
        same(ops.softmax(x, axis), e / e.sum(axis, keepdims=True))
        same(ops.log_softmax(x, axis=axis), np.log(e / e.sum(axis, keepdims=True)), 1e-13)
    same(ops.softmax(x), ops.softmax(x, -1).numpy())


# ---------------------------------------------------------------------------- products

RANKS = [((3,), (3,)), ((2, 3), (3,)), ((3,), (3, 2)), ((2, 3), (3, 4)), ((5, 2, 3), (3, 4)), ((2, 3), (5, 3, 4)),
         ((5, 1, 2, 3), (4, 3, 2)), ((3,), (5, 3, 2)), ((5, 2, 3), (3,)), ((0, 3), (3, 2)), ((2, 0), (0, 2)), ((2,
         3, 0), (0, 4))]  # fmt: skip


@pytest.mark.parametrize("shapes", RANKS, ids=str)
def test_matmul_dot_inner(shapes):
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(s) for s in shapes)
    same(ops.matmul(a, b), np.matmul(a, b))
    same(tg.tensor(a) @ b, a @ b)
    same(a @ tg.tensor(b), a @ b)
    same(ops.dot(a, b), np.dot(a, b))
    if a.shape[-1] == b.shape[-1]:
        same(ops.inner(a, b), np.inner(a, b))
    if a.size and b.size:
        assert tg.gradcheck(ops.matmul, a, b, order=2)
        assert tg.gradcheck(ops.dot, a, b)


@pytest.mark.parametrize("shapes", [((2, 3), (4, 2)), ((3,), (4,)), ((2, 2, 3), (3, 3, 4)), ((), (3,))], ids=str)
def test_matmul_errors_name_the_shapes(shapes):
    with pytest.raises(tg.ShapeError) as caught:
        ops.matmul(*(np.ones(s) for s in shapes))
    assert "gufunc" not in str(caught.value)
    assert "matmul" in str(caught.value)


@pytest.mark.parametrize("axes", [0, 1, 2, ([1], [0]), ([0, 1], [1, 0]), (1, 0), ([-1], [-2])], ids=repr)
def test_tensordot(axes):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 3)), rng.standard_normal((3, 3))
    same(ops.tensordot(a, b, axes), np.tensordot(a, b, axes), 1e-13)
    assert tg.gradcheck(lambda x, y: ops.tensordot(x, y, axes), a, b)


def test_outer_inner_scalars():
    a, b = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([5.0, 6.0, 7.0])
    same(ops.outer(a, b), np.outer(a, b))
    same(ops.dot(2.0, b), np.dot(2.0, b))
    same(ops.inner(b, 2.0), np.inner(b, 2.0))


EINSUMS = [
    ("ij,jk->ik", (2, 3), (3, 4)), ("ij,jk", (2, 3), (3, 4)), ("ij->ji", (2, 3)), ("ba", (2, 3)), ("ij->", (2, 3)),
    ("i,i", (3,), (3,)),
    ("bij,bjk->bik", (2, 3, 4), (2, 4, 5)), ("...ij,...jk->...ik", (2, 3, 4), (4, 5)), ("...i->...", (2, 3)),
    ("i...,i...->...", (3, 4, 5), (3, 4, 5)), ("i...,...i->...", (3, 4), (4, 3)), ("...,...", (2, 1), (3,)),
    (" i j , j k -> i k ", (2, 3), (3, 4)), ("ij,jk,kl->il", (2, 3), (3, 4), (4, 2)), ("i,j->ij", (0,), (3,)),
    ("ij,ij->i", (2, 3), (2, 3)), ("ij,k->ik", (2, 3), (4,)), (",i->i", (), (3,)), ("...j,j->...", (2, 1, 3), (3,)),
    ("i...j,j->...i", (2, 5, 3), (3,)),
]  # fmt: skip


@pytest.mark.parametrize("case", EINSUMS, ids=lambda c: c[0])
def test_einsum(case):
    subscripts, *shapes = case
    rng = np.random.default_rng(0)
    operands = [rng.standard_normal(s) for s in shapes]
    same(ops.einsum(subscripts, *operands), np.einsum(subscripts, *operands), 1e-13)
    if all(o.size for o in operands):
        assert tg.gradcheck(lambda *xs: ops.einsum(subscripts, *xs), *operands, order=2)


@pytest.mark.parametrize("case", [("ij,jk->ik", (2, 3), (4, 5)), ("ij->ik", (2, 3)), ("ij,jk", (2, 3)), ("ij", (2,)),
                                  ("ii->i", (2, 3)), ("...i,...i", (2, 3), (5, 3)), ("i->ii", (2,))],
                                  ids=lambda c: c[0])  # fmt: skip
def test_einsum_refuses_with_its_own_words(case):
    subscripts, *shapes = case
    with pytest.raises(tg.Error):
        ops.einsum(subscripts, *[np.ones(s) for s in shapes])


# ---------------------------------------------------------------------------- shapes


@given(st.data(), arrays(shape=SHAPES))
def test_axis_permutations(data, x):
    same(ops.transpose(x), x.transpose())
    same(tg.tensor(x).T, x.T)
    order = data.draw(st.permutations(range(x.ndim)))
    signed = [a - x.ndim if data.draw(st.booleans()) else a for a in order]
    same(ops.transpose(x, signed), x.transpose(order))
    same(tg.tensor(x).transpose(*signed) if signed else tg.tensor(x).transpose(), x.transpose(*signed))
    if x.ndim:
        a, b = (data.draw(st.integers(-x.ndim, x.ndim - 1)) for _ in range(2))
        same(ops.swapaxes(x, a, b), x.swapaxes(a, b))
        same(ops.moveaxis(x, a, b), np.moveaxis(x, a, b))
        same(ops.moveaxis(x, order, list(range(x.ndim))), np.moveaxis(x, order, list(range(x.ndim))))
        same(ops.flip(x, a), np.flip(x, a))
        same(ops.roll(x, 3, a), np.roll(x, 3, a))
        same(ops.roll(x, (1, -2), (a, 0)), np.roll(x, (1, -2), (a, 0)))
        same(ops.expand_dims(x, (0, -1)), np.expand_dims(x, (0, -1)))
    same(ops.flip(x), np.flip(x))
    same(ops.roll(x, 2), np.roll(x, 2))
    same(ops.ravel(x), np.ravel(x))
    same(ops.squeeze(x), np.squeeze(x))
    same(ops.tile(x, (2, 1)), np.tile(x, (2, 1)))
    same(ops.tile(x, 2), np.tile(x, 2))
    same(ops.repeat(x, 2), np.repeat(x, 2))


def test_reshape_forms():
    x = np.arange(12.0).reshape(3, 4)
    t = tg.tensor(x)
    for found in (t.reshape(2, 6), t.reshape((2, 6)), t.reshape([2, 6]), t.reshape(2, -1), ops.reshape(x, (-1, 6))):
        same(found, x.reshape(2, 6))
    same(t.reshape(-1), x.reshape(-1))
    same(ops.reshape(np.zeros((0, 3)), (-1, 3)), np.zeros((0, 3)))
    for bad in [(5, 2), (-1, -1), (-2, 6), (-1, 5), (0, -1), 1.5]:
        with pytest.raises(tg.Error):
            ops.reshape(x, bad)


def test_broadcast_squeeze_errors():
    same(ops.broadcast_to(np.ones((3, 1)), (2, 3, 4)), np.ones((2, 3, 4)))
    with pytest.raises(tg.ShapeError):
        ops.broadcast_to(np.ones(3), (4,))
    with pytest.raises(tg.ShapeError):
        ops.squeeze(np.ones((2, 3)), 0)
    same(ops.squeeze(np.ones((1, 2, 1)), -1), np.ones((1, 2)))


def test_joining():
    a, b = np.ones((2, 3)), np.zeros((1, 3), np.float32)
    same(ops.concatenate([a, b]), np.concatenate([a, b]))
    same(ops.concatenate((a, a), axis=-1), np.concatenate((a, a), axis=-1))
    for axis in (0, 1, 2, -1, -3):
        same(ops.stack([a, 2 * a], axis), np.stack([a, 2 * a], axis))
    same(ops.stack([tg.tensor(1.0), 2.0]), np.array([1, 2], np.float32))
    for bad in (lambda: ops.concatenate([]), lambda: ops.stack([]), lambda: ops.concatenate([a, np.ones((2, 2))]),
                lambda: ops.stack([a, b]), lambda: ops.concatenate([np.ones(()), np.ones(())]),
                lambda: ops.concatenate([a, np.ones(3)])):  # fmt: skip
        with pytest.raises(tg.Error):
            bad()


@pytest.mark.parametrize("where", [3, 1, [1, 4], [0, 6], [2, 2], [-2], (1,), [3, 9], []], ids=repr)
def test_split(where):
    x = np.arange(12.0).reshape(6, 2)
    for found, expected in zip(ops.split(x, where), np.split(x, where), strict=True):
        same(found, expected)
    parts = ops.split(x.T, where, axis=1)
    assert isinstance(parts, list)
    same(parts[-1], np.split(x.T, where, axis=1)[-1])


def test_split_and_chunk_errors():
    for bad in (
        lambda: ops.split(np.ones(5), 2),
        lambda: ops.split(np.ones(5), 0),
    ):
        with pytest.raises(tg.ShapeError):
            bad()
    assert [p.shape for p in ops.chunk(np.ones((2, 6)), 3)] == [(2, 2)] * 3
    assert [p.shape for p in ops.chunk(np.ones((2, 6)), 2, axis=0)] == [(1, 6)] * 2


@pytest.mark.parametrize("width", [1, (1, 2), ((1, 2), (0, 3)), ((1, 1),), 0], ids=repr)
def test_pad(width):
    x = np.arange(6.0).reshape(2, 3)
    same(ops.pad(x, width), np.pad(x, width))
    same(ops.pad(x, width, constant_values=7.0), np.pad(x, width, constant_values=7.0))
    assert tg.gradcheck(lambda t: ops.pad(t, width) ** 2, x)


@pytest.mark.parametrize("repeats", [0, 3, [1, 0, 2]], ids=repr)
def test_repeat(repeats):
    x = np.arange(6.0).reshape(2, 3)
    same(ops.repeat(x, repeats, axis=1), np.repeat(x, repeats, axis=1))
    assert tg.gradcheck(lambda t: ops.repeat(t, repeats, axis=1).sum() * t[0, 0], x)


@pytest.mark.parametrize("k", [-3, -1, 0, 1, 5])
def test_triangles_and_diagonals(k):
    x = np.arange(1.0, 13.0).reshape(3, 4)
    same(ops.tril(x, k), np.tril(x, k))
    same(ops.triu(x, k), np.triu(x, k))
    same(ops.diag(x, k), np.diag(x, k))
    same(ops.diag(x[0], k), np.diag(x[0], k))
    assert tg.gradcheck(lambda t: ops.tril(t, k) + ops.triu(t, k) ** 2, x)
    assert tg.gradcheck(lambda t: ops.diag(t[0], k).sum() + ops.diag(t, k).sum(), x)
