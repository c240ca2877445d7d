"""Products of what a loop is given (the input projection ``x @ W``) for several steps at once, where rows are few.

In the loop such a product needs no memory for all steps: its rows are read while they are still in the cache.  But a
matrix that is read for one row a step costs as much as the rest of the step.  So the rows of as many steps as make up
a block are brought together and multiplied at once; the steps of the block then read theirs.  The number of rows is
known when the loop runs, so its text is the same for all.
"""

from __future__ import annotations

from tinygrad_lstm.compiler.lowering import Lowered
from tinygrad_lstm.compiler.stages import Product
from tinygrad_lstm.compiler.writer import Writer

__all__ = ["BLOCK", "block_rows", "early", "emit_ahead", "emit_room", "row_bytes"]

BLOCK = 64  # rows: some tiles of the matrix product


def early(lowered: Lowered) -> list[Product]:
    """The products that can be made before their step: of inputs, into scratch."""
    return [op for op in lowered.operations if isinstance(op, Product) and op.early]


def block_rows(chunk: int) -> int:
    """How many rows of a block there may be, where a part has so many rows a step."""
    return max(chunk, BLOCK)


def row_bytes(products: list[Product]) -> int:
    """Bytes of a row of what is brought together: as much as the widest product reads."""
    return max((-(-product.pack.shape[0] * product.left.dtype.itemsize // 64) * 64 for product in products), default=0)


def emit_room(products: list[Product], writer: Writer) -> None:
    """In front of the steps: how many of them make a block."""
    if products:
        writer.line("size = r1 - r0")
        writer.line(f"ahead = max(1, {BLOCK} // max(1, size))")


def emit_ahead(products: list[Product], writer: Writer) -> None:
    """At the start of a step: the products of a block that begins here, and where the rows of this step are."""
    if not products:
        return
    width = row_bytes(products)
    writer.line("at = (step - start) % ahead")
    writer.line("if at == 0:")
    writer.indent += 1
    writer.line("block = min(ahead, stop - step)")
    for product in products:
        left, target = product.left, product.target
        name, root = left.root.name, target.root.name
        out = f"e_{root} + {target.offset}, r_{root}, 0"
        # What one step reads is read where it lies.
        writer.line("if block == 1:")
        writer.indent += 1
        product.emit_call(
            writer, f"size, {product.sizes}, {writer.address(left, 'r0')}, r_{name}, {left.strides[-1]}", out
        )
        writer.indent -= 1
        writer.line("else:")
        writer.indent += 1
        copy = writer.kernel(f"copy_row({product.pack.shape[0] * left.dtype.itemsize})")
        writer.line("for k in range(block):")
        writer.line("    for r in range(r0, r1):")
        source = f"{writer.address(left, 'r')} + k * s_{name}"
        writer.line(f"        {copy}({source}, together + (k * size + r - r0) * {width})")
        product.emit_call(writer, f"block * size, {product.sizes}, together, {width}, {left.dtype.itemsize}", out)
        writer.indent -= 1
    writer.indent -= 1
    for root in sorted({product.target.root.name for product in products}):
        writer.line(f"b_{root} = e_{root} + (at * size - r0) * r_{root}")
