"""Operations of a compiled loop on views, and the text of each.

An operation either works on one row (and shares a loop over the rows with its neighbours), or is a matrix
product over all rows of a thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinygrad_lstm.compiler.views import View, contiguous
from tinygrad_lstm.compiler.writer import Writer, collapsed, nested
from tinygrad_lstm.kernels import Expression
from tinygrad_lstm.kernels.printer import literal

__all__ = [
    "Chain", "Copy", "Fold", "Gather", "Operation", "Packed", "Product", "RowProduct", "combine", "emit_all", "grouped",
    "looped", "walk",
]  # fmt: skip


@dataclass
class Operation:
    """Reads and writes views of one row."""

    alone = False  # whether it works on all rows of a thread, outside of the loops over rows

    def parts(self) -> Sequence[Operation]:
        """The operations inside of a loop."""
        return ()

    def repeats(self) -> int:
        """How often they run."""
        return 1

    def bases(self) -> list[View]:
        """Where what changes its place in a loop begins."""
        return []

    def reads(self) -> list[View]:
        raise NotImplementedError

    def writes(self) -> list[View]:
        raise NotImplementedError

    def emit(self, writer: Writer) -> None:
        """The text, inside a loop over rows ``r``."""
        raise NotImplementedError


@dataclass
class Chain(Operation):
    """A fused kernel over ``shape``; ``targets`` are (view, index of the output)."""

    expression: Expression
    shape: tuple[int, ...]
    inputs: list[View]
    reductions: tuple[str, ...]
    targets: list[tuple[View, int]]

    def reads(self) -> list[View]:
        return self.inputs

    def writes(self) -> list[View]:
        return [view for view, _ in self.targets]

    def emit(self, writer: Writer) -> None:
        shape = self.shape or (1,)
        inputs = [v.broadcast(shape) for v in self.inputs]
        outputs = []
        for view, k in self.targets:
            whole = (*shape[:-1], 1) if self.reductions[k] else shape
            found = view.reshaped(whole)
            assert found is not None, (view, whole)
            outputs.append(found)
        folded = any(self.reductions)
        views = [*inputs, *outputs]
        lengths, strides = collapsed(shape, [v.strides for v in views], last_fixed=folded)
        columns = lengths[-1]
        along = tuple(s[-1] != 0 for s in strides[: len(inputs)])
        nodes = ", ".join(f"({n.op!r}, {n.args!r}, {literal(n.param)})" for n in self.expression.nodes)
        dtypes = tuple(v.dtype.name for v in inputs)
        places = tuple(k for _, k in self.targets)
        name = writer.kernel(
            f"row_kernel({self.expression.n_inputs}, ({nodes},), {self.expression.outputs!r}, {dtypes!r}, "
            f"{along!r}, {self.reductions!r}, {places!r}, {columns})"
        )
        addresses = [writer.address(v, "r") for v in views]
        nested(
            writer, lengths[:-1], addresses, [s[:-1] for s in strides],
            lambda moved: writer.line(f"{name}({', '.join(moved)})"),
        )  # fmt: skip


@dataclass
class Copy(Operation):
    """The elements of one view to another of the same shape."""

    source: View
    target: View

    def reads(self) -> list[View]:
        return [self.source]

    def writes(self) -> list[View]:
        return [self.target]

    def emit(self, writer: Writer) -> None:
        source, itemsize = self.source.broadcast(self.target.shape), self.target.dtype.itemsize
        lengths, strides = collapsed(self.target.shape, [source.strides, self.target.strides])
        nbytes = itemsize
        if strides[0][-1] == itemsize == strides[1][-1]:
            nbytes = itemsize * lengths.pop()
            strides = [s[:-1] for s in strides]
        name = writer.kernel(f"copy_row({nbytes})")
        addresses = [writer.address(v, "r") for v in (source, self.target)]
        nested(writer, lengths, addresses, strides, lambda moved: writer.line(f"{name}({', '.join(moved)})"))


@dataclass
class Fold(Operation):
    """A sum or extremum along one axis that is not the last."""

    kind: str
    axis: int  # from the front, within a row
    source: View
    target: View  # with length 1 there
    combine: Expression = field(repr=False)

    def reads(self) -> list[View]:
        return [self.source]

    def writes(self) -> list[View]:
        return [self.target]

    def emit(self, writer: Writer) -> None:
        first = list(self.source.shape)
        first[self.axis] = 1
        start = self.source.moved(0, tuple(first), self.source.strides)
        Copy(start, self.target).emit(writer)
        n = self.source.shape[self.axis]
        if n > 1:
            step = self.source.strides[self.axis]
            places = [(0, 0), (0, step), (0, 0)]
            looped(writer, n, self.combine, self.source.dtype.name, [self.target, start, self.target], places)


def looped(
    writer: Writer, n: int, expression: Expression, dtype: str, views: Sequence[View], places: Sequence[tuple[int, int]]
) -> None:
    """Steps 1 to n - 1 of an operation on slices: (a, b) -> c, each at (offset, step) of its view, all of one shape."""
    index = writer.fresh("j")
    writer.line(f"for {index} in range(1, {n}):")
    writer.indent += 1
    addresses = []
    for view, (offset, step) in zip(views, places, strict=True):
        here = writer.fresh("a")
        writer.line(f"{here} = {writer.address(view, 'r')} + {offset} + {index} * {step}")
        addresses.append(here)
    lengths, strides = collapsed(views[0].shape, [v.strides for v in views])
    if any(s[-1] not in (0, v.dtype.itemsize) for s, v in zip(strides, views, strict=True)):
        lengths, strides = [*lengths, 1], [[*s, 0] for s in strides]  # one element at a time
    along = tuple(s[-1] != 0 for s in strides[:2])
    nodes = ", ".join(f"({n.op!r}, {n.args!r}, {literal(n.param)})" for n in expression.nodes)
    name = writer.kernel(
        f"row_kernel(2, ({nodes},), {expression.outputs!r}, {(dtype, dtype)!r}, {along!r}, ('',), (0,), {lengths[-1]})"
    )
    nested(
        writer, lengths[:-1], addresses, [s[:-1] for s in strides],
        lambda moved: writer.line(f"{name}({', '.join(moved)})"),
    )  # fmt: skip
    writer.indent -= 1


@dataclass
class Gather(Operation):
    """Rows of a table at an index per row."""

    table: View
    index: View
    target: View

    def reads(self) -> list[View]:
        return [self.table, self.index]

    def writes(self) -> list[View]:
        return [self.target]

    def emit(self, writer: Writer) -> None:
        shape = self.index.shape
        nbytes = self.target.dtype.itemsize
        for n in self.table.shape[1:]:
            nbytes *= n
        name = writer.kernel(f"copy_row({nbytes})")
        load = f"load{8 * self.index.dtype.itemsize}"

        def body(moved: list[str]) -> None:
            row = writer.fresh("n")
            writer.line(f"{row} = {load}({moved[0]})")
            writer.line(f"if {row} < 0:")
            writer.line(f"    {row} += {self.table.shape[0]}")
            writer.line(f"if {row} < 0 or {row} >= {self.table.shape[0]}:")
            writer.line("    return 1")
            writer.line(f"{name}({writer.address(self.table, 'r')} + {row} * {self.table.strides[0]}, {moved[1]})")

        outer = self.target.strides[: len(shape)]
        addresses = [writer.address(self.index, "r"), writer.address(self.target, "r")]
        nested(writer, shape, addresses, [self.index.strides, outer], body)


@dataclass(frozen=True)
class Packed:
    """An invariant matrix that is packed once per call: which invariant, where in it, K, N, strides in bytes."""

    invariant: int
    offset: int
    shape: tuple[int, int]
    strides: tuple[int, int]
    dtype: str

    def whole(self, shape: tuple[int, ...]) -> bool:
        """Whether it is all of an invariant of this shape, as that lies in memory (and not its transpose)."""
        itemsize = np.dtype(self.dtype).itemsize
        return self.offset == 0 and self.shape == shape and self.strides == contiguous(self.shape, itemsize)


@dataclass
class Product(Operation):
    """All rows of a thread times a packed matrix: ``(rows, K) @ (K, N)``."""

    left: View
    packed: int
    pack: Packed
    target: View
    alone = True

    def reads(self) -> list[View]:
        return [self.left]

    def writes(self) -> list[View]:
        return [self.target]

    @property
    def early(self) -> bool:
        """Whether it can be made before its step (see ahead.py)."""
        left = self.left
        return left.root.kind == "x" and left.strides[-1] == left.dtype.itemsize and self.target.root.kind == "t"

    @property
    def sizes(self) -> str:
        """N, K."""
        return f"{self.pack.shape[1]}, {self.pack.shape[0]}"

    def emit(self, writer: Writer) -> None:
        a, c = self.left, self.target
        rows = f"r1 - r0, {self.sizes}, {writer.address(a, 'r0')}, r_{a.root.name}, {a.strides[-1]}"
        self.emit_call(writer, rows, f"{writer.address(c, 'r0')}, r_{c.root.name}, 0")

    def emit_call(self, writer: Writer, rows: str, out: str) -> None:
        """The product of these rows of the left side."""
        right = f"matrix{self.packed}, matrix{self.packed}_row, matrix{self.packed}_col"
        # A few rows in all are multiplied sooner than the matrix is packed.
        writer.line("if packed:")
        writer.line(f"    call_address(g_{self.pack.dtype}, {rows}, p{self.packed}, {out})")
        writer.line("else:")
        writer.line(f"    call_address(h_{self.pack.dtype}, {rows}, {right}, {out})")


@dataclass
class RowProduct(Operation):
    """Within a row: ``(..., M, K) @ (..., K, N)``; the right side a packed invariant or a view."""

    left: View
    right: View | None
    target: View
    packed: int = -1

    def reads(self) -> list[View]:
        return [self.left] if self.right is None else [self.left, self.right]

    def writes(self) -> list[View]:
        return [self.target]

    def emit(self, writer: Writer) -> None:
        c = self.target
        lead = c.shape[:-2]
        m, n = c.shape[-2:]
        k = self.left.shape[-1]
        dtype = c.dtype.name
        a = self.left.broadcast((*lead, m, k))
        views = [a, c]
        if self.right is not None:
            views.append(self.right.broadcast((*lead, k, n)))
        addresses = [writer.address(v, "r") for v in views]

        def body(moved: list[str]) -> None:
            left = f"{moved[0]}, {a.strides[-2]}, {a.strides[-1]}"
            out = f"{moved[1]}, {c.strides[-2]}"
            if self.right is not None:
                b = views[2]
                right = f"{moved[2]}, {b.strides[-2]}, {b.strides[-1]}"
                writer.line(f"call_address(h_{dtype}, {m}, {n}, {k}, {left}, {right}, {out}, 0)")
                return
            right = f"matrix{self.packed}, matrix{self.packed}_row, matrix{self.packed}_col"
            writer.line("if packed:")
            writer.line(f"    call_address(g_{dtype}, {m}, {n}, {k}, {left}, p{self.packed}, {out}, 0)")
            writer.line("else:")
            writer.line(f"    call_address(h_{dtype}, {m}, {n}, {k}, {left}, {right}, {out}, 0)")

        nested(writer, lead, addresses, [v.strides[: len(lead)] for v in views], body)


def grouped(operations: Sequence[Operation]) -> Iterator[tuple[bool, list[Operation]]]:
    """Runs of operations that share a loop over rows (True), and what works on all rows by itself (False)."""
    run: list[Operation] = []
    for operation in operations:
        if operation.alone:
            if run:
                yield True, run
            yield False, [operation]
            run = []
        else:
            run.append(operation)
    if run:
        yield True, run


def walk(operations: Sequence[Operation]) -> Iterator[tuple[Operation, int]]:
    """Every operation, those of inner loops too, and how often it runs in a step."""
    for operation in operations:
        yield operation, 1
        for part, times in walk(operation.parts()):
            yield part, times * operation.repeats()


def emit_all(operations: Sequence[Operation], writer: Writer, rows: bool = True) -> None:
    """The text of operations, with loops over the rows of a thread around what works on one of them."""
    for in_rows, run in grouped(operations):
        if in_rows and rows:
            writer.line("for r in range(r0, r1):")
            writer.indent += 1
        for operation in run:
            operation.emit(writer)
        if in_rows and rows:
            writer.indent -= 1


def combine(kind: str, dtype: np.dtype) -> Expression:
    """The expression that adds one more element to a reduction."""
    from tinygrad_lstm.kernels import build
    from tinygrad_lstm.kernels import expression as e

    rule: Any = {"sum": lambda a, b: a + b, "prod": lambda a, b: a * b, "max": e.maximum, "min": e.minimum}[kind]
    return build(rule, 2)
