"""Elements moved, picked and counted in native loops: flips, rolls, partial sums, products, indices, integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from native_cells import Bools, Case, F, H, Ints, assert_same, check, outcome, runs

import tinygrad_lstm as tg
from tinygrad_lstm import ops
from tinygrad_lstm.autodiff import gradcheck

__all__ = ["runs"]

MOVES: dict[str, Case] = {}


def case(carry: Any, x: Any, how: str = "split split", **captures: Any) -> Callable[[Any], Any]:
    def enrol(make: Callable[..., Any]) -> Callable[..., Any]:
        MOVES[make.__name__] = Case(make.__name__, make, carry, x, captures, *how.split())
        return make

    return enrol


@case(("B", H), ("B", H), U=(H, H))
def flipped(c: Any) -> Any:
    def body(h: Any, x: Any) -> Any:
        z = ops.flip(h, -1) @ c["U"] + ops.flip(x, 1)
        pairs = ops.flip(ops.reshape(ops.tanh(z), (-1, 2, 2)), (1, 2))
        return ops.tanh(ops.flip(z, 1) + h), {"pairs": pairs, "halves": ops.flip(pairs, 1)[:, :, ::-1]}

    return body


@case(("B", H), ("B", H), U=(H, H))
def rolled(c: Any) -> Any:
    def body(h: Any, x: Any) -> Any:
        h = ops.tanh(ops.roll(h, 1, axis=-1) @ c["U"] + ops.roll(x, (-6, 1), axis=(1, 1)))
        grid = ops.roll(ops.reshape(h * x, (-1, 2, 2)), (1, 3), axis=(1, 2))
        return h + 0.1 * ops.reshape(grid, (-1, 4)), ops.roll(grid, 0, axis=1)

    return body


@case(("B", H), ("B", H), U=(H, H))
def cumulated(c: Any) -> Any:
    def body(h: Any, x: Any) -> Any:
        z = ops.cumsum(h, axis=-1) @ c["U"] + x
        grid = ops.cumsum(ops.reshape(ops.sin(z), (-1, 2, 2)), axis=1)
        h = ops.tanh(z + ops.reshape(grid, (-1, 4)))
        return h, {"grid": grid, "strided": ops.cumsum(ops.swapaxes(grid, 1, 2), axis=2)}

    return body


@case(("B", H), ("B", H))
def multiplied(c: Any) -> Any:
    """Products of rows; one factor is zero."""

    def body(h: Any, x: Any) -> Any:
        some = ops.where(x > 0.5, 0.0, 1.0 + x)
        total = ops.prod(some, axis=-1, keepdims=True)
        pairs = ops.prod(ops.reshape(some * h, (-1, 2, 2)), axis=1)
        return ops.tanh(h * total + ops.concatenate([pairs, pairs], axis=-1)), {"total": total, "pairs": pairs}

    return body


@case([("B", H), Ints(("B",))], ("B", H), U=(H, H), E=(H, H))
def greedy(c: Any) -> Any:
    """The largest element's number is looked up at the next step: a decoder that feeds itself."""

    def body(carry: Any, x: Any) -> Any:
        h, token = carry
        h = ops.tanh(ops.take(c["E"], ops.minimum(token, H - 1), axis=0) + h @ c["U"] + x)
        last = ops.argmax(h, axis=-1)
        return [h, last], {"last": last, "least": ops.argmin(ops.reshape(h, (-1, 2, 2)), axis=1)}

    return body


@case([("B", H), Ints(("B",))], ("B", H), U=(H, H))
def hot(c: Any) -> Any:
    def body(carry: Any, x: Any) -> Any:
        h, n = carry
        code = ops.one_hot(n, 7, np.float64)
        h = ops.tanh(h @ c["U"] + code[:, :4] * x + code[:, 3:])
        n = ops.where(n < 6, n + 1, 0)
        return [h, n], {"code": code, "whole": ops.one_hot(n, 7, np.int64), "truth": ops.one_hot(n, 7, bool)}

    return body


