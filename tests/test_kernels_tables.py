"""Rows added to tables, against numpy.add.at in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_lstm.kernels import tables
from tinygrad_lstm.kernels.tables import add_rows


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for every native run."""
    seen: list[Any] = []
    compiled = tables._compiled()
    monkeypatch.setattr(tables, "_compiled", lambda: lambda *given: seen.append(given) or compiled(*given))
    return seen


def check(table: np.ndarray, indices: np.ndarray, rows: np.ndarray) -> None:
    expected = table.astype(np.float64)
    np.add.at(expected, indices, rows.astype(np.float64))
    add_rows(table, indices, rows)
    bound = len(rows) * np.finfo(table.dtype).eps
    np.testing.assert_allclose(table, expected, rtol=bound, atol=bound * (1.0 + np.abs(rows).max(initial=0.0)))


@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    n, width = data.draw(st.integers(1, 70_000)), data.draw(st.integers(0, 70))
    count = data.draw(st.one_of(st.integers(0, 40), st.integers(300, 700)))
    dtype = data.draw(st.sampled_from(["f4", "f8"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    few = min(n, data.draw(st.integers(1, 9)))  # many duplicates
    kind = data.draw(st.sampled_from(["i8", "i4"]))
    indices = rng.integers(-few, few, count).astype(kind)
    check(rng.standard_normal((n, width)).astype(dtype), indices, rng.standard_normal((count, width)).astype(dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("width", [1, 7, 16, 33, 64])
def test_many_rows_are_added_natively(dtype: Any, width: int, ran: list[Any], rng: np.random.Generator) -> None:
    count = tables.LEAST // width + 1
    rows = rng.standard_normal((count, 2 * width)).astype(dtype)[:, ::2]
    for indices in (rng.integers(-5, 5, count), rng.integers(0, 5, 2 * count, np.uint8)[::2]):
        check(rng.standard_normal((5, width)).astype(dtype), indices, rows)
    assert len(ran) == 2


def test_several_axes(ran: list[Any], rng: np.random.Generator) -> None:
    check(np.zeros((6, 3, 5)), rng.integers(0, 6, (40, 50)), rng.standard_normal((40, 50, 3, 5)))
    assert len(ran) == 1


@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize("wrong", [94, -95, 1 << 40])
def test_an_index_out_of_range(native: str, wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYGRAD_LSTM_NATIVE", native)
    table, indices = np.zeros((94, 64), np.float32), np.zeros(300, np.int64)
    indices[-1] = wrong
    with pytest.raises(IndexError, match="out of bounds"):
        add_rows(table, indices, np.ones((300, 64), np.float32))
    assert not table.any()


def test_tables_for_numpy(ran: list[Any], monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """Rows that lie apart, few rows, other dtypes, and native code that is switched off."""
    indices, rows = rng.integers(-9, 9, 300), rng.standard_normal((300, 64))
    check(np.zeros((18, 64))[::2], indices, rows)
    check(np.zeros((9, 64)), indices[:20], rows[:20])
    numbers = np.zeros((9, 64), np.int64)
    add_rows(numbers, indices, np.ones((300, 64), np.int64))
    assert numbers[:, 0].tolist() == np.bincount(indices % 9, minlength=9).tolist()
    monkeypatch.setenv("TINYGRAD_LSTM_NATIVE", "0")
    check(np.zeros((9, 64)), indices, rows)
    assert ran == []
