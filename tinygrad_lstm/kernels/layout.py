"""How operands lie in memory, found out in native code.  The text of this module is compiled by
:func:`.codecache.load`; it is never imported.

A call passes the addresses of the array objects.  ``PyArrayObject`` (data, nd, dimensions, strides, base,
descr, flags, in this order after the object header) and the head of ``PyArray_Descr`` are part of NumPy's
binary interface: the macros that every extension module is compiled with read these fields.  Doing it here
costs a few nanoseconds an operand; asking for ``.ctypes.data`` and ``.strides`` from Python costs 1 us.

``table`` on return 0: outer, rows, cols, then per operand: address, column step (0 or 1 element), row
stride, outer stride (bytes).  A return above 0 means: not for this loop, let NumPy do it.
"""

from __future__ import annotations

from tinygrad_lstm.kernels.dialect import exported, private
from tinygrad_lstm.kernels.memory import load8, load32, load64, store64

HEAD = object.__basicsize__  # the object header: 16 bytes, 32 in free-threaded builds
MAX_DIMS = 8
SMALL = 256


@private
def sort_dims(work: int, ndim: int, n_inputs: int, n_operands: int) -> None:
    """Dimensions from the largest stride of the first output to the smallest (insertion sort, stable)."""
    key = work + 8 * MAX_DIMS * (n_inputs + 1)
    for d in range(1, ndim):
        e = d
        while e > 0 and abs(load64(key + 8 * e)) > abs(load64(key + 8 * (e - 1))) and load64(work + 8 * e) != 1:
            for row in range(n_operands + 1):
                left = work + 8 * MAX_DIMS * row + 8 * (e - 1)
                value = load64(left)
                store64(left, load64(left + 8))
                store64(left + 8, value)
            e -= 1


@private
def collapse(work: int, ndim: int, n_operands: int) -> int:
    """Merges what lies one behind the other; leaves the dims innermost first, returns how many."""
    # In two steps: merge in place towards the end, then reverse, both within the same rows.
    kept = ndim
    for d in range(ndim - 1, -1, -1):
        extent = load64(work + 8 * d)
        if extent == 1:
            continue
        merge = kept < ndim
        if merge:
            inner = load64(work + 8 * kept)
            for k in range(1, n_operands + 1):
                row = work + 8 * MAX_DIMS * k
                if load64(row + 8 * d) != load64(row + 8 * kept) * inner:
                    merge = False
                    break
        if merge:
            store64(work + 8 * kept, load64(work + 8 * kept) * extent)
        else:
            kept -= 1
            for row in range(n_operands + 1):
                base = work + 8 * MAX_DIMS * row
                store64(base + 8 * kept, load64(base + 8 * d))
    count = ndim - kept
    for row in range(n_operands + 1):
        base = work + 8 * MAX_DIMS * row
        for d in range(count):
            store64(base + 8 * d, load64(base + 8 * (kept + d)))
        low = 0
        high = count - 1
        while low < high:
            value = load64(base + 8 * low)
            store64(base + 8 * low, load64(base + 8 * high))
            store64(base + 8 * high, value)
            low += 1
            high -= 1
    return count


@private
def unit_columns(work: int, operands: int, n_inputs: int, n_operands: int) -> bool:
    """Whether along the innermost dim outputs go by one element, and inputs by one or none."""
    for k in range(n_operands):
        step = load64(work + 8 * MAX_DIMS * (k + 1))
        if step != load64(operands + 24 * k + 16) and (step != 0 or k >= n_inputs):
            return False
    return True


@private
def reach(table: int, operands: int, k: int, upper: int) -> int:
    """First byte of operand k, or one past its last."""
    base = table + 24 + 32 * k
    address = load64(base)
    outer = (load64(table) - 1) * load64(base + 24)
    rows = (load64(table + 8) - 1) * load64(base + 16)
    cols = (load64(table + 16) - 1) * load64(base + 8) * load64(operands + 24 * k + 16)
    if upper:
        return address + max(outer, 0) + max(rows, 0) + cols + load64(operands + 24 * k + 16)
    return address + min(outer, 0) + min(rows, 0)


