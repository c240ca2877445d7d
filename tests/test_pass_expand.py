"""Einsums as matrix products: the executor before and after."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygrad_lstm import ops
from tinygrad_lstm.compiler.expand import products
from tinygrad_lstm.primitive import Aval
from tinygrad_lstm.trace import trace


def check(subscripts: str, shapes: list[tuple[int, ...]]) -> list[str]:
    """The primitives of the expanded program, whose result is NumPy's."""
    avals = [Aval(shape, np.dtype(np.float64)) for shape in shapes]
    program = trace(lambda *xs: [ops.einsum(subscripts, *xs)], avals, flat=True).program
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape) for shape in shapes]
    expanded = products(program)
    (found,) = expanded.function()(*arrays)
    np.testing.assert_allclose(found, np.einsum(subscripts, *arrays), rtol=1e-12, atol=1e-12)
    return [equation.primitive.name for equation in expanded.equations]


@pytest.mark.parametrize(
    ("subscripts", "shapes", "expected"),
    [
        ("bi,ij->bj", [(2, 3), (3, 4)], {"matmul"}),
        ("bi,ji->bj", [(2, 3), (4, 3)], {"matmul", "transpose"}),
        ("bi,bj->ij", [(2, 3), (2, 4)], {"matmul", "transpose"}),
        ("bi,bj->bij", [(2, 3), (2, 4)], {"multiply", "reshape"}),
        ("bij->bji", [(2, 3, 4)], {"transpose"}),
        ("bij->b", [(2, 3, 4)], {"sum"}),
    ],
)
def test_what_becomes_of_them(subscripts: str, shapes: Any, expected: set[str]) -> None:
    assert set(check(subscripts, shapes)) == expected


@pytest.mark.parametrize("subscripts", ["i,i->", "ij->"])
def test_numbers_stay(subscripts: str) -> None:
    assert check(subscripts, [(3, 2)[: len(term)] for term in subscripts[:-2].split(",")]) == ["einsum"]


@pytest.mark.parametrize(
    ("subscripts", "shapes"),
    [("...i,ij->...j", [(2, 1, 3), (3, 4)]), ("...i,...ij->...j", [(2, 1, 3), (5, 3, 4)]),
     ("...,...->...", [(2, 1), (3,)]), ("...i,...i->...", [(1, 3), (5, 3)])],
)  # fmt: skip
def test_axes_of_length_one_go_with_any_other(subscripts: str, shapes: Any) -> None:
    assert "einsum" not in check(subscripts, shapes)


@st.composite
def einsums(draw: Any) -> Any:
    sizes = {c: draw(st.integers(0 if draw(st.booleans()) else 1, 3)) for c in "abcde"}
    terms = draw(st.lists(st.lists(st.sampled_from("abcde"), unique=True, max_size=4), min_size=1, max_size=4))
    used = sorted({c for term in terms for c in term})
    out = draw(st.lists(st.sampled_from(used), unique=True)) if used else []
    shapes = [tuple(sizes[c] for c in term) for term in terms]
    return f"{','.join(map(''.join, terms))}->{''.join(out)}", shapes


@settings(max_examples=300, deadline=None)
@given(einsums())
def test_any_of_them(case: Any) -> None:
    subscripts, shapes = case
    names = check(subscripts, shapes)
    assert subscripts.endswith("->") or "einsum" not in names
