"""Matrix products by native kernels, called by address."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import codecache, threads

__all__ = ["Functions", "call", "column_sums", "functions", "packed_bytes", "product"]

LARGEST = 2e10  # multiply-adds of a launch, times the itemsize: some 100 ms of one thread
LEAST = 128  # rows or columns of a piece
# Parts of a product for every thread.  One that is held up leaves the other to the rest; but every part reads a long
# matrix for itself, or packs one again (16 parts on two threads: 3 to 8 % slower than 4).
SHARES = 2


class Functions(NamedTuple):
    """Addresses of C functions ``int64 f(int64, ...)``, and the constants that their callers need.

    Strides are in bytes and may be any multiples of the itemsize (0 and negative ones, too); all functions
    return 0.  ``accumulate`` is 0 (C is set) or another number (the product is added to C).  C has unit column stride.

    - ``pack(K, N, b, b_row, b_col, out)``: B to panels ``[ceil(N / panel)][K][panel]``, padded with zeros;
    - ``gemm_packed(M, N, K, a, a_row, a_k, packed, c, c_row, accumulate)``;
    - ``gemm_strided(M, N, K, a, a_row, a_k, b, b_row, b_col, c, c_row, accumulate, n0, n1, scratch)``: panels n0
      to n1 of C, for long K; ``scratch`` has room for ``scratch_bytes`` and is aligned to 64 bytes;
    - ``gemm_small(M, N, K, a, a_row, a_k, b, b_row, b_col, c, c_row, accumulate)``: nothing is packed.
    """

    panel: int
    lanes: int
    chunk: int
    scratch_bytes: int
    pack: int
    gemm_packed: int
    gemm_strided: int
    gemm_small: int
    gemm_part: int


@functools.lru_cache(maxsize=4)
def functions(dtype: str) -> Functions:
    """The functions for ``"float32"`` or ``"float64"``; compiled, or taken from the disk, at the first call."""
    out = np.zeros(len(Functions._fields), np.int64)
    source = f'''"""Generated matrix products of {dtype}."""
from tinygrad_lstm.kernels.gemm_native import addresses_of
from tinygrad_lstm.kernels.dialect import entry

addresses = addresses_of({dtype!r})


@entry
def write(out):
    addresses(out)
'''
    codecache.load(source, stem="gemm").function("write")(out.ctypes.data)
    return Functions(*out.tolist())


def packed_bytes(length: int, columns: int, dtype: str) -> int:
    """Bytes of a packed ``(length, columns)`` matrix."""
    panel = functions(dtype).panel
    return -(-columns // panel) * panel * length * np.dtype(dtype).itemsize


@functools.lru_cache(maxsize=1)
def _native() -> codecache.Program:
    """The compiled functions of product.py."""
    from . import interface  # noqa: F401  raises ImportError where array objects are not what these functions read

    return codecache.load(Path(__file__).with_name("product.py").read_text(encoding="utf-8"), stem="product")


def call(address: int, *arguments: int) -> int:
    """Calls the C function at ``address`` without the GIL.

    Parameters
    ----------
    address : int
        One of :func:`functions`, or any other C function of at most 15 int64 that returns one.
    arguments : int
        The caller keeps alive what addresses among them point to.

    Returns
    -------
    int
        What the function returns.
    """
    result: int = _native().function("invoke")(address, *arguments, *_ZEROS[len(arguments) :])
    return result


_ZEROS = (0,) * 15


class _Table(threading.local):
    """Where a thread writes the arguments of a product."""

    def __init__(self) -> None:
        self.words = np.zeros(16, np.int64)
        self.address = self.words.ctypes.data


_table = _Table()


@functools.lru_cache(maxsize=4)
def _entry(dtype: np.dtype) -> tuple[Callable[..., int], int, int, int]:
    found = functions(dtype.name)
    return _native().function("product"), found.gemm_part, found.panel, dtype.itemsize


def product(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> bool:
    """``out = a @ b`` for matrices, by the kernels above, on as many threads as are set.

    Parameters
    ----------
    a, b : ndarray
        Matrices (M, K) and (K, N) of one dtype, float32 or float64, of any strides.
    out : ndarray
        A matrix (M, N) of that dtype, which shares no memory with ``a`` or ``b``.

    Returns
    -------
    bool
        Whether it was done.  It is not where ``out`` has no elements or its columns are apart, and where an array is
        not aligned.  The bits of the result do not depend on the number of threads.

    Raises
    ------
    ImportError
        Where array objects are not laid out as these functions read them.

    Notes
    -----
    Ranks, shapes and dtypes are not checked: :func:`.matmul` does that.

    Examples
    --------
    >>> import numpy as np
    >>> a, b, out = np.ones((3, 5)), np.ones((5, 2)), np.empty((3, 2))
    >>> product(a, b, out), out.tolist()
    (True, [[5.0, 5.0], [5.0, 5.0], [5.0, 5.0]])
    """
    entry, part, panel, item = _entry(a.dtype)
    table = _table.address
    parts = entry(part, panel, item, table, SHARES * threads.count(), id(a), id(b), id(out))
    if parts > 0:
        if a.size * b.shape[1] * item > LARGEST and max(out.shape) >= 2 * LEAST:
            return _halved(a, b, out)
        threads.run(part, table, parts)
    return parts >= 0


def _halved(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> bool:
    """A product in two, by its longer side: Python runs in between, and hears of a Ctrl-C."""
    rows, columns = out.shape
    cut = max(rows, columns) // 2 // LEAST * LEAST
    if rows >= columns:
        return product(a[:cut], b, out[:cut]) and product(a[cut:], b, out[cut:])
    return product(a, b[:, :cut], out[:, :cut]) and product(a, b[:, cut:], out[:, cut:])


def column_sums(a: np.ndarray, out: np.ndarray) -> bool:
    """``out = a.sum(axis=0)`` for a matrix: its product with a row of ones.

    A sum starts anew every 256 rows: more accurate than NumPy's, which takes all rows one after another.

    Parameters
    ----------
    a : ndarray
        A matrix (K, N), float32 or float64, of any strides (unit column stride is the fast case).
    out : ndarray
        A vector (N,) of that dtype, which shares no memory with ``a``.

    Returns
    -------
    bool
        Whether it was done, as for :func:`product`.

    Raises
    ------
    ImportError
        As for :func:`product`.

    Examples
    --------
    >>> import numpy as np
    >>> out = np.empty(2)
    >>> column_sums(np.arange(6.0).reshape(3, 2), out), out.tolist()
    (True, [6.0, 9.0])
    """
    ones = np.ndarray((1, a.shape[0]), a.dtype, _ONE[a.dtype.name], 0, (0, 0))
    return product(ones, a, out[None])


_ONE: dict[str, Any] = {"float32": np.ones(1, np.float32), "float64": np.ones(1, np.float64)}
