"""Matrix products and general contractions."""

from __future__ import annotations

import math
import operator
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.errors import ArgumentError, DTypeError, ShapeError
from tinygrad_lstm.kernels import matmul as kernel
from tinygrad_lstm.operands import together
from tinygrad_lstm.ops.axes import normal_axis
from tinygrad_lstm.ops.indexing import getitem
from tinygrad_lstm.ops.shape import broadcast_to, expand_dims, reshape, squeeze, swapaxes, transpose
from tinygrad_lstm.primitive import Aval, Primitive


def _matmul_aval(a: Aval, b: Aval) -> Aval:
    if a.shape[-1] != b.shape[-2]:
        raise ValueError
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return Aval((*batch, a.shape[-2], b.shape[-1]), np.result_type(a.dtype, b.dtype))


def _right_rule(g: Any, a: Any, shapes: Sequence[Any]) -> Any:
    if len(shapes[1]) == 2 and len(shapes[0]) > 2:
        # One matrix for all of a: contract the batch axes too, in one product.
        rows = math.prod(shapes[0][:-1])
        a, g = reshape(a, (rows, shapes[0][-1])), reshape(g, (rows, shapes[1][-1]))
    return _matmul(swapaxes(a, -1, -2), g)


_matmul: Primitive = Primitive(
    "matmul",
    lambda a, b: kernel(a, b),
    (lambda g, b: _matmul(g, swapaxes(b, -1, -2)), _right_rule),
    linear="each",
    shape=_matmul_aval,
    batch="same",
)


def matmul(a: Any, b: Any) -> Any:
    """Matrix product ``(..., M, K) @ (..., K, N)``, as numpy.matmul (1-D operands included).

    >>> import numpy as np
    >>> from tinygrad_lstm import ops
    >>> ops.matmul(np.ones((2, 3)), np.ones(3)).tolist()
    [3.0, 3.0]
    """
    a, b = together(a, b)
    if not a.ndim or not b.ndim:
        raise ShapeError(f"matmul of shapes {a.shape} and {b.shape}: 0-d operands; use multiply")
    left, right = a.ndim == 1, b.ndim == 1
    inner = b.shape[0] if right else b.shape[-2]
    if a.shape[-1] != inner:
        raise ShapeError(
            f"matmul of shapes {a.shape} and {b.shape}: the last axis of the first has {a.shape[-1]} elements, "
            f"the second expects {inner}"
        )
    out = _matmul(expand_dims(a, 0) if left else a, expand_dims(b, -1) if right else b)
    if left or right:
        out = squeeze(out, (-2, -1) if left and right else (-2 if left else -1))
    return out


def dot(a: Any, b: Any) -> Any:
    """Dot product as numpy.dot: the last axis of a with the second-to-last of b."""
    a, b = together(a, b)
    if not a.ndim or not b.ndim:
        return a * b
    if a.ndim <= 2 and b.ndim <= 2:
        return matmul(a, b)
    return tensordot(a, b, ([-1], [-1 if b.ndim == 1 else -2]))


def inner(a: Any, b: Any) -> Any:
    """Product over the last axes of both, as numpy.inner."""
    a, b = together(a, b)
    if not a.ndim or not b.ndim:
        return a * b
    return tensordot(a, b, ([-1], [-1]))


def outer(a: Any, b: Any) -> Any:
    """All products of the elements of two (flattened) arrays, ``(M,), (N,) -> (M, N)``, as numpy.outer."""
    a, b = together(a, b)
    return reshape(a, (a.size, 1)) * reshape(b, (1, b.size))


