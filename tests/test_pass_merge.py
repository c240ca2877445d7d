"""Merging products: the same numbers from fewer products, and nothing drawn into the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from cells import B, H, X, body_of, recipes, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

import tinygrad_lstm as tg
from tinygrad_lstm import ops
from tinygrad_lstm.compiler.adjoint import Adjoint, adjoint
from tinygrad_lstm.compiler.merge import merge_matmuls
from tinygrad_lstm.ops.control import record_body
from tinygrad_lstm.primitive import Aval
from tinygrad_lstm.program import Program
from tinygrad_lstm.trace import trace
from tinygrad_lstm.tree import flatten


def recorded(body: Callable[..., Any], carry: Any, x: Any) -> tuple[Program, list[Any], int]:
    """(program, values of the captures, number of leaves of the carry); x is one step's."""
    leaves, tree = flatten(carry)
    x_leaves, x_tree = flatten(x)
    stacked = [tg.asarray(leaf.numpy()[None]) for leaf in x_leaves]
    made = record_body(body, leaves, tree, stacked, x_tree)
    return made.program, [t.numpy() for t in made.captures], len(leaves)


def products(program: Program) -> list[tuple[int, ...]]:
    return [program.avals[e.outputs[0]].shape for e in program.equations if e.primitive.name == "matmul"]


def names(program: Program) -> list[str]:
    return [e.primitive.name for e in program.equations]


def some(rng: np.random.Generator, avals: Sequence[Any]) -> list[np.ndarray]:
    return [rng.standard_normal(a.shape).astype(a.dtype) for a in avals]