@private
def separate(table: int, operands: int, k: int, j: int) -> bool:
    """Whether output j can be written while operand k is read: the same elements, or no common byte."""
    if reach(table, operands, k, 1) <= reach(table, operands, j, 0):
        return True
    if reach(table, operands, j, 1) <= reach(table, operands, k, 0):
        return True
    a = table + 24 + 32 * k
    b = table + 24 + 32 * j
    if load64(operands + 24 * k + 16) != load64(operands + 24 * j + 16):
        return False
    if load64(a + 16) != load64(b + 16) or load64(a + 24) != load64(b + 24) or load64(a + 8) != load64(b + 8):
        return False
    shift = load64(b) - load64(a)
    if shift == 0:
        return True
    # Column slices of one wider buffer: disjoint within the row stride, hence everywhere.
    stride = load64(a + 16)
    width = load64(table + 16) * load64(operands + 24 * k + 16)
    if stride < width or load64(a + 24) % stride != 0:
        return False
    within = shift % stride
    return within >= width and within <= stride - width


@exported
def layout(ndarray_type: int, operands: int, n_inputs: int, n_operands: int, work: int, table: int) -> int:
    """``operands``: per operand the object's address, its type number and its item size, three words each.

    ``work``: scratch of 8 * (n_operands + 1) words: the shape, then strides of every operand.
    """
    first = load64(operands + 24 * n_inputs)
    if load64(first + HEAD - 8) != ndarray_type:
        return 1
    ndim = load32(first + HEAD + 8)
    if ndim > MAX_DIMS:
        return 2
    dims = load64(first + HEAD + 16)
    empty = False
    for d in range(ndim):
        extent = load64(dims + 8 * d)
        store64(work + 8 * d, extent)
        if extent == 0:
            empty = True
    for k in range(n_operands):
        array = load64(operands + 24 * k)
        itemsize = load64(operands + 24 * k + 16)
        if load64(array + HEAD - 8) != ndarray_type:
            return 1
        descr = load64(array + HEAD + 40)
        flags = load32(array + HEAD + 48)
        if load32(descr + HEAD + 12) != load64(operands + 24 * k + 8) or load8(descr + HEAD + 10) == 62:  # '>'
            return 3
        if not flags & 0x100 or (k >= n_inputs and not flags & 0x400):  # aligned, writeable
            return 4
        own = load32(array + HEAD + 8)
        if own > ndim or (k >= n_inputs and own != ndim):
            return 5
        own_dims = load64(array + HEAD + 16)
        own_strides = load64(array + HEAD + 24)
        strides = work + 8 * MAX_DIMS * (k + 1)
        for d in range(ndim):
            extent = load64(work + 8 * d)
            stride = 0
            if d >= ndim - own:
                found = load64(own_dims + 8 * (d - ndim + own))
                if found == extent:
                    if extent != 1:
                        stride = load64(own_strides + 8 * (d - ndim + own))
                elif found != 1 or k >= n_inputs:
                    return 5
            store64(strides + 8 * d, stride)
        store64(table + 24 + 32 * k, load64(array + HEAD))
        store64(table + 24 + 32 * k + 8, itemsize)
    if empty:
        store64(table, 0)
        return 0
    sort_dims(work, ndim, n_inputs, n_operands)
    count = collapse(work, ndim, n_operands)
    if count > 3:
        return 6
    if count > 0 and not unit_columns(work, operands, n_inputs, n_operands):
        # One element a row is slow, but for few elements faster than NumPy's call overhead.
        total = 1
        for d in range(count):
            total *= load64(work + 8 * d)
        if count == 3 or total > SMALL:
            return 7
        for row in range(n_operands + 1):
            base = work + 8 * MAX_DIMS * row
            for d in range(count, 0, -1):
                store64(base + 8 * d, load64(base + 8 * (d - 1)))
            store64(base, 1 if row == 0 else load64(operands + 24 * (row - 1) + 16))
        count += 1
    store64(table, load64(work + 16) if count > 2 else 1)
    store64(table + 8, load64(work + 8) if count > 1 else 1)
    store64(table + 16, load64(work) if count > 0 else 1)
    for k in range(n_operands):
        itemsize = load64(table + 24 + 32 * k + 8)
        strides = work + 8 * MAX_DIMS * (k + 1)
        step = load64(strides) if count > 0 else itemsize
        store64(table + 24 + 32 * k + 8, 1 if step == itemsize else 0)
        store64(table + 24 + 32 * k + 16, load64(strides + 8) if count > 1 else 0)
        store64(table + 24 + 32 * k + 24, load64(strides + 16) if count > 2 else 0)
    for j in range(n_inputs, n_operands):
        for k in range(j):
            if not separate(table, operands, k, j):
                return 8
    return 0
