"""Large arrays whose memory is used again.

The C library gives freed blocks of some megabytes back to the system, and the next step pays for them
with page faults: up to half of its time.  Here a block stays, and is handed out again when nothing refers to
it any more: not the array that was made of it, nor any view (a view keeps its block alive through
``base``).  So an array that a user holds is never touched.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

import numpy as np

from .locks import Lock

__all__ = [
    "applied", "block_size", "clear", "copied", "empty", "has_own_memory", "idle_bytes", "on_lines",
    "spread_rows", "taken",
]  # fmt: skip

SMALLEST = 5 << 15  # bytes; below, the allocator's own free lists serve
LARGE = 1 << 20
LINE = 64  # bytes of a line of the cache, and of the widest vector: one that crosses lines costs two accesses
# Arrays of one size start at different places of a page: rows of many of them that are used together would
# otherwise compete for the same few places of the first cache.
PAGE, STAGGER, PLACES = 4096, 7 * LINE, 9
ALIASED, APART = 2048, LINE  # bytes: see spread_rows
MOST_IDLE = 1 << 28  # bytes that are kept although nobody uses them

_lock = Lock()
_blocks: dict[int, list[np.ndarray]] = {}  # by size in bytes


def _references(blocks: list[np.ndarray]) -> int:
    return sys.getrefcount(blocks[0])


_UNUSED = _references([np.empty(1, np.uint8)])  # what it says of a block that only its list refers to


def empty(shape: Any, dtype: Any) -> np.ndarray:
    """An uninitialised C-contiguous array, as numpy.empty; its memory may have been used before."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < SMALLEST:
        return np.empty(shape, dtype)
    lock = _lock.plain
    # Never waited for: the garbage collector may run a finalizer, which makes arrays too, in the middle of this.
    if not lock.acquire(False):
        return np.empty(shape, dtype)
    try:
        block, start = _take(_sizes.get(nbytes) or block_size(nbytes))
    finally:
        lock.release()
    return np.ndarray(shape, dtype, block, start)


def on_lines(array: np.ndarray, dtype: Any = None) -> np.ndarray:
    """A copy that starts on a line of the cache, in C order unless the array is in Fortran's.

    Vectors of what NumPy's allocator hands out cross from one line to the next: a product of a row with a matrix in the
    second cache takes a third longer.
    """
    dtype = np.dtype(array.dtype if dtype is None else dtype)
    block = np.empty(array.size * dtype.itemsize + LINE, np.uint8)
    order: Any = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    copy = np.ndarray(array.shape, dtype, block, -block.ctypes.data % LINE, order=order)
    np.copyto(copy, array, casting="unsafe")
    return copy


