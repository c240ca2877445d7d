"""Two hundred random cells: the scan against the loop step by step, and every pass against the program it was given."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from random_cells import OPS, OUTPUTS, UPDATES, RandomCell, cells, make

import tinygrad_lstm as tg
from tinygrad_lstm import ops
from tinygrad_lstm.compiler.adjoint import Adjoint, adjoint
from tinygrad_lstm.compiler.algebra import algebra
from tinygrad_lstm.compiler.fuse import fuse
from tinygrad_lstm.compiler.merge import merge_matmuls
from tinygrad_lstm.compiler.recompute import save_or_recompute
from tinygrad_lstm.compiler.simplify import common, dead_code, simplify
from tinygrad_lstm.ops import loop
from tinygrad_lstm.ops.control import Recorded, record_body
from tinygrad_lstm.program import Program
from tinygrad_lstm.tree import flatten

COUNT = 200
CHUNKS = [range(start, start + 20) for start in range(0, COUNT, 20)]
NATIVE = range(0, COUNT, 8)  # 25 of them
chunked = pytest.mark.parametrize("seeds", CHUNKS, ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")


def close(found: Any, expected: Any, what: Any) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype), what
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10, err_msg=str(what))


# ---------------------------------------------------------------------------- whole scans


def run(cell: RandomCell, reverse: bool = False) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Values of all outputs, and gradients of a function of all of them."""
    carry, ys = ops.scan(cell.body, cell.init, cell.xs, reverse=reverse)
    leaves = flatten((carry, ys))[0]
    rng = np.random.default_rng(7)
    loss = tg.tensor(0.0, dtype=np.float64)
    for leaf in leaves:
        if leaf.dtype.kind == "f":
            loss = loss + (ops.sin(leaf) * rng.standard_normal(leaf.shape)).sum()
    sources = cell.leaves()
    for leaf in sources.values():
        leaf.zero_grad()
    if loss.requires_grad:
        loss.backward()
    gradients = {n: np.zeros(leaf.shape) if leaf.grad is None else leaf.grad for n, leaf in sources.items()}
    return [leaf.numpy() for leaf in leaves], gradients


def check_scan(cell: RandomCell, reverse: bool = False) -> None:
    values, gradients = run(cell, reverse)
    with tg.eager():
        expected, expected_gradients = run(cell, reverse)
    for k, (a, b) in enumerate(zip(values, expected, strict=True)):
        close(a, b, (k, cell.recipe))
    for name, gradient in gradients.items():
        close(gradient, expected_gradients[name], (name, cell.recipe))


@chunked
def test_scan_is_the_loop(seeds: range) -> None:
    for seed in seeds:
        check_scan(make(seed), reverse=seed % 3 == 2)


@settings(max_examples=30)
@given(cell=cells())
def test_scan_is_the_loop_for_cells_that_shrink(cell: RandomCell) -> None:
    check_scan(cell)


# ---------------------------------------------------------------------------- pass by pass


def recorded(cell: RandomCell) -> Recorded:
    carry, carry_tree = flatten(cell.init)
    xs, x_tree = flatten(cell.xs)
    return record_body(cell.body, carry, carry_tree, xs, x_tree)


def arguments(cell: RandomCell) -> list[np.ndarray]:
    return [*(t.numpy() for t in cell.init), *(t.numpy()[0] for t in flatten(cell.xs)[0])]


def passes(program: Program, n_carry: int) -> dict[str, Program]:
    """What every pass makes of a loop body."""
    merged = merge_matmuls(program, n_carry=n_carry)
    return {
        "dead_code": dead_code(program),
        "common": common(program),
        "algebra": algebra(program),
        "simplify": simplify(program),
        "merge_matmuls": merged,
        "merge_matmuls twice": merge_matmuls(merged, n_carry=n_carry),
        "fuse": fuse(dead_code(program)),
        "fuse(merge_matmuls)": fuse(merged),
    }