def assert_same(before: Program, after: Program, captures: Sequence[Any] = (), seed: int = 0) -> None:
    """Both programs compute the same, and have the same interface."""
    assert (before.inputs, before.captures, before.output_avals()) == (
        after.inputs, after.captures, after.output_avals(),
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    inputs = some(rng, [before.avals[s] for s in before.inputs])
    captures = captures or some(rng, [before.avals[s] for s in before.captures])
    for a, b in zip(before.run(inputs, captures), after.run(inputs, captures), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-11, atol=1e-12)


def reversed_body(program: Program, n_carry: int, wanted_x: bool = False) -> Adjoint:
    n_ys, n_x = len(program.outputs) - n_carry, len(program.inputs) - n_carry
    return adjoint(program, n_carry, n_ys, (True,) * n_ys, (wanted_x,) * n_x + (True,) * len(program.captures))


def gates(turned: bool = False, columns: bool = False) -> tuple[Program, list[Any], int]:
    """An LSTM typed with eight products: as rows, with weights (out, in), or with states that are columns."""
    rng = np.random.default_rng(3)
    t = lambda *shape: tg.tensor(0.4 * rng.standard_normal(shape), requires_grad=True)
    wide = (lambda n: (H, n)) if turned or columns else (lambda n: (n, H))
    w, u = {g: t(*wide(X)) for g in "ifgo"}, {g: t(*wide(H)) for g in "ifgo"}
    b = {g: t(*((H, 1) if columns else (H,))) for g in "ifgo"}

    def z(g: str, x: Any, h: Any) -> Any:
        if columns:
            return w[g] @ x + u[g] @ h + b[g]
        return x @ (w[g].T if turned else w[g]) + h @ (u[g].T if turned else u[g]) + b[g]

    def body(state: Any, x: Any) -> Any:
        h, c = state
        i, f, o = [ops.sigmoid(z(g, x, h)) for g in "ifo"]
        c = f * c + i * ops.tanh(z("g", x, h))
        h = o * ops.tanh(c)
        return (h, c), h

    shape, x_shape = ((H, B), (X, B)) if columns else ((B, H), (B, X))
    return recorded(body, (tg.tensor(np.zeros(shape)), tg.tensor(np.zeros(shape))), tg.tensor(np.zeros(x_shape)))


# ---------------------------------------------------------------------------- what it is for


@pytest.mark.parametrize(("turned", "columns"), [(False, False), (True, False), (False, True)])
def test_eight_products_of_an_lstm_become_two(turned: bool, columns: bool) -> None:
    program, captures, n_carry = gates(turned, columns)
    assert len(products(program)) == 8
    merged = merge_matmuls(program, program.captures, n_carry)
    assert sorted(products(merged)) == [(4 * H, B) if columns else (B, 4 * H)] * 2
    assert_same(program, merged, captures)
    assert "concatenate" in str(merged)


@pytest.mark.parametrize(("turned", "columns"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("first", [False, True], ids=["adjoint of the body", "adjoint of the merged body"])
def test_the_adjoint_has_one_product_for_the_state_and_one_for_each_weight(
    first: bool, turned: bool, columns: bool
) -> None:
    program, captures, n_carry = gates(turned, columns)
    if first:
        program = merge_matmuls(program, program.captures, n_carry)
    pair = reversed_body(program, n_carry)
    merged = merge_matmuls(pair.backward, pair.backward.captures, n_carry)
    turn = (lambda *shape: shape[::-1]) if columns else (lambda *shape: shape)
    assert sorted(products(merged)) == sorted([turn(B, H), turn(H, 4 * H), turn(X, 4 * H)])
    bias = [e for e in merged.equations if e.primitive.name == "sum_to"]
    # The bias of a column is summed over the last axis, of a row over the axis in front of the joined one.
    assert len(bias) == (4 if columns else 1)
    assert_same(pair.backward, merged, captures)


def test_what_leaves_the_loop_is_not_drawn_into_it() -> None:
    """d @ U.T is needed by the next carry, d @ W.T is not: they share d and stay two products."""
    program, captures, n_carry = gates()
    pair = reversed_body(program, n_carry, wanted_x=True)
    merged = merge_matmuls(pair.backward, pair.backward.captures, n_carry)
    assert sorted(products(merged)) == sorted([(B, H), (H, 4 * H), (X, 4 * H), (B, X)])
    assert_same(pair.backward, merged, captures)
    # Both are products of one concatenation.
    lefts = {e.operands[0] for e in merged.equations if e.primitive.name == "matmul" and e.operands[0] in rows(merged)}
    assert len(lefts) == 1


def rows(program: Program) -> set[int]:
    return {e.outputs[0] for e in program.equations if e.primitive.name == "concatenate"}


def test_gradients_come_back_in_the_users_order() -> None:
    program, captures, n_carry = gates()
    pair = reversed_body(merge_matmuls(program, program.captures, n_carry), n_carry, wanted_x=True)
    merged = merge_matmuls(pair.backward, pair.backward.captures, n_carry)
    rng = np.random.default_rng(5)
    arrays = some(rng, [program.avals[s] for s in program.inputs])
    out = pair.forward.run(arrays, captures)
    seeds = some(rng, program.output_avals())
    residuals, reads = out[3:], [arrays[2 + k] for k in pair.reads]
    found = merged.run([*seeds[:2], *residuals, *reads, *seeds[2:]], captures)
    _, pullback = tg.vjp(lambda *a: tuple(program.apply(a[:3], a[3:])), *arrays, *captures)
    for a, b in zip(found, pullback(tuple(seeds)), strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-11, atol=1e-12)


# ---------------------------------------------------------------------------- random bodies


@settings(max_examples=60)
@given(recipe=recipes(), seed=st.integers(0, 999))
def test_random_bodies_and_their_adjoints_keep_their_values(recipe: Any, seed: int) -> None:
    t = tensors(seed, 1)
    program, captures, n_carry = recorded(body_of(recipe, t), (t["h"], t["c"]), tg.tensor(t["x"].numpy()[0]))
    merged = merge_matmuls(program, program.captures, n_carry)
    assert_same(program, merged, captures, seed)
    assert len(products(merged)) <= len(products(program))
    pair = reversed_body(merged, n_carry, wanted_x=True)
    assert_same(pair.backward, merge_matmuls(pair.backward, pair.backward.captures, n_carry), captures, seed)


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    swap=st.booleans(),
    lead=st.sampled_from([(), (2,)]),
    terms=st.integers(0, 3),
    data=st.data(),
)
def test_products_and_sums_of_any_width(sizes: list[int], swap: bool, lead: Any, terms: int, data: Any) -> None:
    """Widths differ from product to product; sums also hold numbers, broadcast rows, and terms that are no products."""
    f8 = np.dtype("f8")
    turn = (lambda a, b: b @ a) if swap else (lambda a, b: a @ b)
    shape = lambda m, n: (n, m) if swap else (m, n)
    order = data.draw(st.permutations(range(len(sizes))))

    def f(h: Any, *matrices: Any) -> list[Any]:
        wide = [turn(h, m) for m in matrices[: len(sizes)]]
        total: Any = 1.0
        for k in order:
            total = turn(ops.tanh(wide[k]), matrices[len(sizes) + k]) + total
        for k in range(terms):
            total = (total + h * (k + 2.0), total + 3.0, 2.0 + total + total.sum(axis=-1, keepdims=True))[k]
        return [*wide, total]

    avals = [Aval((*lead, *shape(3, 4)), f8)]
    avals += [Aval(shape(4, n), f8) for n in sizes] + [Aval(shape(n, 4), f8) for n in sizes]
    program = trace(f, avals, flat=True).program
    program = program.replaced(inputs=program.inputs[:1], captures=program.inputs[1:])
    merged = merge_matmuls(program)
    assert_same(program, merged)
    assert len(products(merged)) == 2


# ---------------------------------------------------------------------------- what stays as it is


def body_with(f: Callable[..., Any], *shapes: Any, n_inputs: int = 1, dtypes: str = "") -> Program:
    kinds = dtypes.split() if dtypes else ["f8"] * len(shapes)
    program = trace(f, [Aval(s, np.dtype(k)) for s, k in zip(shapes, kinds, strict=True)], flat=True).program
    return program.replaced(inputs=program.inputs[:n_inputs], captures=program.inputs[n_inputs:])


@pytest.mark.parametrize(
    "program",
    [
        body_with(lambda h, u, v: [h @ u, h @ v], (2, 3), (3, 3), (3, 3), dtypes="f8 f8 f4"),
        body_with(lambda h, u, v: [h @ u, h @ v], (2, 3), (3, 3), (3, 3), n_inputs=3),
        body_with(lambda h, u, v: [h @ u, (h + 1.0) @ v], (2, 3), (3, 3), (3, 3)),
        body_with(lambda h, u, v: [h @ u, h @ v], (5, 2, 3), (5, 3, 3), (5, 3, 3)),
        body_with(lambda h, u, v, w: [u @ v + h, u @ w + h, v @ w + h], (3, 3), (3, 3), (3, 3), (3, 3)),
        body_with(lambda h, u, v: [h @ u + ops.tanh(h) @ v], (2, 30), (30, 1), (30, 1)),
        body_with(lambda h, u, v: [h @ u + (h[:1] + 1.0) @ v], (2, 3), (3, 3), (3, 3)),
        body_with(lambda a, b, u, v: [a @ u + b @ v], (2, 3), (2, 3), (3, 3), (3, 3), n_inputs=2, dtypes="f4 f8 f4 f8"),
    ],
    ids=["dtypes", "changing", "operands", "batch", "invariant", "long", "broadcast", "sum of dtypes"],
)  # fmt: skip
def test_products_that_have_nothing_to_share_stay(program: Program) -> None:
    merged = merge_matmuls(program)
    assert names(merged) == names(program)
    assert_same(program, merged)


def test_a_product_that_is_read_elsewhere_too_is_not_drawn_into_a_sum() -> None:
    f = lambda a, b, u, v: [a @ u + b @ v, ops.tanh(a @ u)]
    program = body_with(f, (2, 3), (2, 3), (3, 3), (3, 3), n_inputs=2)
    merged = merge_matmuls(program)
    assert len(products(merged)) == 2
    assert_same(program, merged)


def test_products_of_one_operand_in_a_sum_do_not_copy_it() -> None:
    program = body_with(lambda h, u, v: [h @ u + h @ v], (2, 3), (3, 3), (3, 3))
    merged = merge_matmuls(program)
    assert [e.operands[0] for e in merged.equations if e.primitive.name == "matmul"] == [program.inputs[0]]
    assert_same(program, merged)


def test_a_concatenation_that_exists_is_used_in_its_order() -> None:
    f = lambda a, b, u, v: [a @ u + b @ v, ops.concatenate([b, a], -1)]
    program = body_with(f, (2, 3), (2, 3), (3, 3), (3, 3), n_inputs=2)
    merged = merge_matmuls(program)
    (product,) = [e for e in merged.equations if e.primitive.name == "matmul"]
    assert product.operands[0] == merged.outputs[1]
    assert_same(program, merged)


def test_sums_outside_of_the_loop_stay_there() -> None:
    """Only the terms that need the carry are added in the loop."""
    f = lambda h, c, x, w, u: [ops.tanh((x @ w + x) + h @ u + c @ u), c]
    program = body_with(f, (2, 3), (2, 3), (2, 3), (3, 3), (3, 3), n_inputs=3)
    merged = merge_matmuls(program, n_carry=2)
    assert len(products(merged)) == 2
    (outside,) = [e for e in merged.equations if e.primitive.name == "matmul" and e.operands[0] == program.inputs[2]]
    assert (outside.outputs[0], program.inputs[2]) in [e.operands for e in merged.equations]
    assert_same(program, merged)


def test_sums_over_the_axis_of_the_pieces_are_not_sums_of_the_whole() -> None:
    f = lambda a, b, w: [
        w @ ops.concatenate([a, b], -2),
        ops.sum_to(a, (3,)),
        ops.sum_to(b, (3,)),
        a.sum(-2),
        b.sum(-2),
    ]
    program = body_with(f, (2, 3), (2, 3), (3, 4), n_inputs=3)
    merged = merge_matmuls(program)
    assert sorted(names(merged)) == sorted(names(program))
    assert_same(program, merged)


def test_the_input_projection_stays_outside_of_the_loop() -> None:
    """x @ W + h @ U: a merged product would do the work of x @ W at every step."""
    f = lambda h, x, w, u: [ops.tanh(x @ w + h @ u)]
    program = body_with(f, (2, 3), (2, 3), (3, 3), (3, 3), n_inputs=2)
    assert len(products(merge_matmuls(program, n_carry=1))) == 2
    assert len(products(merge_matmuls(program, n_carry=0))) == 1


def test_pieces_that_depend_on_each_other_are_not_computed_at_once() -> None:
    def f(a: Any, p: Any, w: Any) -> list[Any]:
        first = a @ p
        q = ops.tanh(first)
        return [first, a @ q, ops.concatenate([p, q], -1) @ w]

    program = body_with(f, (3, 3), (3, 3), (6, 2), n_inputs=2)
    assert_same(program, merge_matmuls(program))


def test_two_merges_that_would_wait_for_each_other() -> None:
    """Either group of pieces can be merged, but not both."""

    def f(a: Any, b: Any, p: Any, s: Any) -> list[Any]:
        a_p, b_s = a @ p, b @ s
        q, t = ops.tanh(b_s), ops.tanh(a_p)
        return [a_p, a @ q, b_s, b @ t, ops.concatenate([p, q], -1), ops.concatenate([s, t], -1)]

    program = body_with(f, *[(3, 3)] * 4, n_inputs=4)
    merged = merge_matmuls(program)
    assert len(products(merged)) == 3
    assert_same(program, merged)


def test_labels_stay_on_their_values() -> None:
    program = body_with(lambda h, u, v: [tg.name(h @ u, "left"), h @ v], (2, 3), (3, 3), (3, 3))
    assert merge_matmuls(program).labelled("left") == program.outputs[0]
