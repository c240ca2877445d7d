"""Instructions of :mod:`.tables`.  Imported when that is compiled."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from .instructions import I64, for_range
from .multi_native import by_itemsize

__all__ = ["add_elements"]

_FLOATS = {4: ir.FloatType(), 8: ir.DoubleType()}


@by_itemsize
def add_elements(builder: Any, item: int, source: Any, target: Any, count: Any) -> None:
    """Add ``count`` elements to those at ``target``, 64 bytes at a time as far as they go."""

    def add(index: Any, type_: Any) -> None:
        shift = builder.mul(index, I64(item))
        a, b = (builder.inttoptr(builder.add(start, shift), type_.as_pointer()) for start in (source, target))
        total = builder.fadd(builder.load(b, align=item), builder.load(a, align=item))
        builder.store(total, b, align=item)

    lanes = 64 // item
    full = builder.and_(count, I64(-lanes))
    with for_range(builder, I64(0), full, lanes) as index:
        add(index, ir.VectorType(_FLOATS[item], lanes))
    with for_range(builder, full, count) as index:
        add(index, _FLOATS[item])