@case([("B", H), Ints(("B",)), Ints(("B", 3), dtype="int32")], [("B", H), Bools(("B",))])
def counted(c: Any) -> Any:
    """Integer arithmetic of two widths, comparisons, conversions."""

    def body(carry: Any, xs: Any) -> Any:
        (h, n, k), (x, keep) = carry, xs
        m = ops.where(keep, n * 3 - 7, -n) + k[:, 0]
        wrapped = k * k * 2_000_003 + ops.square(k)
        up = ops.greater(m, n)
        k = ops.maximum(ops.abs(k) - 5, ops.minimum(k, 2)) + ops.sign(-k)
        step = (h * 10.0).astype(np.int64).sum(axis=1)
        h = ops.tanh(h * ops.reshape(up.astype(h.dtype), (-1, 1)) + x / (1 + ops.square(k[:, :1])))
        shown = {"up": up, "equal": ops.equal(m, step), "wrapped": wrapped, "step": step.astype(np.int32),
                 "any": ops.logical_or(keep, m), "most": ops.max(k, axis=1), "partial": ops.cumsum(k, axis=1),
                 "half": (m / 2).astype(np.float32), "large": m * 4_000_000_000 < n * 4_000_000_001}  # fmt: skip
        return [h, m, k], shown

    return body


@case(("B", H), [("B", H), Ints(("B", 3), high=H)])
def picked_along(c: Any) -> Any:
    """One element per position; some are picked twice."""

    def body(h: Any, xs: Any) -> Any:
        x, places = xs
        some = ops.take_along_axis(h * x, places, axis=1)
        last = ops.take_along_axis(h, places[:, :1] - H, axis=-1)
        return ops.tanh(h + some.sum(axis=1, keepdims=True) * last), some

    return body


@case(("B", 2, H), ("B", H))
def taken_inside(c: Any) -> Any:
    """The same elements of every row; a repetition is such a choice."""

    def body(h: Any, x: Any) -> Any:
        some = ops.take(h, np.array([[3, 0], [1, -1]]), axis=2)
        wide = ops.repeat(x, 2, axis=1) + ops.tile(x, (1, 2))
        h = ops.tanh(h + some.sum(axis=-1, keepdims=True)[:, :, 1] * x[:, None])
        return h, {"some": some, "wide": ops.reshape(wide, (-1, 2, H)) * ops.repeat(h, np.array([1, 1]), axis=1)}

    return body


@case(("B", H), ("B", H), "whole whole", U=(H, H))
def over_the_batch(c: Any) -> Any:
    """The same along the rows: unsplit."""

    def body(h: Any, x: Any) -> Any:
        z = ops.flip(h, 0) @ c["U"] + ops.roll(x, 1, axis=0)
        z = ops.tanh(z + 0.1 * ops.cumsum(h, axis=0))
        return z, {"first": ops.argmax(z, axis=0), "product": ops.prod(z, axis=0)}

    return body


@pytest.mark.parametrize("name", MOVES)
def test_values_and_gradients(name: str, runs: list[bool]) -> None:
    check(MOVES[name], runs)


@pytest.mark.slow
@pytest.mark.parametrize("steps, rows", [(1, 1), (2, 2), (1, 9), (4, 4)])
@pytest.mark.parametrize("name", MOVES)
def test_other_lengths(name: str, steps: int, rows: int, runs: list[bool]) -> None:
    check(MOVES[name], runs, seed=1, steps=steps, rows=rows)


@pytest.mark.parametrize("name", ["flipped", "multiplied", "counted"])
def test_lengths_and_directions(name: str, runs: list[bool]) -> None:
    check(MOVES[name], runs, steps=4, lengths=np.array([4, 0, 2, 1, 3]), reverse=True)


