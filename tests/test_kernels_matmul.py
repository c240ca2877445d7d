"""The matmul seam against np.matmul: every rank, layout and dtype."""

from __future__ import annotations

import numpy as np
import pytest

from tinygrad_lstm.kernels import matmul

SHAPES = [
    ((4,), (4,)),
    ((4,), (4, 3)),
    ((5, 4), (4,)),
    ((5, 4), (4, 3)),
    ((7, 5, 4), (4, 3)),
    ((2, 7, 5, 4), (4, 3)),
    ((7, 5, 4), (4,)),
    ((7, 5, 4), (7, 4, 3)),
    ((7, 1, 5, 4), (2, 4, 3)),
    ((5, 4), (7, 4, 3)),
    ((4,), (7, 4, 3)),
    ((0, 4), (4, 3)),
    ((5, 0), (0, 3)),
    ((0, 5, 4), (4, 3)),
    ((7, 5, 0), (0, 3)),
    ((7, 5, 4), (4, 0)),
]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "bool", "complex64"])
@pytest.mark.parametrize(("left", "right"), SHAPES)
def test_every_rank(left, right, dtype: str) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 3, left).astype(dtype), rng.integers(0, 3, right).astype(dtype)
    found, expected = matmul(a, b), np.matmul(a, b)
    assert type(found) is type(expected) and found.dtype == expected.dtype and found.shape == expected.shape
    np.testing.assert_array_equal(found, expected)
    out = np.full(expected.shape, 9, expected.dtype)
    assert matmul(a, b, out=out) is out
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    "view", [lambda x: x[::2], lambda x: x[::-1], lambda x: x.swapaxes(0, 1), lambda x: x[..., ::2]]
)
def test_layouts(view) -> None:
    rng = np.random.default_rng(1)
    a = view(rng.standard_normal((6, 8, 10)).astype(np.float32))
    b = rng.standard_normal((12, a.shape[-1])).astype(np.float32).T
    np.testing.assert_allclose(matmul(a, b), np.matmul(a, b), rtol=1e-5, atol=1e-6)
    wide = np.zeros((*a.shape[:-1], 24), np.float32)
    matmul(a, b, out=wide[..., 6:18])
    np.testing.assert_allclose(wide[..., 6:18], np.matmul(a, b), rtol=1e-5, atol=1e-6)
    assert not wide[..., :6].any() and not wide[..., 18:].any()


def test_mixed_dtypes_and_float16_rounds_once() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((3, 4)).astype(np.float32), rng.standard_normal((4, 2))
    assert matmul(a, b).dtype == np.float64
    half = rng.standard_normal((20, 300)).astype(np.float16)
    exact = half.astype(np.float64) @ half.T.astype(np.float64)
    assert np.max(np.abs(matmul(half, half.T) - exact) / np.spacing(np.abs(exact).astype(np.float16))) <= 0.51


@pytest.mark.parametrize(("left", "right"), [((5, 4), (3, 4)), ((7, 5, 4), (3, 4)), ((), (4,))])
def test_wrong_shapes_raise_like_numpy(left, right) -> None:
    with pytest.raises(ValueError, match="matmul"):
        matmul(np.ones(left), np.ones(right))
    with pytest.raises(ValueError, match="matmul"):
        matmul(np.ones((7, 5, 4)), np.ones((4, 3)), out=np.ones((7, 5, 2)))
