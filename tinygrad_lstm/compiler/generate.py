"""The text of a compiled loop: a module with two functions (table, part), for kernels/translate.py.

Neither the number of steps nor the number of rows occurs in it (unless the rows mix), so another length of
sequence or batch finds the same machine code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count

from tinygrad_lstm.compiler.ahead import BLOCK, block_rows, early, emit_ahead, emit_room, row_bytes
from tinygrad_lstm.compiler.lowering import Lowered
from tinygrad_lstm.compiler.stages import Operation, Product, emit_all, grouped, walk
from tinygrad_lstm.compiler.writer import Writer

__all__ = ["FIELDS", "generate", "in_order", "operands_of", "roots_of", "scratch_bytes"]

# The head of the table: what every part of a launch reads.  The first three are written by launch.py.  Behind them
# stand the addresses of the packed matrices.
FIELDS = ("operands", "start", "stop", "rows", "chunk", "steps", "reverse", "packed", "scratch", "scratch_size",
          "g_float32", "g_float64", "h_float32", "h_float64", "pack_float32", "pack_float64")  # fmt: skip


def roots_of(lowered: Lowered) -> list[str]:
    """The buffers that the operations name, in the order of the table; what lies in scratch is not among them."""
    names: set[str] = set()
    for operation in lowered.operations:
        for view in (*operation.reads(), *operation.writes()):
            names.add(view.root.name)
    # The rows of a carry before and after the step are one buffer.
    return sorted({name.replace("o", "i") for name in names if name[0] not in "tn"})


def operands_of(lowered: Lowered) -> list[str]:
    """The arrays that a call hands over in a tuple: buffers by name, the carry before the first step (``c0``) and
    behind the last one (``f0``), and the matrices that are packed (``q0``).  What must be in C order stands first."""
    carries, packs = range(len(lowered.kept)), lowered.packs
    # A carry that no operation touches is handed through, so it has its place all the same.
    names = sorted({*roots_of(lowered), *(f"i{k}" for k in carries)})
    names += [f"{kind}{k}" for k in carries for kind in "cf"] + [f"q{k}" for k in range(len(packs))]
    loose = any_order(lowered)
    return sorted(names, key=lambda name: not _in_order(name, lowered, loose))


def in_order(lowered: Lowered) -> int:
    """How many of the first operands must be in C order."""
    loose = any_order(lowered)
    return sum(_in_order(name, lowered, loose) for name in operands_of(lowered))


def _in_order(name: str, lowered: Lowered, loose: set[int]) -> bool:
    """Whether this operand must be in C order: what the caller gives, but for matrices that are packed.  The buffers
    are our own; their rows are."""
    kind, k = name[0], int(name[1:])
    return kind in "cxv" or (kind == "q" and lowered.packs[k].invariant not in loose)


def any_order(lowered: Lowered) -> set[int]:
    """The invariants that may lie in memory in any order: they are only read as whole matrices, with the strides that
    they have."""
    packs = lowered.packs
    otherwise = {pack.invariant for k, pack in enumerate(packs) if not _whole(lowered, k)}
    read = set(roots_of(lowered))
    return {pack.invariant for pack in packs if f"v{pack.invariant}" not in read} - otherwise


def _whole(lowered: Lowered, k: int) -> bool:
    pack = lowered.packs[k]
    return pack.whole(lowered.row_shapes[f"v{pack.invariant}"][0])


def generate(lowered: Lowered, split: bool, title: str) -> str:
    """The module's text."""
    writer = Writer()
    roots = sorted({*roots_of(lowered), *(f"i{k}" for k in range(len(lowered.kept)))})
    used = {v.root.name for op in lowered.operations for v in (*op.reads(), *op.writes())}
    for k, name in enumerate(FIELDS):
        writer.line(f"{name} = load64(table + {8 * k})")
    place = {name: 8 * k + _ITEMS for k, name in enumerate(operands_of(lowered))}
    for name in roots:
        _locate(writer, name, place[name], lowered, split)
    for k, pack in enumerate(lowered.packs):
        writer.line(f"p{k} = load64(table + {8 * (len(FIELDS) + k)})")
        row, column = _matrix(writer, place[f"q{k}"], k, lowered)
        writer.line(f"matrix{k}, matrix{k}_row, matrix{k}_col = load64(o + {_HEAD}) + {pack.offset}, {row}, {column}")
    writer.line("r0 = part * chunk")
    writer.line("r1 = min(rows, r0 + chunk)")
    first = early(lowered)
    emit_room(first, writer)
    _scratch(lowered, used, writer)
    _carry(writer, lowered, split, place, first=True)
    writer.line("for step in range(start, stop):")
    writer.indent += 1
    writer.line("pass")  # everything may have left the loop
    for name in roots:
        if name[0] == "i":
            kept = lowered.kept[int(name[1:])]
            if kept:
                writer.line(f"b_{name} = a_{name} + step * s_{name}")
                writer.line(f"b_o{name[1:]} = b_{name} + s_{name}")
            else:
                writer.line(f"b_{name} = a_{name} + (step & 1) * s_{name}")
                writer.line(f"b_o{name[1:]} = a_{name} + (1 - (step & 1)) * s_{name}")
            writer.line(f"r_o{name[1:]} = r_{name}")
        elif name[0] in "xy":
            writer.line(f"b_{name} = a_{name} + step * s_{name}")
        else:
            writer.line(f"b_{name} = a_{name}")
    emit_ahead(first, writer)
    emit_all([op for op in lowered.operations if op not in first], writer)
    writer.indent = 0
    _carry(writer, lowered, split, place, first=False)
    body = "\n".join("    " + line for line in writer.lines)
    kernels = "\n".join(f"{name} = {text}" for text, name in writer.kernels.items())
    described = "".join(f"# {line}\n" for line in title.splitlines())
    return f'''"""A compiled loop."""
from tinygrad_lstm.kernels.memory import (
    call_address, load8, load32, load64, load_float32, load_float64, store8, store32, store64, store_float32,
    store_float64,
)
from tinygrad_lstm.kernels.rows import copy_row, row_kernel
from tinygrad_lstm.kernels.dialect import exported

{described}
{kernels}


@exported
def loop(table, part):
{body}
    return 0


@exported
def prepare(table, part):
{_prepare(lowered, place)}
    return 0
'''


