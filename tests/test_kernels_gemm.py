"""Native matrix products: accuracy at every edge of a tile, strides, memory they may not touch, equal bits."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinygrad_lstm.kernels import gemm

DTYPES = ["float32", "float64"]


def place(x: np.ndarray) -> tuple[int, ...]:
    return (x.ctypes.data, *x.strides)


def aligned(size: int, dtype: str) -> np.ndarray:
    raw = np.full(size * np.dtype(dtype).itemsize + 64, 0xFF, np.uint8)  # NaN
    start = -raw.ctypes.data % 64
    return raw[start : raw.size - 64 + start].view(dtype)


def packed(b: np.ndarray, into: np.ndarray | None = None) -> np.ndarray:
    f = gemm.functions(b.dtype.name)
    length, columns = b.shape
    size = gemm.packed_bytes(length, columns, b.dtype.name) // b.itemsize
    out = aligned(size, b.dtype.name) if into is None else into
    gemm.call(f.pack, length, columns, *place(b), out.ctypes.data)
    return out.reshape(-(-columns // f.panel), length, f.panel)


def by(name: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, accumulate: int = 0) -> np.ndarray:
    """C by one of the functions."""
    f = gemm.functions(c.dtype.name)
    sizes = (*c.shape, a.shape[1])
    assert c.strides[1] == c.itemsize or c.shape[1] == 1
    if name == "packed":
        panels = packed(b)
        gemm.call(f.gemm_packed, *sizes, *place(a), panels.ctypes.data, *place(c)[:2], accumulate)
    elif name == "strided":
        scratch = aligned(f.scratch_bytes // c.itemsize, c.dtype.name)
        panels_end = -(-c.shape[1] // f.panel)
        rest = (accumulate, 0, panels_end, scratch.ctypes.data)
        gemm.call(f.gemm_strided, *sizes, *place(a), *place(b), *place(c)[:2], *rest)
    elif name == "part":
        table = np.array([*sizes, *place(a), *place(b), *place(c)[:2], accumulate, 7, 2], np.int64)
        for part in reversed(range(-(-sizes[0] // 7) * -(-sizes[1] // (2 * f.panel)))):
            gemm.call(f.gemm_part, table.ctypes.data, part)
    else:
        gemm.call(f.gemm_small, *sizes, *place(a), *place(b), *place(c)[:2], accumulate)
    return c


FUNCTIONS = ["packed", "strided", "part", "small"]


def check(found: np.ndarray, a: np.ndarray, b: np.ndarray, before: Any = 0.0) -> None:
    """Within the bound of a chain of sums: (K + 2) roundings, each relative to the sum of absolute values."""
    wide_a, wide_b = a.astype(np.longdouble), b.astype(np.longdouble)
    error = np.abs(found - (wide_a @ wide_b + before))
    bound = (a.shape[1] + 2) * np.finfo(found.dtype).eps / 2 * (np.abs(wide_a) @ np.abs(wide_b) + np.abs(before))
    assert (error <= bound).all(), (a.shape, b.shape, np.argwhere(~(error <= bound))[:5])


def edges(dtype: str) -> tuple[list[int], list[int]]:
    f = gemm.functions(dtype)
    p, lanes = f.panel, f.lanes
    columns = [1, lanes - 1, lanes, lanes + 1, p // 2, p // 2 + 1, p - 1, p, p + 1, 2 * p + 3, 4 * p, 5 * p - 1]
    return columns, [0, 1, 2, lanes - 1, lanes + 3, f.chunk - 1, f.chunk, f.chunk + 1, 2 * f.chunk + 5]


@pytest.mark.parametrize("accumulate", [0, 1])
@pytest.mark.parametrize("transposed", [False, True], ids=["B", "BT"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_edge_of_a_tile(dtype: str, name: str, transposed: bool, accumulate: int) -> None:
    rng = np.random.default_rng(0)
    all_columns, lengths = edges(dtype)
    most = max(all_columns)
    a_all, b_all = (rng.uniform(-1, 1, s).astype(dtype) for s in ((13, max(lengths)), (max(lengths), most)))
    columns_left, lengths_left = itertools.cycle(all_columns), itertools.cycle(lengths)
    cases = [(rows, next(columns_left), next(lengths_left)) for rows in range(1, 14) for _ in range(12)]
    for rows, columns, length in cases:
        a, b = a_all[:rows, :length], b_all[:length, :columns]
        b = np.asfortranarray(b) if transposed else b
        whole = rng.uniform(-1, 1, (rows + 2, columns + 3)).astype(dtype)
        before = whole.copy()
        c = by(name, a, b, whole[1:-1, 1:-2], accumulate)
        check(c, a, b, before[1:-1, 1:-2] if accumulate else 0.0)
        before[1:-1, 1:-2] = c
        np.testing.assert_array_equal(whole, before)  # nothing around C was written


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_more_rows_than_one_block(dtype: str, name: str) -> None:
    rng = np.random.default_rng(10)
    a, b = rng.uniform(-1, 1, (601, 20)).astype(dtype), rng.uniform(-1, 1, (20, 70)).astype(dtype)
    check(by(name, a, b, np.full((601, 70), np.nan, dtype)), a, b)


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


@pytest.mark.parametrize("right", VIEWS)
@pytest.mark.parametrize("left", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype: str, left: str, right: str) -> None:
    rng = np.random.default_rng(1)
    a = VIEWS[left](rng.uniform(-1, 1, (11, 37)).astype(dtype))
    b = VIEWS[right](rng.uniform(-1, 1, (37, 75)).astype(dtype))
    panel = gemm.functions(dtype).panel
    panels = packed(b)
    expected = np.zeros((len(panels) * panel, 37), dtype)
    expected[:75] = b.T
    np.testing.assert_array_equal(panels, expected.reshape(-1, panel, 37).swapaxes(1, 2))
    for name in FUNCTIONS:
        check(by(name, a, b, np.full((11, 75), np.nan, dtype)), a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_split(dtype: str) -> None:
    rng = np.random.default_rng(2)
    f = gemm.functions(dtype)
    a, b = rng.standard_normal((23, 600)).astype(dtype), rng.standard_normal((600, 3 * f.panel + 1)).astype(dtype)
    c = by("packed", a, b, np.empty((23, b.shape[1]), dtype))
    for name in FUNCTIONS:
        np.testing.assert_array_equal(by(name, a, b, np.empty_like(c)), c)
    for rows in range(1, 23):
        some = rng.permutation(23)[:rows]
        np.testing.assert_array_equal(by("packed", a[some], b, np.empty_like(c[:rows])), c[some])
        np.testing.assert_array_equal(by("small", a[some], b, np.empty_like(c[:rows])), c[some])
    for columns in (1, 5, f.panel, b.shape[1]):
        some = rng.permutation(b.shape[1])[:columns]
        for right in (b[:, some], np.asfortranarray(b[:, some]), np.repeat(b[:, some], 2, 1)[:, ::2]):
            for name in ("packed", "strided"):
                np.testing.assert_array_equal(by(name, a, right, np.empty_like(c[:, :columns])), c[:, some])
    pieces = np.zeros_like(c)
    scratch = aligned(f.scratch_bytes // c.itemsize, dtype)
    for n in (2, 0, 3, 1):
        rest = (*place(a), *place(b), *place(pieces)[:2], 0, n, n + 1, scratch.ctypes.data)
        gemm.call(f.gemm_strided, 23, b.shape[1], 600, *rest)
    np.testing.assert_array_equal(pieces, c)
    # chunks of K one by one
    total = by("packed", a[:, : f.chunk], b[: f.chunk], np.empty_like(c))
    np.testing.assert_array_equal(by("packed", a[:, f.chunk :], b[f.chunk :], total, 1), c)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_dot_products_do_not_depend_on_the_split(dtype: str) -> None:
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((9, 133)).astype(dtype), rng.standard_normal((83, 133)).astype(dtype).T
    c = by("small", a, b, np.empty((9, 83), dtype))
    for rows, columns in ((1, 1), (2, 3), (9, 8), (3, 82)):
        m, n = rng.permutation(9)[:rows], rng.permutation(83)[:columns]
        part = by("small", a[m], np.asfortranarray(b[:, n]), np.empty((rows, columns), dtype))
        np.testing.assert_array_equal(part, c[np.ix_(m, n)])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_rows_and_columns(dtype: str, name: str, transposed: bool) -> None:
    f = gemm.functions(dtype)
    for rows, columns, length in ((1, 3, 5), (8, f.panel + 3, 20), (13, 2 * f.panel, 17)):
        a, b = np.ones((rows, length), dtype), np.ones((length, columns), dtype)
        a[rows // 2, 3], b[4, columns - 2] = np.nan, -np.inf
        if transposed:
            b = np.asfortranarray(b)
        found = by(name, a, b, np.empty((rows, columns), dtype))
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(found, a @ b)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_do(dtype: str, name: str) -> None:
    for transposed in (False, True):
        b = np.ones((70, 0), dtype).T if transposed else np.ones((0, 70), dtype)
        c = np.full((7, 70), 3, dtype)
        assert (by(name, np.ones((7, 0), dtype), b, c, 1) == 3).all()
        assert (by(name, np.ones((7, 0), dtype), b, c) == 0).all()
        for rows, columns in ((0, 70), (7, 0)):
            whole = np.full((9, 80), 3, dtype)
            by(name, np.ones((rows, 5), dtype), np.ones((5, columns), dtype), whole[:rows, :columns])
            assert (whole == 3).all()


class Guarded:
    """Arrays that end where a page begins that may not be touched, or begin behind one."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.maps: list[tuple[Any, int, int]] = []

    def copy(self, x: np.ndarray, at_the_end: bool) -> np.ndarray:
        page = mmap.PAGESIZE
        inside = -(-max(x.nbytes, 1) // page) * page
        memory = mmap.mmap(-1, inside + 2 * page)
        base = np.frombuffer(memory, np.uint8)
        start = page + (inside - x.nbytes if at_the_end else 0)
        result = base[start : start + x.nbytes].view(x.dtype).reshape(x.shape, order="F" if x.flags.fnc else "C")
        result[...] = x
        for shut in (base.ctypes.data, base.ctypes.data + page + inside):
            assert self.libc.mprotect(shut, page, 0) == 0
            self.maps.append((base, shut, page))
        return result

    def open(self) -> None:
        for _, shut, page in self.maps:
            assert self.libc.mprotect(shut, page, mmap.PROT_READ | mmap.PROT_WRITE) == 0


@pytest.fixture
def guarded() -> Iterator[Guarded]:
    guard = Guarded()
    yield guard
    guard.open()


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_access_beyond_the_arrays(dtype: str, name: str, transposed: bool, guarded: Guarded) -> None:
    rng = np.random.default_rng(4)
    f = gemm.functions(dtype)
    p, lanes = f.panel, f.lanes
    shapes = [
        (1, 1, 1),
        (1, 5, 3),
        (3, p - 1, lanes + 1),
        (7, p, lanes - 1),
        (2, p + 1, f.chunk + 1),
        (9, 2 * p + 3, 2),
    ]
    for (rows, columns, length), at_the_end in itertools.product([*shapes, (1, 4 * p + 1, 9)], [True, False]):
        a, b = rng.standard_normal((rows, length)).astype(dtype), rng.standard_normal((length, columns)).astype(dtype)
        b = np.asfortranarray(b) if transposed else b
        for left in (a, np.asfortranarray(a)):
            x, y = guarded.copy(left, at_the_end), guarded.copy(b, at_the_end)
            c = guarded.copy(np.full((rows, columns), np.nan, dtype), at_the_end)
            check(by(name, x, y, c), a, b)
    panels = guarded.copy(aligned(gemm.packed_bytes(length, columns, dtype) // c.itemsize, dtype), True)
    np.testing.assert_array_equal(packed(y, panels), packed(y))


def python(code: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, *(["-c", code] if code else []), *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_a_later_process_loads_what_was_compiled(tmp_path: Path) -> None:
    code = """if True:
        from tinygrad_lstm.kernels import codecache, gemm
        gemm.functions("float32")
        print([program.compiled for program in codecache._loaded.values()])"""
    environment = {"TINYGRAD_LSTM_CACHE_DIR": str(tmp_path)}
    assert python(code, **environment) == "[True]"
    assert python(code, **environment) == "[False]"


@pytest.mark.skipif(platform.machine() not in {"x86_64", "AMD64"}, reason="names CPUs of x86-64")
@pytest.mark.parametrize(
    ("cpu", "features"),
    [
        ("x86-64", "+sse2"),
        pytest.param("sandybridge", "+avx", marks=pytest.mark.slow),
        pytest.param("haswell", "+avx2,+avx,+fma", marks=pytest.mark.slow),
    ],
)
def test_older_processors(cpu: str, features: str) -> None:
    import llvmlite.binding

    host = llvmlite.binding.get_host_cpu_features()
    if not all(host.get(feature.strip("+"), False) for feature in features.split(",")):
        pytest.skip(f"this computer has no {features}")
    chosen = "edge or strides or bits or nan or beyond or nothing"
    here = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, __file__]
    assert " passed" in python("", *here, NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES=features)
