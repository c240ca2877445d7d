"""Calls of the matrix product from Python.  The text of this module is compiled by :func:`.codecache.load`; it is
never imported.

As in :mod:`.layout`, a call passes the addresses of the array objects.
"""

from __future__ import annotations

from tinygrad_lstm.kernels.dialect import entry
from tinygrad_lstm.kernels.memory import call_address, load64, store64

HEAD = object.__basicsize__  # the object header: 16 bytes, 32 in free-threaded builds
TALL = 384  # rows of A that one part takes: with a chunk of K they fit the second cache
LOW = 24
PART = 1 << 20  # multiply-adds of a part: less is not worth another thread
STRIP = 8  # panels


@entry
def invoke(
    address: int, a0: int, a1: int, a2: int, a3: int, a4: int, a5: int, a6: int, a7: int, a8: int, a9: int,
    a10: int, a11: int, a12: int, a13: int, a14: int,
) -> int:  # fmt: skip
    """Calls a C function of at most 15 integers: what it does not take, it does not see."""
    return call_address(address, a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14)


@entry
def product(function: int, panel: int, item: int, table: int, most: int, a: int, b: int, out: int) -> int:
    """``out = a @ b``: writes the table of ``gemm_part`` for at most so many parts, and runs it where one is enough.

    Returns 0 when it is done, the number of parts when they are still to be run, and -1 for what is not a case for
    these kernels: nothing to write, unaligned addresses, columns of ``out`` that are apart.
    """
    dims, strides = load64(a + HEAD + 16), load64(a + HEAD + 24)
    rows, length, start, down, along = (
        load64(dims),
        load64(dims + 8),
        load64(a + HEAD),
        load64(strides),
        load64(strides + 8),
    )
    store64(table, rows)
    store64(table + 16, length)
    store64(table + 24, start)
    store64(table + 32, down)
    store64(table + 40, along)
    bits = start | down | along
    dims, strides = load64(b + HEAD + 16), load64(b + HEAD + 24)
    columns, start, down, along = load64(dims + 8), load64(b + HEAD), load64(strides), load64(strides + 8)
    store64(table + 8, columns)
    store64(table + 48, start)
    store64(table + 56, down)
    store64(table + 64, along)
    bits |= start | down | along
    strides = load64(out + HEAD + 24)
    start, down, along = load64(out + HEAD), load64(strides), load64(strides + 8)
    store64(table + 72, start)
    store64(table + 80, down)
    store64(table + 88, 0)
    if (bits | start | down) & (item - 1) or (along != item and columns != 1) or rows * columns == 0:
        return -1
    # The bits of the result do not depend on the split.
    wanted = min(rows * columns * length // PART, most)
    across = (columns + panel - 1) // panel
    down = (rows + TALL - 1) // TALL
    panels = across
    if wanted > 1:
        # Parts of equal height, as many for every thread.  Where there are few rows, the columns are cut as well.
        low = max(rows // LOW, 1)
        if wanted <= low:
            down = (down + wanted - 1) // wanted * wanted
        else:
            down = low
            groups = (wanted + down - 1) // down
            panels = (across + groups - 1) // groups
    if rows == 1:  # a matter of reading B, which is better done in long pieces
        panels = min(max(panels, STRIP), across)
    height = ((rows + down - 1) // down + 5) // 6 * 6
    down = (rows + height - 1) // height
    store64(table + 96, height)
    store64(table + 104, panels)
    parts = down * ((across + panels - 1) // panels)
    if wanted > 1:
        return parts
    for part in range(parts):
        call_address(function, table, part)
    return 0
