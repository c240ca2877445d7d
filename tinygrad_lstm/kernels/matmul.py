"""The seam through which every eager matrix product goes.

Static rules, each from a measurement (float32, one thread, one AVX-512 core, NumPy 2.4 with OpenBLAS; microseconds):

=====================================================  ==============  =========
product                                                ``np.matmul``   here
=====================================================  ==============  =========
(4, 16) @ (16, 4)                                      .87             .85
(32, 64) @ (64, 64)                                    3.5             2.8
(32, 64) @ (64, 256)                                   11.4            6.3
(32, 64) @ (256, 64).T                                 11.9            6.7
(64, 256) @ (256, 1024)                                312             155
(1600, 256).T @ (1600, 1024)                           7284            3950
(1024, 1024) @ (1024, 1024)                            18470           9610
(50, 32, 32) @ (32, 256)                               269             114
(1000, 8, 64) @ (64, 256)                              3945            1181
every second of 50 steps: (25, 32, 64) @ (64, 256)     357             112
float16 (64, 64) @ (64, 64)                            844             20
=====================================================  ==============  =========

- Large 2-D @ 2-D in float32 and float64 goes to the kernels of :mod:`.gemm`, on all threads that are set.  Twice as
  fast here means that NumPy's OpenBLAS takes AVX2 kernels on this CPU (its peak is half); with AVX2 alone the
  two are equal (111 and 109 GFLOP/s).
- Smaller 2-D @ 2-D goes to ``ndarray.dot``: the same BLAS call as ``np.matmul``, .4 us less around it.
- N-D @ 2-D is one product of (rows, K) @ (K, N) instead of one BLAS call per matrix of the stack.
- float16 has no BLAS: computed in float32 and rounded once, which is also the more accurate result.

Batched small products (90 ns for each 8 x 8 x 8, 840 ns for each 32 x 32 x 32) and products with a vector are left
to NumPy.  Integer products are slow in NumPy (.48 ns a multiply-add) and stay so: nothing here differentiates
through them.  ``TINYGRAD_LSTM_NATIVE=0``, read once, leaves everything to NumPy.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from .pool import SMALLEST, empty

__all__ = ["dot", "matmul"]

# From so many multiply-adds on, products are native.  Once compiled they win earlier (32 x 32 x 32: 1.1 against
# 1.5 us), but what only ever multiplies small matrices is not worth .5 s of compiling.
THRESHOLD = 1 << 17
NARROW = 8  # columns; below, most of a register tile would be empty (and for one row BLAS has a kernel of its own)

_FLOAT16, _FLOAT32, _FLOAT64 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)


def matmul(a: Any, b: Any, out: np.ndarray | None = None) -> Any:
    """``a @ b`` with the meaning, ranks and errors of ``np.matmul``; a NumPy scalar for two vectors.

    ``out``, where given, has the shape of the product, and is returned; it must not share memory with an
    operand unless NumPy could write there too.
    """
    if type(a) is np.ndarray and type(b) is np.ndarray:
        rank_a, rank_b = a.ndim, b.ndim
        if a.dtype is _FLOAT16 and b.dtype is _FLOAT16:
            return _half(a, b, out)
        if out is None:
            # Shapes are compared first: the message of np.matmul names the core dimensions.
            if rank_a == 2 and rank_b == 2 and a.shape[1] == b.shape[0]:
                return dot(a, b)
            if rank_b == 2 and rank_a > 2 and a.shape[-1] == b.shape[0] and a.size:
                return dot(a.reshape(-1, b.shape[0]), b).reshape(*a.shape[:-1], b.shape[1])
        elif rank_a == 2 and rank_b == 2 and a.shape[1] == b.shape[0] and out.shape == (a.shape[0], b.shape[1]):
            dot(a, b, out)
            return out
        elif rank_b == 2 and rank_a > 2 and a.size and out.size and out.flags.c_contiguous:
            rows, columns = b.shape
            if a.shape[-1] == rows and out.shape == (*a.shape[:-1], columns):
                dot(a.reshape(-1, rows), b, out.reshape(-1, columns))
                return out
    return np.matmul(a, b) if out is None else np.matmul(a, b, out=out)


def dot(a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """2-D @ 2-D of matching shapes; a large result gets pooled memory."""
    (rows, length), columns, dtype = a.shape, b.shape[1], a.dtype
    large = rows * length * columns >= THRESHOLD and rows > 1 and columns >= NARROW
    if large and dtype is b.dtype and (dtype is _FLOAT32 or dtype is _FLOAT64):
        product = _native_product()
        if product is not None:
            if out is None:
                target = empty((rows, columns), dtype)
                return target if product(a, b, target) else np.dot(a, b, out=target)
            fits = out.dtype is dtype and out.shape == (rows, columns) and out.flags.writeable
            if fits and not np.may_share_memory(a, out) and not np.may_share_memory(b, out) and product(a, b, out):
                return out
    if out is not None:
        return np.matmul(a, b, out=out)
    if rows * columns * dtype.itemsize >= SMALLEST and dtype is b.dtype:
        return np.dot(a, b, out=empty((rows, columns), dtype))
    return a.dot(b)


@functools.lru_cache(maxsize=1)
def _native_product() -> Callable[[np.ndarray, np.ndarray, np.ndarray], bool] | None:
    """The native product, or None where it is switched off or cannot be had.  Asked once."""
    if os.environ.get("TINYGRAD_LSTM_NATIVE", "1") == "0":
        return None
    try:
        from . import interface  # noqa: F401  raises where this NumPy's arrays are not known
        from .gemm import product
    except ImportError:
        return None
    return product


def _half(a: np.ndarray, b: np.ndarray, out: np.ndarray | None) -> Any:
    result = matmul(a.astype(np.float32), b.astype(np.float32))
    # A sum beyond 65504 is infinite in float16, as it is for NumPy.
    if out is None:
        return result.astype(np.float16)
    np.copyto(out, result, casting="same_kind")
    return out
