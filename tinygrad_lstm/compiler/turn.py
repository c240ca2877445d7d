"""Products that are only read transposed are computed transposed: ``(a @ b).T`` is ``b.T @ a.T``, number by number.

Transposing an operand is a matter of strides; transposing a result would be a copy, element by element.
"""

from __future__ import annotations

from tinygrad_lstm.compiler.simplify import simplify
from tinygrad_lstm.primitive import REGISTRY, Aval
from tinygrad_lstm.program import Equation, Program

__all__ = ["turned"]


def turned(program: Program) -> Program:
    """Turn the products of which the last two axes are swapped, and nothing else is made.  Exact.

    >>> import numpy as np
    >>> from tinygrad_lstm.primitive import Aval
    >>> from tinygrad_lstm.trace import trace
    >>> avals = [Aval((2, 3), np.dtype("f4")), Aval((3, 4), np.dtype("f4"))]
    >>> print(turned(trace(lambda a, b: [(a @ b).T], avals, flat=True).program))
    program(%0 float32[2,3], %1 float32[3,4])
      %4 float32[4,3] = transpose(%1, axes=(-1, -2))
      %5 float32[3,2] = transpose(%0, axes=(-1, -2))
      %3 float32[4,2] = matmul(%4, %5)
      return %3
    """
    made, users = program.definitions(), program.users()
    avals = list(program.avals)
    equations: list[Equation] = []
    for equation in program.equations:
        product = made.get(equation.operands[0]) if _swaps(equation) else None
        if product is None or product.primitive.name != "matmul" or len(users[product.outputs[0]]) > 1:
            equations.append(equation)
            continue
        swapped = []
        for operand in reversed(product.operands):
            aval = program.aval(operand)
            if operand.__class__ is not int or len(aval.shape) < 2:
                break
            avals.append(Aval((*aval.shape[:-2], aval.shape[-1], aval.shape[-2]), aval.dtype))
            swapped.append(equation._replace(operands=(operand,), outputs=(len(avals) - 1,)))
        if len(swapped) < 2:
            equations.append(equation)
            continue
        operands = tuple(other.outputs[0] for other in swapped)
        equations += [*swapped, product._replace(operands=operands, outputs=equation.outputs)]
    if len(equations) == len(program.equations):
        return program
    return simplify(program.replaced(avals=avals, equations=tuple(equations)))


def _swaps(equation: Equation) -> bool:
    if equation.primitive is not REGISTRY["transpose"]:
        return False
    axes = tuple(equation.params["axes"])  # of the last so many axes
    return len(axes) > 1 and axes == (*range(-len(axes), -2), -1, -2)
