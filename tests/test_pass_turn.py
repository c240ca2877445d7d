"""Products that are only read transposed, and loops of one step of a few rows, in which they arise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from native_cells import CASES, outcome
from native_cells import runs as runs

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops
from tinygrad_lstm.compiler.loop import plan_loop
from tinygrad_lstm.compiler.turn import turned
from tinygrad_lstm.primitive import Aval
from tinygrad_lstm.trace import trace

MATRICES = [(3, 4), (4, 5)]
STACKS = [(2, 3, 4), (2, 4, 5)]


def program_of(f: Any, shapes: list[tuple[int, ...]]) -> Any:
    return trace(f, [Aval(shape, np.dtype("f8")) for shape in shapes], flat=True).program


def names(program: Any) -> list[str]:
    return [equation.primitive.name for equation in program.equations]


TURNED = {
    "a matrix": (lambda a, b: [(a @ b).T], MATRICES, ["transpose", "transpose", "matmul"]),
    "operands that are transposed already": (lambda a, b: [(b.T @ a.T).T], MATRICES, ["matmul"]),
    "a stack": (lambda a, b: [ops.swapaxes(a @ b, -1, -2)], STACKS, ["transpose", "transpose", "matmul"]),
}
KEPT = {
    "read as it is, too": (lambda a, b: [(p := a @ b), p.T], MATRICES),
    "all axes turned around": (lambda a, b: [ops.transpose(a @ b, (2, 1, 0))], STACKS),
    "a vector": (lambda a, b: [(a[0] @ b)[None].T], MATRICES),
    "no product": (lambda a, b: [(a + 1.0).T, b], MATRICES),
}


@pytest.mark.parametrize("name", TURNED)
def test_what_is_turned(name: str, rng: np.random.Generator) -> None:
    f, shapes, expected = TURNED[name]
    before = program_of(f, shapes)
    after = turned(before)
    assert names(after) == expected
    arrays = [rng.standard_normal(shape) for shape in shapes]
    for a, b in zip(before.run(arrays), after.run(arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-14)


@pytest.mark.parametrize("name", KEPT)
def test_what_is_not(name: str) -> None:
    f, shapes = KEPT[name]
    program = program_of(f, shapes)
    assert turned(program) is program


# ---------------------------------------------------------------------------- one step of a few rows


def plan(steps: int, batch: int, hidden: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plan of an LSTM's adjoint loop."""
    monkeypatch.setenv("TINYGRAD_LSTM_COMPILE", "always")
    from tinygrad_lstm.ops import prepared

    found = []
    original = prepared.plan_of
    monkeypatch.setattr(prepared, "plan_of", lambda *args: found.append(original(*args)) or found[-1])
    layer = nn.LSTM(3, hidden)
    y, _ = layer(tg.tensor(np.ones((steps, batch, 3), np.float32), requires_grad=True))
    y.sum().backward()
    return found[-1]


@pytest.mark.parametrize(
    ("steps", "batch", "hidden", "apart"),
    [(1, 1, 4, 0), (1, 4, 4, 0), (1, 5, 4, 3), (2, 1, 4, 3), (1, 4, 96, 3)],
)
def test_products_stay_in_the_loop_where_they_are_few_and_small(
    steps: int, batch: int, hidden: int, apart: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dx and both weight gradients are products behind the loop, or none is; and nothing is added up over one step."""
    found = plan(steps, batch, hidden, monkeypatch)
    assert found.compiled
    assert names(found.behind).count("matmul") == apart
    assert names(found.inner).count("matmul") == 4 - apart
    if not apart:
        assert not found.sums and set(names(found.behind)) <= {"reshape"} and not names(found.before)


def test_what_cannot_run_in_the_loop_runs_in_front_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one thing has no native form, the loop has one without it."""
    monkeypatch.setenv("TINYGRAD_LSTM_COMPILE", "always")

    def body(h: Any, x: Any, table: Any) -> Any:
        h = ops.tanh(h + x @ ops.scatter_add(table, np.array([0, 0]), table[1:3]))
        return [h, h]

    program = program_of(body, [(1, 4), (1, 4), (4, 4)])
    captures = (*program.inputs[2:], *program.captures)
    found = plan_loop(program.replaced(inputs=program.inputs[:2], captures=captures), 1, 1, 1)
    assert found.compiled and "scatter_add" in names(found.before)


@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize("name", ["lstm", "attention", "rows_normalised", "batch_norm", "gates_upon_gates"])
def test_one_step_of_a_few_rows(name: str, rows: int, runs: list[bool]) -> None:
    case = CASES[name]
    arrays = case.arrays(0, 1, rows)
    found = outcome(case.make, *arrays, eager=False)
    expected = outcome(case.make, *arrays, eager=True)
    assert runs
    for a, b in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
