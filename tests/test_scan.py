"""ops.scan against a Python loop: values, all gradients, second order, lengths, trees, odd sizes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from samples import spread

import tinygrad_lstm as tg
from tinygrad_lstm import ops
from tinygrad_lstm.tree import flatten, unflatten

T, B, N = 5, 3, 4


def lstm(w: Any, u: Any, b: Any) -> Any:
    def body(state: Any, x: Any) -> Any:
        h, c = state
        i, f, g, o = ops.chunk(x @ w + h @ u + b, 4)
        c = ops.sigmoid(f) * c + ops.sigmoid(i) * ops.tanh(g)
        h = ops.sigmoid(o) * ops.tanh(c)
        return (h, c), h

    return body


def gated(w: Any, u: Any, b: Any) -> Any:
    """Trees everywhere, an unused y, a y that needs no carry, and an op that mixes rows."""

    def body(state: dict[str, Any], x: dict[str, Any]) -> Any:
        z = ops.tanh(state["h"] @ u[:, :N] + x["a"] @ w[:, :N] + b[:N])
        h = z * x["k"] + (1.0 - x["k"]) * state["h"] - ops.mean(z, axis=0)
        return {"h": h, "n": state["n"] + x["k"]}, {"out": [h * 2.0, ops.exp(x["a"])], "z": z}

    return body


def looped(body: Any, init: Any, xs: Any, *, length: int | None = None, reverse: bool = False) -> Any:
    """The same by a Python loop; time is axis 0."""
    leaves, tree = flatten(xs)
    leaves = [tg.asarray(leaf) for leaf in leaves]
    steps = length if length is not None else leaves[0].shape[0]
    init_leaves, init_tree = flatten(init)
    carry, rows, y_tree = unflatten(init_tree, [tg.asarray(leaf) for leaf in init_leaves]), [], None
    for t in reversed(range(steps)) if reverse else range(steps):
        carry, y = body(carry, unflatten(tree, [leaf[t] for leaf in leaves]))
        row, y_tree = flatten(y)
        rows.append(row)
    rows = rows[::-1] if reverse else rows
    return carry, unflatten(y_tree, [ops.stack(column) for column in zip(*rows, strict=True)])


def lstm_arguments() -> tuple[Any, ...]:
    init = (spread((B, N), -0.5, 0.5), spread((B, N), -0.5, 0.5, 1))
    return init, spread((T, B, 2)), spread((2, 4 * N)), spread((N, 4 * N), -0.6, 0.6), spread((4 * N,), -0.3, 0.3)


def gated_arguments() -> tuple[Any, ...]:
    init = {"h": spread((B, N)), "n": np.zeros((B, 1))}
    xs = {"a": spread((T, B, 2)), "k": spread((T, B, 1), 0.1, 0.9)}
    return init, xs, *lstm_arguments()[2:]


CASES = {"lstm": (lstm, lstm_arguments), "gated": (gated, gated_arguments)}


def run(how: Any, make: Any, **options: Any) -> Any:
    return lambda init, xs, *weights: how(make(*weights), init, xs, **options)


def projected(f: Any) -> Any:
    """A scalar that depends on every output in another way."""

    def scalar(*args: Any) -> Any:
        leaves = [t for t in flatten(f(*args))[0] if t.dtype.kind == "f"]
        return ops.sum(
            ops.stack([(t * np.cos(np.arange(t.size) + k).reshape(t.shape)).sum() for k, t in enumerate(leaves)])
        )

    return scalar


def close(a: Any, b: Any, rtol: float = 1e-10) -> None:
    for x, y in zip(flatten(a)[0], flatten(b)[0], strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_allclose(x.numpy(), y.numpy(), rtol=rtol, atol=rtol)


# ---------------------------------------------------------------------------- against the loop


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("name", CASES)
def test_values_gradients_and_tangents(name, reverse):
    make, arguments = CASES[name]
    args = arguments()
    scanned, plain = run(ops.scan, make, reverse=reverse), run(looped, make, reverse=reverse)
    close(scanned(*args), plain(*args))
    numbers = tuple(range(len(args)))
    close(tg.grad(projected(scanned), numbers)(*args), tg.grad(projected(plain), numbers)(*args))
    directions = tuple(unflatten(flatten(a)[1], [np.cos(leaf) for leaf in flatten(a)[0]]) for a in args)
    close(tg.jvp(scanned, args, directions), tg.jvp(plain, args, directions))


@pytest.mark.parametrize("name", CASES)
def test_second_order(name):
    make, arguments = CASES[name]
    args = arguments()
    numbers = tuple(range(len(args)))
    directions = tuple(unflatten(flatten(a)[1], [np.sin(leaf) for leaf in flatten(a)[0]]) for a in args)

    def slope(f: Any) -> Any:
        def scalar(*xs: Any) -> Any:
            grads = flatten(tg.grad(projected(f), numbers)(*xs))[0]
            return sum(((g * d).sum() for g, d in zip(grads, flatten(directions)[0], strict=True)), tg.asarray(0.0))

        return scalar

    scanned, plain = run(ops.scan, make), run(looped, make)
    expected = tg.grad(slope(plain), numbers)(*args)
    close(tg.grad(slope(scanned), numbers)(*args), expected, 1e-9)
    close(tg.jvp(tg.grad(projected(scanned), numbers), args, directions)[1], expected, 1e-9)


def test_gradcheck_of_an_lstm():
    init, xs, w, u, b = lstm_arguments()
    f = run(ops.scan, lstm)
    assert tg.gradcheck(f, (init[0][:2], init[1][:2]), xs[:2, :2], w, u, b)
    assert tg.gradcheck(
        lambda x, u: ops.scan(lambda h, t: (ops.tanh(h * u + t),) * 2, x[0], x), xs[:3, 0, :], u[0, :2], order=2
    )


def test_backward_fills_grad_of_everything():
    args = lstm_arguments()
    leaves = [tg.tensor(a, requires_grad=True) for a in flatten(args)[0]]
    rebuilt = unflatten(flatten(args)[1], leaves)
    projected(run(ops.scan, lstm))(*rebuilt).backward()
    expected = tg.grad(projected(run(looped, lstm)), tuple(range(5)))(*args)
    for leaf, e in zip(leaves, flatten(expected)[0], strict=True):
        np.testing.assert_allclose(leaf.grad, e.numpy(), rtol=1e-10, atol=1e-12)


def test_eager_runs_op_by_op_with_the_same_numbers():
    args = lstm_arguments()
    f = run(ops.scan, lstm)
    with tg.eager():
        slow = tg.value_and_grad(projected(f), (1, 2))(*args)
        with tg.Tape() as tape:
            f(*[unflatten(flatten(a)[1], [tg.tensor(leaf) for leaf in flatten(a)[0]]) for a in args])
    close(slow, tg.value_and_grad(projected(f), (1, 2))(*args))
    assert sum(r.primitive.name == "tanh" for r in tape.records) == 2 * T
    assert {r.place.step for r in tape.records if r.primitive.name == "tanh"} == set(range(T))


def test_float32_stays_float32():
    args = [unflatten(flatten(a)[1], [leaf.astype(np.float32) for leaf in flatten(a)[0]]) for a in lstm_arguments()]
    f = run(ops.scan, lstm)
    for leaf in flatten(f(*args))[0]:
        assert leaf.dtype == np.float32
    grads = tg.grad(projected(lambda *a: f(*a)[1].astype(np.float64)), (0, 1, 2))(*args)
    for g in flatten(grads)[0]:
        assert g.dtype == np.float32
    close(
        [g.astype(np.float64) for g in flatten(grads)[0]],
        flatten(tg.grad(projected(lambda *a: f(*a)[1]), (0, 1, 2))(*lstm_arguments()))[0], 1e-4,
    )  # fmt: skip


# ---------------------------------------------------------------------------- lengths

LENGTHS = [[5, 3, 1], [0, 5, 2], [0, 0, 0], [5, 5, 5]]


def row_by_row(body: Any, init: Any, xs: Any, lengths: list[int], reverse: bool) -> Any:
    """Every row alone, over its own steps only; padded with zeros afterwards."""
    carries, outs = [], []
    leaves, x_tree = flatten(xs)
    init_leaves, c_tree = flatten(init)
    for b, n in enumerate(lengths):
        row = unflatten(c_tree, [tg.asarray(leaf)[b : b + 1] for leaf in init_leaves])
        if n:
            row, ys = looped(
                body, row, unflatten(x_tree, [tg.asarray(x)[:n, b : b + 1] for x in leaves]), reverse=reverse
            )
            ys = ops.pad(ys, ((0, T - n), (0, 0), (0, 0)))
        else:
            ys = np.zeros((T, 1, N))
        carries.append(flatten(row)[0])
        outs.append(ys)
    return unflatten(c_tree, [ops.concatenate(c) for c in zip(*carries, strict=True)]), ops.concatenate(outs, 1)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths(lengths, reverse):
    args = lstm_arguments()
    scanned = run(ops.scan, lstm, lengths=lengths, reverse=reverse)
    rows = lambda init, xs, *w: row_by_row(lstm(*w), init, xs, lengths, reverse)
    close(scanned(*args), rows(*args))
    numbers = tuple(range(5))
    close(tg.grad(projected(scanned), numbers)(*args), tg.grad(projected(rows), numbers)(*args))


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 1e300], ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_what_is_in_the_padding_changes_nothing(junk, reverse):
    init, xs, *weights = lstm_arguments()
    lengths = np.array([5, 2, 0])
    f = run(ops.scan, lstm, lengths=lengths, reverse=reverse)
    dirty = xs.copy()
    for b, n in enumerate(lengths):
        dirty[n:, b] = junk
    numbers = tuple(range(5))
    clean = tg.value_and_grad(projected(f), numbers)(init, xs, *weights)
    close(tg.value_and_grad(projected(f), numbers)(init, dirty, *weights), clean, 0)
    for leaf in flatten(clean)[0]:
        assert np.isfinite(leaf.numpy()).all()
    gx = clean[1][1].numpy()
    assert not gx[2:, 1].any()
    assert not gx[:, 2].any()


SINGULAR: dict[str, Any] = {  # at x = 0, and the last one also where all elements of a row are equal
    "divided": lambda x: x / ops.sum(x, axis=1, keepdims=True),
    "logarithm": lambda x: ops.log(x),
    "root": lambda x: ops.sqrt(x),
    "normalised": lambda x: (x - ops.mean(x, axis=1, keepdims=True)) / ops.std(x, axis=1, keepdims=True),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", SINGULAR)
def test_bodies_that_are_singular_in_the_padding(name, lengths, reverse, compiled):
    def cell(w: Any) -> Any:
        def body(h: Any, x: Any) -> Any:
            h = ops.tanh(h + SINGULAR[name](x) @ w)
            return h, h * 2.0

        return body

    if name == "normalised" and not any(lengths):
        pytest.skip("no step of any sequence is there to take the place of the padding")
    xs = spread((T, B, 3), 0.5, 1.5)
    xs[np.arange(T)[:, None] >= np.array(lengths)] = np.nan
    init, w = spread((B, N), -0.5, 0.5), spread((3, N), -0.5, 0.5)
    rows = lambda init, xs, w: row_by_row(cell(w), init, xs, lengths, reverse)
    masked = lambda init, xs, w, n: ops.scan(cell(w), init, xs, lengths=n, reverse=reverse)
    masked = tg.compile(masked) if compiled else masked
    given = np.array(lengths)
    close(masked(init, xs, w, given), rows(init, xs, w))
    found = tg.grad(lambda *args: projected(masked)(*args, given), (0, 1, 2))(init, xs, w)
    close(found, tg.grad(projected(rows), (0, 1, 2))(init, xs, w))


@pytest.mark.parametrize("how", ["eager", "scan", "native", "memory", "compiled", "pushed"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_bodies_that_are_singular_in_padding_and_carry_together(reverse, how, monkeypatch):
    """The carry that a sequence ends with, beside its first step, may be where no step of it has been: here at 0, 0."""

    def body(h: Any, x: Any) -> Any:
        return x, ops.sqrt(h * h + x * x)

    xs, init, lengths = spread((T, B, N), 1.0, 2.0), spread((B, N), 1.0, 2.0), np.array([T, 1, 0])
    xs[0, 1] = 0.0  # its only step, which is run from init, and is the carry afterwards
    init[2] = 0.0
    if how == "native":
        monkeypatch.setenv("TINYGRAD_LSTM_COMPILE", "always")
    memory = 0.5 if how == "memory" else None
    masked = lambda init, xs, n: ops.scan(body, init, xs, lengths=n, reverse=reverse, memory=memory)
    masked = tg.compile(masked) if how == "compiled" else masked
    rows = lambda init, xs: row_by_row(body, init, xs, lengths, reverse)
    if how == "pushed":
        at, along = (init, xs), (np.cos(init), np.cos(xs))
        close(tg.jvp(lambda *a: masked(*a, lengths), at, along)[1], tg.jvp(rows, at, along)[1])
        return
    with tg.eager() if how == "eager" else nullcontext():
        found = tg.grad(lambda *args: projected(masked)(*args, lengths), (0, 1))(init, xs)
    close(found, tg.grad(projected(rows), (0, 1))(init, xs))
    assert not found[1].numpy()[1:, 1].any() and not found[1].numpy()[:, 2].any()


@pytest.mark.parametrize("native", [False, True])
def test_a_selection_of_the_users_own_keeps_its_second_derivative(native, monkeypatch):
    """Where the gradient of a value is stopped now and then, so is that of what is multiplied with it."""
    if native:
        monkeypatch.setenv("TINYGRAD_LSTM_COMPILE", "always")
    cut = np.arange(T * B).reshape(T, B, 1) % 2 == 0

    def loss(init: Any, xs: Any, w: Any) -> Any:
        def body(h: Any, x_and_cut: Any) -> Any:
            x, here = x_and_cut
            h = ops.where(here, h, ops.stop_gradient(h)) * w + x
            return h, h * h

        return ops.scan(body, init, (xs, cut))[1].sum()

    arrays = spread((B, N), 0.3, 0.9), spread((T, B, N), 0.2, 0.8), spread((N,), 0.5, 1.5)
    second = lambda *args: sum((g * g).sum() for g in tg.grad(loss, (0, 1, 2))(*args))
    found = tg.grad(second, (0, 1, 2))(*arrays)
    with tg.eager():
        expected = tg.grad(second, (0, 1, 2))(*arrays)
    close(found, expected)


def test_padded_token_ids_are_not_looked_at():
    ids = np.array([[3, 2], [1, 99], [2, -7]])
    table = spread((4, 2))
    f = lambda table, ids: ops.scan(lambda h, i: (h + table[i], h), np.zeros((2, 2)), ids, lengths=[3, 1])[0].sum()
    expected = np.zeros((4, 2))
    expected[[1, 2, 3]], expected[2] = 1.0, 2.0
    np.testing.assert_array_equal(tg.grad(f)(table, ids).numpy(), expected)


def test_forms_of_lengths():
    args = lstm_arguments()
    expected = run(ops.scan, lstm, lengths=[5, 3, 1])(*args)
    for form in (np.array([5, 3, 1], np.int32), (5, 3, 1), tg.tensor([5, 3, 1])):
        close(run(ops.scan, lstm, lengths=form)(*args), expected, 0)


@pytest.mark.parametrize(("bad", "error"), [
    ([5, 3], tg.ShapeError), ([6, 1, 1], tg.OutOfRangeError), ([-1, 1, 1], tg.OutOfRangeError),
    ([5.0, 3.0, 1.0], tg.DTypeError), ([[5, 3, 1]], tg.ShapeError), (5, tg.ShapeError),
])  # fmt: skip
def test_bad_lengths(bad, error):
    with pytest.raises(error):
        run(ops.scan, lstm, lengths=bad)(*lstm_arguments())


# ---------------------------------------------------------------------------- odd sizes and forms


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("lengths", [False, True], ids=["full", "lengths"])
@pytest.mark.parametrize(("steps", "batch"), [(0, 3), (1, 3), (2, 3), (5, 0), (0, 0), (1, 1)])
def test_few_steps_and_empty_batches(steps, batch, lengths, reverse):
    init, xs, *weights = lstm_arguments()
    init, xs = (init[0][:batch], init[1][:batch]), xs[:steps, :batch]
    options = {"lengths": [min(steps, 1)] * batch} if lengths else {}
    f = run(ops.scan, lstm, reverse=reverse, **options)
    (h, c), ys = f(init, xs, *weights)
    assert h.shape == c.shape == (batch, N)
    assert ys.shape == (steps, batch, N)
    grads = tg.grad(projected(f), tuple(range(5)))(init, xs, *weights)
    for g, a in zip(flatten(grads)[0], flatten((init, xs, *weights))[0], strict=True):
        assert g.shape == a.shape
        assert np.isfinite(g.numpy()).all()
    if steps == 0:
        np.testing.assert_array_equal(h.numpy(), init[0])
        assert not grads[2].numpy().any()
    elif batch and not lengths:
        close(grads, tg.grad(projected(run(looped, lstm, reverse=reverse)), tuple(range(5)))(init, xs, *weights))


@pytest.mark.parametrize("eager", [False, True])
def test_no_steps_give_gradients_of_zero(eager):
    init, xs, *weights = lstm_arguments()
    leaves = [tg.tensor(a, requires_grad=True) for a in (*init, xs[:0], *weights)]
    with tg.eager() if eager else nullcontext():
        (h, c), ys = run(ops.scan, lstm)(tuple(leaves[:2]), *leaves[2:])
        (ys.sum() + h.sum() + 2.0 * c.sum()).backward()
    assert ys.requires_grad and ys.shape[0] == 0
    assert [float(t.grad.max(initial=0.0)) for t in leaves] == [1.0, 2.0] + [0.0] * (len(leaves) - 2)


def test_no_xs():
    powers = lambda a: ops.scan(lambda h, _: (h * a, h), np.array(1.0), None, length=4)
    h, ys = powers(np.array(3.0))
    assert (h.item(), ys.tolist()) == (81.0, [1.0, 3.0, 9.0, 27.0])
    assert tg.grad(lambda a: powers(a)[0])(np.array(3.0)).item() == 4 * 27.0
    with pytest.raises(tg.Error, match="length"):
        ops.scan(lambda h, _: (h, h), np.array(1.0), None)


def test_forms_of_results():
    xs = np.arange(3.0)
    carry, ys = ops.scan(lambda h, x: (h + x, None), np.array(0.0), xs)
    assert (carry.item(), ys) == (3.0, None)
    carry, ys = ops.scan(lambda h, x: (None, x * 2.0), None, xs)
    assert (carry, ys.tolist()) == (None, [0.0, 2.0, 4.0])
    carry, ys = ops.scan(lambda h, x: (h, (h, {"x": x})), np.array(5.0), xs)
    assert (ys[0].tolist(), ys[1]["x"].tolist()) == ([5.0] * 3, [0.0, 1.0, 2.0])
    carry, ys = ops.scan(lambda h, x: (h + 1.0, 7.0), np.array(0.0), xs)
    assert ys.tolist() == [7.0] * 3
    carry, ys = ops.scan(lambda h, x: (x, h), np.array(-1.0), xs)
    assert (carry.item(), ys.tolist()) == (2.0, [-1.0, 0.0, 1.0])


@pytest.mark.parametrize("eager", [False, True], ids=["scan", "eager"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_rows_that_read_rows_which_have_ended(reverse, eager):
    """There they read the carry that those ended with, through which gradients flow."""

    def f(c: Any, w: Any) -> Any:
        body = lambda c, x: (ops.tanh(c @ w + x), ops.sin(c).mean(axis=0) + x)
        last, ys = ops.scan(body, c, spread((T, 3), -0.5, 0.5), lengths=[5, 2, 0], reverse=reverse)
        return (ops.sin(last) * np.arange(1.0, 4.0)).sum() + ops.square(ys).sum()

    arguments = spread((3,), -1.0, 1.0), spread((3, 3), -0.7, 0.9)
    with tg.eager() if eager else nullcontext():
        assert tg.gradcheck(f, *arguments, order=2)


def test_an_inner_loop_whose_rows_read_empty_ones_is_the_same_op_by_op():
    def f(c: Any, w: Any, xs: Any) -> Any:
        def inner(s: Any, v: Any) -> Any:
            return ops.tanh(s @ w + v.mean(axis=0)), None

        def body(c: Any, x: Any) -> Any:
            c = ops.scan(inner, c, ops.stack([x, c]), lengths=[1, 2, 0])[0]
            return c, c

        return ops.scan(body, c, xs)

    arguments = spread((B, 3), -1.0, 1.0), spread((3, 3), -0.7, 0.9), spread((T, B, 3), -0.5, 1.5)
    found = f(*arguments)
    with tg.eager():
        close(f(*arguments), found)
