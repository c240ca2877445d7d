"""Loops in loop bodies, as native code: against the executor and eager mode, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from native_cells import F, H, Ints, assert_same, outcome, runs

import tinygrad_lstm as tg
from tinygrad_lstm import ops
from tinygrad_lstm.autodiff import gradcheck

__all__ = ["runs"]

K = 3  # inner steps

Made = tuple[Any, Any, dict[str, Any]]


def numbers(spec: Any, rng: np.random.Generator, sizes: dict[str, int]) -> Any:
    if isinstance(spec, list):
        return [numbers(part, rng, sizes) for part in spec]
    if isinstance(spec, Ints):
        return rng.integers(0, spec.high, [sizes.get(n, n) for n in spec.shape]).astype(spec.dtype)
    return np.asarray(0.6 * rng.standard_normal([sizes.get(n, n) for n in spec]))


class Nested:
    """A body with a loop inside, and the shapes of what it reads; ``split`` says whether rows are shared out."""

    def __init__(self, make: Callable[..., Any], carry: Any, x: Any, split: bool, captures: dict[str, Any]) -> None:
        self.make, self.carry, self.x, self.split, self.captures = make, carry, x, split, captures

    def arrays(self, steps: int, rows: int, inner: int, dtype: str = "float64") -> Made:
        rng = np.random.default_rng(0)
        sizes = {"T": steps, "B": rows, "K": inner}
        lead = lambda spec: [lead(s) for s in spec] if isinstance(spec, list) else ("T", *spec)
        made = [numbers(spec, rng, sizes) for spec in (self.carry, lead(self.x), list(self.captures.values()))]
        made = [_cast(part, dtype) for part in made]
        return made[0], made[1], dict(zip(self.captures, made[2], strict=True))


def _cast(tree: Any, dtype: str) -> Any:
    if isinstance(tree, list):
        return [_cast(part, dtype) for part in tree]
    return tree.astype(dtype) if tree.dtype.kind == "f" else tree


BODIES: dict[str, Nested] = {}


def nested(carry: Any, x: Any, split: bool = True, **captures: Any) -> Callable[[Any], Any]:
    def enrol(make: Callable[..., Any]) -> Callable[..., Any]:
        BODIES[make.__name__] = Nested(make, carry, x, split, captures)
        return make

    return enrol


@nested(("B", H), ("B", H), U=(H, H))
def pondering(c: Any, inner: int) -> Any:
    """The same cell several times per step; no inner sequence."""

    def body(h: Any, x: Any) -> Any:
        def step(s: Any, _: Any) -> Any:
            s = ops.tanh(s @ c["U"] + x)
            return s, s

        h, states = ops.scan(step, h, None, length=inner)
        return h, states

    return body


@nested(("B", H), ("K", "B", F), U=(H, H), W=(F, H))
def words_of_a_line(c: Any, inner: int) -> Any:
    """Time inside of every x, in front of the batch; backwards."""

    def body(h: Any, x: Any) -> Any:
        def step(s: Any, w: Any) -> Any:
            s = ops.tanh(s @ c["U"] + w @ c["W"] + h)
            return s, s * 2.0

        s, ys = ops.scan(step, h * 0.5, x, reverse=True)
        return ops.tanh(s + h), ys.sum(axis=0)

    return body


@nested(("B", H), ("B", H), U=(H, H), M=("K", "B", H))
def memory_walk(c: Any, inner: int) -> Any:
    """A sequence that is closed over, with a row for every row of the batch; first and last state are picked."""

    def body(h: Any, x: Any) -> Any:
        def step(s: Any, m: Any) -> Any:
            s = ops.sigmoid(s @ c["U"] + m * x)
            return s, s

        s, ys = ops.scan(step, h, c["M"])
        return s + 0.1 * h, ops.tanh(ys[-1]) + ys[0] if inner else s

    return body


@nested(("B", H), ("B", H), U=(H, H), M=("K", H))
def shared_sequence(c: Any, inner: int) -> Any:
    """A sequence that all rows share."""

    def body(h: Any, x: Any) -> Any:
        def step(s: Any, m: Any) -> Any:
            s = ops.tanh(s @ c["U"] + ops.sin(m)) * x
            return s, s.sum(axis=-1)

        s, ys = ops.scan(step, h, c["M"])
        return s, ys

    return body


@nested([("B", H), ("B", 2)], ("B", "K", F), U=(H, H), W=(F, H))
def batch_first_sequence(c: Any, inner: int) -> Any:
    """Time behind the batch, swapped for the inner loop and back; two carries, one of which is only read."""

    def body(carry: Any, x: Any) -> Any:
        h, p = carry

        def step(state: Any, w: Any) -> Any:
            s, q = state
            s = ops.tanh(s @ c["U"] + w @ c["W"]) * q[:, :1]
            return (s, q * 0.9), [s, q]

        (s, q), (ys, _) = ops.scan(step, (h, p), ops.swapaxes(x, 0, 1))
        return [s, ops.tanh(q + p)], ops.swapaxes(ys, 0, 1) * 2.0

    return body


@nested(("B", 2, 3), ("B", 2))
def no_product(c: Any, inner: int) -> Any:
    """Nothing over all rows: the inner loop stands in the loop over the rows."""

    def body(h: Any, x: Any) -> Any:
        def step(s: Any, _: Any) -> Any:
            s = ops.sin(s) * x[:, :, None] + s.mean(axis=-1, keepdims=True)
            return s, s[:, 0]

        s, ys = ops.scan(step, h, None, length=inner)
        return ops.tanh(s), ys

    return body


@nested(("B", H), ("B", H), split=False, U=(H, H))
def rows_that_mix(c: Any, inner: int) -> Any:
    def body(h: Any, x: Any) -> Any:
        def step(s: Any, _: Any) -> Any:
            s = ops.tanh(s @ c["U"] + x - s.mean(axis=0))
            return s, s

        h, ys = ops.scan(step, h, None, length=inner)
        return h, ys

    return body


@nested(("B", H), ("B", H), split=False, U=(H, H))
def over_the_rows(c: Any, inner: int) -> Any:
    """The rows of the batch are the inner steps."""

    def body(h: Any, x: Any) -> Any:
        def step(s: Any, row: Any) -> Any:
            s = ops.tanh(s + row @ c["U"])
            return s, s * 0.5

        s, ys = ops.scan(step, x.mean(axis=0), h)
        return ops.tanh(ys + x + s), s

    return body


@nested(("B", H), ("B", H), split=False, U=(H, H))
def counted(c: Any, inner: int) -> Any:
    """A number that all rows share in the inner carry."""

    def body(h: Any, x: Any) -> Any:
        def step(state: Any, _: Any) -> Any:
            s, n = state
            return (ops.tanh(s @ c["U"] + x * n), n * 0.7 + 0.1), n

        (s, _), ns = ops.scan(step, (h, np.float64(0.5)), None, length=inner)
        return s.astype(h.dtype), ns

    return body


@nested(("B", H), ("K", 2, "B", F), U=(H, H), W=(F, H))
def three_deep(c: Any, inner: int) -> Any:
    def body(h: Any, x: Any) -> Any:
        def middle(s: Any, pair: Any) -> Any:
            def innermost(r: Any, w: Any) -> Any:
                r = ops.tanh(r @ c["U"] + w @ c["W"])
                return r, r + s

            r, rs = ops.scan(innermost, s, pair, reverse=True)
            return ops.tanh(r + s), rs

        s, deep = ops.scan(middle, h, x)
        return s, deep

    return body


def compare(name: str, runs: list[bool], steps: int, rows: int, inner: int, **options: Any) -> None:
    case = BODIES[name]
    make = lambda captured: case.make(captured, inner)
    arrays = case.arrays(steps, rows, inner)
    runs.clear()
    found = outcome(make, *arrays, eager=False, **options)
    ran = list(runs)
    expected = outcome(make, *arrays, eager=True, **options)
    assert_same(found[0], expected[0])
    assert_same(found[1], expected[1])
    if steps and rows and inner:
        # One native loop forward and one backward: the inner loops are part of them.
        assert len(ran) == 2, f"{name} ran as {ran}: {tg.explain()}"
        # Where a sequence of (steps, width) could be one of (steps, rows), sharing the rows out may be given up.
        if rows > 1 and (name, rows) != ("shared_sequence", H):
            assert ran == [case.split] * 2, f"{name} ran as {ran}: {tg.explain()}"


@pytest.mark.parametrize("name", BODIES)
def test_values_and_gradients(name: str, runs: list[bool]) -> None:
    compare(name, runs, steps=3, rows=5, inner=K)


@pytest.mark.slow
@pytest.mark.parametrize("inner", [0, 1, 2])
@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("name", BODIES)
def test_few_steps(name: str, steps: int, inner: int, runs: list[bool]) -> None:
    compare(name, runs, steps, 5, inner)


@pytest.mark.parametrize("steps, inner", [(1, 0), (0, 2), (2, 1)])
def test_few_steps_of_two_bodies(steps: int, inner: int, runs: list[bool]) -> None:
    for name in ("words_of_a_line", "memory_walk"):
        compare(name, runs, steps, 5, inner)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, K, H, 9])
@pytest.mark.parametrize("name", BODIES)
def test_rows_like_other_lengths(name: str, rows: int, runs: list[bool]) -> None:
    """As many rows as inner steps or features: shapes alone do not tell the batch."""
    compare(name, runs, 2, rows, K)


@pytest.mark.parametrize("rows", [1, K])
def test_rows_like_inner_steps(rows: int, runs: list[bool]) -> None:
    for name in ("words_of_a_line", "memory_walk"):
        compare(name, runs, 2, rows, K)


@pytest.mark.parametrize("name", ["memory_walk", "batch_first_sequence"])
def test_lengths_of_the_outer_loop(name: str, runs: list[bool]) -> None:
    for reverse in (False, True):
        compare(name, runs, 4, 5, K, lengths=np.array([4, 0, 2, 1, 3]), reverse=reverse)


def test_both_backwards(runs: list[bool]) -> None:
    compare("words_of_a_line", runs, 4, 5, K, reverse=True)


def test_lengths_inside(runs: list[bool]) -> None:
    """Rows of the inner loop that end early, with NaN behind the end."""
    rng = np.random.default_rng(1)
    lengths = np.array([0, 1, K, 2, 1])
    words = rng.standard_normal((3, K, 5, F))
    words[:, np.arange(K)[:, None] >= lengths] = np.nan

    def make(c: Any) -> Any:
        def body(h: Any, x: Any) -> Any:
            def step(s: Any, w: Any) -> Any:
                s = ops.tanh(s @ c["U"] + w @ c["W"])
                return s, s

            return ops.scan(step, h, x, lengths=lengths)

        return body

    arrays = rng.standard_normal((5, H)), words, {"U": rng.standard_normal((H, H)), "W": rng.standard_normal((F, H))}
    found = outcome(make, *arrays, eager=False)
    assert runs == [True, True]
    expected = outcome(make, *arrays, eager=True)
    assert_same(found[0], expected[0])
    assert_same(found[1], expected[1])
    assert all(np.isfinite(a).all() for a in found[0] + found[1])


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = tg.get_num_threads()
    yield tg.set_num_threads
    tg.set_num_threads(before)


@pytest.mark.parametrize("name", ["words_of_a_line", "no_product", "memory_walk", "rows_that_mix"])
def test_the_same_bits_with_any_number_of_threads(name: str, runs: list[bool], threads: Any) -> None:
    case = BODIES[name]
    arrays = case.arrays(3, 9, K)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(outcome(lambda captured: case.make(captured, K), *arrays, eager=False))
    assert len(runs) == 6
    for other in found[1:]:
        for a, b in zip(found[0][0] + found[0][1], other[0] + other[1], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_special_values(value: float, runs: list[bool]) -> None:
    case = BODIES["no_product"]
    init, xs, captures = case.arrays(3, 5, K)
    init[1, 0, 1] = xs[1, 2, 0] = value
    with np.errstate(all="ignore"):
        found = outcome(lambda c: case.make(c, K), init, xs, captures, eager=False)
        expected = outcome(lambda c: case.make(c, K), init, xs, captures, eager=True)
    assert len(runs) == 2
    assert_same(found[0], expected[0])
    assert_same(found[1], expected[1])


def test_in_float32(runs: list[bool]) -> None:
    case = BODIES["words_of_a_line"]
    arrays = case.arrays(3, 5, K, "float32")
    found = outcome(lambda c: case.make(c, K), *arrays, eager=False)
    assert runs == [True, True]
    expected = outcome(lambda c: case.make(c, K), *arrays, eager=True)
    assert_same(found[0], expected[0], 2e-5)
    assert_same(found[1], expected[1], 2e-5)


def test_an_index_out_of_range_inside(runs: list[bool]) -> None:
    table = np.random.default_rng(0).standard_normal((5, H))

    def body(carry: Any, x: Any) -> Any:
        def step(state: Any, token: Any) -> Any:
            s, last = state
            s = ops.tanh(s + ops.take(table, last, axis=0))
            return (s, token), s

        (s, last), _ = ops.scan(step, carry, x)
        return (s, last), s

    init = np.zeros((4, H)), np.zeros(4, int)
    tokens = np.zeros((2, K, 4), int)
    ops.scan(body, init, tokens)
    assert runs == [True]
    tokens[1, 1, 2] = 5
    with pytest.raises(tg.errors.OutOfRangeError, match="5 is outside"):
        ops.scan(body, init, tokens)


def test_gradients_by_finite_differences(runs: list[bool]) -> None:
    """Of the first and of the second order; both are native."""
    case = BODIES["words_of_a_line"]
    init, xs, captures = case.arrays(2, 2, 2)

    def f(h: Any, x: Any, u: Any, w: Any) -> Any:
        h, ys = ops.scan(case.make({"U": u, "W": w}, 2), h, x)
        return (h * h).sum() + ops.sin(ys).sum()

    gradcheck(f, init, xs, captures["U"], captures["W"], order=2)
    assert runs


def test_explain_says_native(runs: list[bool]) -> None:
    case = BODIES["words_of_a_line"]
    init, xs, captures = case.arrays(40, 32, K)
    ops.scan(case.make(captures, K), init, xs)
    report = tg.explain()
    assert not report.not_lowered and not any("NumPy" in note for note in report.notes), str(report)
