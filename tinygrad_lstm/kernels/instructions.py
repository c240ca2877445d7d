"""What LLVM IR is written with everywhere: loops, places on the stack, declared functions.  Imports llvmlite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

__all__ = ["I32", "I64", "declared", "for_range", "on_stack"]

I32, I64 = ir.IntType(32), ir.IntType(64)


def declared(module: Any, type_: Any, name: str) -> Any:
    """The function ``name`` of another module, or of LLVM."""
    found = module.globals.get(name)
    return ir.Function(module, type_, name) if found is None else found


def on_stack(builder: Any, type_: Any, align: int | None = None) -> Any:
    """A place of the function's frame, with no value yet."""
    with builder.goto_entry_block():
        place = builder.alloca(type_)
    if align is not None:
        place.align = align
    return place


@contextmanager
def for_range(builder: Any, start: Any, stop: Any, step: int = 1) -> Iterator[Any]:
    """``for index in range(start, stop, step)`` around what is written inside of the ``with``."""
    before, head = builder.block, builder.append_basic_block("head")
    inside, after = builder.append_basic_block("body"), builder.append_basic_block("after")
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(I64)
    builder.cbranch(builder.icmp_signed("<", index, stop), inside, after)
    builder.position_at_end(inside)
    yield index
    index.add_incoming(start, before)
    index.add_incoming(builder.add(index, I64(step)), builder.block)
    builder.branch(head)
    builder.position_at_end(after)
