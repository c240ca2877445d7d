"""Sums of values of which some do not change from step to step: these are added up by themselves.

The gates of a cell read ``(x @ W + b) + (h @ U + c)``.  In that order two biases are read at every step.  Regrouped to
``(x @ W + h @ U) + (b + c)``, they are added up once, before the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.compiler.simplify import in_order, simplify
from tinygrad_lstm.primitive import REGISTRY
from tinygrad_lstm.program import Equation, Program

__all__ = ["regroup"]


def regroup(program: Program) -> Program:
    """Sums with several invariant terms: these are added up by themselves.

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
        fixed = [t for t in terms if t in self.invariant]
        rest = [t for t in terms if t not in self.invariant]
        if len(fixed) < 2 or len({self.avals[t].shape for t in fixed}) > 1 or not rest:
            return [equation]
        self.changed = True
        new: list[Equation] = []
        self._added([self._added(rest, equation, new), self._added(fixed, equation, new)], equation, new)
        new[-1] = new[-1]._replace(outputs=equation.outputs)  # the last one takes the slot of the sum
        return new

    def _added(self, terms: Sequence[int], like: Equation, new: list[Equation]) -> int:
        total = terms[0]
        add = REGISTRY["add"]
        for term in terms[1:]:
            self.avals.append(add.abstract([self.avals[total], self.avals[term]], {}))
            new.append(Equation(add, (total, term), {}, (len(self.avals) - 1,), like.source))
            total = len(self.avals) - 1
        return total
