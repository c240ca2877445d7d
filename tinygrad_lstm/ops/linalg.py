"""Matrix products and general contractions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.errors import ArgumentError, ShapeError
from tinygrad_lstm.kernels import matmul as kernel
from tinygrad_lstm.ops.axes import normal_axis
from tinygrad_lstm.ops.shape import broadcast_to, expand_dims, reshape, squeeze, swapaxes, transpose
from tinygrad_lstm.primitive import Aval, Primitive
from tinygrad_lstm.tensor import together


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
    else:
        first, second = [list(x) if isinstance(x, (list, tuple)) else [x] for x in axes]
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


def einsum(subscripts: str, *operands: Any) -> Any:
    """Einstein summation, as numpy.einsum with a subscript string.

    Ellipsis and an implicit output are taken; a subscript that stands twice in one operand (a diagonal) is not.

    >>> import numpy as np
    >>> from tinygrad_lstm import ops
    >>> ops.einsum("bi,ij->bj", np.ones((2, 3)), np.ones((3, 4))).shape
    (2, 4)
    """
    tensors = together(*operands)
    text = subscripts.replace(" ", "")
    left, arrow, out = text.partition("->")
    terms = left.split(",")
    if len(terms) != len(tensors):
        raise ArgumentError(f"einsum {subscripts!r}: {len(terms)} terms for {len(tensors)} operands")
    spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in text]
    width = 0
    for term, t in zip(terms, tensors, strict=True):
        if "..." in term:
            width = max(width, t.ndim - len(term) + 3)
    dots = "".join(spare[:width])
    for k, (term, t) in enumerate(zip(terms, tensors, strict=True)):
        if "..." in term:
            need = t.ndim - len(term) + 3
            terms[k] = term.replace("...", dots[width - need :] if need else "")
        if len(terms[k]) != t.ndim:
            raise ShapeError(f"einsum {subscripts!r}: term {term!r} for an operand of shape {t.shape}")
        if len(set(terms[k])) != len(terms[k]):
            raise ArgumentError(f"einsum {subscripts!r}: a subscript stands twice in {term!r}; take the diagonal first")
    if arrow:
        out = out.replace("...", dots)
    else:
        joined = "".join(terms)
        out = dots + "".join(sorted(c for c in set(joined) if joined.count(c) == 1 and c not in dots))
    lengths: dict[str, int] = {}
    for term, t in zip(terms, tensors, strict=True):
        for c, n in zip(term, t.shape, strict=True):
            if lengths.setdefault(c, n) != n and c not in dots:
                raise ShapeError(f"einsum {subscripts!r}: subscript {c!r} has lengths {lengths[c]} and {n}")
    for c in out:
        if c not in lengths:
            raise ArgumentError(f"einsum {subscripts!r}: output subscript {c!r} is in no operand")
    if dots:
        # Broadcasting between ellipses is made explicit, so that the rule sees one length per subscript.
        spans = [[at for at, c in enumerate(term) if c in dots] for term in terms]
        try:
            full = np.broadcast_shapes(*[[t.shape[at] for at in span] for t, span in zip(tensors, spans, strict=True)])
        except ValueError:
            shapes = ", ".join(str(t.shape) for t in tensors)
            raise ShapeError(f"einsum {subscripts!r}: the axes under '...' of {shapes} do not broadcast") from None
        for k, (t, span) in enumerate(zip(tensors, spans, strict=True)):
            shape = list(t.shape)
            for at, n in zip(span, full[len(full) - len(span) :], strict=True):
                shape[at] = n
            if tuple(shape) != t.shape:
                tensors[k] = broadcast_to(t, tuple(shape))
    return _einsum(*tensors, subscripts=f"{','.join(terms)}->{out}")


__all__ = ["dot", "einsum", "inner", "matmul", "outer", "tensordot"]
