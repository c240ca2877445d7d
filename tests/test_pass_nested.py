"""Opening inner loops and moving the batch to the front, on the executor: same values, and rows that stay apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_native_lowering import depends_across
from test_native_nested import BODIES, K

from tinygrad_lstm import ops
from tinygrad_lstm.compiler.adjoint import adjoint
from tinygrad_lstm.compiler.batch_first import batch_first
from tinygrad_lstm.compiler.constants import fill
from tinygrad_lstm.compiler.loop import _Planner
from tinygrad_lstm.compiler.rows import row_values
from tinygrad_lstm.compiler.simplify import simplify
from tinygrad_lstm.compiler.unnest import unnest
from tinygrad_lstm.ops.loop import INNER
from tinygrad_lstm.primitive import Aval
from tinygrad_lstm.program import Program
from tinygrad_lstm.trace import trace
from tinygrad_lstm.tree import flatten, unflatten

ROWS = 5


def body_program(name: str, rows: int) -> tuple[Program, int]:
    """The body of a nested case as a program (carry..., x...; captures...), and how many carries it has."""
    case = BODIES[name]
    init, xs, captures = case.arrays(1, rows, K)
    leaves, structure = flatten((init, xs, captures))
    n_carry, n_x = len(flatten(init)[0]), len(flatten(xs)[0])
    avals = [Aval(a.shape[1:] if n_carry <= k < n_carry + n_x else a.shape, a.dtype) for k, a in enumerate(leaves)]

    def flat(*tensors: Any) -> list[Any]:
        carry, x, captured = unflatten(structure, tensors)
        return list(flatten(case.make(captured, K)(carry, x))[0])

    traced = trace(flat, avals, flat=True)
    inputs, program = traced.program.inputs, traced.program
    n = n_carry + n_x
    program = program.replaced(inputs=inputs[:n], captures=(*inputs[n:], *program.captures))
    return fill(program, traced.captures), n_carry


def both(program: Program, n_carry: int) -> list[tuple[Program, int]]:
    """The forward and the backward body, with how many of their outputs are stacked."""
    n_x, n_ys = len(program.inputs) - n_carry, len(program.outputs) - n_carry
    pair = adjoint(program, n_carry, n_ys, [True] * n_ys, [True] * (n_x + len(program.captures)))
    return [(pair.forward, n_ys + len(pair.residuals)), (pair.backward, n_x)]


def opened(program: Program) -> Program:
    return unnest(simplify(program), lambda b, c, y, t: _Planner(b, c, y, t, native=True).plan())


def values_of(program: Program, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    make = lambda slots: [
        np.asarray(0.7 * rng.standard_normal(program.avals[s].shape)).astype(program.avals[s].dtype) for s in slots
    ]
    return make(program.inputs), make(program.captures)


def same(a: Program, b: Program, seed: int = 0) -> None:
    given = values_of(a, seed)
    for x, y in zip(a.run(*given), b.run(*given), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rows", [ROWS, K, 1])
@pytest.mark.parametrize("name", BODIES)
def test_values_are_kept(name: str, rows: int) -> None:
    """Whatever is guessed about the batch; forward and in the adjoint."""
    program, n_carry = body_program(name, rows)
    for body, _ in both(program, n_carry):
        first = opened(body)
        same(body, first)
        same(body, batch_first(first, n_carry))


@pytest.mark.parametrize("rows", [ROWS, K])
@pytest.mark.parametrize("name", [name for name, case in BODIES.items() if case.split])
def test_proved_rows_are_independent(name: str, rows: int) -> None:
    """What is left in the outer loop of the forward and of the adjoint body."""
    program, n_carry = body_program(name, rows)
    for body, n_ys in both(program, n_carry):
        moved = batch_first(opened(body), n_carry)
        assert any(e.primitive is INNER for e in moved.equations)
        left = _Planner(moved, n_carry, n_ys, 2, native=True).plan().inner
        if rows != K or row_values(left, n_carry).mixing is None:
            assert row_values(left, n_carry).mixing is None
            assert not depends_across(left)


def inner(body: Any) -> Program:
    """A program with an inner loop over (carry, x with time behind the batch; a capture)."""
    shapes = [(ROWS, 4), (ROWS, 4), (ROWS, 4)]
    program = trace(body, [Aval(s, np.float64) for s in shapes], flat=True).program
    program = program.replaced(inputs=program.inputs[:2], captures=program.inputs[2:])
    params = {"body": program, "n_carry": 1, "n_ys": 1, "length": K, "reverse": False, "lead": (1,)}
    outer = [Aval(s, np.float64) for s in ((ROWS, 4), (ROWS, K, 4), (ROWS, 4))]
    return trace(lambda h, xs, u: list(INNER.bind((h, xs, u), params)), outer, flat=True).program


MIXING = {
    "mean": lambda h, x, u: [h - h.mean(axis=0) + x, h],
    "rows of a capture": lambda h, x, u: [h + u.sum(axis=0), x],
    "rows of x": lambda h, x, u: [h + x[::-1], h],
    "the first row in what is stacked": lambda h, x, u: [h + x * u, h[:1] + x],
}


@pytest.mark.parametrize("name", MIXING)
def test_rows_that_mix_inside_are_found(name: str) -> None:
    program = inner(MIXING[name])
    found = row_values(program, 1)
    assert found.mixing is not None and "scan" in found.mixing.why
    assert depends_across(program)


def test_rows_that_stay_apart_inside() -> None:
    program = inner(lambda h, x, u: [ops.tanh(h + x * u), h.sum(axis=-1)])
    assert row_values(program, 1).mixing is None
    assert not depends_across(program)
