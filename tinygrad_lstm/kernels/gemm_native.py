"""The drivers of the matrix product in LLVM IR: what is packed when, and in which order tiles are swept.

:mod:`.gemm` loads what is generated here.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from .address_code import I64, Code, Tile, define, tile_for
from .dialect import Intrinsic
from .microkernel import dot_products, micro_kernel, pack_panel, sweep

__all__ = ["CHUNK", "addresses_of"]

CHUNK = 256  # KC: a sum over k starts anew after so many terms, and is added to C
PART_WORDS = 14
ROWS = 192  # of A at a time: their chunk stays in the second cache while all panels pass


def addresses_of(dtype: str) -> Intrinsic:
    """``addresses(out)``: writes P, lanes and the addresses of the C functions to int64s."""

    @Intrinsic
    def addresses(builder: Any, out: Any) -> None:
        tile = tile_for(dtype)
        functions = _functions(builder.module, tile)
        room = CHUNK * tile.panel * tile.itemsize
        numbers = [
            I64(tile.panel),
            I64(tile.lanes),
            I64(CHUNK),
            I64(room),
            *(builder.ptrtoint(f, I64) for f in functions),
        ]
        for k, number in enumerate(numbers):
            builder.store(number, builder.inttoptr(builder.add(out, I64(8 * k)), I64.as_pointer()))

    return addresses


def _functions(module: Any, tile: Tile) -> list[Any]:
    panel = pack_panel(module, tile)
    swept = sweep(module, tile, narrow=sweep(module, tile._replace(vectors=tile.vectors // 2)))
    strided, small = _gemm_strided(module, tile, panel, swept), _gemm_small(module, tile, swept)
    part = _gemm_part(module, tile, strided, small)
    return [_pack(module, tile, panel), _gemm_packed(module, tile, swept), strided, small, part]


def _panels(code: Code, columns: Any) -> Any:
    return code.b.sdiv(code.b.add(columns, I64(code.tile.panel - 1)), I64(code.tile.panel))


def _chunks(code: Code, length: Any) -> Any:
    """``for start in range(0, max(K, 1), KC)``: an empty sum is written, too."""
    return code.loop(0, code.most(length, 1), CHUNK)


def _following(code: Code, row: Any, n: Any, stop: Any, across: Any, down: Any) -> Any:
    """Where B is read next: the next panel, or the first one of the next chunk.  It is only prefetched, so it need not
    be there."""
    build = code.b
    last = build.icmp_signed(">=", build.add(n, I64(1)), stop)
    return build.select(last, build.add(row, down), code.index(row, (build.add(n, I64(1)), across)))


def _pack(module: Any, tile: Tile, panel: Any) -> Any:
    code, arguments = define(module, tile, "pack", "K N b b_row b_col out")
    length, columns, b, b_row, b_col, out = arguments
    size = code.b.mul(length, I64(tile.panel * tile.itemsize))
    with code.loop(0, _panels(code, columns)) as n:
        first = code.b.mul(n, I64(tile.panel))
        some = code.least(code.b.sub(columns, first), tile.panel)
        code.call(panel, length, some, code.index(b, (first, b_col)), b_row, b_col, code.index(out, (n, size)))
    return code.end()


def _gemm_packed(module: Any, tile: Tile, swept: Any) -> Any:
    code, arguments = define(module, tile, "gemm_packed", "M N K a a_row a_k packed c c_row accumulate")
    total, columns, length, a, a_row, a_k, packed, c, c_row, accumulate = arguments
    build, width = code.b, tile.panel * tile.itemsize
    size = build.mul(length, I64(width))
    panels = _panels(code, columns)
    with code.loop(0, total, ROWS) as row, _chunks(code, length) as k, code.loop(0, panels) as n:
        code.call(
            swept,
            code.least(build.sub(total, row), ROWS),
            code.least(build.sub(length, k), CHUNK),
            code.index(a, (row, a_row), (k, a_k)),
            a_row,
            a_k,
            code.index(packed, (n, size), (k, width)),
            width,
            code.index(c, (row, c_row), (n, width)),
            c_row,
            build.or_(accumulate, k),
            build.sub(columns, build.mul(n, I64(tile.panel))),
            _following(code, code.index(packed, (k, width)), n, panels, size, I64(CHUNK * width)),
            width,
        )
    return code.end()


def _gemm_strided(module: Any, tile: Tile, panel: Any, swept: Any) -> Any:
    packing = micro_kernel(module, tile, tile.rows, kind="packing")
    names = "M N K a a_row a_k b b_row b_col c c_row accumulate n0 n1 scratch"
    code, arguments = define(module, tile, "gemm_strided", names)
    total, columns, length, a, a_row, a_k, b, b_row, b_col, c, c_row, accumulate, n0, n1, scratch = arguments
    build, width, rows = code.b, tile.panel * tile.itemsize, I64(tile.rows)
    stop = code.least(n1, _panels(code, columns))
    by_rows = build.icmp_signed("==", b_col, I64(tile.itemsize))
    many = build.icmp_signed(">=", total, rows)
    with _chunks(code, length) as k, code.loop(n0, stop) as n:
        first = build.mul(n, I64(tile.panel))
        rest, some = build.sub(columns, first), code.least(build.sub(length, k), CHUNK)
        start, source = code.index(a, (k, a_k)), code.index(b, (k, b_row), (first, b_col))
        target, add = code.index(c, (n, width)), build.or_(accumulate, k)
        whole = build.and_(by_rows, build.icmp_signed(">=", rest, I64(tile.panel)))
        copied = build.and_(whole, many)
        with build.if_else(copied) as (fused, other):
            with fused:
                code.call(packing, some, start, a_row, a_k, source, b_row, target, c_row, add, rest, scratch)
            with other, build.if_then(build.not_(whole)):
                code.call(panel, some, code.least(rest, tile.panel), source, b_row, b_col, scratch)
        # What one tile of rows reads only once is read where it lies.
        direct = build.and_(whole, build.not_(many))
        right, right_k = build.select(direct, source, scratch), build.select(direct, b_row, I64(width))
        done = build.select(copied, rows, I64(0))
        left, below = code.index(start, (done, a_row)), code.index(target, (done, c_row))
        across = build.mul(b_col, I64(tile.panel))
        down = build.mul(b_row, I64(CHUNK))
        soon = _following(code, code.index(b, (k, b_row)), n, stop, across, down)
        less = build.sub(total, done)
        code.call(swept, less, some, left, a_row, a_k, right, right_k, below, c_row, add, rest, soon, b_row)
    return code.end()


def _gemm_part(module: Any, tile: Tile, strided: Any, small: Any) -> Any:
    """A block of C: some rows, some panels.  Its scratch is on the stack, so any thread may run it."""
    code, (table, part) = define(module, tile, "gemm_part", "table part")
    build = code.b
    scratch = build.alloca(ir.ArrayType(ir.IntType(8), CHUNK * tile.panel * tile.itemsize))
    scratch.align = 64
    words = [build.load(build.inttoptr(build.add(table, I64(8 * k)), I64.as_pointer())) for k in range(PART_WORDS)]
    total, columns, length, a, a_row, a_k, b, b_row, b_col, c, c_row, accumulate, rows, panels = words
    across = build.sdiv(build.add(_panels(code, columns), build.sub(panels, I64(1))), panels)
    row, n0 = build.mul(build.sdiv(part, across), rows), build.mul(build.srem(part, across), panels)
    some, left = code.least(build.sub(total, row), rows), (code.index(a, (row, a_row)), a_row, a_k)
    target, width = code.index(c, (row, c_row)), tile.panel * tile.itemsize
    narrow = build.and_(build.icmp_signed("==", total, I64(1)), build.icmp_signed("==", b_col, I64(tile.itemsize)))
    with build.if_else(narrow) as (single, many):
        with single:
            first = build.mul(n0, I64(tile.panel))
            rest = code.least(build.sub(columns, first), build.mul(panels, I64(tile.panel)))
            right = (code.index(b, (first, b_col)), b_row, b_col)
            code.call(small, 1, rest, length, *left, *right, code.index(target, (n0, width)), c_row, accumulate)
        with many:
            block = (n0, build.add(n0, panels), build.ptrtoint(scratch, I64))
            code.call(strided, some, columns, length, *left, b, b_row, b_col, target, c_row, accumulate, *block)
    return code.end()


def _gemm_small(module: Any, tile: Tile, swept: Any) -> Any:
    """B where it lies: by rows through the micro-kernels, by columns through dot products, else number by number."""
    names = "M N K a a_row a_k b b_row b_col c c_row accumulate"
    inner, dot = sweep(module, tile, kind="masked"), dot_products(module, tile)
    # One row of A: many columns at a time, since four sums at a time wait for each other, and memory likes long rows.
    strip = tile._replace(vectors=4 * tile.vectors)
    wide = micro_kernel(module, strip, 1)
    code, arguments = define(module, tile, "gemm_small", names)
    total, columns, length, a, a_row, a_k, b, b_row, b_col, c, c_row, accumulate = arguments
    build, item = code.b, I64(tile.itemsize)
    width = tile.panel * tile.itemsize
    by_rows = build.icmp_signed("==", b_col, item)
    by_columns = build.and_(build.icmp_signed("==", b_row, item), build.icmp_signed("==", a_k, item))
    single = build.icmp_signed("==", total, I64(1))
    strips = build.select(single, build.and_(columns, I64(-strip.panel)), I64(0))
    with build.if_else(by_rows) as (rows, other):
        with rows, _chunks(code, length) as k:
            some, add = code.least(build.sub(length, k), CHUNK), build.or_(accumulate, k)
            first, source = code.index(a, (k, a_k)), code.index(b, (k, b_row))
            with code.loop(0, strips, strip.panel) as n:
                right, target = code.index(source, (n, item)), code.index(c, (n, item))
                code.call(wide, some, first, a_row, a_k, right, b_row, target, c_row, add, strip.panel, right, 0)
            with code.loop(build.sdiv(strips, I64(tile.panel)), _panels(code, columns)) as n:
                rest = build.sub(columns, build.mul(n, I64(tile.panel)))
                right, target = code.index(source, (n, width)), code.index(c, (n, width))
                whole = build.icmp_signed(">=", rest, I64(tile.panel))
                with build.if_else(whole) as (plain, tail):
                    shared = (total, some, first, a_row, a_k, right, b_row, target, c_row, add, rest)
                    with plain:
                        code.call(swept, *shared, build.add(right, I64(width)), b_row)
                    with tail:
                        code.call(inner, *shared)
        with other, build.if_else(by_columns) as (dots, general):
            with dots:
                code.call(dot, total, columns, length, a, a_row, b, b_col, c, c_row, accumulate)
            with general:
                _number_by_number(code, arguments)
    return code.end()


def _number_by_number(code: Code, arguments: list[Any]) -> None:
    """Any strides: a chain for each element, with the bits of the micro-kernels."""
    total, columns, length, a, a_row, a_k, b, b_row, b_col, c, c_row, accumulate = arguments
    build, item = code.b, code.tile.itemsize
    zero = ir.Constant(code.tile.scalar, 0.0)
    with code.loop(0, total) as m, code.loop(0, columns) as n, _chunks(code, length) as k:
        start, stop = code.index(a, (m, a_row)), code.least(length, build.add(k, I64(CHUNK)))
        column, target = code.index(b, (n, b_col)), code.index(c, (m, c_row), (n, item))

        def multiply(i: Any, sums: list[Any], start: Any = start, column: Any = column, code: Code = code) -> list[Any]:
            left, right = code.number(code.index(start, (i, a_k))), code.number(code.index(column, (i, b_row)))
            return [code.fmuladd(left, right, sums[0])]

        (value,) = code.carry(k, stop, 1, [zero], multiply)
        with build.if_else(build.icmp_signed("!=", build.or_(accumulate, k), I64(0))) as (add, put):
            with add:
                code.put_number(build.fadd(code.number(target), value), target)
            with put:
                code.put_number(value, target)
