"""Loops in native code: lower the body of a plan once, then run it over a batch, shared out among threads.

Each thread runs the whole time loop for its rows; nothing is synchronised inside.  A launch covers at most
some 100 ms of steps, so that a pending Ctrl-C is delivered in between.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.compiler.expand import expand
from tinygrad_lstm.compiler.fuse import FUSED, fuse
from tinygrad_lstm.compiler.generate import FIELDS, generate, roots_of, scratch_bytes
from tinygrad_lstm.compiler.lowering import Lowered, lower_body
from tinygrad_lstm.compiler.narrow import narrow
from tinygrad_lstm.compiler.rows import Mixing, row_values
from tinygrad_lstm.compiler.simplify import simplify
from tinygrad_lstm.compiler.stages import Product, RowProduct, walk
from tinygrad_lstm.compiler.views import Unsupported
from tinygrad_lstm.errors import ArgumentError
from tinygrad_lstm.kernels import codecache, threads
from tinygrad_lstm.kernels.pool import empty
from tinygrad_lstm.program import Program

__all__ = ["NativeLoop", "native_loop", "switched_off", "wanted", "work_of"]

# Loops that do less per call than this many elementary operations are left to NumPy: compiling takes a second.
LEAST_WORK = 2_000
SLICE = 2e9  # floating-point operations of a launch: 100 ms at a tenth of what a thread does at best
_ALIGN = 64


def _mode() -> str:
    return os.environ.get("TINYGRAD_LSTM_COMPILE", "auto")


def work_of(program: Program) -> int:
    """Elementary operations of a step, matrix products counted by the vector."""
    total = 0
    for equation in program.equations:
        size = int(np.prod(program.avals[equation.outputs[0]].shape, dtype=np.int64))
        if equation.primitive is FUSED:
            total += size * len(equation.params["kernel"].expression.nodes)
        elif equation.primitive.name == "matmul":
            total += size * program.aval(equation.operands[0]).shape[-1] // 8
        elif "body" in equation.params:  # a loop in the loop
            total += equation.params["length"] * work_of(equation.params["body"])
        else:
            total += size
    return total


def wanted(work: int) -> bool:
    """Whether a loop of so much work is to be compiled, or what ``TINYGRAD_LSTM_COMPILE`` (always, never) says.

    A static rule: the same loop takes the same path at every call, so its numbers do not change in a run.
    """
    mode = _mode()
    if mode == "auto":
        return work >= LEAST_WORK and os.environ.get("TINYGRAD_LSTM_NATIVE", "1") != "0"
    if mode not in ("always", "never"):
        raise ArgumentError(
            f"the environment variable TINYGRAD_LSTM_COMPILE is {mode!r}; expected auto, always or never"
        )
    return mode == "always"


def switched_off() -> bool:
    """Whether the environment forbids native loops."""
    return _mode() == "never" or (_mode() == "auto" and os.environ.get("TINYGRAD_LSTM_NATIVE", "1") == "0")


class NativeLoop:
    """A loop body of certain shapes in native code.  The code itself knows neither the number of steps nor (with
    ``split``) the number of rows."""

    def __init__(
        self, lowered: Lowered, split: bool, program: Program, mixing: Mixing | None, source: str, row_count: int
    ) -> None:  # fmt: skip
        self.lowered, self.split, self.program, self.mixing, self.source = lowered, split, program, mixing, source
        self.roots = roots_of(lowered)
        self.place = {name: len(FIELDS) + k for k, name in enumerate(self.roots)}  # in the table
        self._entry: tuple[int, int] | None = None
        self._free: list[_Workspace] = []
        self._lock = threading.Lock()
        self.rows = row_count  # of the batch; 1 where rows mix
        self.flops = sum(times * _flops(op) for op, times in walk(lowered.operations))

    def entry(self) -> tuple[int, int]:
        """Addresses of the loop and of what packs matrices for it; compiled at the first call."""
        if self._entry is None:
            with self._lock:
                loop = codecache.load(self.source, "loop", stem="loop")
                prepare = codecache.load(self.source, "prepare", stem="loop")
                self._entry = (loop.address, prepare.address)  # type: ignore[attr-defined]
        return self._entry

    def run(
        self, carry: Sequence[np.ndarray], sequence: Sequence[np.ndarray], invariant: Sequence[np.ndarray],
        stacked: Sequence[Any], sums: Sequence[Any], steps: int, reverse: bool,
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]] | None:  # fmt: skip
        """(final carry, stacks, sums); None when native code met an index out of range (let NumPy report it)."""
        low, place = self.lowered, self.place
        loop, prepare = self.entry()
        try:
            space = self._free.pop()
        except IndexError:
            space = _Workspace(self)
        parts, chunk = _shares(self.rows)
        table = space.table_for(self, chunk, parts)
        held: list[np.ndarray] = []  # arrays that only the table names

        def put(name: str, array: np.ndarray) -> None:
            at = place.get(name)
            if at is not None:
                table[at] = id(array)
                held.append(array)

        carries = []
        for k, value in enumerate(carry):
            if low.kept[k]:
                buffer = empty((steps + 1, *value.shape), value.dtype)
                buffer[steps if reverse else 0] = value
            else:
                buffer = space.carry(k, value)
                buffer[0] = value
            carries.append(buffer)
            put(f"i{k}", buffer)
        stacks: list[Any] = []
        for k, (kind, index) in enumerate(low.stacked):
            if kind == "y":
                buffer = empty((steps, *stacked[k].shape), stacked[k].dtype)
                put(f"y{k}", buffer)
                stacks.append(buffer)
            else:  # the carry before or after every step: rows of one buffer
                shifted = (kind == "o") != reverse
                stacks.append(carries[index][shifted : steps + shifted])
        totals = [np.zeros(aval.shape, aval.dtype) for aval in sums]
        for k, total in enumerate(totals):
            put(f"s{k}", total)
        for k, value in enumerate(sequence):
            put(
                f"x{k}", value if value.flags.c_contiguous else _plain(value, 2 if self.split and value.ndim > 1 else 1)
            )
        for k, value in enumerate(invariant):
            if f"v{k}" in place:
                put(f"v{k}", _plain(value, 0))
        base = len(FIELDS) + len(self.roots) + len(low.packs)
        for k, pack in enumerate(low.packs):
            array = invariant[pack.invariant]
            if not pack.whole(array.shape):
                array = _plain(array, 0)
            table[base + k] = id(array)
            held.append(array)
        table[0], table[1], table[4], table[5] = self.rows, chunk, steps, reverse
        address = space.address
        if low.packs:
            threads.run(prepare, address, 1)
        status = start = 0
        step = max(1, int(SLICE / max(self.flops * self.rows, 1)))
        while start < steps and not status:
            stop = min(steps, start + step)
            table[2], table[3] = start, stop
            status = threads.run(loop, address, parts)
            start = stop
        final = []
        for k, buffer in enumerate(carries):
            final.append(buffer[(0 if reverse else steps) if low.kept[k] else steps & 1].copy())
        self._free.append(space)
        return None if status else (final, stacks, totals)


def _plain(array: np.ndarray, lead: int) -> np.ndarray:
    """With everything behind the first ``lead`` axes contiguous."""
    if array.flags.c_contiguous:
        return array
    step = array.itemsize
    for n, stride in zip(reversed(array.shape[lead:]), reversed(array.strides[lead:]), strict=True):
        if n != 1 and stride != step:
            return np.ascontiguousarray(array)
        step *= n
    return array


def _shares(rows: int) -> tuple[int, int]:
    """Parts and rows of a part: whole tiles of the matrix product where there are enough rows."""
    count = threads.get_num_threads()
    if count == 1 or rows < 2 * count:
        return 1, max(rows, 1)
    chunk = -(-rows // count)
    return -(-rows // chunk), chunk


def _flops(operation: Any) -> int:
    if isinstance(operation, Product):
        return 2 * operation.pack.shape[0] * operation.pack.shape[1]
    if isinstance(operation, RowProduct):
        return 2 * operation.target.size * operation.left.shape[-1]
    return 0 if operation.parts() else 8 * sum(view.size for view in operation.writes())


class _Workspace:
    """Scratch, packed matrices and carries of one running call; used again by the next."""

    def __init__(self, loop: NativeLoop) -> None:
        low = loop.lowered
        self.table = np.zeros(len(FIELDS) + len(loop.roots) + 2 * len(low.packs), np.int64)
        self.address = self.table.ctypes.data
        self.carries: dict[int, np.ndarray] = {}
        self.scratch: np.ndarray | None = None
        self.shape = (0, 0)
        self._functions(loop)
        total = 0
        offsets = []
        if low.packs:
            from tinygrad_lstm.kernels.gemm import packed_bytes

            for pack in low.packs:
                offsets.append(total)
                total += -(-packed_bytes(*pack.shape, pack.dtype) // 4096) * 4096 + _ALIGN
        self.packs = np.empty(total + 4096, np.uint8)
        start = -(-self.packs.ctypes.data // 4096) * 4096
        base = len(FIELDS) + len(loop.roots)
        for k, offset in enumerate(offsets):
            self.table[base + k] = start + offset

    def _functions(self, loop: NativeLoop) -> None:
        """Addresses of the products of the dtypes that occur."""
        low = loop.lowered
        products = [op.target for op, _ in walk(low.operations) if isinstance(op, (Product, RowProduct))]
        for dtype in sorted({view.dtype.name for view in products}):
            from tinygrad_lstm.kernels.gemm import functions

            found = functions(dtype)
            self.table[FIELDS.index(f"g_{dtype}")] = found.gemm_packed
            self.table[FIELDS.index(f"h_{dtype}")] = found.gemm_small
            self.table[FIELDS.index(f"pack_{dtype}")] = found.pack

    def table_for(self, loop: NativeLoop, chunk: int, parts: int) -> np.ndarray:
        """The table, with scratch for so many parts of so many rows."""
        if self.shape != (chunk, parts):
            size = scratch_bytes(loop.lowered, chunk)
            self.scratch = np.empty(size * parts + 4096, np.uint8)
            self.table[FIELDS.index("scratch")] = -(-self.scratch.ctypes.data // 4096) * 4096
            self.table[FIELDS.index("scratch_size")] = size
            self.shape = (chunk, parts)
        return self.table

    def carry(self, k: int, like: np.ndarray) -> np.ndarray:
        """Two rows for a carry that is not kept."""
        found = self.carries.get(k)
        if found is None or found.shape[1:] != like.shape:
            found = self.carries[k] = np.empty((2, *like.shape), like.dtype)
        return found


# ---------------------------------------------------------------------------- found again by content

_known: OrderedDict[Any, Any] = OrderedDict()
_MOST = 256
_lock = threading.Lock()


def native_loop(program: Program, n_carry: int, n_stacked: int) -> NativeLoop | Unsupported:
    """The compiled form of a loop body (carry..., x...; captures...) -> (carry..., stacked..., sums...), or why not."""
    key = (program.key, n_carry, n_stacked)
    with _lock:
        found = _known.get(key)
        if found is not None:
            _known.move_to_end(key)
            return found
    made = _make(program, n_carry, n_stacked)
    with _lock:
        made = _known.setdefault(key, made)
        while len(_known) > _MOST:
            _known.popitem(last=False)
    return made


def _make(program: Program, n_carry: int, n_stacked: int) -> NativeLoop | Unsupported:
    ready = simplify(narrow(expand(program)))
    rows = row_values(ready, n_carry)
    fused = fuse(ready, at_least=1, reductions=True)
    first: Unsupported | None = None
    for split in (True, False) if rows.mixing is None else (False,):
        try:
            lowered = lower_body(fused, n_carry, n_stacked, split)
        except Unsupported as reason:
            first = first or reason
            continue
        source = generate(lowered, split, "")
        return NativeLoop(lowered, split, fused, rows.mixing, source, rows.batch if split else 1)
    assert first is not None
    return first