def reverse_mode(made: Recorded, program: Program) -> Adjoint:
    n_ys = len(program.outputs) - made.n_carry
    floats = lambda avals: tuple(np.dtype(a.dtype).kind == "f" for a in avals)
    present = floats(program.aval(o) for o in program.outputs[made.n_carry :])
    wanted = floats(program.avals[s] for s in (*program.inputs[made.n_carry :], *program.captures))
    return adjoint(program, made.n_carry, n_ys, present, wanted)


def fewer(pair: Adjoint, made: Recorded, **options: Any) -> Adjoint:
    return save_or_recompute(pair, made.n_carry, len(made.program.outputs) - made.n_carry, **options)


def pulled_back(pair: Adjoint, made: Recorded, inputs: list[np.ndarray], captures: list[np.ndarray]) -> list[Any]:
    """Run both programs of an adjoint, cotangents of 1, 2, ... for the outputs."""
    n = len(made.program.outputs)
    out = pair.forward.run(inputs, captures)
    seeds = [np.full(o.shape, 1.0 + 0.5 * k) for k, o in enumerate(map(np.asarray, out[:n])) if o.dtype.kind == "f"]
    reads = [inputs[made.n_carry + k] for k in pair.reads]
    n_float = made.n_carry
    return list(pair.backward.run([*seeds[:n_float], *out[n:], *reads, *seeds[n_float:]], captures))


@chunked
def test_every_pass_keeps_the_values(seeds: range) -> None:
    for seed in seeds:
        cell = make(seed)
        made = recorded(cell)
        inputs, captures = arguments(cell), [t.numpy() for t in made.captures]
        with tg.no_grad(), tg.eager():
            new, y = cell.body(cell.init, {name: t[0] for name, t in cell.xs.items()})
        expected = [np.asarray(leaf) for leaf in flatten((new, y))[0]]
        for name, program in {"recorded": made.program, **passes(made.program, made.n_carry)}.items():
            for a, b in zip(program.run(inputs, captures), expected, strict=True):
                close(a, b, (name, cell.recipe))


@chunked
def test_every_pass_keeps_the_adjoint(seeds: range) -> None:
    """The adjoint of a body that a pass was applied to, and passes applied to the backward body."""
    for seed in seeds:
        cell = make(seed)
        made = recorded(cell)
        inputs, captures = arguments(cell), [t.numpy() for t in made.captures]
        pair = reverse_mode(made, made.program)
        expected = pulled_back(pair, made, inputs, captures)
        pairs = {
            "merged body": reverse_mode(made, merge_matmuls(made.program, n_carry=made.n_carry)),
            "recomputed where cheap": fewer(pair, made),
            "recomputed where possible": fewer(pair, made, flops_per_byte=math.inf),
            **{n: pair._replace(backward=p) for n, p in passes(pair.backward, made.n_carry).items()},
        }
        for name, other in pairs.items():
            for a, b in zip(pulled_back(other, made, inputs, captures), expected, strict=True):
                close(a, b, (name, cell.recipe))


def test_the_cells_have_all_of_it() -> None:
    """Every op, update and output stands in some of the cells, and a seed always gives the same cell."""
    made = [make(seed) for seed in range(COUNT)]
    assert {s.op for cell in made for s in cell.recipe.body} == set(OPS)
    assert {u for cell in made for u in cell.recipe.updates} == set(UPDATES)
    assert {o for cell in made for o in cell.recipe.outputs} == set(OUTPUTS)
    assert make(3).recipe == made[3].recipe
    for a, b in zip(make(3).leaves().values(), made[3].leaves().values(), strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


# ---------------------------------------------------------------------------- native code


@pytest.fixture
def natively(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every loop in native code, whatever its size; nothing that was planned before."""
    monkeypatch.setenv("TINYGRAD_LSTM_COMPILE", "always")
    loop._known.clear()
    yield
    loop._known.clear()


@pytest.mark.slow
@pytest.mark.parametrize("seed", NATIVE)
def test_native_code_is_the_loop(seed: int, natively: Any) -> None:
    check_scan(make(seed), reverse=seed % 3 == 2)


@pytest.mark.nightly
@chunked
def test_native_code_is_the_loop_for_all_cells(seeds: range, natively: Any) -> None:
    for seed in seeds:
        check_scan(make(seed), reverse=seed % 3 == 2)