@pytest.mark.parametrize("name", ["flipped", "rolled", "cumulated", "multiplied", "hot"])
def test_in_float32(name: str, runs: list[bool]) -> None:
    init, xs, captures = MOVES[name].arrays(0, 3, 5)
    narrow = lambda a: a.astype(np.float32) if a.dtype.kind == "f" else a
    init = [narrow(a) for a in init] if isinstance(init, list) else narrow(init)
    arrays = init, narrow(xs), {key: narrow(a) for key, a in captures.items()}
    if name == "hot":
        values = lambda: ops.scan(lambda c, x: (c, ops.one_hot(c[1], 7) * x[:, :1]), arrays[0], arrays[1])[1].numpy()
        found = values()
        with tg.eager():
            np.testing.assert_array_equal(found, values())
        return
    found = outcome(MOVES[name].make, *arrays, eager=False)
    assert len(runs) == 2
    expected = outcome(MOVES[name].make, *arrays, eager=True)
    assert_same(found[0], expected[0], 2e-5)
    assert_same(found[1], expected[1], 2e-5)


def test_special_values_of_the_largest(runs: list[bool]) -> None:
    """The first NaN, else the first of equals, is the largest and the smallest."""
    xs = np.array([[[1.0, 3.0, 3.0], [np.nan, 1.0, np.nan], [2.0, np.nan, 5.0], [-np.inf, np.inf, np.inf],
                    [-0.0, 0.0, 0.0], [np.inf, -np.inf, -np.inf]]])  # fmt: skip
    for dtype in (np.float64, np.float32):
        body = lambda n, x: (n + ops.argmax(x, axis=1), ops.argmin(x, axis=1, keepdims=True))
        n, least = ops.scan(body, np.zeros(6, int), xs.astype(dtype))
        np.testing.assert_array_equal(n.numpy(), np.argmax(xs[0], axis=1))
        np.testing.assert_array_equal(least.numpy()[0, :, 0], np.argmin(xs[0], axis=1))
    assert len(runs) == 2


def test_conversions_as_numpy_makes_them(runs: list[bool]) -> None:
    values = np.array([[0.0, -0.0, 1.9, -1.9, 2.0**31, -(2.0**31), 2.0**53 + 2, 1e15, np.nan, np.inf, -np.inf]])
    kinds = (np.int64, np.int32, np.bool_, np.float32)
    with np.errstate(all="ignore"):
        body = lambda c, x: (c, [x.astype(k) for k in kinds] + [x.astype(np.int64).astype(k) for k in kinds])
        _, found = ops.scan(body, np.zeros((1, 1)), values[None])
        for k, kind in enumerate(kinds):
            if kind is not np.int32:  # out of range there is no right answer in C
                np.testing.assert_array_equal(found[k].numpy()[0], values.astype(kind))
            np.testing.assert_array_equal(found[4 + k].numpy()[0], values.astype(np.int64).astype(kind))
    inside = np.array([[[0.0, 1.9, -1.9, 2.0**31 - 1, -(2.0**31)]]])
    _, found = ops.scan(lambda c, x: (c, x.astype(np.int32)), np.zeros((1, 1)), inside)
    np.testing.assert_array_equal(found.numpy(), inside.astype(np.int32))
    assert len(runs) == 2


def test_long_integers_are_compared_and_wrap_around(runs: list[bool]) -> None:
    """Beyond 2**53 a float64 would not tell neighbours apart."""
    a = np.array([2**53, 2**53 + 1, -(2**62), 2**63 - 1, 0])
    b = np.array([2**53 + 1, 2**53, -(2**62) + 1, 2**63 - 2, -(2**63)])
    ways = (ops.equal, ops.less, ops.greater_equal, ops.maximum, ops.add, ops.multiply)
    expected = (np.equal, np.less, np.greater_equal, np.maximum, np.add, np.multiply)
    _, found = ops.scan(lambda c, x: (c, [f(x[0], x[1]) for f in ways]), np.zeros(5), (a[None], b[None]))
    with np.errstate(over="ignore"):
        for values, f in zip(found, expected, strict=True):
            np.testing.assert_array_equal(values.numpy()[0], f(a, b))
    assert runs == [True]


