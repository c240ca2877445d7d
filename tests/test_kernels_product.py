"""Eager matrix products: what goes to the native kernels, on any number of threads, and what to NumPy."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygrad_lstm.kernels import gemm, matmul, threads

seam = sys.modules["tinygrad_lstm.kernels.matmul"]
DTYPES = ["float32", "float64"]


def check(found: np.ndarray, a: np.ndarray, b: np.ndarray, before: Any = 0.0) -> None:
    """Within the bound of a chain of sums: (K + 2) roundings, each relative to the sum of absolute values."""
    wide_a, wide_b = a.astype(np.longdouble), b.astype(np.longdouble)
    error = np.abs(found - (wide_a @ wide_b + before))
    bound = (a.shape[1] + 2) * np.finfo(found.dtype).eps / 2 * (np.abs(wide_a) @ np.abs(wide_b) + np.abs(before))
    assert (error <= bound).all(), (a.shape, b.shape, np.argwhere(~(error <= bound))[:5])


VIEWS = {
    "rows": lambda x: x,
    "transposed": lambda x: np.ascontiguousarray(x.T).T,
    "every second column": lambda x: np.repeat(x, 2, 1)[:, ::2],
    "backwards": lambda x: np.ascontiguousarray(x[::-1])[::-1],
    "columns backwards": lambda x: np.ascontiguousarray(x[:, ::-1])[:, ::-1],
    "one row": lambda x: np.broadcast_to(x[0], x.shape),
    "one column": lambda x: np.broadcast_to(x[:, :1], x.shape),
    "one number": lambda x: np.broadcast_to(x[0, 0], x.shape),
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_random_products(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    rows, length, columns = data.draw(st.tuples(*[st.integers(1, 90)] * 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    views = st.sampled_from(sorted(VIEWS))
    a = VIEWS[data.draw(views)](rng.uniform(-1, 1, (rows, length)).astype(dtype))
    b = VIEWS[data.draw(views)](rng.uniform(-1, 1, (length, columns)).astype(dtype))
    out = np.empty((rows, columns), dtype)
    assert gemm.product(a, b, out)
    check(out, a, b)


@pytest.fixture
def native_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What gemm.product said when the seam asked it."""
    said: list[bool] = []

    def counted(a: Any, b: Any, out: Any) -> bool:
        said.append(gemm.product(a, b, out))
        return said[-1]

    monkeypatch.setattr(seam, "_native_product", lambda: counted)
    return said


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(64, 64, 64), (1200, 16, 70), (6, 9000, 70), (500, 100, 200), (2, 300, 700), (90, 90, 2245)]
)
def test_large_products_are_native_for_any_number_of_threads(dtype: str, shape: Any, native_calls: list[bool]) -> None:
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal(shape[:2]).astype(dtype), rng.standard_normal(shape[1:]).astype(dtype)
    before, said, found = threads.get_num_threads(), threads._threads, []
    try:
        for count in (1, 2, 5):
            threads.set_num_threads(count)
            found.append(matmul(a, b))
            out = np.full((shape[0], shape[2] + 3), 7, dtype)
            assert matmul(a, b, out=out[:, :-3]).base is out
            np.testing.assert_array_equal(out[:, :-3], found[0])
            assert (out[:, -3:] == 7).all()
    finally:
        threads.set_num_threads(before)
        threads._threads = said
    check(found[0], a, b)
    assert all((x == found[0]).all() for x in found) and native_calls == [True] * 6


