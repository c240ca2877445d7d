"""Algebra on programs: bit for bit the same numbers, from fewer equations."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinygrad_lstm as tg
from tinygrad_lstm import ops
from tinygrad_lstm.compiler.simplify import dead_code, simplify, unguarded
from tinygrad_lstm.ops.indexing import put
from tinygrad_lstm.ops.shape import stop_nan
from tinygrad_lstm.primitive import REGISTRY, Aval
from tinygrad_lstm.program import Equation, Literal, Program
from tinygrad_lstm.trace import trace

SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 5e-324, 1e308, -2.5]
R, C = 4, 6


def program_of(f: Callable[..., Any], *avals: Any) -> Program:
    given = [a if isinstance(a, Aval) else Aval(a, np.dtype("f8")) for a in avals or ((R, C), (R, C))]
    return trace(f, given, flat=True).program


def names(program: Program) -> list[str]:
    return [e.primitive.name for e in program.equations]


def full(value: float, shape: Sequence[int] = (R, C), dtype: Any = "f8") -> Any:
    return REGISTRY["full"].bind((), {"shape": tuple(shape), "dtype": np.dtype(dtype), "value": value})


def values(program: Program, seed: int = 0) -> list[np.ndarray]:
    """Inputs with every special value at many places."""
    rng = np.random.default_rng(seed)
    out = []
    for slot in program.inputs:
        aval = program.avals[slot]
        if np.dtype(aval.dtype).kind == "f":
            out.append(rng.choice([*SPECIAL, *rng.standard_normal(6)], aval.shape).astype(aval.dtype))
        else:
            out.append(rng.integers(0, 2, aval.shape).astype(aval.dtype))
    return out


def bits(a: Any) -> list[str]:
    """Every element as text, all NaN alike, -0.0 apart from 0.0."""
    return [repr(v) for v in np.asarray(a).reshape(-1).tolist()]


@np.errstate(all="ignore")
def assert_exact(program: Program, after: Program | None = None, signs: bool = True) -> Program:
    after = simplify(program) if after is None else after
    assert [a.shape for a in after.output_avals()] == [a.shape for a in program.output_avals()]
    for seed in range(3):
        arrays = values(program, seed)
        for a, b in zip(program.run(arrays), after.run(arrays), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert bits(a if signs else a + 0.0) == bits(b if signs else b + 0.0)
    return after


# ---------------------------------------------------------------------------- rules one by one


S = ops.split
CASES: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "times one": (lambda x, y: [x * 1.0 + 1 * y], ["add"]),
    "times an array of ones": (lambda x, y: [x * full(1.0) + full(1.0, (C,)) * y], ["add"]),
    "over one": (lambda x, y: [x / 1 + y / full(1.0)], ["add"]),
    "times minus one": (lambda x, y: [x * -1.0 * y], ["negative", "multiply"]),
    "plus minus zero": (lambda x, y: [(x + -0.0) * (-0.0 + y)], ["multiply"]),
    "minus zero": (lambda x, y: [(x - 0.0) * (y - full(0.0))], ["multiply"]),
    "twice negative": (lambda x, y: [ops.negative(-x) * y], ["multiply"]),
    "plus a negative": (lambda x, y: [x + (-y)], ["subtract"]),
    "a negative plus": (lambda x, y: [(-x) + y], ["subtract"]),
    "minus a negative": (lambda x, y: [x - (-y)], ["add"]),
    "product of negatives": (lambda x, y: [(-x) * (-y)], ["multiply"]),
    "transposed twice": (lambda x, y: [x.T.T * y], ["multiply"]),
    "three transposes": (lambda x, y: [x.T.T.T @ y], ["transpose", "matmul"]),
    "reshaped twice": (lambda x, y: [x.reshape((2, 2, C)).reshape((C, R)) @ y], ["reshape", "matmul"]),
    "reshaped there and back": (lambda x, y: [x.reshape((2, 2, C)).reshape((R, C)) * y], ["multiply"]),
    "broadcast to its shape": (lambda x, y: [ops.broadcast_to(x, (R, C)) * y], ["multiply"]),
    "broadcast twice": (
        lambda x, y: [ops.broadcast_to(ops.broadcast_to(x, (2, R, C)), (3, 2, R, C)) * y],
        ["broadcast_to", "multiply"],
    ),
    "summed to its shape": (lambda x, y: [ops.sum_to(x, (R, C)) * y], ["multiply"]),
    "alias": (lambda x, y: [ops.alias(x) * y], ["multiply"]),
    "where with a number": (lambda x, y: [ops.where(full(1.0), x, y) * ops.where(full(0.0), x, y)], ["multiply"]),
    "wider and back": (lambda x, y: [x.astype(np.longdouble).astype(np.float64) * y], ["multiply"]),
    "split and joined": (lambda x, y: [ops.concatenate(S(x, 3, -1), -1) * y], ["multiply"]),
    "sliced and joined": (lambda x, y: [ops.concatenate([x[:, :2], x[..., 2:5], x[:, 5:]], -1) * y], ["multiply"]),
    "joined and split": (lambda x, y: [a * b for a, b in [S(ops.concatenate([x, y], 0), 2, 0)]], ["multiply"]),
    "joined and split coarsely": (
        lambda x, y: [S(ops.concatenate([*S(x, 2, -1), y], -1), [6], -1)[0] * y],
        ["multiply"],
    ),
    "joined and sliced": (lambda x, y: [ops.concatenate([x, y], -1)[:, C:] * x], ["multiply"]),
    "one piece of a split": (lambda x, y: [S(x, 3, -1)[1] * y[:, :2]], ["getitem", "getitem", "multiply"]),
    "all of it": (lambda x, y: [x[:, :] * y[...]], ["multiply"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_cancels(name: str) -> None:
    f, expected = CASES[name]
    program = program_of(f)
    assert len(program) > len(expected) or names(program) != expected
    # NumPy's sum of a single -0.0 is 0.0.
    assert names(assert_exact(program, signs=name != "summed to its shape")) == expected


KEPT: dict[str, Callable[..., Any]] = {
    "plus zero": lambda x, y: [x + 0.0, 0 + y],
    "minus a difference": lambda x, y: [-(x - y)],
    "zero minus": lambda x, y: [0.0 - x, y - (-0.0)],
    "times zero": lambda x, y: [x * 0.0, y * 0],
    "ones that broadcast": lambda x, y: [y[0] * full(1.0), x[:1] + full(-0.0)],
    "one of another dtype": lambda x, y: [x.astype(np.float32) * full(1.0), y],
    "narrower and back": lambda x, y: [x.astype(np.float32).astype(np.float64) + y],
    "other order": lambda x, y: [ops.concatenate(ops.split(x, 3, -1)[::-1], -1) * y],
    "other axis": lambda x, y: [ops.concatenate(ops.split(x, 2, -1), 0)],
    "a hole": lambda x, y: [ops.concatenate([x[:, :2], x[:, 3:]], -1), y[::2], y[::-1]],
    "not all": lambda x, y: [ops.concatenate([x[:, 1:3], x[:, 3:]], -1), ops.concatenate([y[:, :2], y[:, 2:4]], -1)],
    "one half twice": lambda x, y: [ops.concatenate([(half := x[:, :3]), half], -1) * y],
    "one part of another": lambda x, y: [ops.concatenate([x[:, :3], y[:, 3:]], -1)],
    "cut around": lambda x, y: ops.split(ops.concatenate([x, y, x], -1), [3, 15], -1),
    "cut inside": lambda x, y: ops.split(ops.concatenate([x, y], -1), [2, 7], -1),
    "where without a number": lambda x, y: [ops.where(x, x, y)],
    "stopped": lambda x, y: [ops.stop_gradient(x) * y],
    "picked": lambda x, y: [x[0], x[:, None], y[1:2, 2:3]],
}


@pytest.mark.parametrize("name", KEPT)
def test_what_does_not_cancel(name: str) -> None:
    program = program_of(KEPT[name])
    assert sorted(names(assert_exact(program))) == sorted(names(program))


def test_integers_lose_their_zeros_and_keep_their_signs() -> None:
    i4, u1 = Aval((R,), np.dtype("i4")), Aval((R,), np.dtype("u1"))
    program = program_of(lambda i, u: [(i + 0) * 1, i + (-u), i - (-u), (-i) * (-u)], i4, u1)
    after = assert_exact(program)
    # -u wraps around in u's dtype: i + (-u) is not i - u.
    assert names(after) == ["negative", "add", "subtract", "negative", "multiply"]


def test_the_transpose_of_a_transpose_of_three_axes() -> None:
    turn = (1, 2, 0)
    f = lambda x: [ops.transpose(ops.transpose(x, turn), turn), ops.transpose(x, turn).transpose((2, 0, 1)) * 2.0]
    after = assert_exact(program_of(f, (2, 3, 4)))
    assert names(after) == ["transpose", "multiply"]
    # Axes count from the end: a transpose of the last two, behind one of all three.
    swap = lambda x: [ops.swapaxes(ops.transpose(x, turn), -1, -2)]
    assert names(assert_exact(program_of(swap, (2, 3, 4)))) == ["transpose"]


def test_a_transpose_that_names_fewer_axes() -> None:
    f = lambda x: [ops.transpose(x, (1, 2, 0))]
    program = program_of(f, (2, 3, 4))
    last = Equation(REGISTRY["transpose"], program.outputs, {"axes": (-1, -2)}, (len(program.avals),))
    avals = [*program.avals, Aval((3, 2, 4), np.dtype("f8"))]
    program = program.replaced(avals=avals, equations=(*program.equations, last), outputs=(len(avals) - 1,))
    assert names(assert_exact(program)) == ["transpose"]
    short = Equation(REGISTRY["transpose"], (0,), {"axes": (-1, -2)}, (1,))
    long = Equation(REGISTRY["transpose"], (1,), {"axes": (-2, -1, -3)}, (2,))
    avals = [Aval(shape, np.dtype("f8")) for shape in ((2, 3, 4), (2, 4, 3), (4, 3, 2))]
    assert names(assert_exact(Program(avals, (0,), (), (short, long), (2,)))) == ["transpose"]


def test_a_value_with_a_name_keeps_its_equation() -> None:
    program = program_of(lambda x, y: [tg.name(x * 1.0, "gate") + y])
    after = assert_exact(program)
    assert after.labelled("gate") in after.definitions()


def test_literal_outputs_stay() -> None:
    program = program_of(lambda x, y: [x * 1.0])
    program = program.replaced(outputs=(*program.outputs, Literal(2.0)))
    assert simplify(program).outputs == (program.inputs[0], Literal(2.0))


# ---------------------------------------------------------------------------- sums of parts


def at(x: Any, axis: int, start: int, stop: int, shape: Sequence[int]) -> Any:
    template = [("slice", None, None, None)] * len(shape)
    template[axis] = ("slice", start, stop, None)
    return put(x, template=tuple(template), shape=tuple(shape))


def corner(x: Any, start: int) -> Any:
    template = (("slice", 1, 3, None), ("slice", start, start + 3, None))
    return put(x, template=template, shape=(R, C))


@settings(max_examples=60)
@given(data=st.data(), axis=st.sampled_from([-1, -2]), extra=st.integers(0, 2))
def test_parts_put_into_zeros_are_joined(data: Any, axis: int, extra: int) -> None:
    """Any number of disjoint parts in any order, with gaps, between other terms: as autodiff leaves slices."""
    n = (R, C)[axis]
    cuts = sorted(data.draw(st.sets(st.integers(0, n), min_size=3)))
    spans = list(itertools.pairwise(cuts))
    keep = data.draw(st.lists(st.sampled_from(spans), min_size=2, unique=True))

    def f(x: Any, y: Any) -> list[Any]:
        piece = lambda a, b: x[a:b] if axis == -2 else x[:, a:b]
        terms = [at(ops.tanh(piece(a, b)), axis, a, b, (R, C)) for a, b in keep] + [y * float(k) for k in range(extra)]
        terms = [terms[k] for k in data.draw(st.permutations(range(len(terms))))]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return [total]

    program = program_of(f)
    after = assert_exact(program, signs=False)
    assert "put" not in names(after)
    assert names(after).count("concatenate") == 1


@pytest.mark.parametrize(
    "f",
    [
        lambda x, y: [at(x[:, :4], -1, 0, 4, (R, C)) + at(y[:, 3:], -1, 3, C, (R, C)) + x],
        lambda x, y: [at(x[:, :4], -1, 0, 4, (R, C)) + at(y[1:], -2, 1, R, (R, C))],
        lambda x, y: [at(x[:, :3], -1, 0, 3, (R, C)) * at(y[:, 3:], -1, 3, C, (R, C))],
        lambda x, y: [(p := at(x[:, :3], -1, 0, 3, (R, C))) + at(y[:, 3:], -1, 3, C, (R, C)) + p],
        lambda x, y: [corner(x[1:3, :3], 0) + corner(y[1:3, 3:], 3) + x],
    ],
    ids=["overlap", "axes", "product", "twice", "corners"],
)
def test_parts_that_do_not_fit_stay(f: Any) -> None:
    program = program_of(f)
    assert names(assert_exact(program)).count("put") == names(simplify(program)).count("put") > 0


def test_a_sum_of_parts_that_is_read_elsewhere_is_computed_once() -> None:
    def f(x: Any, y: Any) -> list[Any]:
        both = at(x[:, :3], -1, 0, 3, (R, C)) + at(y[:, 3:], -1, 3, C, (R, C))
        return [both, ops.tanh(both + x)]

    after = assert_exact(program_of(f), signs=False)
    assert names(after).count("concatenate") == 1
    assert "put" not in names(after)


# ---------------------------------------------------------------------------- random programs


LEAVES: list[Callable[..., Any]] = [
    lambda x, y: x + y, lambda x, y: x - y, lambda x, y: x * y, lambda x, y: x / y, lambda x, y: -x,
    lambda x, y: x * 1.0, lambda x, y: x * -1.0, lambda x, y: x + 0.0, lambda x, y: x + -0.0, lambda x, y: x - 0.0,
    lambda x, y: 1 * x, lambda x, y: x * full(1.0), lambda x, y: full(0.0) + x, lambda x, y: x / full(1.0),
    lambda x, y: x.T.T, lambda x, y: ops.flip(x, 0), lambda x, y: ops.concatenate(ops.split(x, 2, -1), -1),
    lambda x, y: ops.concatenate([ops.split(x, 3, -1)[k] for k in (2, 0, 1)], -1),
    lambda x, y: ops.split(ops.concatenate([x, y], 0), 2, 0)[1], lambda x, y: ops.concatenate([x, y], -1)[:, 3:9],
    lambda x, y: ops.concatenate([x[:, :3], y[:, 3:]], -1), lambda x, y: ops.reshape(ops.reshape(x, (C, R)), (R, C)),
    lambda x, y: ops.reshape(ops.transpose(x), (R, C)), lambda x, y: ops.where(x > y, x, y), lambda x, y: ops.abs(x),
    lambda x, y: ops.where(full(1.0), x, y), lambda x, y: x[:, :], lambda x, y: ops.alias(y),
    lambda x, y: ops.broadcast_to(x, (R, C)),
    lambda x, y: x.astype(np.float32).astype(np.float64), lambda x, y: ops.roll(x, 1, -1),
]  # fmt: skip


@settings(max_examples=150)
@given(recipe=st.lists(st.tuples(st.integers(0, len(LEAVES) - 1), st.integers(1, 4), st.integers(1, 4)), max_size=14))
def test_random_programs_keep_every_bit(recipe: Any) -> None:
    def f(x: Any, y: Any) -> list[Any]:
        made = [x, y]
        for k, i, j in recipe:
            made.append(LEAVES[k](made[-min(i, len(made))], made[-min(j, len(made))]))
        return made[-3:]

    program = program_of(f)
    after = assert_exact(program)
    assert len(after) <= len(program)
    assert simplify(after).key == after.key


def test_what_selects_only_the_gradient_is_read_through():
    def f(x: Any, y: Any) -> list[Any]:
        guarded = ops.where(ops.greater(y, 0.0), x, stop_nan(x))
        kept = ops.where(ops.greater(y, 0.0), x, stop_nan(y))
        of_a_user = ops.where(ops.greater(y, 0.0), x, ops.stop_gradient(x))
        return [ops.exp(guarded) * guarded, kept, guarded, of_a_user]

    program = program_of(f)
    found = dead_code(unguarded(program))
    assert [e.primitive.name for e in found.equations].count("where") == 2 and found.outputs[2] == found.inputs[0]
    arrays = [np.random.default_rng(k).normal(size=(R, C)) for k in range(2)]
    for a, b in zip(program.apply(arrays, []), found.apply(arrays, []), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert unguarded(found) is found
