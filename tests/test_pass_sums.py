"""Sums of which some terms do not change: the executor before and after, and what became of the equations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tinygrad_lstm import ops
from tinygrad_lstm.compiler.sums import regroup
from tinygrad_lstm.primitive import Aval
from tinygrad_lstm.trace import trace

ROW, MATRIX, VECTOR = (3, 4), (4, 4), (4,)


def body_of(f: Any, shapes: list[tuple[int, ...]], n_inputs: int, dtypes: str = "f8") -> Any:
    kinds = dtypes.split() * (len(shapes) if len(dtypes.split()) == 1 else 1)
    program = trace(f, [Aval(s, np.dtype(d)) for s, d in zip(shapes, kinds, strict=True)], flat=True).program
    return program.replaced(inputs=program.inputs[:n_inputs], captures=program.inputs[n_inputs:])


def values(program: Any) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = [
        (rng.standard_normal(program.avals[s].shape) * 3).astype(program.avals[s].dtype)
        for s in (*program.inputs, *program.captures)
    ]
    return [np.asarray(out) for out in program.function()(*arrays)]


def invariant_sums(program: Any) -> int:
    """Additions of what does not change alone."""
    fixed, count = set(program.captures), 0
    for equation in program.equations:
        if all(slot in fixed for slot in equation.reads()):
            fixed.update(equation.outputs)
            count += equation.primitive.name == "add"
    return count


def names(program: Any) -> list[str]:
    return [equation.primitive.name for equation in program.equations]


CASES = {
    "two biases": (
        lambda x, h, w, u, b, c: [ops.tanh((x @ w + b) + (h @ u + c))],
        [ROW, ROW, MATRIX, MATRIX, VECTOR, VECTOR], 2, 1,
    ),
    "three biases": (lambda x, b, c, d: [((x + b) + c) + d], [ROW, VECTOR, VECTOR, VECTOR], 1, 2),
    "deep": (lambda x, h, b, c: [(((b + x) + h) * 2.0 + b) + (h + c)], [ROW, ROW, VECTOR, VECTOR], 2, 1),
    "of products": (lambda x, w, u, b: [(x + b * 2.0) + (w @ u)[0]], [ROW, MATRIX, MATRIX, VECTOR], 1, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_invariant_is_added_up_apart(name: str) -> None:
    f, shapes, n_inputs, expected = CASES[name]
    body = body_of(f, shapes, n_inputs)
    after = regroup(body)
    assert invariant_sums(body) == 0 and invariant_sums(after) == expected
    assert names(after).count("add") == names(body).count("add")
    for a, b in zip(values(after), values(body), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    assert str(regroup(after)) == str(after), "a second time nothing is left to do"


UNCHANGED = {
    "one bias": (lambda x, b: [x + b], [ROW, VECTOR], 1, "f8"),
    "read elsewhere": (lambda x, b, c: (lambda y: [y + c, y])(x + b), [ROW, VECTOR, VECTOR], 1, "f8"),
    "other shapes": (lambda x, b, c: [(x + b) + c], [ROW, VECTOR, (3, 1)], 1, "f8"),
    "other dtypes": (lambda x, b, c: [(x + b) + c], [ROW, VECTOR, VECTOR], 1, "f8 f4 f8"),
    "integers": (lambda x, b, c: [(x + b) + c], [ROW, VECTOR, VECTOR], 1, "i8"),
    "a number": (lambda x, b: [(x + b) + 1.0], [ROW, VECTOR], 1, "f8"),
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_what_is_left_alone(name: str) -> None:
    f, shapes, n_inputs, dtypes = UNCHANGED[name]
    body = body_of(f, shapes, n_inputs, dtypes)
    assert regroup(body) is body