@pytest.mark.parametrize("shape", [(1000, 40, 300), (300, 40, 1000), (258, 1700, 7), (513, 90, 130)])
def test_large_products_run_in_pieces_with_the_same_bits(shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch ends before long, so that a Ctrl-C is heard of between two."""
    rows, length, columns = shape
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-1, 1, (length, rows)).T, rng.uniform(-1, 1, (length, columns))
    whole, pieces = np.empty((rows, columns)), np.full((rows, columns), np.nan)
    made: list[Any] = []
    product = gemm.product
    monkeypatch.setattr(gemm, "product", lambda a, b, out: made.append(out.shape) or product(a, b, out))
    assert product(a, b, whole) and not made
    monkeypatch.setattr(gemm, "LARGEST", 1.0)
    assert product(a, b, pieces) and len(made) >= 2
    np.testing.assert_array_equal(pieces, whole)


def test_stacks_and_transposed_operands_are_native(native_calls: list[bool]) -> None:
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal((5, 40, 64)), rng.standard_normal((80, 64)).T
    out = np.empty((5, 40, 80))
    np.testing.assert_allclose(matmul(a, b), np.matmul(a, b), rtol=1e-12, atol=1e-12)
    assert matmul(a, b, out=out) is out
    np.testing.assert_allclose(out, np.matmul(a, b), rtol=1e-12, atol=1e-12)
    assert native_calls == [True, True]


def test_what_is_left_to_numpy(native_calls: list[bool]) -> None:
    rng = np.random.default_rng(7)
    square = rng.standard_normal((100, 100))
    for a, b in (
        (square[:10], square),  # small
        (np.tile(square, (1, 30))[:1], np.tile(square, (30, 10))),  # a row
        (np.tile(square, (30, 1)), square[:, :7]),  # a few columns
        (square, square.astype(np.float32)),
        (square.astype(int), square.astype(int)),
        (square.astype(square.dtype.newbyteorder()), square),
    ):
        np.testing.assert_allclose(matmul(a, b), np.matmul(a, b), rtol=1e-12, atol=1e-12)
    assert native_calls == []
    raw = np.zeros(square.nbytes + 1, np.uint8)
    unaligned = raw[1:].view(np.float64).reshape(100, 100)
    unaligned[...] = square
    np.testing.assert_allclose(matmul(unaligned, square), square @ square, rtol=1e-12, atol=1e-12)
    wide = np.zeros((100, 200))
    np.testing.assert_allclose(matmul(square, square, out=wide[:, ::2]), square @ square, rtol=1e-12, atol=1e-12)
    assert native_calls == [False, False]


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.T, lambda x: x[::-1], lambda x: x[:, ::-1]])
def test_an_output_that_shares_memory(view: Any, native_calls: list[bool]) -> None:
    rng = np.random.default_rng(8)
    for shift, shares in ((0, True), (100, True), (99 * 100 + 99, True), (100 * 100, False)):
        memory, other = rng.standard_normal(40000), rng.standard_normal((100, 100))
        x, out = memory[10000:20000].reshape(100, 100), memory[10000 + shift :][:10000].reshape(100, 100)
        for a, b in ((view(x), other), (other, view(x))):
            expected = a.copy() @ b.copy()
            np.testing.assert_allclose(matmul(a, b, out=out), expected, rtol=1e-10, atol=1e-10)
            assert native_calls == ([] if shares else [True])
            native_calls.clear()


def test_a_read_only_output_and_wrong_shapes(native_calls: list[bool]) -> None:
    square = np.ones((100, 100))
    out = np.zeros((100, 100))
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        matmul(square, square, out=out)
    with pytest.raises(ValueError, match="matmul"):
        matmul(square, square, out=np.zeros((100, 99)))
    assert not out.any() and native_calls == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (7, 300), (1000, 33), (3000, 70)])
def test_column_sums(dtype: str, shape: tuple[int, int]) -> None:
    x = np.random.default_rng(9).standard_normal((shape[0], 2 * shape[1])).astype(dtype)
    for a in (x[:, : shape[1]], x[::-1, : shape[1]], np.asfortranarray(x[:, : shape[1]]), x[:, ::2]):
        out = np.full(shape[1] + 1, 7, dtype)
        assert gemm.column_sums(a, out[:-1])
        check(out[None, :-1], np.ones((1, shape[0]), dtype), a)
        assert out[-1] == 7
    assert gemm.column_sums(x[:, ::2], np.empty(2 * shape[1], dtype)[::2]) is (shape[1] == 1)


def python(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_the_compiler_is_loaded_by_the_first_large_product_alone() -> None:
    code = """if True:
        import sys, numpy as np, tinygrad_lstm
        from tinygrad_lstm.kernels import matmul
        matmul(np.ones((30, 30)), np.ones((30, 30)))
        print("llvmlite" in sys.modules)
        matmul(np.ones((60, 60)), np.ones((60, 60)))
        print("llvmlite" in sys.modules)"""
    assert python(code).split() == ["False", "True"]
    assert python(code, TINYGRAD_LSTM_NATIVE="0").split() == ["False", "False"]