def tensordot(a: Any, b: Any, axes: Any = 2) -> Any:
    """Contraction over pairs of axes, as numpy.tensordot."""
    a, b = together(a, b)
    if isinstance(axes, (int, np.integer)):
        first, second = list(range(a.ndim - int(axes), a.ndim)), list(range(int(axes)))
    elif isinstance(axes, (list, tuple)) and len(axes) == 2:
        first, second = [list(x) if isinstance(x, (list, tuple)) else [x] for x in axes]
    else:
        raise DTypeError(f"tensordot: axes is an int or a pair (axes of a, axes of b), found {axes!r}")
    if len(first) != len(second):
        raise ShapeError(f"tensordot: {len(first)} axes of a and {len(second)} of b do not pair up")
    first = [normal_axis(x, a.ndim, "tensordot") + a.ndim for x in first]
    second = [normal_axis(x, b.ndim, "tensordot") + b.ndim for x in second]
    if [a.shape[k] for k in first] != [b.shape[k] for k in second]:
        raise ShapeError(f"tensordot of {a.shape} and {b.shape}: axes {first} and {second} differ in length")
    kept_a = [k for k in range(a.ndim) if k not in first]
    kept_b = [k for k in range(b.ndim) if k not in second]
    length = int(np.prod([a.shape[k] for k in first], dtype=int))
    rows = tuple(a.shape[k] for k in kept_a)
    columns = tuple(b.shape[k] for k in kept_b)
    left = reshape(transpose(a, kept_a + first), (int(np.prod(rows, dtype=int)), length))
    right = reshape(transpose(b, second + kept_b), (length, int(np.prod(columns, dtype=int))))
    return reshape(_matmul(left, right), rows + columns)


# ---------------------------------------------------------------------------- einsum


def _einsum_rule(g: Any, inputs: Any, shapes: Sequence[Any], position: int, subscripts: str) -> Any:
    """Swap the operand's subscripts with the output's; axes summed within one operand are broadcast back."""
    terms, out = _terms(subscripts)
    mine = terms[position]
    others = [t for k, t in enumerate(terms) if k != position]
    available = set(out).union(*others) if others else set(out)
    reachable = "".join(s for s in mine if s in available)
    operands = [x for k, x in enumerate(inputs) if k != position]
    share = _einsum(g, *operands, subscripts=f"{','.join([out, *others])}->{reachable}")
    if reachable != mine:
        missing = tuple(k - len(mine) for k, s in enumerate(mine) if s not in available)
        share = broadcast_to(expand_dims(share, missing), shapes[position])
    return share


def _terms(subscripts: str) -> tuple[list[str], str]:
    left, out = subscripts.split("->")
    return left.split(","), out


_einsum: Primitive = Primitive(
    "einsum",
    lambda *xs, subscripts: np.einsum(subscripts, *xs, optimize=len(xs) > 1),
    (_einsum_rule,),
    linear="each",
)


def einsum(*operands: Any, optimize: Any = False) -> Any:
    """Einstein summation, as numpy.einsum.

    Parameters
    ----------
    operands : str and arrays
        ``einsum("ij,jk->ik", a, b)``, or with lists of integers ``einsum(a, [0, 1], b, [1, 2], [0, 2])``.  A subscript
        that stands twice in one operand is its diagonal; ellipses and axes of length 1 broadcast; without an arrow the
        result has the subscripts that stand once, in alphabetical order.
    optimize : anything
        As in NumPy; the order of products is chosen in any case.

    Raises
    ------
    ArgumentError
        Subscripts that do not fit the number of operands, or an output subscript of no operand.
    ShapeError
        A term that does not fit its operand, or lengths that do not broadcast.

    Examples
    --------
    >>> import numpy as np
    >>> from tinygrad_lstm import ops
    >>> ops.einsum("bi,ij->bj", np.ones((2, 3)), np.ones((3, 4))).shape
    (2, 4)
    """
    if not operands:
        raise ArgumentError("einsum needs subscripts and operands, as in einsum('ij,jk->ik', a, b)")
    subscripts, given = (operands[0], operands[1:]) if isinstance(operands[0], str) else _from_lists(operands)
    tensors = together(*given)
    text = subscripts.replace(" ", "")
    left, arrow, out = text.partition("->")
    terms = left.split(",")
    if len(terms) != len(tensors):
        raise ArgumentError(f"einsum {subscripts!r}: {len(terms)} terms for {len(tensors)} operands")
    terms, dots = _without_dots(subscripts, terms, tensors)
    joined = "".join(terms)
    if arrow:
        out = out.replace("...", dots)
    else:
        out = dots + "".join(sorted(c for c in set(joined) if joined.count(c) == 1 and c not in dots))
    for k, c in enumerate(out):
        if c not in joined:
            raise ArgumentError(f"einsum {subscripts!r}: output subscript {c!r} is in no operand")
        if c in out[:k]:
            raise ArgumentError(f"einsum {subscripts!r}: output subscript {c!r} stands twice")
    for k, term in enumerate(terms):
        while (twice := next((c for c in terms[k] if terms[k].count(c) > 1), None)) is not None:
            terms[k], tensors[k] = _diagonal(subscripts, terms[k], tensors[k], twice)
        if len(terms[k]) != tensors[k].ndim:
            raise ShapeError(f"einsum {subscripts!r}: term {term!r} for an operand of shape {tensors[k].shape}")
    lengths = _lengths_of(subscripts, terms, tensors)
    for k, (term, t) in enumerate(zip(terms, tensors, strict=True)):
        # An axis of length 1 that broadcasts is left out: the rule then sees one length per subscript.
        spread = tuple(at for at, (c, n) in enumerate(zip(term, t.shape, strict=True)) if n != lengths[c])
        if spread:
            terms[k], tensors[k] = "".join(c for at, c in enumerate(term) if at not in spread), squeeze(t, spread)
    return _einsum(*tensors, subscripts=f"{','.join(terms)}->{out}")


