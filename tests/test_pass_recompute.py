"""What is kept for the backward body: the same gradients from fewer bytes, and the cheapest choice there is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from cells import body_of, recipes, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

import tinygrad_lstm as tg
from tinygrad_lstm import ops
from tinygrad_lstm.compiler.adjoint import Adjoint, adjoint
from tinygrad_lstm.compiler.recompute import _Flow, _price, kept_bytes, save_or_recompute
from tinygrad_lstm.primitive import Aval
from tinygrad_lstm.program import Program
from tinygrad_lstm.trace import trace

B, H = 3, 4
REPEATED = {"reshape", "transpose", "broadcast_to", "alias", "stop_gradient", "split", "getitem", "astype"}


def body_with(f: Callable[..., Any], n_inputs: int, *shapes: Any, dtype: str = "f4") -> Program:
    program = trace(f, [Aval(shape, np.dtype(dtype)) for shape in shapes], flat=True).program
    return program.replaced(inputs=program.inputs[:n_inputs], captures=program.inputs[n_inputs:])


def pair_of(program: Program, n_carry: int) -> tuple[Adjoint, int]:
    """The adjoint with all cotangents, and the number of ys."""
    n_ys = len(program.outputs) - n_carry
    wanted = (True,) * (len(program.inputs) - n_carry + len(program.captures))
    return adjoint(program, n_carry, n_ys, (True,) * n_ys, wanted), n_ys


def lstm(dtype: str = "f4") -> Program:
    def body(h: Any, c: Any, x: Any, w: Any) -> list[Any]:
        i, f, g, o = ops.chunk(ops.concatenate([x, h], -1) @ w, 4)
        c = ops.sigmoid(f) * c + ops.sigmoid(i) * ops.tanh(g)
        h = ops.sigmoid(o) * ops.tanh(c)
        return [h, c, h]

    return body_with(body, 3, (B, H), (B, H), (B, 2), (2 + H, 4 * H), dtype=dtype)


def assert_same(pair: Adjoint, other: Adjoint, n_carry: int, n_ys: int, seed: int = 0, y_seeds: bool = True) -> None:
    """Bit for bit the same outputs and cotangents."""
    rng = np.random.default_rng(seed)
    some = lambda avals: [rng.standard_normal(a.shape).astype(a.dtype) for a in avals]
    program = pair.forward
    inputs, captures = (
        some([program.avals[s] for s in program.inputs]),
        some(program.avals[s] for s in program.captures),
    )
    seeds = some(program.output_avals()[: n_carry + n_ys * y_seeds])
    results = []
    assigned = [slot for e in other.backward.equations for slot in e.outputs]
    assert len({*assigned, *other.backward.inputs}) == len(assigned) + len(other.backward.inputs)
    for p in (pair, other):
        out = p.forward.run(inputs, captures)
        residuals = out[n_carry + n_ys :]
        assert len(residuals) == len(p.residuals)
        reads = [inputs[n_carry + k] for k in p.reads]
        found = p.backward.run([*seeds[:n_carry], *residuals, *reads, *seeds[n_carry:]], captures)
        results.append([*out[: n_carry + n_ys], *found])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def repeated(pair: Adjoint, other: Adjoint) -> list[str]:
    """The names of the equations that the other backward body computes again."""
    before = {slot for e in pair.backward.equations for slot in e.outputs}
    return [e.primitive.name for e in other.backward.equations if e.outputs[0] not in before]


# ---------------------------------------------------------------------------- the choice


def test_lstm_keeps_its_gates_and_computes_the_cell_state_again() -> None:
    pair, n_ys = pair_of(lstm(), 2)
    smallest = save_or_recompute(pair, 2, n_ys, flops_per_byte=math.inf)
    # tanh(c) comes from the gates and the previous c, which are kept.
    assert repeated(pair, smallest).count("tanh") == 1
    assert {"multiply", "add"} <= set(repeated(pair, smallest))
    assert kept_bytes(pair, 2, n_ys) - kept_bytes(smallest, 2, n_ys) == B * H * 4
    assert_same(pair, smallest, 2, n_ys)


def test_float64_functions_are_dear() -> None:
    for dtype, again in (("f4", ["exp"]), ("f8", [])):
        body = body_with(lambda c, x: [ops.exp(c * x) * 0.1, c * x], 2, (B, H), (B, H), dtype=dtype)
        pair, n_ys = pair_of(body, 1)
        fewer = save_or_recompute(pair, 1, n_ys, flops_per_byte=6.0)
        assert [name for name in repeated(pair, fewer) if name == "exp"] == again
        assert_same(pair, fewer, 1, n_ys)


@pytest.mark.parametrize(("rate", "again"), [(2.9, []), (3.0, []), (3.1, ["exp"])])
def test_keeping_moves_eight_bytes_and_exp_takes_24_operations(rate: float, again: list[str]) -> None:
    pair, n_ys = pair_of(body_with(lambda c: [ops.exp(c) + ops.square(c)], 1, (B, H)), 1)
    assert repeated(pair, save_or_recompute(pair, 1, n_ys, flops_per_byte=rate)) == again


def test_what_is_computed_again_may_read_what_depends_on_captures() -> None:
    body = body_with(lambda c, x, w: [ops.square(c * x * ops.tanh(w))], 2, (B, H), (B, H), (H,))
    pair, n_ys = pair_of(body, 1)
    fewer = save_or_recompute(pair, 1, n_ys)
    assert repeated(pair, fewer) == ["multiply", "multiply"]
    assert_same(pair, fewer, 1, n_ys)


def test_one_piece_of_a_split_is_kept_and_the_other_is_not() -> None:
    def body(c: Any, w: Any) -> list[Any]:
        a, b = ops.split(c @ w, 2, axis=-1)
        return [ops.square(a) + ops.square(b)]

    pair, n_ys = pair_of(body_with(body, 1, (B, H), (H, 2 * H)), 1)
    (split,) = [e for e in pair.forward.equations if e.primitive.name == "split"]
    kept = (pair.forward.inputs[0], *split.operands, split.outputs[0])
    fewer = save_or_recompute(pair, 1, n_ys, kept=kept)
    assert set(split.operands) < set(fewer.residuals) < set(kept)
    assert_same(pair, fewer, 1, n_ys)


def test_nothing_is_computed_again_where_arithmetic_is_infinitely_slow() -> None:
    pair, n_ys = pair_of(lstm(), 2)
    same = save_or_recompute(pair, 2, n_ys, flops_per_byte=0.0)
    assert (same.residuals, same.reads) == (pair.residuals, pair.reads)
    assert str(same.backward) == str(pair.backward)


def test_a_chain_of_arithmetic_is_kept_as_one_value() -> None:
    def body(c: Any, x: Any, w: Any) -> list[Any]:
        z = c @ w
        return [ops.square(z) / (1.0 + ops.abs(z)) * ops.where(z > 0.5, z, 0.1 * x)]

    pair, n_ys = pair_of(body_with(body, 2, (B, H), (B, H), (H, H)), 1)
    fewer = save_or_recompute(pair, 1, n_ys)
    product = next(e.outputs[0] for e in pair.forward.equations if e.primitive.name == "matmul")
    assert set(fewer.residuals) == {product, pair.forward.inputs[0]}
    assert kept_bytes(fewer, 1, n_ys) < kept_bytes(pair, 1, n_ys)
    assert_same(pair, fewer, 1, n_ys)


def test_a_product_a_reduction_and_a_users_primitive_are_never_computed_again(request: Any) -> None:
    request.addfinalizer(lambda: tg.REGISTRY.pop("test_own", None))
    own = tg.primitive("test_own", lambda x: x * 2.0, lambda g: g * 2.0, expression=lambda x: x * 2.0)

    def body(c: Any, w: Any) -> list[Any]:
        return [ops.square(c @ w) * ops.square(own(c)) + ops.softmax(c) * ops.square(c.sum(-1, keepdims=True))]

    pair, n_ys = pair_of(body_with(body, 1, (B, H), (H, H)), 1)
    fewer = save_or_recompute(pair, 1, n_ys, flops_per_byte=math.inf)
    assert repeated(pair, fewer)
    assert not {"matmul", "softmax", "sum", "test_own"} & set(repeated(pair, fewer))
    assert_same(pair, fewer, 1, n_ys)


def test_what_is_compared_exactly_is_kept() -> None:
    """The gradient of a maximum goes where x equals the maximum: an x that is computed again may be off by a bit."""
    pair, n_ys = pair_of(
        body_with(lambda c, x: [c * 0.5 + ops.max(c * x, axis=-1, keepdims=True)], 2, (B, H), (B, H)), 1
    )
    product = next(e.outputs[0] for e in pair.forward.equations if e.primitive.name == "multiply" and 1 in e.operands)
    assert product in save_or_recompute(pair, 1, n_ys, flops_per_byte=math.inf).residuals


def test_values_that_are_stored_anyway_cost_nothing() -> None:
    f = lambda h, c, x, u: [y := ops.tanh(h @ u * c), h * c, y]
    pair, n_ys = pair_of(body_with(f, 3, (B, H), (B, H), (B, H), (H, H)), 2)
    h, c = pair.forward.inputs[:2]
    out, new_c = pair.forward.outputs[:2]
    row = 4 * B * H
    bytes_of = lambda *residuals: kept_bytes(pair._replace(residuals=residuals), 2, n_ys)
    # h and tanh are the y, now or a step before; a row of c that goes in is the row that came out a step before.
    assert bytes_of(h, out) == 0
    assert bytes_of(c) == bytes_of(c, new_c) == bytes_of(new_c) == row
    product = next(e.outputs[0] for e in pair.forward.equations if e.primitive.name == "matmul")
    assert bytes_of(h, c, product) == 2 * row


def test_residuals_of_an_earlier_forward_pass_are_enough() -> None:
    """A backward pass whose y has no cotangent uses what the forward pass kept for all of them."""
    program = lstm()
    all_of_it = save_or_recompute(pair_of(program, 2)[0], 2, 1, flops_per_byte=math.inf)
    part = adjoint(program, 2, 1, (False,), (False, True))
    found = save_or_recompute(part, 2, 1, kept=all_of_it.residuals)
    assert set(found.residuals) <= set(all_of_it.residuals)
    assert_same(part, found, 2, 1, y_seeds=False)
    with pytest.raises(ValueError, match="residuals that were kept"):
        save_or_recompute(part, 2, 1, kept=all_of_it.residuals[:-1])


# ---------------------------------------------------------------------------- against all other choices


@settings(max_examples=80)
@given(edges=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 9)), max_size=14))
def test_the_cut_is_a_minimum(edges: list[tuple[int, int, int]]) -> None:
    flow = _Flow()
    flow.edge(0, 5, 0)
    for a, b, room in edges:
        flow.edge(a, b, room)
    price = lambda behind: sum(room for a, b, room in edges if a not in behind and b in behind)
    found = flow.cut(0, 5)
    every = [{5, *some} for n in range(5) for some in itertools.combinations(range(1, 5), n)]
    least = min(map(price, every))
    assert found is not None
    assert 0 not in found
    assert price(found) == least
    assert len(found) == min(len(some) for some in every if price(some) == least)


def test_no_cut_is_finite() -> None:
    flow = _Flow()
    flow.edge("a", "b", math.inf)
    flow.edge("b", "c", math.inf)
    assert flow.cut("a", "c") is None


OPERATIONS: list[Callable[[Any, Any], Any]] = [
    ops.add, ops.multiply, lambda a, b: ops.tanh(a), lambda a, b: ops.square(a), lambda a, b: a / (1.5 + b * b),
    lambda a, b: ops.where(a > b, a, b), lambda a, b: a.T, lambda a, b: ops.softmax(a),
]  # fmt: skip


def price_of(pair: Adjoint, kept: Sequence[int], needed: set[int], rate: float) -> float:
    """The bytes of a choice, from the definition: what is kept twice, and the arithmetic of the rest."""
    made = pair.forward.definitions()
    total = 0.0
    for slot in kept:
        times = 1 if slot in pair.forward.inputs[1:] else 2
        total += (
            64 * times * math.prod(pair.forward.avals[slot].shape) * np.dtype(pair.forward.avals[slot].dtype).itemsize
        )
    done = set(kept)
    pending = list(needed)
    while pending:
        slot = pending.pop()
        if slot in done:
            continue
        done.add(slot)
        if slot not in made:
            return math.inf
        total += _price(pair.forward, made[slot], rate)
        pending.extend(made[slot].reads())
    return total


@settings(max_examples=60)
@given(
    recipe=st.lists(st.tuples(st.integers(0, 7), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=5),
    rate=st.sampled_from([0.5, 3.0, 8.0]),
)
def test_no_other_choice_is_cheaper(recipe: Any, rate: float) -> None:
    def body(c: Any, x: Any) -> list[Any]:
        made = [c, x]
        for k, i, j in recipe:
            made.append(OPERATIONS[k](made[-min(i, len(made))], made[-min(j, len(made))]))
        return [ops.tanh(made[-1]) * c]

    pair, n_ys = pair_of(body_with(body, 2, (H, H), (H, H)), 1)
    fewer = save_or_recompute(pair, 1, n_ys, flops_per_byte=rate)
    xs = pair.forward.inputs[1:]
    needed = {*pair.residuals, *(xs[k] for k in pair.reads)}
    slots = [*pair.forward.inputs, *(s for e in pair.forward.equations for s in e.outputs)]
    if pair.forward.outputs[0] in slots and pair.forward.inputs[0] in pair.residuals:
        slots.remove(pair.forward.outputs[0])  # free as the carry's other end, and never read
    choices = itertools.chain.from_iterable(itertools.combinations(slots, n) for n in range(len(slots) + 1))
    least = min(price_of(pair, kept, needed, rate) for kept in choices)
    assert price_of(pair, [*fewer.residuals, *(xs[k] for k in fewer.reads)], needed, rate) == least


@settings(max_examples=60)
@given(recipe=recipes(), seed=st.integers(0, 999), rate=st.sampled_from([0.0, 3.0, 100.0, math.inf]))
def test_random_bodies_keep_their_gradients(recipe: Any, seed: int, rate: float) -> None:
    t = tensors(seed, 1)
    body = body_of(recipe, t)

    def flat(h: Any, c: Any, x: Any) -> list[Any]:
        (new_h, new_c), ys = body((h, c), x)
        return [new_h, new_c, *(ys[key] for key in sorted(ys))]

    program = trace(flat, [Aval(t[n].shape[n == "x" :], np.dtype("f8")) for n in ("h", "c", "x")], flat=True).program
    pair, n_ys = pair_of(program, 2)
    fewer = save_or_recompute(pair, 2, n_ys, flops_per_byte=rate)
    assert_same(pair, fewer, 2, n_ys, seed)
    assert kept_bytes(fewer, 2, n_ys) <= kept_bytes(pair, 2, n_ys) or rate < math.inf
    primitives = {e.primitive.name: e.primitive for e in pair.forward.equations}
    assert all(name in REPEATED or primitives[name].is_elementwise for name in repeated(pair, fewer))
