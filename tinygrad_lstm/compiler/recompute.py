"""Which values of the forward body are kept for the backward body, and which are computed again.

Every value is either kept, which moves its bytes through memory twice, or computed again from others that are
there, which costs arithmetic.  The cheapest choice is a minimum cut of the graph of the forward body between what
is there anyway and what the backward body reads::

    source --(computing v again)--> v --(keeping v)--> v' --> readers of v, or the sink where backward reads v

An edge from the source that is cut says: v is computed again; one from v to v': v is kept.  The formulation with
a minimum cut is that of Horace He's partitioner for PyTorch (functorch, 2022), here with a price on arithmetic.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from typing import Any

import numpy as np

from tinygrad_lstm.compiler.adjoint import Adjoint, is_float
from tinygrad_lstm.compiler.simplify import dead_code, in_order
from tinygrad_lstm.primitive import Aval
from tinygrad_lstm.program import Equation, Program

__all__ = ["FLOPS_PER_BYTE", "SCARCE", "kept_bytes", "save_or_recompute"]

# Operations on float32 in the time in which one byte is moved between a core and its outer cache or memory, and
# what an element takes in such operations: measured on AVX2, fused loops in the inner cache against a copy.
FLOPS_PER_BYTE = 3.0
SCARCE = 2.0  # how much more a byte costs within a memory budget, where it shortens the segments of a loop
CHEAP, ROOT, TRANSCENDENTAL, LIBRARY = 1.0, 5.0, 24.0, 300.0
_FLOPS = {
    **dict.fromkeys(("divide", "sqrt"), ROOT),
    **dict.fromkeys(
        (
            "add", "subtract", "multiply", "negative", "square", "abs", "sign", "maximum", "minimum", "relu",
            "leaky_relu", "clip", "where", "equal", "not_equal", "less", "less_equal", "greater", "greater_equal",
            "isfinite", "logical_and", "logical_or", "logical_not", "astype",
        ),
        CHEAP,
    ),
    # With kernels of their own in float32; all others, and float64, are calls of a library element by element.
    **dict.fromkeys(("exp", "tanh", "sigmoid", "log", "silu", "elu"), TRANSCENDENTAL),
    # Views: the same memory.
    **dict.fromkeys(("reshape", "transpose", "broadcast_to", "alias"), 0.0),
    **dict.fromkeys(("stop_gradient", "stop_nan", "split", "getitem"), 0.0),
}  # fmt: skip
_UNIT = 64  # capacities are integers: 64 to the byte


def save_or_recompute(
    pair: Adjoint,
    n_carry: int,
    n_ys: int,
    *,
    kept: Collection[int] | None = None,
    flops_per_byte: float = FLOPS_PER_BYTE,
) -> Adjoint:
    """An adjoint that keeps what costs least: the backward body computes the rest again.

    *Keeping* a value costs its bytes twice (written forward, read backward); once where it is stored anyway: as a
    y, as an x, or as a carry of which the other end (the previous or the next step's) is stored.  *Computing
    again* costs ``operations / flops_per_byte`` bytes, with 1 operation an element for arithmetic, 5 for division
    and roots, 24 for exp, tanh and their like, 300 for functions that are not vectorised (in float64, all of
    them), twice that for elements of 8 bytes, and none for views.  What depends on captures alone is free.

    Only elementwise primitives and views are computed again, never a product, a reduction, a gather or a
    primitive of a user.  The operands of ``equal`` are kept: a maximum finds its place again by comparing exactly.

    The model is that of a fused loop, where a value that is computed again never sees memory.  Run op by op on
    NumPy, computing again is slower than keeping.

    Parameters
    ----------
    pair : Adjoint
        Of a loop body.
    n_carry, n_ys : int
        How many of the body's outputs are carries and ys.
    kept : slots, optional
        The residuals that a forward pass has kept already: no others are used.
    flops_per_byte : float
        How fast arithmetic is.  0 computes nothing again but views; infinity gives the smallest residuals.

    Returns
    -------
    Adjoint
        With other residuals and reads, and the same results bit for bit where NumPy runs both.

    Raises
    ------
    ValueError
        The backward body cannot be computed from ``kept``.

    Examples
    --------
    >>> import numpy as np
    >>> from tinygrad_lstm import ops
    >>> from tinygrad_lstm.compiler.adjoint import adjoint
    >>> from tinygrad_lstm.primitive import Aval
    >>> from tinygrad_lstm.trace import trace
    >>> row = Aval((8, 32), np.dtype("f4"))
    >>> def body(c, x):
    ...     z = c * 0.5 + x
    ...     return [ops.square(z) / (1.0 + ops.abs(z))]
    >>> pair = adjoint(trace(body, [row, row], flat=True).program, 1, 0, (), (True,))
    >>> fewer = save_or_recompute(pair, 1, 0)
    >>> len(pair.residuals), len(fewer.residuals)  # z is left
    (3, 1)
    """
    graph = _Graph(pair, n_carry, n_ys, kept, flops_per_byte)
    saved = graph.saved()
    forward, backward = pair.forward, pair.backward
    xs = forward.inputs[n_carry:]
    known = {*saved, *backward.captures, *backward.definitions()}
    # Equations whose results the backward body reads, back to what is saved.
    made = forward.definitions()
    again: set[int] = set()
    pending = [slot for slot in (*pair.residuals, *(xs[k] for k in pair.reads)) if slot not in known]
    while pending:
        slot = pending.pop()
        if slot in known:
            continue
        equation = made[slot]
        again.add(id(equation))
        known.update(equation.outputs)
        saved -= set(equation.outputs)  # a split that is done again makes all of its pieces
        pending.extend(s for s in equation.reads() if s not in known)
    residuals = tuple(sorted(slot for slot in saved if slot not in xs))
    reads = tuple(k for k, slot in enumerate(xs) if slot in saved)
    head, tail = forward.outputs[: n_carry + n_ys], forward.outputs[n_carry + n_ys + len(pair.residuals) :]
    n_seeds = sum(is_float(forward.avals[slot]) for slot in forward.inputs[:n_carry])
    y_seeds = backward.inputs[n_seeds + len(pair.residuals) + len(pair.reads) :]
    repeated = [equation for equation in forward.equations if id(equation) in again]
    # What is computed again may read what the backward body had of the captures, and be read by its views.
    equations = in_order((*repeated, *backward.equations))
    assert equations is not None
    return Adjoint(
        dead_code(forward.replaced(outputs=(*head, *residuals, *tail))),
        backward.replaced(
            inputs=(*backward.inputs[:n_seeds], *residuals, *(xs[k] for k in reads), *y_seeds),
            equations=equations,
        ),
        residuals,
        reads,
    )


def kept_bytes(pair: Adjoint, n_carry: int, n_ys: int) -> int:
    """Bytes that are stored for the backward pass at every step, beyond xs, ys and the carry."""
    stored = _stored(pair, n_carry, n_ys)
    return sum(_bytes(pair.forward.avals[slot]) for slot in pair.residuals if slot not in stored)


def _bytes(aval: Aval) -> int:
    return math.prod(aval.shape) * np.dtype(aval.dtype).itemsize


def _stored(pair: Adjoint, n_carry: int, n_ys: int) -> set[int]:
    """Values of the forward body that are stored anyway."""
    forward = pair.forward
    stored = {*forward.inputs[n_carry:], *(o for o in forward.outputs[n_carry : n_carry + n_ys] if o.__class__ is int)}
    for before, after in zip(forward.inputs[:n_carry], forward.outputs[:n_carry], strict=True):
        # One of the two, shifted by a step, is the other one.
        if after in stored:
            stored.add(before)
        elif before in pair.residuals and after.__class__ is int:
            stored.add(after)
    return stored


class _Graph:
    """Capacities of the cut."""

    def __init__(
        self, pair: Adjoint, n_carry: int, n_ys: int, kept: Collection[int] | None, flops_per_byte: float
    ) -> None:
        self.flow = _Flow()
        self.flow.edge("source", "sink", 0)
        forward = pair.forward
        xs = forward.inputs[n_carry:]
        needed = {*pair.residuals, *(xs[k] for k in pair.reads)}
        stored = _stored(pair, n_carry, n_ys)
        invariant = set(forward.captures)
        compared = {s for p in (forward, pair.backward) for e in p.equations for s in e.reads() if _compares(e)}
        self.slots = list(forward.inputs)
        for slot in forward.inputs:
            self.flow.edge("source", slot, math.inf)
        for equation in forward.equations:
            if all(slot in invariant for slot in equation.reads()):
                invariant.update(equation.outputs)
                continue
            for slot in equation.outputs:
                self.slots.append(slot)
                price = math.inf if slot in compared else _price(forward, equation, flops_per_byte)
                self.flow.edge("source", slot, price)
                for read in equation.reads():
                    if read not in invariant:
                        self.flow.edge((read, "kept"), slot, math.inf)
        for slot in self.slots:
            room = _UNIT * _bytes(forward.avals[slot]) * (1 if slot in stored else 2)
            if kept is not None and slot not in xs:
                room = 0 if slot in kept else math.inf  # type: ignore[assignment]
            self.flow.edge(slot, (slot, "kept"), room)
            if slot in needed:
                self.flow.edge((slot, "kept"), "sink", math.inf)

    def saved(self) -> set[int]:
        """The slots that the cheapest cut keeps; of several such cuts the one that computes least again."""
        behind = self.flow.cut("source", "sink")
        if behind is None:
            raise ValueError("what the backward body reads cannot be computed from the residuals that were kept")
        return {slot for slot in self.slots if slot not in behind and (slot, "kept") in behind}


def _compares(equation: Equation) -> bool:
    return equation.primitive.name in ("equal", "not_equal")


def _price(program: Program, equation: Equation, flops_per_byte: float) -> float:
    """What computing an equation again costs, in units of the cut; infinite where it must not be."""
    primitive = equation.primitive
    view = _FLOPS.get(primitive.name) == 0.0 and len(equation.operands) == 1
    if not primitive.explains or not (primitive.is_elementwise or primitive.name == "astype" or view):
        return math.inf
    if view:
        return 0
    if not flops_per_byte:
        return math.inf
    dtypes = [np.dtype(program.avals[slot].dtype) for slot in (*equation.reads(), *equation.outputs)]
    width = max(dtype.itemsize for dtype in dtypes)
    flops = _FLOPS.get(primitive.name, LIBRARY)
    if flops == TRANSCENDENTAL and width > 4:
        flops = LIBRARY
    size = math.prod(program.avals[equation.outputs[0]].shape)
    return math.ceil(_UNIT * flops * size * width / 4 / flops_per_byte)


class _Flow:
    """A network with integer capacities, and its minimum cut by the shortest augmenting paths (Edmonds & Karp 1972)."""

    def __init__(self) -> None:
        self.room: dict[Any, dict[Any, float]] = {}

    def edge(self, a: Any, b: Any, room: float) -> None:
        """Add an edge, or more room on one."""
        self.room.setdefault(a, {}).setdefault(b, 0)
        self.room.setdefault(b, {}).setdefault(a, 0)
        self.room[a][b] += room

    def cut(self, source: Any, sink: Any) -> set[Any] | None:
        """The nodes on the sink's side of the minimum cut, as few as possible; None where no cut is finite."""
        while True:
            came: dict[Any, Any] = {source: source}
            pending = deque([source])
            while pending and sink not in came:
                node = pending.popleft()
                for other, room in self.room[node].items():
                    if room > 0 and other not in came:
                        came[other] = node
                        pending.append(other)
            if sink not in came:
                return self._reaching(sink)
            path = [sink]
            while path[-1] != source:
                path.append(came[path[-1]])
            steps = list(zip(path[1:], path, strict=False))
            least = min(self.room[a][b] for a, b in steps)
            if math.isinf(least):
                return None
            for a, b in steps:
                self.room[a][b] -= least
                self.room[b][a] += least

    def _reaching(self, sink: Any) -> set[Any]:
        """The nodes from which something could still flow to the sink."""
        found = {sink}
        pending = [sink]
        while pending:
            node = pending.pop()
            for other in self.room[node]:
                if other not in found and self.room[other][node] > 0:
                    found.add(other)
                    pending.append(other)
        return found
