"""What the arrays of one tensor look like, found out in native code.  The text of this module is compiled by
:func:`.codecache.load`; it is never imported.  See :mod:`.layout` for the fields that are read.
"""

from __future__ import annotations

from tinygrad_lstm.kernels.dialect import exported, private
from tinygrad_lstm.kernels.memory import load8, load32, load64, store64
from tinygrad_lstm.kernels.multi_native import TILE_BYTES, copy_element, transpose_block

HEAD = object.__basicsize__
C_ORDER, F_ORDER, ALIGNED, WRITEABLE = 0x1, 0x2, 0x100, 0x400
TILE_WIDTH = 256  # bytes of the columns of a tile of a transposed operand


@private
def order_of(ndarray_type: int, objects: int, count: int, written: int, typenum: int, itemsize: int) -> int:
    """How the ``count`` arrays at ``objects`` (the first ``written`` are overwritten) can be passed through:

    -1: not here; 2 n: as n elements that lie in the same order in all of them; 2 n + 1: as matrices of n
    elements of which the last one alone is transposed.
    """
    first = load64(objects)
    if load64(first + HEAD - 8) != ndarray_type:
        return -1
    ndim = load32(first + HEAD + 8)
    size = 1
    for d in range(ndim):
        size *= load64(load64(first + HEAD + 16) + 8 * d)
    common = C_ORDER | F_ORDER
    for k in range(count):
        array = load64(objects + 8 * k)
        if load64(array + HEAD - 8) != ndarray_type:
            return -1
        descr = load64(array + HEAD + 40)
        flags = load32(array + HEAD + 48)
        if load32(descr + HEAD + 12) != typenum or load8(descr + HEAD + 10) == 62:  # '>'
            return -1
        if not flags & ALIGNED or (k < written and not flags & WRITEABLE) or load32(array + HEAD + 8) != ndim:
            return -1
        for d in range(ndim):
            if load64(load64(array + HEAD + 16) + 8 * d) != load64(load64(first + HEAD + 16) + 8 * d):
                return -1
        if k == count - 1 and k >= written and not common & flags and common & C_ORDER and flags & F_ORDER:
            if ndim != 2:
                return -1
            transposed = 1
        else:
            common &= flags
            transposed = 0
        if not common:
            return -1
        # Elements may be read late: what is read must be what is written, in the same order, or lie elsewhere.
        start = load64(array + HEAD)
        for j in range(min(k, written)):
            other = load64(load64(objects + 8 * j) + HEAD)
            same = start == other and not transposed and k >= written
            if abs(start - other) < size * itemsize and not same:
                return -1
    return 2 * size + transposed


@exported
def inspect(ndarray_type: int, objects: int, count: int, written: int, typenum: int, itemsize: int) -> int:
    """:func:`order_of`; if the tensor is not for here, its first address is replaced by 0."""
    found = order_of(ndarray_type, objects, count, written, typenum, itemsize)
    if found < 0:
        store64(objects, 0)
    return found


@private
def transpose(source: int, stride: int, target: int, rows: int, columns: int, itemsize: int) -> None:
    """``target[r, c] = source[c, r]``: rows of ``source`` are ``stride`` bytes apart, those of target contiguous."""
    side = 64 // itemsize
    low, left = rows - rows % side, columns - columns % side
    for r in range(0, low, side):
        for c in range(0, left, side):
            start = source + c * stride + r * itemsize
            transpose_block(start, stride, target + (r * columns + c) * itemsize, columns * itemsize, itemsize)
    for r in range(rows):
        for c in range(left if r < low else 0, columns):
            copy_element(source + c * stride + r * itemsize, target + (r * columns + c) * itemsize, itemsize)


@private
def place_tile(table: int, tile: int, objects: int, last: int, itemsize: int, position: int) -> int:
    """Transpose a tile of the last array to ``tile`` and write its rows and columns to ``table``.

    Returns the offset of the tile's first element in the other arrays.
    """
    dims = load64(load64(objects) + HEAD + 16)
    rows = load64(dims)
    columns = load64(dims + 8)
    height = TILE_WIDTH // itemsize
    width = TILE_BYTES // TILE_WIDTH
    beside = (columns + width - 1) // width
    top = position // beside * height
    left = position % beside * width
    here = min(height, rows - top)
    wide = min(width, columns - left)
    store64(table + 8, here)
    store64(table + 16, wide)
    source = load64(load64(objects + 8 * last) + HEAD)
    transpose(source + (left * rows + top) * itemsize, rows * itemsize, tile, here, wide, itemsize)
    return (top * columns + left) * itemsize


@exported
def advance(ndarray_type: int, plan: int, table: int, tile: int, objects: int, numbers: int, position: int) -> int:
    """Write the loop's table (see :mod:`.layout`) for one tile of a tensor: all of it, if nothing is transposed.

    ``plan`` is an array: how many arrays a tensor has, how many inputs and outputs the loop, type number, item size.
    Returns the position of the next tile; -1 behind the last one; -2 if the tensor is not for here: then its first
    address is replaced by 0, and the table says that there is nothing to do.
    """
    plan = load64(plan + HEAD)
    arrays = load64(plan)
    inputs = load64(plan + 8)
    outputs = load64(plan + 16)
    itemsize = load64(plan + 32)
    state = table + 24 + 32 * (inputs + outputs)  # behind the table: what was found at position 0
    if position == 0:
        store64(state, inspect(ndarray_type, objects, arrays, outputs, load64(plan + 24), itemsize))
    found = load64(state)
    store64(table, 1)
    store64(table + 8, 1)
    store64(table + 16, found >> 1)
    if found < 2:
        store64(table + 8, 0)
        return -2 if found < 0 else -1
    offset = 0
    across = 0
    following = -1
    if found & 1:
        offset = place_tile(table, tile, objects, arrays - 1, itemsize, position)
        across = load64(load64(load64(objects) + HEAD + 16) + 8) * itemsize
        if (offset + (load64(table + 8) - 1) * across) // itemsize + load64(table + 16) < found >> 1:
            following = position + 1
    for k in range(inputs + outputs):
        own = k if k < inputs else k - inputs
        field = table + 24 + 32 * k
        if arrays <= k < inputs:
            store64(field, load64(numbers + HEAD) + itemsize * (k - arrays))
            store64(field + 8, 0)
            store64(field + 16, 0)
        elif found & 1 and k == arrays - 1:
            store64(field, tile)
            store64(field + 8, 1)
            store64(field + 16, load64(table + 16) * itemsize)
        else:
            store64(field, load64(load64(objects + 8 * own) + HEAD) + offset)
            store64(field + 8, 1)
            store64(field + 16, across)
        store64(field + 24, 0)
    return following