def _carry(writer: Writer, lowered: Lowered, split: bool, place: dict[str, int], first: bool) -> None:
    """Copies the rows of the carry: in before the first step, out behind the last one."""
    writer.line("if start == 0:" if first else "if stop == steps:")
    writer.indent += 1
    writer.line("pass")
    for k, kept in enumerate(lowered.kept):
        shape, dtype = lowered.row_shapes[f"i{k}"]
        copy = writer.kernel(f"copy_row({dtype.itemsize * math.prod(shape)})")
        other = "c" if first else "f"
        writer.line(f"o = load64(operands + {place[f'{other}{k}']})")
        rowed = split and f"i{k}" not in lowered.shared
        writer.line(f"n = load64(load64(o + {_HEAD + 24}))" if rowed else "n = 0")
        at = "0" if first else "steps" if kept else "(steps & 1)"
        writer.line("for r in range(r0, r1):" if rowed else "if part == 0:")
        row = "r" if rowed else "0"
        ends = [f"load64(o + {_HEAD}) + {row} * n", f"a_i{k} + {at} * s_i{k} + {row} * r_i{k}"]
        writer.line(f"    {copy}({', '.join(ends if first else ends[::-1])})")
    writer.indent -= 1


def _locate(writer: Writer, name: str, offset: int, lowered: Lowered, split: bool) -> None:
    """Where an array is, and its strides: read from the array object, whose address is in the table.

    Asking Python for the same costs a microsecond an array.
    """
    writer.line(f"o_{name} = load64(operands + {offset})")
    writer.line(f"a_{name} = load64(o_{name} + {_HEAD})")
    writer.line(f"d_{name} = load64(o_{name} + {_HEAD + 16})")
    writer.line(f"t_{name} = load64(o_{name} + {_HEAD + 24})")
    kind = name[0]
    stepped = kind in "xyi"
    if stepped:
        writer.line(f"s_{name} = load64(t_{name})")
        if kind != "i" or lowered.kept[int(name[1:])]:
            last = "steps" if kind == "i" else "steps - 1"
            writer.line(f"if reverse != 0:\n        a_{name} += ({last}) * s_{name}\n        s_{name} = -s_{name}")
    shape = lowered.row_shapes[name][0]
    rows = split and name not in lowered.shared and (kind != "v" or len(shape) > 0)
    axis = 1 if stepped else 0
    if not rows:
        writer.line(f"r_{name} = 0")
    elif kind == "v":
        writer.line(f"r_{name} = load64(t_{name}) if load64(d_{name}) > 1 else 0")
    else:
        writer.line(f"r_{name} = load64(t_{name} + {8 * axis})")