def test_remainder_and_floor_divide_of_integers(runs: list[bool]) -> None:
    limits = np.iinfo(np.int64)
    a = np.array([7, -7, 7, -7, 5, -5, 0, limits.min, limits.min, limits.max, 6, -6, limits.min])
    b = np.array([3, 3, -3, -3, 0, 0, 0, -1, 1, -1, 3, 3, limits.max])
    for kind in (np.int64, np.int32):
        pair = a.astype(kind), b.astype(kind)
        _, found = ops.scan(lambda c, x: (c, [x[0] % x[1], x[0] // x[1]]), np.zeros(13), tuple(p[None] for p in pair))
        with np.errstate(all="ignore"):
            for values, f in zip(found, (np.remainder, np.floor_divide), strict=True):
                np.testing.assert_array_equal(values.numpy()[0], f(*pair))
    assert runs == [True, True]


def test_a_loop_that_counts_modulo(runs: list[bool]) -> None:
    """As the loop in Python would: a counter that starts again, a phase, reflected and with NumPy scalars."""

    def body(carry: Any, x: Any) -> Any:
        n, h = carry
        n = (n + 1) % 3
        phase = (h + x) % 1.5
        h = ops.where(ops.equal(n, 0), phase, h + x // np.float64(0.7)) + 7.3 % (x * x + 0.5)
        return (n, h), (np.int64(7) // (n + 1), phase)

    init = np.array([0, 1, 2, 5, -4]), np.linspace(-2, 2, 5)
    xs = np.random.default_rng(0).normal(size=(6, 5))
    expected, n, h = [], *init
    for x in xs:
        (n, h), y = body((n, h), x)
        expected.append((np.asarray(y[0]), y[1].numpy() if isinstance(y[1], tg.Tensor) else y[1]))
        h = h.numpy()
    x0 = tg.tensor(xs, requires_grad=True)
    (found_n, found_h), ys = ops.scan(body, init, x0)
    np.testing.assert_array_equal(found_n.numpy(), n)
    np.testing.assert_allclose(found_h.numpy(), h, rtol=1e-12)
    for k in range(2):
        np.testing.assert_allclose(ys[k].numpy(), np.stack([e[k] for e in expected]), rtol=1e-12)
    found_h.sum().backward()
    x1 = tg.tensor(xs, requires_grad=True)
    with tg.eager():
        ops.scan(body, init, x1)[0][1].sum().backward()
    np.testing.assert_allclose(x0.grad, x1.grad, rtol=1e-12)
    assert len(runs) == 2


@pytest.mark.parametrize("bad", [-1, 7])
def test_a_class_out_of_range(bad: int, runs: list[bool]) -> None:
    case = MOVES["hot"]
    init, xs, captures = case.arrays(0, 3, 5)
    init[1][3] = bad
    with pytest.raises(tg.errors.OutOfRangeError, match="class"):
        ops.scan(case.make(captures), init, xs)
    assert not runs


def test_a_place_out_of_range(runs: list[bool]) -> None:
    case = MOVES["picked_along"]
    init, xs, captures = case.arrays(0, 3, 5)
    xs[1][2, 4, 1] = H
    with pytest.raises(tg.errors.OutOfRangeError, match=f"{H} is outside"):
        ops.scan(case.make(captures), init, xs)
    assert not runs


@pytest.mark.parametrize("name", ["cumulated", "multiplied", "picked_along"])
def test_gradients_by_finite_differences(name: str, runs: list[bool]) -> None:
    init, xs, captures = MOVES[name].arrays(3, 2, 3)
    fixed = xs[1:] if isinstance(xs, list) else []

    def f(h: Any, x: Any, *rest: Any) -> Any:
        body = MOVES[name].make(dict(zip(captures, rest, strict=True)))
        h, ys = ops.scan(body, h, [x, *fixed] if fixed else x)
        return (h, ys)

    gradcheck(f, init, xs[0] if fixed else xs, *captures.values(), order=2 if name == "cumulated" else 1)
    assert runs


def test_explain_says_native(runs: list[bool]) -> None:
    for name in MOVES:
        init, xs, captures = MOVES[name].arrays(0, 3, F + 2)
        ops.scan(MOVES[name].make(captures), init, xs)
        assert not tg.explain().not_lowered, f"{name}: {tg.explain()}"