def _from_lists(operands: Sequence[Any]) -> tuple[str, Sequence[Any]]:
    """Subscripts and operands of the form ``einsum(a, [0, 1], b, [1, 2], [0, 2])``."""

    def text(subscripts: Any) -> str:
        try:
            return "".join("..." if c is Ellipsis else string.ascii_letters[operator.index(c)] for c in subscripts)
        except (TypeError, IndexError):
            raise ArgumentError(
                f"einsum: subscripts are a string, or lists of integers in 0..51 and ... behind their operands; "
                f"found {subscripts!r:.60}"
            ) from None

    pairs = len(operands) // 2
    terms = ",".join(text(operands[2 * k + 1]) for k in range(pairs))
    arrow = f"->{text(operands[-1])}" if len(operands) % 2 else ""
    return terms + arrow, operands[0 : 2 * pairs : 2]


def _without_dots(subscripts: str, terms: list[str], tensors: Sequence[Any]) -> tuple[list[str], str]:
    """The terms with letters for ellipses, and the letters of the widest one."""
    spare = [c for c in reversed(string.ascii_letters) if c not in subscripts]
    needs = [t.ndim - len(term) + 3 if "..." in term else 0 for term, t in zip(terms, tensors, strict=True)]
    for term, t, need in zip(terms, tensors, needs, strict=True):
        if need < 0:
            raise ShapeError(f"einsum {subscripts!r}: term {term!r} for an operand of shape {t.shape}")
    width = max(needs, default=0)
    dots = "".join(spare[:width])
    return [t.replace("...", dots[width - n :] if n else "") for t, n in zip(terms, needs, strict=True)], dots


def _diagonal(subscripts: str, term: str, t: Any, c: str) -> tuple[str, Any]:
    """An operand in which a subscript stands twice, with one axis in place of the first two of them."""
    if len(term) != t.ndim:
        raise ShapeError(f"einsum {subscripts!r}: term {term!r} for an operand of shape {t.shape}")
    first = term.index(c)
    second = term.index(c, first + 1)
    n = t.shape[first]
    if t.shape[second] != n:
        raise ShapeError(f"einsum {subscripts!r}: subscript {c!r} has lengths {n} and {t.shape[second]} in one operand")
    rest = [k for k in range(t.ndim) if k not in (first, second)]
    places = np.arange(n)
    return "".join(term[k] for k in rest) + c, getitem(transpose(t, (*rest, first, second)), (..., places, places))


def _lengths_of(subscripts: str, terms: Sequence[str], tensors: Sequence[Any]) -> dict[str, int]:
    """The length that every subscript stands for."""
    lengths: dict[str, int] = {}
    for term, t in zip(terms, tensors, strict=True):
        for c, n in zip(term, t.shape, strict=True):
            known = lengths.setdefault(c, n)
            if known == 1:
                lengths[c] = n
            elif n not in (1, known):
                raise ShapeError(f"einsum {subscripts!r}: subscript {c!r} has lengths {known} and {n}")
    return lengths


__all__ = ["dot", "einsum", "inner", "matmul", "outer", "tensordot"]