_HEAD = object.__basicsize__  # data, ndim, dimensions, strides follow the object header (see kernels/layout.py)
_ITEMS = tuple.__basicsize__  # the items of a tuple follow its head


def _matrix(writer: Writer, offset: int, k: int, lowered: Lowered) -> tuple[str, str]:
    """``o``, the object of a matrix, and the texts of its strides."""
    writer.line(f"o = load64(operands + {offset})")
    writer.line(f"t = load64(o + {_HEAD + 24})")
    pack = lowered.packs[k]
    return ("load64(t)", "load64(t + 8)") if _whole(lowered, k) else (str(pack.strides[0]), str(pack.strides[1]))


def _prepare(lowered: Lowered, place: dict[str, int]) -> str:
    """Packs every invariant matrix."""
    writer = Writer()
    writer.indent = 1
    writer.line(f"operands = load64(table + {8 * FIELDS.index('operands')})")
    for k, pack in enumerate(lowered.packs):
        row, column = _matrix(writer, place[f"q{k}"], k, lowered)
        field = 8 * FIELDS.index(f"pack_{pack.dtype}")
        writer.line(
            f"call_address(load64(table + {field}), {pack.shape[0]}, {pack.shape[1]}, "
            f"load64(o + {_HEAD}) + {pack.offset}, {row}, {column}, load64(table + {8 * (len(FIELDS) + k)}))"
        )
    return "\n".join(writer.lines)


def _crossing(lowered: Lowered) -> set[str]:
    """Scratch that lives longer than one loop over rows."""
    where: dict[str, set[int]] = {}
    found: set[str] = set()
    runs = count()

    def visit(operations: Sequence[Operation]) -> None:
        for in_rows, run in grouped(operations):
            k = next(runs)
            for operation in run:
                if not in_rows and operation.parts():
                    found.update(view.root.name for view in operation.bases())  # from one inner step to the next
                    visit(operation.parts())
                    continue
                for view in (*operation.reads(), *operation.writes()):
                    where.setdefault(view.root.name, set()).add(k)

    visit(lowered.operations)
    for operation, _ in walk(lowered.operations):
        if isinstance(operation, Product):
            found.update(view.root.name for view in (*operation.reads(), *operation.writes()))
    found.update(name for name, places in where.items() if len(places) > 1)
    return {name for name in found if name[0] == "t"}


def _scratch(lowered: Lowered, used: set[str], writer: Writer) -> None:
    """Addresses of scratch: buffers of one row first, then those with a row for every row of the part, then those with
    one for every row of a block of products, and what these read."""
    crossing, wide = _crossing(lowered), _wide(lowered)
    fixed = per_row = per_wide = 0

    def place() -> str:
        return f"scratch + part * scratch_size + {fixed} + {per_row} * chunk + {per_wide} * max(chunk, {BLOCK})"

    sizes = [(f"t{k}", nbytes) for k, nbytes in enumerate(lowered.scratch) if f"t{k}" in used]
    for name, nbytes in sizes:
        writer.line(f"r_{name} = {nbytes if name in crossing else 0}")
        if name not in crossing:
            writer.line(f"b_{name} = {place()}")
            fixed += nbytes
    for name, nbytes in sizes:
        if name in crossing - wide:
            # Address of row 0 of the batch, as for every other buffer: rows of the part start at r0.
            writer.line(f"b_{name} = {place()} - r0 * {nbytes}")
            per_row += nbytes
    for name, nbytes in sizes:
        if name in wide:
            writer.line(f"e_{name} = {place()}")
            per_wide += nbytes
    if wide:
        writer.line(f"together = {place()}")


def _wide(lowered: Lowered) -> set[str]:
    return {product.target.root.name for product in early(lowered)}


def scratch_bytes(lowered: Lowered, chunk: int) -> int:
    """Bytes of scratch of one part with so many rows."""
    crossing, wide = _crossing(lowered), _wide(lowered)
    used = {v.root.name for op in lowered.operations for v in (*op.reads(), *op.writes())}
    total = 0
    for k, nbytes in enumerate(lowered.scratch):
        if f"t{k}" in used:
            rows = block_rows(chunk) if f"t{k}" in wide else chunk if f"t{k}" in crossing else 1
            total += nbytes * rows
    total += row_bytes(early(lowered)) * BLOCK
    return -(-max(total, 64) // 4096) * 4096
