"""LLVM IR of the matrix product: register tiles, and how their operands are packed.

A *micro-kernel* keeps ``rows x vectors`` vector registers of sums.  For each k it loads one row of a panel of B
(``vectors`` registers, P numbers), broadcasts one number of A per row, and adds the products: BLIS calls it a
rank-1 update (Van Zee and van de Geijn 2015).  An element of C sees one chain of ``fmuladd`` in the order of
k whatever its place in the tile, so the bits of a result do not depend on how rows and columns were split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from .address_code import I32, I64, Code, Tile, define

__all__ = ["dot_products", "micro_kernel", "pack_panel", "sweep"]

LINE = 64  # bytes of a line of the cache


def micro_kernel(module: Any, tile: Tile, rows: int, *, kind: str = "whole") -> Any:
    """``C[rows x P] (=|+=) sum over k of A[row, k] * B[k, :]``; K may be 0.

    ``columns`` of the tile exist in C: nothing else is read or written there.  Of B whole rows are read, or only
    those columns if ``kind`` is "masked"; "packing" also copies them to ``out[K][P]``, while they are in
    registers.  The sum starts from zero and is added to C at the end.

    Of "whole", each step prefetches one line at ``ahead + k * ahead_k``: what is read next of B comes from beyond the
    second cache, faster than the first tile could wait for it.
    """
    names = "K a a_row a_k b b_k c c_row accumulate columns"
    more = {"whole": " ahead ahead_k", "packing": " out", "masked": ""}[kind]
    code, arguments = define(module, tile, f"micro_{kind}_{rows}x{tile.vectors}", names + more)
    length, a, a_row, a_k, b, b_k, c, c_row, accumulate, columns, *rest = arguments
    out, ahead = (rest, []) if kind == "packing" else ([], rest)
    build, step = code.b, tile.lanes * tile.itemsize
    masks = code.masks(columns)
    starts = [code.index(a, (row, a_row)) for row in range(rows)]
    below = code.index(a, (LINE // tile.itemsize, a_row))
    zeros = [code.constant(0.0)] * (rows * tile.vectors)
    for row in range(rows):
        for v in range(tile.vectors):
            # C is seldom in the first cache, and wanted K steps later.
            code.prefetch(build.add(code.index(c, (row, c_row)), I64(v * step)))

    def rank_1(k: Any, carried: list[Any]) -> list[Any]:
        along, here, *sums = carried
        right = [
            code.vector(build.add(here, I64(v * step)), masks[v] if kind == "masked" else None)
            for v in range(tile.vectors)
        ]
        if kind != "masked":
            # The tile below reads the next line where A is transposed.
            code.prefetch(build.add(below, along))
        if ahead:
            code.prefetch(code.index(ahead[0], (k, ahead[1])))
        for place in out:
            for v in range(tile.vectors):
                code.put_vector(right[v], code.index(place, (k, tile.vectors * step), (v, step)))
        for row in range(rows):
            left = code.splat(code.number(build.add(starts[row], along)))
            for v in range(tile.vectors):
                sums[row * tile.vectors + v] = code.fmuladd(left, right[v], sums[row * tile.vectors + v])
        return [build.add(along, a_k), build.add(here, b_k), *sums]

    _, _, *sums = code.carry(0, length, 1, [I64(0), b, *zeros], rank_1)
    cells = [
        (sums[row * tile.vectors + v], build.add(code.index(c, (row, c_row)), I64(v * step)), masks[v])
        for row in range(rows)
        for v in range(tile.vectors)
    ]
    adds = build.icmp_signed("!=", accumulate, I64(0))
    with build.if_else(build.icmp_signed(">=", columns, I64(tile.panel))) as (whole, tail):
        with whole, build.if_else(adds) as (add, put):
            with add:
                for value, address, _ in cells:
                    code.put_vector(build.fadd(code.vector(address), value), address)
            with put:
                for value, address, _ in cells:
                    code.put_vector(value, address)
        with tail:
            for value, address, mask in cells:
                # x + -0 is x, for zeros of both signs
                old = code.vector(address, build.and_(mask, code.splat(adds)), -0.0)
                code.put_vector(build.fadd(old, value), address, mask)
    return code.end()


def sweep(module: Any, tile: Tile, *, kind: str = "whole", narrow: Any = None) -> Any:
    """All rows of C for one panel of B and one chunk of K: a micro-kernel for each tile of rows.

    At ``ahead`` lies the panel that comes next: each tile prefetches one line of each of its rows.
    Few rows are wanted of the masked kind, so it has low tiles only: less to compile.
    ``narrow`` is the sweep that takes over where half of the panel is empty.
    """
    most = 2 if kind == "masked" else tile.rows
    kernels = [micro_kernel(module, tile, rows, kind=kind) for rows in range(1, most + 1)]
    names = "M K a a_row a_k b b_k c c_row accumulate columns" + (" ahead ahead_k" if kind == "whole" else "")
    code, arguments = define(module, tile, f"sweep_{kind}_{tile.vectors}", names)
    total, length, a, a_row, a_k, b, b_k, c, c_row, accumulate, columns, *ahead = arguments
    build = code.b
    if narrow is not None:
        with build.if_then(build.icmp_signed("<=", columns, I64(tile.panel // 2))):
            build.ret(code.call(narrow, *arguments))
    entry, head = build.block, build.append_basic_block("head")
    inside, following, after = (build.append_basic_block(name) for name in ("body", "next", "after"))
    build.branch(head)
    build.position_at_end(head)
    row, line = build.phi(I64), build.phi(I64)
    rest = build.sub(total, row)
    build.cbranch(build.icmp_signed(">", rest, I64(0)), inside, after)
    build.position_at_end(inside)
    # Two tiles of middling height are better than a full one and a low one, which waits for B.
    middling = build.ashr(build.add(rest, I64(1)), I64(1))
    count = build.select(build.icmp_signed("<", rest, I64(min(most + 4, 2 * most))), middling, I64(most))
    count = build.select(build.icmp_signed("<=", rest, I64(most)), rest, count)
    here, there = code.index(a, (row, a_row)), code.index(c, (row, c_row))
    default = build.append_basic_block("default")
    switch = build.switch(count, default)
    for rows, kernel in enumerate(kernels, 1):
        block = default if rows == most else build.append_basic_block(f"rows{rows}")
        if rows != most:
            switch.add_case(I64(rows), block)
        build.position_at_end(block)
        soon = [build.add(ahead[0], line), ahead[1]] if ahead else []
        code.call(kernel, length, here, a_row, a_k, b, b_k, there, c_row, accumulate, columns, *soon)
        build.branch(following)
    build.position_at_end(following)
    row.add_incoming(I64(0), entry)
    line.add_incoming(I64(0), entry)
    line.add_incoming(code.least(build.add(line, I64(LINE)), max(tile.panel * tile.itemsize - LINE, 0)), following)
    row.add_incoming(build.add(row, count), following)
    build.branch(head)
    build.position_at_end(after)
    return code.end()


def pack_panel(module: Any, tile: Tile) -> Any:
    """``columns`` (at most P) columns of B to ``out[K][P]``, padded with zeros."""
    code, arguments = define(module, tile, "pack_panel", "K columns b b_row b_col out")
    length, columns, b, b_row, b_col, out = arguments
    build, item, width = code.b, tile.itemsize, tile.panel * tile.itemsize
    with build.if_else(build.icmp_signed("==", b_col, I64(item))) as (copied, other):
        with copied, build.if_else(build.icmp_signed(">=", columns, I64(tile.panel))) as (whole, tail):
            with whole:
                _rows(code, arguments, [None] * tile.vectors)
            with tail:
                _rows(code, arguments, code.masks(columns))
        with other:
            lanes = I64(-tile.lanes)
            blocked = build.icmp_signed("==", b_row, I64(item))
            rows = build.select(blocked, build.and_(length, lanes), I64(0))
            cols = build.select(blocked, build.and_(columns, lanes), I64(0))
            with code.loop(0, cols, tile.lanes) as col, code.loop(0, rows, tile.lanes) as k:
                source = code.index(b, (col, b_col), (k, b_row))
                lines = [code.vector(code.index(source, (j, b_col))) for j in range(tile.lanes)]
                target = code.index(out, (k, width), (col, item))
                for j, line in enumerate(_transposed(code, lines)):
                    code.put_vector(line, code.index(target, (j, width)))
            _scalars(code, (0, rows), (cols, columns), arguments)
            _scalars(code, (rows, length), (0, columns), arguments)
            zero = ir.Constant(tile.scalar, 0.0)
            with code.loop(0, length) as k, code.loop(columns, tile.panel) as col:
                code.put_number(zero, code.index(out, (k, width), (col, item)))
    return code.end()


def _rows(code: Code, arguments: Sequence[Any], masks: list[Any]) -> None:
    """Copies whole rows of the panel."""
    length, _, b, b_row, _, out = arguments
    tile, build = code.tile, code.b
    with code.loop(0, length) as k:
        source, target = code.index(b, (k, b_row)), code.index(out, (k, tile.panel * tile.itemsize))
        for v, mask in enumerate(masks):
            shift = I64(v * tile.lanes * tile.itemsize)
            code.put_vector(code.vector(build.add(source, shift), mask), build.add(target, shift))


def _scalars(code: Code, rows: tuple[Any, Any], cols: tuple[Any, Any], arguments: Sequence[Any]) -> None:
    """Copies numbers one by one."""
    _, _, b, b_row, b_col, out = arguments
    tile = code.tile
    with code.loop(*rows) as k, code.loop(*cols) as col:
        value = code.number(code.index(b, (k, b_row), (col, b_col)))
        code.put_number(value, code.index(out, (k, tile.panel * tile.itemsize), (col, tile.itemsize)))


def _transposed(code: Code, lines: list[Any]) -> list[Any]:
    """A square block in registers: in round s, lines 2^s apart exchange blocks of 2^s lanes."""
    distance = 1
    while distance < len(lines):
        result = list(lines)
        for j in range(len(lines)):
            if not j & distance:
                result[j], result[j + distance] = _exchanged(code, lines[j], lines[j + distance], distance)
        lines, distance = result, 2 * distance
    return lines


def _exchanged(code: Code, x: Any, y: Any, distance: int) -> tuple[Any, Any]:
    """The blocks of ``distance`` lanes at even places of both, and those at odd places."""
    lanes = code.tile.lanes
    type_ = ir.VectorType(I32, lanes)
    even = [j if not j & distance else lanes + j - distance for j in range(lanes)]
    odd = [j + distance if not j & distance else lanes + j for j in range(lanes)]
    return (
        code.b.shuffle_vector(x, y, ir.Constant(type_, even)),
        code.b.shuffle_vector(x, y, ir.Constant(type_, odd)),
    )


def dot_products(module: Any, tile: Tile) -> Any:
    """``C[m, n] (=|+=) A[m, :] . B[:, n]`` where A has unit stride along its rows, and B along its columns.

    A dot product is summed in the lanes of one register, and these then pairwise: the same order everywhere.
    """
    code, arguments = define(module, tile, "dots", "M N K a a_row b b_col c c_row accumulate")
    total, columns, length, a, a_row, b, b_col, c, c_row, accumulate = arguments
    build, item, lanes = code.b, tile.itemsize, tile.lanes
    group = min(8, lanes)
    full = build.and_(length, I64(-lanes))
    rest = code.mask(build.sub(length, full))
    adds = code.splat(build.icmp_signed("!=", accumulate, I64(0)))
    with code.loop(0, columns, group) as n, code.loop(0, total) as m:
        # Columns past the last are the last one again, and are not stored.
        last = build.sub(columns, I64(1))
        lines = [code.index(b, (code.least(build.add(n, I64(j)), last), b_col)) for j in range(group)]
        left = code.index(a, (m, a_row))

        def multiply(k: Any, sums: list[Any], mask: Any = None, lines: Any = lines, left: Any = left) -> list[Any]:
            shift = build.mul(k, I64(item))
            x = code.vector(build.add(left, shift), mask)
            return [
                code.fmuladd(x, code.vector(build.add(line, shift), mask), s)
                for line, s in zip(lines, sums, strict=True)
            ]

        def last_terms(k: Any, sums: list[Any], multiply: Any = multiply) -> list[Any]:
            return multiply(k, sums, rest)

        sums = code.carry(0, full, lanes, [code.constant(0.0)] * group, multiply)
        sums = code.carry(full, length, lanes, sums, last_terms)
        for even, odd in _halves(tile):
            pairs = list(zip(sums[::2], sums[1::2], strict=True)) if len(sums) > 1 else [(sums[0], sums[0])]
            sums = [build.fadd(build.shuffle_vector(x, y, even), build.shuffle_vector(x, y, odd)) for x, y in pairs]
        target = code.index(c, (m, c_row), (n, item))
        stored = code.mask(code.least(build.sub(columns, n), group))
        old = code.vector(target, build.and_(stored, adds), -0.0)
        code.put_vector(build.fadd(old, sums[0]), target, stored)
    return code.end()


def _halves(tile: Tile) -> list[tuple[Any, Any]]:
    """Shuffles of two vectors, round by round, of which the sums are the sums of all lanes of the vectors, in order.

    First within the blocks of 16 bytes, in which shuffles are cheapest.
    """
    block = 16 // tile.itemsize
    type_, rounds, distance = ir.VectorType(I32, tile.lanes), [], 1
    while distance < tile.lanes:
        if distance < block:
            low = [
                j + k + side * tile.lanes
                for j in range(0, tile.lanes, block)
                for m in range(0, block // 2, distance)
                for side in (0, 1)
                for k in range(m, m + distance)
            ]
            high = [j + block // 2 for j in low]
        else:
            low = [j + k for j in range(0, 2 * tile.lanes, 2 * block) for k in range(block)]
            high = [j + block for j in low]
        rounds.append((ir.Constant(type_, low), ir.Constant(type_, high)))
        distance *= 2
    return rounds
