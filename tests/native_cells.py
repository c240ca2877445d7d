"""Loop bodies that the native compiler is tried on, and the comparison with eager execution that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import ops
from tinygrad_lstm.compiler import native
from tinygrad_lstm.tree import flatten, tree_map, unflatten

F, H, S = 3, 4, 6  # features, hidden units, rows of a memory
VOCABULARY = 7
TOLERANCE = 1e-10  # float64: native and eager differ in the order of a few sums


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Compile every loop; lists, for each native loop that ran to its end, whether its rows were shared out."""
    monkeypatch.setenv("TINYGRAD_LSTM_COMPILE", "always")
    seen: list[bool] = []
    run = native.NativeLoop.run

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        status = run(self, *arguments, **options)
        if not status:
            seen.append(self.split)
        return status

    monkeypatch.setattr(native.NativeLoop, "run", watched)
    yield seen


# ---------------------------------------------------------------------------- leaves: shapes with "T" and "B" in them


@dataclass(frozen=True)
class Ints:
    """Whole numbers from 0 to ``high - 1``; ``shift`` is added."""

    shape: tuple[Any, ...]
    high: int = VOCABULARY
    dtype: str = "int64"
    shift: int = 0


@dataclass(frozen=True)
class Bools:
    shape: tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """A body and the shapes of what it reads.

    ``forward`` and ``backward`` say how its loop runs: ``split`` (the rows are shared out), ``whole`` (native code,
    but the rows mix), ``numpy`` (no native form).
    """

    name: str
    make: Callable[[dict[str, Any]], Callable[..., Any]]
    carry: Any
    x: Any
    captures: Mapping[str, Any] = field(default_factory=dict)
    forward: str = "split"
    backward: str = "split"
    slow: bool = False

    def arrays(self, seed: int, steps: int, rows: int) -> tuple[Any, Any, dict[str, Any]]:
        """(init, xs, captures) of random numbers."""
        rng = np.random.default_rng(seed)
        sizes = {"T": steps, "B": rows}

        def filled(leaf: Any, *lead: Any) -> np.ndarray:
            shape = [sizes.get(n, n) for n in (*lead, *(leaf if isinstance(leaf, tuple) else leaf.shape))]
            if isinstance(leaf, Ints):
                return (rng.integers(0, leaf.high, shape) + leaf.shift).astype(leaf.dtype)
            return rng.random(shape) > 0.4 if isinstance(leaf, Bools) else np.asarray(0.6 * rng.standard_normal(shape))

        def tree(spec: Any, *lead: Any) -> Any:
            return [filled(leaf, *lead) for leaf in spec] if isinstance(spec, list) else filled(spec, *lead)

        return tree(self.carry), tree(self.x, "T"), {name: filled(leaf) for name, leaf in self.captures.items()}


CASES: dict[str, Case] = {}


