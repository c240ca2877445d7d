"""Sums of products and of values that do not change, taken in the order that costs least.

The gates of a cell read ``(x @ W + b) + (h @ U + c)``.  In that order two products wait side by side until somebody
adds them up, and two biases are read at every step.  Regrouped to ``(x @ W + h @ U) + (b + c)``, the second product is
added to the first one while it is in registers, and the biases are added up once, before the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.compiler.simplify import in_order, simplify
from tinygrad_lstm.kernels import matmul as product
from tinygrad_lstm.primitive import REGISTRY, Primitive
from tinygrad_lstm.program import Equation, Program

__all__ = ["MATMUL_ADD", "accumulate", "regroup"]

MATMUL_ADD: Primitive = Primitive(
    "matmul_add", lambda c, a, b: c + product(a, b), None, differentiable=False, register=False,
    doc="c + a @ b, where nobody else reads c.",
)  # fmt: skip


def regroup(program: Program) -> Program:
    """Sums with several products, or several invariant terms: products first, what is invariant added up by itself.

    Equal up to rounding.  What is invariant are the captures of the program and what is computed from them alone.

    Examples
    --------
    >>> import numpy as np
    >>> from tinygrad_lstm.primitive import Aval
    >>> from tinygrad_lstm.trace import trace
    >>> h, u, b = (Aval(s, np.dtype("f4")) for s in ((2, 3), (3, 3), (3,)))
    >>> body = trace(lambda x, h, u, v, b, c: [(x @ u + b) + (h @ v + c)], [h, h, u, u, b, b], flat=True).program
    >>> print(regroup(body.replaced(inputs=body.inputs[:2], captures=body.inputs[2:])))
    program(%0 float32[2,3], %1 float32[2,3]) captures(%2 float32[3,3], %3 float32[3,3], %4 float32[3], %5 float32[3])
      %6 float32[2,3] = matmul(%0, %2)
      %8 float32[2,3] = matmul(%1, %3)
      %11 float32[2,3] = add(%6, %8)
      %12 float32[3] = add(%4, %5)
      %10 float32[2,3] = add(%11, %12)
      return %10
    """
    rewriter = _Sums(program)
    equations: list[Equation] = []
    for equation in program.equations:
        equations += rewriter.rewritten(equation)
    if not rewriter.changed:
        return program
    ordered = in_order(equations)
    return program if ordered is None else simplify(program.replaced(avals=rewriter.avals, equations=ordered))


class _Sums:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.avals = list(program.avals)
        self.made, self.users = program.definitions(), program.users()
        self.invariant = set(program.captures)
        for equation in program.equations:
            if all(slot in self.invariant for slot in equation.reads()):
                self.invariant.update(equation.outputs)
        self.changed = False

    def _inner(self, operand: Any, total: int) -> Equation | None:
        """The addition behind an operand, if nobody else reads it and it has the shape of the whole sum."""
        made = self.made.get(operand) if operand.__class__ is int else None
        if made is None or made.primitive.name != "add" or len(self.users[operand]) != 1 or operand in self.invariant:
            return None
        return made if self.avals[operand] == self.avals[total] else None

    def _terms(self, equation: Equation, total: int) -> list[Any]:
        terms: list[Any] = []
        for operand in equation.operands:
            inner = self._inner(operand, total)
            terms += [operand] if inner is None else self._terms(inner, total)
        return terms

    def _is_product(self, term: Any, total: int) -> bool:
        made = self.made.get(term) if term.__class__ is int else None
        if made is None or made.primitive.name != "matmul" or len(made.reads()) != 2:
            return False
        alone = len(self.users[term]) == 1 and self.avals[term] == self.avals[total]
        return alone and made.operands[1] in self.invariant and made.operands[0] not in self.invariant

    def rewritten(self, equation: Equation) -> list[Equation]:
        """What stands in the place of an equation."""
        total = equation.outputs[0]
        if equation.primitive.name != "add" or total in self.invariant:
            return [equation]
        dtype = np.dtype(self.avals[total].dtype)
        terms = self._terms(equation, total)
        fits = all(t.__class__ is int and np.dtype(self.avals[t].dtype) == dtype for t in terms)
        # Part of a larger sum: that one is rewritten, and this one is not read any more.
        (user, *others) = self.users.get(total, [None])
        part = not others and user is not None and user.primitive.name == "add"
        if dtype.kind != "f" or not fits or (part and user and self._inner(total, user.outputs[0]) is not None):
            return [equation]
        products = [t for t in terms if self._is_product(t, total)]
        fixed = [t for t in terms if t in self.invariant]
        rest = [t for t in terms if t not in products and t not in fixed]
        alike = {self.avals[t].shape for t in fixed}
        if len(set(terms)) < len(terms) or len(alike) > 1 or not (products or rest):
            return [equation]
        if len(products) < 2 and len(fixed) < 2:
            return [equation]
        self.changed = True
        new: list[Equation] = []
        varying = self._added([*products, *rest], equation, new)
        whole = self._added([varying, self._added(fixed, equation, new)] if fixed else [varying], equation, new)
        new[-1] = new[-1]._replace(outputs=equation.outputs)
        assert whole != total
        return new

    def _added(self, terms: Sequence[int], like: Equation, new: list[Equation]) -> int:
        total = terms[0]
        add = REGISTRY["add"]
        for term in terms[1:]:
            self.avals.append(add.abstract([self.avals[total], self.avals[term]], {}))
            new.append(Equation(add, (total, term), {}, (len(self.avals) - 1,), like.source))
            total = len(self.avals) - 1
        return total


def accumulate(program: Program) -> Program:
    """``p + a @ u``, with a product p that nobody else reads and invariant u, as one equation that adds to p in place."""
    made, users = program.definitions(), program.users()
    fixed = set(program.captures)
    outputs = set(program.outputs)
    gone: set[int] = set()
    replaced: dict[int, Equation] = {}
    sums: set[int] = set()  # slots of such equations

    def is_alone(operand: Any, aval: Any) -> bool:
        if operand.__class__ is not int or operand not in made or operand in outputs or len(users[operand]) != 1:
            return False
        return bool(program.avals[operand] == aval)

    def is_product(operand: Any) -> bool:
        equation = made[operand]
        return equation.primitive.name == "matmul" and equation.operands[1] in fixed and len(equation.reads()) == 2

    for k, equation in enumerate(program.equations):
        if equation.primitive.name != "add" or len(equation.reads()) != 2:
            continue
        aval = program.avals[equation.outputs[0]]
        left, right = equation.operands
        if not (is_alone(left, aval) and is_alone(right, aval) and is_product(right) and right not in gone):
            continue
        if not (left in sums or (is_product(left) and left not in gone)):
            continue
        factor = made[right]
        gone.add(right)
        sums.add(equation.outputs[0])
        replaced[k] = equation._replace(primitive=MATMUL_ADD, operands=(left, *factor.operands))
    if not replaced:
        return program
    kept = [
        replaced.get(k, equation)
        for k, equation in enumerate(program.equations)
        if not (len(equation.outputs) == 1 and equation.outputs[0] in gone)
    ]
    return program.replaced(equations=tuple(kept))