def spread_rows(shape: Any, dtype: Any) -> np.ndarray:
    """As :func:`empty`, but its rows (along the last axis) stand a little apart.

    Rows whose distance is a multiple of a page's half all want the same few places of the first and second cache: a
    product that reads such a matrix by columns (the gradient of a weight) is up to 9 % slower.  They stand so little
    apart that the block is, as a rule, of the size that arrays without gaps take turns in: it is in the cache already.
    """
    apart = empty((*shape[:-1], shape[-1] + APART // np.dtype(dtype).itemsize), dtype)
    return apart[..., : shape[-1]]


def block_size(nbytes: int) -> int:
    """Bytes of the block that an array of so many bytes is made of."""
    # Steps of an eighth: T and T + 1 rows take turns in one block.  What is not touched takes no memory.
    granule = 1 << (nbytes.bit_length() - 4) if nbytes >= LARGE else PAGE
    size = -(-nbytes // granule) * granule + PAGE
    if len(_sizes) < MOST_SIZES:
        _sizes[nbytes] = size
    return size


_sizes: dict[int, int] = {}  # of the blocks for arrays of so many bytes
MOST_SIZES = 1024


def applied(ufunc: np.ufunc, a: np.ndarray, b: np.ndarray) -> Any:
    """``ufunc(a, b)``; a large result gets memory from here, where b has the shape of a, or of its last axes."""
    if a.nbytes >= SMALLEST and a.dtype is b.dtype and a.dtype.kind == "f" and _keeps_dtype(ufunc):
        lead = a.ndim - b.ndim
        if lead >= 0 and a.shape[lead:] == b.shape:
            return ufunc(a, b, out=empty(a.shape, a.dtype))
    return ufunc(a, b)


@functools.cache
def _keeps_dtype(ufunc: np.ufunc) -> bool:
    """Whether it works element by element, on floating arrays of any one dtype, and gives that dtype."""
    return ufunc.signature is None and "ff->f" in ufunc.types and "dd->d" in ufunc.types


def taken(array: np.ndarray, indices: np.ndarray, axis: int) -> np.ndarray:
    """``numpy.take`` of indices that are known to be in range; a large result gets memory from here."""
    if indices.dtype.num != _INTP:
        indices = indices.astype(np.intp)  # NumPy 2.0 takes no uint64
    place = axis + array.ndim if axis < 0 else axis
    shape = (*array.shape[:place], *indices.shape, *array.shape[place + 1 :])
    if math.prod(shape) * array.itemsize < SMALLEST:
        return np.take(array, indices, axis=axis)
    # Without "wrap" NumPy would look for indices out of range, and write to a buffer first.
    return np.take(array, indices, axis=axis, out=empty(shape, array.dtype), mode="wrap")


_INTP = np.dtype(np.intp).num


def copied(array: np.ndarray, dtype: Any) -> np.ndarray:
    """A C-contiguous copy in memory of its own.  A transposed matrix is copied a few columns at a time: in the order
    of the target, every element would fetch a line of its own (585 against 128 us for 1024 x 256 float32)."""
    if array.ndim != 2 or array.size < _TRANSPOSED or not array.flags.f_contiguous:
        return np.array(array, dtype=dtype, order="C")
    out = np.empty(array.shape, dtype)
    for start in range(0, array.shape[1], 8):
        out[:, start : start + 8] = array[:, start : start + 8]
    return out


_TRANSPOSED = 1 << 14  # elements


def has_own_memory(array: np.ndarray) -> bool:
    """Whether no other array lies in the memory of this one: its own, or a block that was handed out for it alone."""
    block = array.base
    if block is None:
        return bool(array.flags.owndata)
    # The ids of blocks are those of arrays that are alive, so nothing else has one.
    return sys.getrefcount(block) == _HELD and id(block) in _starts


def _take(size: int) -> tuple[np.ndarray, int]:
    """A block that nobody uses, and where an array in it starts."""
    global _turn
    blocks = _blocks.get(size, _NO_BLOCKS)
    for k in range(len(blocks)):
        if sys.getrefcount(blocks[k]) == _UNUSED:
            if k + 1 < len(blocks):
                blocks.append(blocks.pop(k))  # the one used last is the last to be given up
            block = blocks[-1]
            return block, _starts[id(block)]
    _give_up(MOST_IDLE)
    block = np.empty(size, np.uint8)
    _turn = (_turn + 1) % PLACES
    _starts[id(block)] = start = (_turn * STAGGER - block.ctypes.data) % PAGE
    _blocks.setdefault(size, []).append(block)
    return block, start


_NO_BLOCKS: list[np.ndarray] = []
_turn = 0
_starts: dict[int, int] = {}  # by the id of a block: the same place each time, whose pages are there already


def _give_up(most: int) -> None:
    """Free unused blocks, oldest first, until at most so many bytes lie idle."""
    idle = [(size, k) for size, blocks in _blocks.items() for k in range(len(blocks)) if _is_idle(blocks, k)]
    excess = sum(size for size, _ in idle) - most
    doomed: dict[int, list[int]] = {}
    for size, k in idle:
        if excess <= 0:
            break
        doomed.setdefault(size, []).append(k)
        excess -= size
    for size, numbers in doomed.items():
        for k in reversed(numbers):
            del _starts[id(_blocks[size].pop(k))]
        if not _blocks[size]:
            del _blocks[size]


def _is_idle(blocks: list[np.ndarray], k: int) -> bool:
    return sys.getrefcount(blocks[k]) == _UNUSED


def idle_bytes() -> int:
    """How much memory is kept although nobody uses it."""
    with _lock:
        return sum(s for s, blocks in _blocks.items() for k in range(len(blocks)) if _is_idle(blocks, k))


def clear() -> None:
    """Free all memory that nobody uses."""
    with _lock:
        _give_up(0)


def _held() -> int:
    """What :func:`has_own_memory` sees of a block that one array was made of."""
    array = empty((SMALLEST,), np.uint8)
    block = array.base
    return sys.getrefcount(block)


_HELD = _held()
