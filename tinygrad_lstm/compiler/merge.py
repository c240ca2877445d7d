"""Fewer and larger matrix products.

Four gates typed as four products of one state are one product with the four matrices side by side::

    h @ U_i, h @ U_f, h @ U_g, h @ U_o         split(h @ concatenate(U_i, U_f, U_g, U_o))
    d_i @ U_i.T + d_f @ U_f.T + ...            concatenate(d_i, d_f, ...) @ concatenate(U_i.T, U_f.T, ...)
    h.T @ d_i, h.T @ d_f, ...                  split(h.T @ concatenate(d_i, d_f, ...))

The same holds with left and right exchanged (``U_i @ h`` for states that are columns).  The matrices that are
put side by side depend on captures alone, so this is done once for all steps.  Nothing here knows what a gate is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.compiler.simplify import in_order, simplify
from tinygrad_lstm.primitive import REGISTRY, Aval
from tinygrad_lstm.program import Equation, Program

__all__ = ["merge_matmuls"]

# A product whose inner axis is longer than this many times its outer one is not worth a copy of its left operand.
LONG = 4


def merge_matmuls(program: Program, invariant: Collection[int] | None = None, n_carry: int = 0) -> Program:
    """Merge the matrix products of a loop body that share an operand, or that are summed.

    A merged product computes the same dot products, and a merged sum the same sum in another order: the results
    are equal up to rounding.  Products are merged only where they run in the same place, so that nothing is
    drawn into the loop which could have left it: what does not depend on the carry, what the next carry needs,
    and what it does not need stay apart.  Applying the pass twice gives the same program as once.

    Parameters
    ----------
    program : Program
        A loop body ``(carry..., x...; captures...) -> (carry..., y..., s...)``.
    invariant : slots, optional
        What does not change from step to step; by default the captures.  What is computed from these alone
        is invariant too.
    n_carry : int
        How many inputs, and how many outputs, are the carry.  0 for a program that is no loop body.

    Returns
    -------
    Program
        With the same inputs, captures, outputs and labels.

    Examples
    --------
    >>> import numpy as np
    >>> from tinygrad_lstm.primitive import Aval
    >>> from tinygrad_lstm.trace import trace
    >>> h, u = Aval((2, 3), np.dtype("f4")), Aval((3, 3), np.dtype("f4"))
    >>> body = trace(lambda h, u, v: [h @ u, h @ v], [h, u, u], flat=True).program
    >>> body = body.replaced(inputs=body.inputs[:1], captures=body.inputs[1:])
    >>> print(merge_matmuls(body))
    program(%0 float32[2,3]) captures(%1 float32[3,3], %2 float32[3,3])
      %5 float32[3,6] = concatenate(%1, %2, axis=-1)
      %6 float32[2,6] = matmul(%0, %5)
      %3 float32[2,3], %4 float32[2,3] = split(%6, sizes=(3, 3), axis=-1)
      return %3, %4
    """
    fixed = program.captures if invariant is None else invariant
    # Sums first: products of one operand that belong to different sums then still share an operand.
    for step in (_merge_sums, _merge_shared, _merge_pieces):
        merger = _Merger(simplify(program), fixed, n_carry)
        step(merger)
        program = merger.program()
    return simplify(program)


class _Merger:
    """A program while it is being rewritten: slots that are added, and equations that are replaced."""

    def __init__(self, program: Program, invariant: Collection[int], n_carry: int) -> None:
        self.original = program
        self.avals = list(program.avals)
        self.replaced: dict[int, list[Equation]] = {}  # by position: what stands there instead
        self.positions = {id(equation): k for k, equation in enumerate(program.equations)}
        self.made = program.definitions()
        self.invariant = _closure(program, invariant)
        self.place = _places(program, n_carry)
        self.users = program.users()

    def is_replaced(self, equation: Equation) -> bool:
        """Whether something else stands in the place of an equation."""
        return self.positions[id(equation)] in self.replaced

    def products(self) -> list[Equation]:
        """Products of two slots that have not been replaced."""
        return [
            e
            for e in self.original.equations
            if e.primitive.name == "matmul" and len(e.reads()) == 2 and not self.is_replaced(e)
        ]

    def bind(self, name: str, operands: Sequence[Any], like: Equation, **params: Any) -> tuple[Equation, int]:
        """A new equation with one output."""
        primitive = REGISTRY[name]
        known = [self.avals[o] if o.__class__ is int else o.value for o in operands]
        self.avals.append(primitive.abstract(known, params))
        slot = len(self.avals) - 1
        return Equation(primitive, tuple(operands), params, (slot,), like.source), slot

    def joined(self, pieces: Sequence[int], axis: int, like: Equation) -> tuple[list[Equation], int]:
        """``concatenate(pieces)``."""
        equation, slot = self.bind("concatenate", pieces, like, axis=axis)
        return [equation], slot

    def parted(self, whole: int, outputs: Sequence[int], axis: int, like: Equation) -> Equation:
        """``outputs = split(whole)``: the old slots, which their users go on reading."""
        sizes = tuple(self.avals[slot].shape[axis] for slot in outputs)
        return Equation(REGISTRY["split"], (whole,), {"sizes": sizes, "axis": axis}, tuple(outputs), like.source)

    def replace(self, old: Iterable[Equation], new: list[Equation]) -> None:
        """Put ``new`` in the place of ``old``."""
        for equation in old:
            self.replaced[self.positions[id(equation)]] = []
        self.replaced[min(self.positions[id(equation)] for equation in old)] = new

    def program(self) -> Program:
        """The rewritten program."""
        return self.original.replaced(avals=self.avals, equations=self.ordered()) if self.replaced else self.original

    def ordered(self) -> tuple[Equation, ...] | None:
        """The equations in an order in which they can run; None where some would depend on themselves."""
        equations: list[Equation] = []
        for k, equation in enumerate(self.original.equations):
            equations.extend(self.replaced.get(k, (equation,)))
        return in_order(equations)


def _closure(program: Program, invariant: Collection[int]) -> set[int]:
    """The invariant slots and all that is computed from them alone."""
    found = set(invariant)
    for equation in program.equations:
        if all(slot in found for slot in equation.reads()):
            found.update(equation.outputs)
    return found


def _places(program: Program, n_carry: int) -> Callable[[int], tuple[bool, bool]]:
    """Where a slot is computed: (does it depend on the carry, does the next carry depend on it)."""
    after = set(program.inputs[:n_carry])
    for equation in program.equations:
        if any(slot in after for slot in equation.reads()):
            after.update(equation.outputs)
    needed = {output for output in program.outputs[:n_carry] if output.__class__ is int}
    for equation in reversed(program.equations):
        if any(slot in needed for slot in equation.outputs):
            needed.update(equation.reads())
    return lambda slot: (slot in after, slot in after and slot in needed)


# ---------------------------------------------------------------------------- products that share an operand


def _merge_shared(merger: _Merger) -> None:
    """``h @ u, h @ v`` with invariant u and v, and ``u @ h, v @ h``."""
    for side in (0, 1):
        groups: dict[Any, list[Equation]] = {}
        for equation in merger.products():
            shared, other = equation.operands[side], equation.operands[1 - side]
            aval = merger.avals[other]
            if other not in merger.invariant or shared in merger.invariant or len(aval.shape) != 2:
                continue
            key = (shared, np.dtype(aval.dtype), merger.place(equation.outputs[0]))
            groups.setdefault(key, []).append(equation)
        for (shared, *_), members in groups.items():
            if len(members) < 2:
                continue
            axis = -1 if side == 0 else -2
            first = members[0]
            new, matrix = merger.joined([e.operands[1 - side] for e in members], axis, first)
            product, whole = merger.bind("matmul", _on(side, shared, matrix), first)
            split = merger.parted(whole, [e.outputs[0] for e in members], axis, first)
            merger.replace(members, [*new, product, split])


def _on(side: int, one: int, other: int) -> tuple[int, int]:
    """Operands with ``one`` on a side (0: left)."""
    return (one, other) if side == 0 else (other, one)


# ---------------------------------------------------------------------------- sums of products


def _merge_sums(merger: _Merger) -> None:
    """``a @ u + b @ v`` with invariant u and v, and ``u @ a + v @ b``."""
    inner: set[int] = set()  # additions that are part of a larger sum
    for root in reversed(merger.original.equations):
        if root.primitive.name != "add" or id(root) in inner:
            continue
        terms, adds = _terms(merger, root)
        inner.update(id(equation) for equation in adds)
        groups: dict[Any, list[Equation]] = {}
        for term in terms:
            for side in (0, 1):
                key = _summand(merger, term, merger.avals[root.outputs[0]], side)
                if key is not None:
                    groups.setdefault(key, []).append(merger.made[term])
        _replace_sum(merger, root, adds, terms, groups)


def _terms(merger: _Merger, root: Equation) -> tuple[list[Any], list[Equation]]:
    """The terms of a tree of additions, from left to right, and the additions themselves."""
    terms: list[Any] = []
    adds: list[Equation] = []
    pending: list[Any] = [root]
    goal = root.outputs[0]
    while pending:
        item = pending.pop()
        if not isinstance(item, Equation):
            terms.append(item)
            continue
        adds.append(item)
        for operand in reversed(item.operands):
            made = merger.made.get(operand) if operand.__class__ is int else None
            if (
                made is not None
                and made.primitive.name == "add"
                and len(merger.users[operand]) == 1
                and merger.avals[operand] == merger.avals[goal]
                and merger.place(operand) == merger.place(goal)
            ):
                pending.append(made)
            else:
                pending.append(operand)
    return terms, adds


def _summand(merger: _Merger, term: Any, total: Aval, side: int) -> Any:
    """What products must agree in to be merged in a sum, their varying operand on ``side``; None for other terms."""
    made = merger.made.get(term) if term.__class__ is int else None
    if made is None or made.primitive.name != "matmul" or len(made.reads()) != 2 or len(merger.users[term]) > 1:
        return None
    varying, matrix = merger.avals[made.operands[side]], merger.avals[made.operands[1 - side]]
    if made.operands[1 - side] not in merger.invariant or made.operands[side] in merger.invariant:
        return None
    if merger.avals[term] != total or len(matrix.shape) != 2:
        return None
    inner, outer = matrix.shape if side == 0 else matrix.shape[::-1]
    if inner > LONG * outer:
        return None
    return side, np.dtype(varying.dtype), np.dtype(matrix.dtype), merger.place(term)


def _replace_sum(
    merger: _Merger, root: Equation, adds: list[Equation], terms: list[Any], groups: dict[Any, list[Equation]]
) -> None:
    new: list[Equation] = []
    totals: list[Any] = []
    gone: list[Equation] = []
    for (side, *_), members in groups.items():
        if len(members) < 2 or len({e.operands[side] for e in members}) < len(members):
            continue
        axis = -1 if side == 0 else -2  # the inner axis of the varying operands
        members = _in_known_order(merger, members, side, axis)
        row_made, row = merger.joined([e.operands[side] for e in members], axis, root)
        matrix_made, matrix = merger.joined([e.operands[1 - side] for e in members], -3 - axis, root)
        product, total = merger.bind("matmul", _on(side, row, matrix), root)
        new += [*row_made, *matrix_made, product]
        totals.append(total)
        gone += members
    if not gone:
        return
    dropped = {equation.outputs[0] for equation in gone}
    rest = [*totals, *(term for term in terms if term.__class__ is not int or term not in dropped)]
    total = rest[0]
    for term in rest[1:]:
        added, total = merger.bind("add", (total, term), root)
        new.append(added)
    # The last equation takes the slot of the sum.
    new[-1] = new[-1]._replace(outputs=root.outputs)
    merger.replace([*gone, *adds], new)


def _in_known_order(merger: _Merger, members: list[Equation], side: int, axis: int) -> list[Equation]:
    """Products in the order of a concatenation of their operands that exists already, so that it serves for them."""
    pieces = {equation.operands[side] for equation in members}
    for equation in merger.original.equations:
        if equation.primitive.name == "concatenate" and equation.params["axis"] == axis:
            known = equation.operands
            if len(known) == len(members) and set(known) == pieces:
                return sorted(members, key=lambda e: known.index(e.operands[side]))
    return members


# ---------------------------------------------------------------------------- the pieces of a concatenation


def _merge_pieces(merger: _Merger) -> None:
    """``f(p_1), f(p_2), ...`` where ``concatenate(p_1, p_2, ...)`` exists, for products and sums over other axes."""
    for joint in merger.original.equations:
        if joint.primitive.name != "concatenate" or joint.params["axis"] not in (-1, -2):
            continue
        axis, pieces = joint.params["axis"], joint.operands
        if len(set(pieces)) < len(pieces) or not _slots(pieces):
            continue
        groups: dict[Any, dict[int, Equation]] = {}
        for piece in pieces:
            for user in merger.users[piece]:
                key = None if user is None or merger.is_replaced(user) else _by_piece(merger, user, piece, axis)
                if key is not None:
                    groups.setdefault(key, {}).setdefault(piece, user)  # type: ignore[arg-type]
        for key, found in groups.items():
            if len(found) < len(pieces):
                continue
            members = list(found.values())  # in the order of the pieces
            whole = joint.outputs[0]
            if key[0] == "matmul":
                made, result = merger.bind("matmul", _on(key[1], whole, key[2]), members[0])
            else:
                made, result = _summed(merger, members, whole)
            split = merger.parted(result, [e.outputs[0] for e in members], axis, members[0])
            before = dict(merger.replaced)
            merger.replace(members, [made, split])
            if merger.ordered() is None:  # one piece depends on what is computed from another one
                merger.replaced = before


def _slots(operands: Sequence[Any]) -> bool:
    return all(operand.__class__ is int for operand in operands)


def _by_piece(merger: _Merger, equation: Equation, piece: int, axis: int) -> Any:
    """What equations that read the pieces of one concatenation must agree in to read the whole; None for others."""
    name, place = equation.primitive.name, merger.place(equation.outputs[0])
    if name == "matmul":
        position = 1 if axis == -1 else 0  # the axis of the pieces is an outer axis of the product
        other = equation.operands[1 - position]
        # Without batch axes, the result's axes are the operands'.
        if equation.operands[position] != piece or other == piece or not _slots((other,)):
            return None
        return name, position, other, place, np.dtype(merger.avals[equation.outputs[0]].dtype)
    if axis != -1 or name not in ("sum_to", "sum"):
        return None
    inside, shape = merger.avals[piece].shape, merger.avals[equation.outputs[0]].shape
    if name == "sum_to" and shape and shape[-1] == inside[-1]:
        return name, shape[:-1], place
    if name == "sum" and -1 not in equation.params["axis"] and len(inside) > 1:
        return name, equation.params["axis"], equation.params["keepdims"], place
    return None


def _summed(merger: _Merger, members: Sequence[Equation], whole: int) -> tuple[Equation, int]:
    params = dict(members[0].params)
    if "shape" in params:
        params["shape"] = (*params["shape"][:-1], merger.avals[whole].shape[-1])
    return merger.bind(members[0].primitive.name, (whole,), members[0], **params)
