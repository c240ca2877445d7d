"""Softmax over rows and cross-entropy, natively and by NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygrad_lstm import get_num_threads, nn, set_num_threads, tensor
from tinygrad_lstm.kernels import codecache, softmax
from tinygrad_lstm.kernels.softmax import COMPILE_FROM, exp_sums, scaled_softmax


@pytest.fixture
def native(monkeypatch):
    """Float32 matrices of any size go through the native loop."""
    monkeypatch.delenv("TINYGRAD_LSTM_NATIVE", raising=False)
    monkeypatch.setattr(softmax, "COMPILE_FROM", 0)


def reference(rows):
    wide = rows.astype(np.float64)
    top = wide.max(axis=1)
    exps = np.exp(wide - top[:, None])
    return top, exps.sum(axis=1), exps / exps.sum(axis=1, keepdims=True)


@settings(max_examples=60)
@given(st.integers(0, 70), st.sampled_from([2, 5, 16, 37, 96]), st.floats(0, 100), st.booleans())
def test_rows_against_double_precision(count, columns, spread, strided):
    rng = np.random.default_rng(count)
    rows = (spread * rng.normal(size=(count, columns))).astype(np.float32)
    scale = rng.normal(size=count).astype(np.float32)
    given_rows = np.array(rows, order="F") if strided else rows
    with pytest.MonkeyPatch.context() as patch:
        for least in (0, 1 << 40):
            patch.setattr(softmax, "COMPILE_FROM", least)
            top, total = exp_sums(given_rows)
            shares = scaled_softmax(given_rows, scale)
            expected = reference(rows) if count else (top, total, shares)
            np.testing.assert_array_equal(top, expected[0])
            np.testing.assert_allclose(total, expected[1], rtol=2e-6)
            assert total.dtype == shares.dtype == np.float32 and shares.flags.c_contiguous
            np.testing.assert_allclose(shares, scale[:, None] * expected[2], rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("count", [1, 700, 2001])
def test_the_same_bits_for_any_number_of_threads(count, native):
    rows = np.random.default_rng(0).normal(size=(count, 96)).astype(np.float32)
    scale = np.arange(1, count + 1, dtype=np.float32)
    found, before = [], get_num_threads()
    try:
        for threads in (1, 2, 3):
            set_num_threads(threads)
            found.append([*exp_sums(rows), scaled_softmax(rows, scale)])
    finally:
        set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(found[0][2], scale[:, None] * reference(rows)[2], rtol=1e-5)


def test_rows_that_are_not_finite(native):
    rows = np.zeros((5, 37), np.float32)
    rows[0, 30], rows[1, 36], rows[2] = np.nan, -np.inf, -1e4
    rows[3, 0] = 1e4
    top, total = exp_sums(rows)
    shares = scaled_softmax(rows, np.ones(5, np.float32))
    assert math.isnan(top[0]) and np.isnan(shares[0]).all() and np.isfinite(shares[1:]).all()
    assert total[1] == 36 and shares[1, 36] == 0 and total[2] == 37
    assert total[3] == 1 and shares[3, 0] == 1 and not shares[3, 1:].any()
    assert top[4] == 0 and total[4] == 37


@pytest.mark.conformance
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"ignore_index": 3}, {"reduction": "sum"}])
@pytest.mark.parametrize("shape", [(33, 37), (7, 3, 37)])
def test_native_cross_entropy_against_torch(shape, options, rng, native):
    torch = pytest.importorskip("torch")
    logits = (3 * rng.normal(size=shape)).astype(np.float32)
    target = rng.integers(0, 37, shape[:-1])
    target.reshape(-1)[::5] = 3
    x, y = tensor(logits, requires_grad=True), torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    loss = nn.cross_entropy(x, target, **options)
    expected = torch.nn.functional.cross_entropy(y.reshape(-1, 37), torch.tensor(target.reshape(-1)), **options)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    np.testing.assert_allclose(x.grad, y.grad.numpy(), rtol=1e-5, atol=1e-7)


def test_native_from_a_size_on(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("native code was asked for")

    monkeypatch.delenv("TINYGRAD_LSTM_NATIVE", raising=False)
    monkeypatch.setattr(codecache, "load", refuse)
    softmax._compiled.cache_clear()
    wide = np.zeros((COMPILE_FROM // 8, 8), np.float32)
    for rows in (wide[1:], wide.astype(np.float64), wide.reshape(-1, 1)):
        assert exp_sums(rows)[1][0] == rows.shape[1]
    with pytest.raises(AssertionError, match="asked for"):
        exp_sums(wide)
    monkeypatch.setenv("TINYGRAD_LSTM_NATIVE", "0")
    assert exp_sums(wide)[1][0] == 8
