"""Loops in native code: lower the body of a plan once, then run it over a batch, shared out among threads.

Each thread runs the whole time loop for its rows; nothing is synchronised inside.  A launch covers at most
some 100 ms of steps, so that a pending Ctrl-C is delivered in between.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np

from tinygrad_lstm.compiler.expand import expand
from tinygrad_lstm.compiler.fuse import FUSED, fuse
from tinygrad_lstm.compiler.generate import FIELDS, any_order, generate, in_order, operands_of, roots_of, scratch_bytes
from tinygrad_lstm.compiler.lowering import Lowered, lower_body
from tinygrad_lstm.compiler.narrow import narrow
from tinygrad_lstm.compiler.rows import Mixing, row_values
from tinygrad_lstm.compiler.simplify import simplify
from tinygrad_lstm.compiler.stages import Product, RowProduct, walk
from tinygrad_lstm.compiler.turn import turned
from tinygrad_lstm.compiler.views import Unsupported
from tinygrad_lstm.errors import ArgumentError
from tinygrad_lstm.kernels import codecache, threads
from tinygrad_lstm.kernels.locks import Lock
from tinygrad_lstm.kernels.pool import ALIASED, SMALLEST, empty, spread_rows
from tinygrad_lstm.program import Program

__all__ = ["FEW", "Frame", "NativeLoop", "Workspace", "native_loop", "shares", "switched_off", "wanted", "work_of"]

# Loops that do less per call than this many elementary operations are left to NumPy: compiling takes a second.
LEAST_WORK = 2_000
FEW = 4  # rows times steps: so few are multiplied sooner than a matrix is packed
ALONE = 2e6  # floating-point operations of a loop from which on a thread may have one row
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


class Entry(NamedTuple):
    """Addresses of a compiled loop and of what packs matrices for it, and what calls them (see kernels/launch.py)."""

    loop: int
    prepare: int
    plain: Callable[..., bool]
    advance: Callable[..., int]


class NativeLoop:
    """A loop body of certain shapes in native code.  The code itself knows neither the number of steps nor (with
    ``split``) the number of rows."""

    def __init__(
        self, lowered: Lowered, split: bool, program: Program, mixing: Mixing | None, source: str, row_count: int,
        n_stacked: int,
    ) -> None:  # fmt: skip
        self.lowered, self.split, self.program, self.mixing, self.source = lowered, split, program, mixing, source
        self.roots = roots_of(lowered)
        self.rows = row_count  # of the batch; 1 where rows mix
        self.flops = sum(times * _flops(op) for op, times in walk(lowered.operations))
        self.n_carry, self.n_stacked = len(lowered.kept), n_stacked
        self._entry: Entry | None = None
        self.spaces: list[Workspace] = []  # that no call uses
        self._lock = Lock()

    def entry(self) -> Entry:
        """Compiled at the first call."""
        if self._entry is None:
            with self._lock:
                program = codecache.load(self.source, stem="loop")
                self._entry = Entry(program.address("loop"), program.address("prepare"), *threads.loop_functions())
        return self._entry

    def run(self, frame: Frame, space: Workspace, operands: tuple[np.ndarray, ...], parts: int) -> int:
        """All steps on these operands, in so many parts; not 0 where an index was out of range."""
        advance, pack, loop = frame.launch or frame.find_launch()
        steps, address, control = frame.steps, id(operands), 0
        if parts > 1 and (team := threads.team_for(parts)) is not None:
            control = team.control
        if frame.work <= SLICE:
            return advance(control, pack, loop, space.address, address, 0, steps, parts)
        status = start = 0
        piece = max(1, int(steps * SLICE / frame.work))
        while start < steps and not status:
            stop = min(steps, start + piece)
            status = advance(control, pack, loop, space.address, address, start, stop, parts)
            start = stop
        return status

    def workspace(self) -> Workspace:
        """For one running call; calls put those that they are done with into :attr:`spaces`."""
        return Workspace(self)


class Frame:
    """What the calls of a loop over so many steps in one direction have in common."""

    def __init__(self, loop: NativeLoop, steps: int, reverse: bool, private: Collection[int] = ()) -> None:
        """``private``: stacks that only programs of ours read."""
        low, program = loop.lowered, loop.program
        n_carry, n_stacked = loop.n_carry, loop.n_stacked
        self.loop, self.steps, self.lead = loop, steps, 2 if loop.split else 1
        carries = [program.avals[slot] for slot in program.inputs[:n_carry]]
        outputs = program.output_avals()
        self.makers: list[tuple[Callable[..., np.ndarray], tuple[int, ...], np.dtype]] = []
        places: dict[str, int] = {}  # in (carry, sequence, invariant, buffers, turns)
        n_x, n_v = len(program.inputs) - n_carry, len(program.captures)
        for kind, count in (("c", n_carry), ("x", n_x), ("v", n_v)):
            places.update({f"{kind}{k}": len(places) + k for k in range(count)})

        def buffer(name: str, aval: Any, lead: tuple[int, ...] = (), zero: bool = False, padded: bool = False) -> int:
            shape, dtype = (*lead, *aval.shape), np.dtype(aval.dtype)
            large = dtype.itemsize * int(np.prod(shape, dtype=np.int64)) >= SMALLEST
            spread = large and padded and shape[-1] * dtype.itemsize % ALIASED == 0
            make = np.zeros if zero else spread_rows if spread else empty if large else np.empty
            self.makers.append((make, shape, dtype))
            places[name] = n_carry + n_x + n_v + len(self.makers) - 1
            return len(self.makers) - 1

        at = {k: buffer(f"i{k}", aval, (steps + 1,)) for k, aval in enumerate(carries) if low.kept[k]}
        # Per stack: which buffer, and which of its rows (None for all).
        self.stacks: list[tuple[int, slice | None]] = []
        for k, (kind, index) in enumerate(low.stacked):
            if kind == "y":
                # Native code takes a row of several axes (all of the batch, where rows mix) for one piece of memory.
                padded = k in private and len(low.row_shapes[f"y{k}"][0]) == 1
                self.stacks.append((buffer(f"y{k}", outputs[n_carry + k], (steps,), padded=padded), None))
            else:  # the carry before or after every step: rows of one buffer
                shifted = (kind == "o") != reverse
                self.stacks.append((at[index], slice(shifted, steps + shifted)))
        self.n_buffers = len(self.makers)
        for k, aval in enumerate(carries):
            buffer(f"f{k}", aval)
        for k, aval in enumerate(outputs[n_carry + n_stacked :]):
            buffer(f"s{k}", aval, zero=True)
        self.turns = [aval for k, aval in enumerate(carries) if not low.kept[k]]
        start = n_carry + n_x + n_v + len(self.makers)
        for n, k in enumerate(k for k in range(n_carry) if not low.kept[k]):
            places[f"i{k}"] = start + n
        places.update({f"q{k}": places[f"v{pack.invariant}"] for k, pack in enumerate(low.packs)})
        # Which of (carry, sequence, invariant, buffers, turns) native code reads, and how many must be in C order.
        self.order = [places[name] for name in operands_of(low)]
        self.checked = in_order(low)
        self.packed = steps * loop.rows > FEW
        self.packs = bool(low.packs) and self.packed
        self.work = steps * loop.flops * loop.rows
        # A row alone reads all matrices, as two do together: another thread pays where there is much to do.
        self.least = 1 if self.work >= ALONE else 2
        self.launch: tuple[Any, int, int] | None = None

    def find_launch(self) -> tuple[Any, int, int]:
        """What runs the loop, and the addresses of what packs its matrices (0: nothing to pack) and of itself."""
        entry = self.loop.entry()
        self.launch = found = entry.advance, entry.prepare if self.packs else 0, entry.loop
        return found

    def tidied(self, carry: Any, sequence: Any, invariant: Any, buffers: Any, space: Workspace) -> tuple[Any, ...]:
        """The operands as arrays whose rows are in C order."""
        loose = any_order(self.loop.lowered)
        found = [_plain(np.asarray(a), self.lead - 1) for a in carry]
        found += [_plain(np.asarray(a), min(self.lead, np.ndim(a))) for a in sequence]
        found += [np.asarray(a) if k in loose else _plain(np.asarray(a), 0) for k, a in enumerate(invariant)]
        found += [*buffers, *space.turns]
        return tuple([found[place] for place in self.order])


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


def shares(rows: int, least: int = 2) -> tuple[int, int]:
    """Parts and rows of a part (``least`` at least): whole tiles of the matrix product where there are enough rows."""
    if rows < 2:
        return 1, 1
    count = threads.count()
    if count == 1 or rows < least * count:
        return 1, rows
    chunk = -(-rows // count)
    return -(-rows // chunk), chunk


def _flops(operation: Any) -> int:
    if isinstance(operation, Product):
        return 2 * operation.pack.shape[0] * operation.pack.shape[1]
    if isinstance(operation, RowProduct):
        return 2 * operation.target.size * operation.left.shape[-1]
    return 0 if operation.parts() else 8 * sum(view.size for view in operation.writes())


class Workspace:
    """Scratch, packed matrices and carries of one running call; used again by the next."""

    def __init__(self, loop: NativeLoop) -> None:
        low = loop.lowered
        self.table = np.zeros(len(FIELDS) + len(low.packs), np.int64)
        self.address = self.table.ctypes.data
        self.stamp: Any = None  # what the table was written for
        self.shape = (0, 0)
        self.scratch: np.ndarray | None = None
        self.packs: np.ndarray | None = None
        self.turns: list[np.ndarray] = []  # two rows for every carry that is not kept
        self._functions(loop)

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

    def prepare_for(self, frame: Frame, stamp: tuple[int, bool, int, int]) -> None:
        """Make room for so many steps of so many parts."""
        loop, (steps, reverse, chunk, parts) = frame.loop, stamp
        if self.shape != (chunk, parts):
            size = scratch_bytes(loop.lowered, chunk)
            self.scratch = np.empty(size * parts + 4096, np.uint8)
            self.table[FIELDS.index("scratch")] = -(-self.scratch.ctypes.data // 4096) * 4096
            self.table[FIELDS.index("scratch_size")] = size
            self.turns = [np.empty((2, *aval.shape), aval.dtype) for aval in frame.turns]
            self.shape = (chunk, parts)
        if frame.packs and self.packs is None:
            self._room_for_packs(loop.lowered)
        for field, value in (("rows", loop.rows), ("chunk", chunk), ("steps", steps), ("reverse", reverse)):
            self.table[FIELDS.index(field)] = value
        self.table[FIELDS.index("packed")] = frame.packed
        self.stamp = stamp

    def _room_for_packs(self, low: Lowered) -> None:
        from tinygrad_lstm.kernels.gemm import packed_bytes

        total = 0
        for k, pack in enumerate(low.packs):
            self.table[len(FIELDS) + k] = total
            total += -(-packed_bytes(*pack.shape, pack.dtype) // 4096) * 4096 + _ALIGN
        self.packs = np.empty(total + 4096, np.uint8)
        self.table[len(FIELDS) :] += -(-self.packs.ctypes.data // 4096) * 4096


# ---------------------------------------------------------------------------- found again by content

_known: OrderedDict[Any, Any] = OrderedDict()
_MOST = 256
_lock = Lock()


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
    ready = turned(simplify(narrow(expand(program))))
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
        return NativeLoop(lowered, split, fused, rows.mixing, source, rows.batch if split else 1, n_stacked)
    assert first is not None
    return first