def case(
    carry: Any, x: Any, how: str = "split split", slow: bool = False, **captures: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enrol a function (captures) -> body."""
    forward, backward = how.split()

    def enrol(make: Callable[..., Any]) -> Callable[..., Any]:
        name = make.__name__
        CASES[name] = Case(name, make, carry, x, captures, forward, backward, slow)
        return make

    return enrol


def cases(slow: bool) -> list[Any]:
    """The cases as parameters; the slow ones with their mark."""
    return [pytest.param(c, id=c.name, marks=[pytest.mark.slow] * slow) for c in CASES.values() if c.slow == slow]


# ---------------------------------------------------------------------------- native against eager

Outcome = tuple[list[np.ndarray], list[np.ndarray]]


def loss_of(tree: Any) -> Any:
    """A scalar to which every element of every floating leaf contributes in its own way."""
    total: Any = 0.0
    for k, leaf in enumerate(flatten(tree)[0]):
        if leaf.dtype.kind == "f" and leaf.size:
            total = total + (ops.sin(leaf * (1.0 + 0.3 * k)) + 0.5 * ops.square(leaf)).sum()
    return total


def leaves_of(tree: Any) -> Any:
    """Copies of the arrays of a tree as tensors, those of floats with a gradient."""
    return tree_map(lambda a: tg.tensor(a, requires_grad=np.asarray(a).dtype.kind == "f"), tree)


def gradients(tensors: Any) -> list[np.ndarray]:
    return [t.grad if t.grad is not None else np.zeros(t.shape, t.dtype) for t in tensors if t.dtype.kind == "f"]


def outcome(make: Any, init: Any, xs: Any, captures: Mapping[str, Any], eager: bool, **options: Any) -> Outcome:
    """Values of a scan, and the gradients of :func:`loss_of` with respect to all that goes in."""
    flat, structure = flatten(leaves_of((init, xs, dict(captures))))
    init, xs, captured = unflatten(structure, flat)
    with tg.eager() if eager else nullcontext():
        out = ops.scan(make(captured), init, xs, **options)
    values = [leaf.numpy().copy() for leaf in flatten(out)[0]]
    loss = loss_of(out)
    if isinstance(loss, tg.Tensor) and loss.requires_grad:
        loss.backward()
    return values, gradients(flat)


def assert_same(found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    """Equal shapes and dtypes, NaN and infinity in the same places, numbers within the tolerance (of the largest)."""
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, (k, a.shape, b.shape, a.dtype, b.dtype)
        finite = np.abs(b, where=np.isfinite(b), out=np.zeros(b.shape)) if b.dtype.kind == "f" else np.ones(1)
        scale = max(1.0, float(finite.max(initial=0.0)))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=f"number {k}")


def check(case: Case, runs: list[bool], seed: int = 0, steps: int = 3, rows: int = 5, **options: Any) -> None:
    """Values and gradients of a case as eager gives them, and native code where the case says so."""
    arrays = case.arrays(seed, steps, rows)
    runs.clear()
    found = outcome(case.make, *arrays, eager=False, **options)
    native_runs = [how == "split" for how in (case.forward, case.backward) if how != "numpy"]
    native_runs *= bool(steps and rows)
    assert len(runs) == len(native_runs), f"{case.name} ran as {runs}"
    if steps > 1 or rows > native.FEW:  # one step of a few rows has its weight gradients in the loop, which mix rows
        assert runs == native_runs, f"{case.name} ran as {runs}"
    expected = outcome(case.make, *arrays, eager=True, **options)
    assert_same(found[0], expected[0])
    assert_same(found[1], expected[1])


# ---------------------------------------------------------------------------- the bodies


@case([("B", H), ("B", H)], ("B", F), W=(F, 4 * H), U=(H, 4 * H), b=(4 * H,))
def lstm(c: Any) -> Any:
    def body(carry: Any, x: Any) -> Any:
        h, cell = carry
        i, f, g, o = ops.chunk(x @ c["W"] + h @ c["U"] + c["b"], 4)
        cell = ops.sigmoid(f) * cell + ops.sigmoid(i) * ops.tanh(g)
        h = ops.sigmoid(o) * ops.tanh(cell)
        return [h, cell], h

    return body


@case(("B", H), ("B", H), U=(H, H))
def in_loop_input(c: Any) -> Any:
    """x is read inside of the loop, with whatever strides it has."""

    def body(h: Any, x: Any) -> Any:
        h = ops.tanh(h @ c["U"] + 0.5 * h * x)
        return h, h

    return body


@case(("B", H), ("B", H), U=(H, H))
def product_in_a_stack(c: Any) -> Any:
    """Maxout; the product's place in the stack has a stride between its columns."""

    def body(h: Any, x: Any) -> Any:
        both = ops.stack([h @ c["U"], ops.tanh(h) + x], axis=-1)
        h = ops.tanh(ops.max(both, axis=-1) + x)
        return h, both

    return body


@case(("B", H), ("B", H))
def reductions_of_strided_views(c: Any) -> Any:
    def body(h: Any, x: Any) -> Any:
        a = ops.tanh(ops.reshape(h, (-1, 2, 2)) * 1.1 + ops.reshape(x, (-1, 2, 2)))
        h = ops.concatenate([ops.max(ops.swapaxes(a, -1, -2), axis=-2), a[:, :, ::-1].sum(axis=1)], axis=-1)
        return h, a[:, ::-1]

    return body


@case([("B", H), Ints(("B",))], [("B", H), Ints(("B",))], "split split", E=(VOCABULARY, H), U=(H, H))
def lookup_in_a_stack(c: Any) -> Any:
    """Yesterday's token is looked up: the table's rows are copied to a place with a stride between its columns."""

    def body(carry: Any, xs: Any) -> Any:
        (h, token), (x, following) = carry, xs
        both = ops.stack([ops.take(c["E"], token, axis=0), h + x], axis=-1)
        h = ops.tanh(both.sum(axis=-1) @ c["U"])
        return [h, following], h

    return body


@case(("B", H), ("B", F), W=(F, H), U=(H, H), M=("B", S, H))
def attention(c: Any) -> Any:
    """Over a captured memory: scores by batched products, the context by broadcasting."""

    def body(h: Any, x: Any) -> Any:
        query = h @ c["U"] + x @ c["W"]
        weights = ops.softmax(ops.squeeze(c["M"] @ query[:, :, None], -1))
        h = ops.tanh((weights[:, :, None] * c["M"]).sum(axis=1) + h)
        return h, weights

    return body


@case(("B", H), ("B", H), "whole whole", U=(H, H), b=(H,))
def batch_norm(c: Any) -> Any:
    def body(h: Any, x: Any) -> Any:
        z = h @ c["U"] + x
        z = (z - z.mean(axis=0)) / ops.sqrt(z.var(axis=0) + 0.1)
        h = ops.tanh(z * c["b"])
        return h, h

    return body


@case([("B", H)] * 5, ("B", H), U=(H, H), M=("B", H))
def carries(c: Any) -> Any:
    """Swapped, shifted, unchanged, set to a capture; a carry that is a y, equal ys, y equal to x, a constant."""

    def body(carry: Any, x: Any) -> Any:
        p, q, h, same, _ = carry
        new = ops.tanh(h @ c["U"] + x * q + same)
        shown = {"old": h, "new": new, "again": new, "x": x, "one": np.ones(3), "q": q, "total": new.sum()}
        return [q, p, new, same, c["M"]], shown

    return body


@case([("B", 2), ("B", 3), ("B", 1)], [("B", F), Bools(("B", 1))], W=(9, 6), s=("B", 1), m=("B",))
def widths(c: Any) -> Any:
    """Carries of several widths, concatenated, split and sliced; masks as inputs; a tree of outputs."""

    def body(carry: Any, xs: Any) -> Any:
        (p, q, r), (x, mask) = carry, xs
        z = ops.concatenate([p, q, r, x], axis=-1) @ c["W"]
        a, b, d = ops.split(z, [2, 5], axis=-1)
        q = ops.where(mask, ops.sigmoid(b) * q, q * c["s"])
        p = ops.where(ops.greater(p, 0.1), ops.tanh(a), -0.5 * p) + x[:, ::2]
        row = z[:, 0] * c["m"]
        return [p, q, ops.tanh(d) + r], {"z": z[:, ::-1], "row": row, "both": ops.concatenate([b, p], axis=-1)}

    return body


@case(("B", H), ("B", H), U=(H, H))
def rows_normalised(c: Any) -> Any:
    """Reductions of a row of every kind; also what is done to NaN and infinity."""

    def body(h: Any, x: Any) -> Any:
        z = h @ c["U"] + x
        peak = ops.max(z, axis=-1, keepdims=True) - ops.min(z, axis=-1, keepdims=True)
        shares = ops.softmax(z) + ops.log_softmax(z) + peak
        length = ops.norm(z, axis=-1) + ops.logsumexp(z, axis=-1)
        kinks = ops.maximum(z, h) + ops.minimum(z, 0.3) + ops.relu(z) + ops.abs(z)
        picked = ops.where(ops.greater(z, 0.0), z, ops.sigmoid(z) * ops.exp(z))
        return ops.tanh(z), {"shares": shares, "length": length, "kinks": kinks, "picked": picked}

    return body


@case([("B", H), Ints(("B",), dtype="int32", shift=-VOCABULARY)], Ints(("B",), dtype="int32", shift=-VOCABULARY),
      "split split", slow=True, E=(VOCABULARY, H), U=(H, H))  # fmt: skip
def embedding_counted_from_the_end(c: Any) -> Any:
    def body(carry: Any, following: Any) -> Any:
        h, token = carry
        h = ops.tanh(c["E"][token] + h @ c["U"])
        return [h, following], h

    return body


@case([("B", 3, H), ("B", H)], ("B", F), slow=True, U=(H, H), W=(F, H), K=(F, 3))
def fast_weights(c: Any) -> Any:
    """A matrix per row in the carry, changed by outer products, read by batched products."""

    def body(carry: Any, x: Any) -> Any:
        memory, h = carry
        key, value = ops.tanh(x @ c["K"]), ops.tanh(h @ c["U"] + x @ c["W"])
        memory = 0.9 * memory + key[:, :, None] @ value[:, None, :]
        y = ops.squeeze(ops.sigmoid(key)[:, None, :] @ memory, 1)
        memory = memory - 0.1 * (key[:, :, None] * ops.expand_dims(y, 1))
        return [memory, ops.tanh(y + h)], y

    return body


@case(("B", 2, 3), ("B", 2), slow=True, W=(3, 3), V=("B", 3, 3), b=(2, 3))
def heads(c: Any) -> Any:
    """A carry with three axes, times one matrix and times a matrix per row."""

    def body(h: Any, x: Any) -> Any:
        z = ops.swapaxes(ops.swapaxes(h @ c["W"] + c["b"], 1, 2) * 1.1, 1, 2)
        h = ops.tanh(z @ c["V"] + x[:, :, None])
        return h, ops.reshape(ops.swapaxes(h, 1, 2), (-1, 6))

    return body


@case([("B", H), ("B", H)], ("B", F), slow=True, b=(H,), **{f"W{k}": (F, H) for k in range(4)},
      **{f"U{k}": (H, H) for k in range(4)})  # fmt: skip
def eight_products(c: Any) -> Any:
    def body(carry: Any, x: Any) -> Any:
        h, cell = carry
        i, f, g, o = (x @ c[f"W{k}"] + h @ c[f"U{k}"] + c["b"] for k in range(4))
        cell = ops.sigmoid(f) * cell + ops.sigmoid(i) * ops.tanh(g)
        h = ops.sigmoid(o) * ops.tanh(cell)
        return [h, cell], h

    return body


@case([("B", H), ("B", H)], ("B", F), slow=True, A=(F, H), D=(H, H), W=(F, H), V=(F, H), U=(H, H), Q=(H, H))
def gates_upon_gates(c: Any) -> Any:
    """A minimal gated unit next to a multiplicative one: products of what the loop has just computed."""

    def body(carry: Any, x: Any) -> Any:
        h, m = carry
        f = ops.sigmoid(x @ c["W"] + h @ c["U"])
        m = ops.tanh(((x @ c["A"]) * (m @ c["D"])) @ c["Q"] + h)
        h = (1.0 - f) * h + f * ops.tanh(x @ c["V"] + (f * h) @ c["Q"])
        return [h, m], h

    return body


@case([(), ("B", H), (H, H)], ("B", H), "whole whole", U=(H, H))
def no_batch_in_the_carry(c: Any) -> Any:
    """A number and a matrix that all rows share and change."""

    def body(carry: Any, x: Any) -> Any:
        s, h, w = carry
        h = ops.tanh(h @ w + x * s)
        return [s * 0.9 + h.mean(), h - 0.5 * h.mean(axis=0, keepdims=True), w * 0.9 + c["U"]], h

    return body


@case(("B", H), ("B", H), slow=True, U=(H, H))
def conversions(c: Any) -> Any:
    """Comparisons and conversions to other dtypes, bool and narrower floats among the outputs."""

    def body(h: Any, x: Any) -> Any:
        new = ops.tanh(h @ c["U"] + x)
        up = ops.greater(new, h)
        return 0.5 * new + 0.5 * h * up.astype(np.float64), {"up": up, "narrow": new.astype(np.float32)}

    return body


@case(("B", H), ("B", H), U=(H, H), M=("B", 5, H))
def einsums(c: Any) -> Any:
    """Products and multiplications by letters."""

    def body(h: Any, x: Any) -> Any:
        read = ops.einsum("bsi,bi,bsj->bj", c["M"], x, c["M"])
        h = ops.tanh(ops.einsum("bi,ij,bj->bi", x, c["U"], h) + ops.einsum("ij,bi->bj", c["U"], h) + 0.1 * read)
        return h, ops.einsum("bi,bj->bij", h, x)

    return body


@case(("B", H), ("B", H), "numpy whole", slow=True, U=(H, H))
def scattered(c: Any) -> Any:
    """No native form: the executor runs it."""

    def body(h: Any, x: Any) -> Any:
        h = ops.tanh(h @ c["U"] + ops.scatter_add(x, np.zeros(1, int), h[:1]))
        return h, h

    return body
