"""Random recurrent cells for the compiler: ``make(seed)``, and ``cells()`` for Hypothesis.

A cell is a list of steps, each of which adds a value of shape (B, n) to a pool; the carried states and the
outputs are then made from the pool.  All is float64, and states and factors are bounded (tanh, sigmoid), so that
a comparison to 1e-10 makes sense.  The list is plain data: a cell that fails is printed, and shrunk.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

import tinygrad_lstm as tg
from tinygrad_lstm import ops

TOKENS, S, D = 5, 3, 4  # vocabulary; rows and width of the attended memory


class Step(NamedTuple):
    """One value of the pool: what is done, with which values (counted back from the newest), and a width."""

    op: str
    i: int
    j: int
    n: int


class Recipe(NamedTuple):
    """A cell as plain data."""

    seed: int  # of the numbers
    batch: int
    steps: int
    widths: tuple[int, ...]  # of the carried states
    body: tuple[Step, ...]
    updates: tuple[str, ...]  # how each state is made
    outputs: tuple[str, ...]


@dataclass
class RandomCell:
    """A body for ``ops.scan`` with its arguments; ``captures`` are the tensors that it closes over, by name."""

    recipe: Recipe
    body: Callable[[Any, Any], tuple[Any, Any]]
    init: tuple[Any, ...]
    xs: dict[str, Any]
    captures: dict[str, Any] = field(default_factory=dict)

    def leaves(self) -> dict[str, Any]:
        """Everything that has a gradient."""
        floats = {f"xs[{name!r}]": t for name, t in self.xs.items() if t.dtype.kind == "f"}
        return {**{f"init[{k}]": t for k, t in enumerate(self.init)}, **floats, **self.captures}


Get = Callable[..., Any]  # (name, *shape) -> a tensor that is closed over


def fit(v: Any, n: int) -> Any:
    """v with n columns: repeated and cut."""
    while v.shape[-1] < n:
        v = ops.concatenate([v, v * 0.9], axis=-1)
    return v if v.shape[-1] == n else v[:, :n]


def attend(q: Any, get: Get, plain: bool) -> Any:
    memory = get("memory", None, S, D)
    if plain:
        weights = ops.softmax(ops.einsum("bd,bsd->bs", q, memory))
        return ops.einsum("bs,bsd->bd", weights, memory)
    weights = ops.softmax((memory @ q.reshape((*q.shape, 1))).reshape((q.shape[0], S)) * 0.5)
    return (weights.reshape((q.shape[0], 1, S)) @ memory).reshape(q.shape)


def halves(v: Any, f: Callable[[Any], Any]) -> Any:
    """f on the (B, 2, n/2) form of a value."""
    v = fit(v, v.shape[-1] + v.shape[-1] % 2)
    batch, n = v.shape
    return f(v.reshape((batch, 2, n // 2))).reshape((batch, n))


def normed(v: Any) -> Any:
    centred = v - v.mean(axis=-1, keepdims=True)
    return centred / ops.sqrt(ops.square(centred).mean(axis=-1, keepdims=True) + 0.5)


# name: (pool value a, pool value b with a's width, the step, captured tensors, x of this step) -> value
OPS: dict[str, Callable[[Any, Any, Step, Get, Any], Any]] = {
    "tanh": lambda a, b, s, get, x: ops.tanh(a),
    "sigmoid": lambda a, b, s, get, x: ops.sigmoid(a),
    "softplus": lambda a, b, s, get, x: ops.softplus(a),
    "gelu": lambda a, b, s, get, x: ops.gelu(a),
    "bump": lambda a, b, s, get, x: ops.exp(-ops.square(a)),
    "relu": lambda a, b, s, get, x: ops.relu(a) - 0.1,
    "leaky": lambda a, b, s, get, x: ops.leaky_relu(a, 0.2) + ops.abs(b) * 0.1,
    "clip": lambda a, b, s, get, x: ops.clip(a, -0.6, 0.7),
    "add": lambda a, b, s, get, x: 0.7 * (a + b),
    "subtract": lambda a, b, s, get, x: (a - b) / 1.5,
    "multiply": lambda a, b, s, get, x: ops.tanh(a) * b,
    "divide": lambda a, b, s, get, x: a / (1.5 + ops.square(b)),
    "maximum": lambda a, b, s, get, x: ops.maximum(a, b) - 0.2 * ops.minimum(a, -b),
    "blend": lambda a, b, s, get, x: ops.sigmoid(a) * b + (1.0 - ops.sigmoid(a)) * a,
    "select": lambda a, b, s, get, x: ops.where(ops.greater(a, b), a, 0.5 * b),
    "select_both": lambda a, b, s, get, x: ops.where(ops.logical_and(a > -0.5, ops.less_equal(b, 0.3)), a * b, 0.1),
    "mask": lambda a, b, s, get, x: ops.where(x["keep"], a, b),
    "masked_row": lambda a, b, s, get, x: a * x["keep"].astype(a.dtype) + 0.2,
    "matmul": lambda a, b, s, get, x: a @ get("W", a.shape[-1], s.n),
    "matmul_turned": lambda a, b, s, get, x: a @ get("V", s.n, a.shape[-1]).T,
    "matmul_sum": lambda a, b, s, get, x: a @ get("W0", a.shape[-1], s.n) + ops.tanh(b) @ get("W1", b.shape[-1], s.n),
    "gates": lambda a, b, s, get, x: _gates(a, s, get, x, 2),
    "many_gates": lambda a, b, s, get, x: _gates(a, s, get, x, 4),
    "chunks": lambda a, b, s, get, x: _chunks(a, s, get),
    "input": lambda a, b, s, get, x: x["x"] @ get("Wx", x["x"].shape[-1], s.n) + get("bx", s.n),
    "embedding": lambda a, b, s, get, x: ops.take(get("table", TOKENS, s.n), x["token"], axis=0),
    "bias": lambda a, b, s, get, x: a * get("scale", a.shape[-1]) + get("shift", a.shape[-1]),
    "scalar": lambda a, b, s, get, x: a * get("factor"),
    "row": lambda a, b, s, get, x: a + get("row", None, 1),
    "constant": lambda a, b, s, get, x: a * np.linspace(0.5, 1.0, a.shape[-1]) - 0.25,
    "squeeze": lambda a, b, s, get, x: a * 1.0 - (-b) * 0.5 + 0.0,
    "softmax": lambda a, b, s, get, x: ops.softmax(a) + ops.log_softmax(b, -1) * 0.1,
    "layer_norm": lambda a, b, s, get, x: normed(a) * get("gain", a.shape[-1]),
    "norm": lambda a, b, s, get, x: a / (1.0 + ops.norm(a, axis=-1, keepdims=True)),
    "row_sum": lambda a, b, s, get, x: ops.tanh(a.sum(axis=-1, keepdims=True)) * b,
    "row_max": lambda a, b, s, get, x: 0.5 * a + 0.1 * ops.max(b, axis=-1, keepdims=True),
    "row_min": lambda a, b, s, get, x: a - 0.3 * ops.min(a * b, axis=-1).reshape((-1, 1)),
    "logsumexp": lambda a, b, s, get, x: b - 0.4 * ops.logsumexp(a, axis=-1, keepdims=True),
    "join": lambda a, b, s, get, x: fit(ops.concatenate([b, a], axis=-1), s.n),
    "parts": lambda a, b, s, get, x: ops.concatenate(ops.split(a, [a.shape[-1] // 2], axis=-1)[::-1], axis=-1),
    "slices": lambda a, b, s, get, x: ops.concatenate([a[:, :1] * 2.0, ops.sin(b[:, 1:])], axis=-1),
    "overlap": lambda a, b, s, get, x: 0.5 * (fit(a, a.shape[-1] + 1)[:, 1:] + a),
    "attention": lambda a, b, s, get, x: attend(fit(a, D), get, True),
    "attention_matmul": lambda a, b, s, get, x: attend(fit(a, D) @ get("Wq", D, D), get, False),
    "turned": lambda a, b, s, get, x: halves(a, lambda v: ops.swapaxes(v, 1, 2) * 0.9),
    "in_halves": lambda a, b, s, get, x: halves(a, lambda v: v @ get("Wh", v.shape[-1], v.shape[-1])),
    "cumsum": lambda a, b, s, get, x: ops.cumsum(a, axis=-1) / a.shape[-1],
    "moved": lambda a, b, s, get, x: ops.flip(a, -1) * 0.5 + ops.roll(b, 1, -1) * 0.5,
    "prod": lambda a, b, s, get, x: ops.prod(0.5 + ops.sigmoid(a), axis=-1, keepdims=True) * b,
    "picked": lambda a, b, s, get, x: a * ops.take_along_axis(b, _place(x, b), axis=-1),
    "counted": lambda a, b, s, get, x: a * _counted(x).astype(a.dtype),
    "hot": lambda a, b, s, get, x: b + ops.one_hot(x["token"], TOKENS, np.float64) @ get("codes", TOKENS, b.shape[-1]),
    "largest": lambda a, b, s, get, x: b * (1.0 + ops.argmax(_apart(a), axis=-1, keepdims=True).astype(b.dtype)) * 0.4,
    "pondered": lambda a, b, s, get, x: _pondered(a, b, get("Wp", a.shape[-1], a.shape[-1])),
    "walked": lambda a, b, s, get, x: _walked(a, [b, ops.tanh(a), b * 0.3], get("bw", a.shape[-1])),
    "stopped": lambda a, b, s, get, x: a * ops.stop_gradient(ops.tanh(b)),
    "named": lambda a, b, s, get, x: tg.name(ops.tanh(a), "named") * 0.8,
}  # fmt: skip


def _counted(x: Any) -> Any:
    """Whole numbers of a few bits, one a row."""
    n = x["token"].reshape((-1, 1))
    return ops.where(n > 2, ops.maximum(n * n - 7, 1), -n) + ops.abs(n - 3)


def _place(x: Any, b: Any) -> Any:
    return ops.minimum(x["token"], b.shape[-1] - 1).reshape((-1, 1))


def _apart(a: Any) -> Any:
    """Without equal columns, whose order would be chance."""
    return ops.stop_gradient(a) + np.linspace(0.0, 0.37, a.shape[-1])


def _pondered(a: Any, b: Any, w: Any) -> Any:
    """An inner loop on the state alone; its last state."""
    return ops.scan(lambda s, _: (ops.tanh(s @ w + b),) * 2, a, None, length=2)[0]


def _walked(a: Any, values: Sequence[Any], bias: Any) -> Any:
    """An inner loop over values of the pool, backwards; all of its states."""

    def step(s: Any, v: Any) -> Any:
        s = ops.sigmoid(v) * s + 0.5 * v + bias
        return s, ops.sin(s)

    return ops.scan(step, a, ops.stack(values, axis=0), reverse=True)[1].mean(axis=0)


def _gates(a: Any, s: Step, get: Get, x: Any, count: int) -> Any:
    """Gates typed one by one: products that share an operand."""
    z = [
        a @ get(f"U{k}", a.shape[-1], s.n) + x["x"] @ get(f"X{k}", x["x"].shape[-1], s.n) + get(f"b{k}", s.n)
        for k in range(count)
    ]
    out = ops.sigmoid(z[0]) * ops.tanh(z[1])
    return out if count == 2 else out + ops.sigmoid(z[2]) * ops.sin(z[3])


def _chunks(a: Any, s: Step, get: Get) -> Any:
    """Gates cut out of one product, of which one is not used."""
    i, g, _, o = ops.chunk(a @ get("Uc", a.shape[-1], 4 * s.n), 4)
    return ops.sigmoid(i) * ops.tanh(g) + 0.1 * o


UPDATES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "leaky": lambda old, v, w: 0.5 * old + 0.5 * ops.tanh(v),
    "tanh": lambda old, v, w: ops.tanh(v + 0.5 * old),
    "gated": lambda old, v, w: ops.sigmoid(v) * old + (1.0 - ops.sigmoid(v)) * ops.tanh(w),
    "cell": lambda old, v, w: ops.sigmoid(v) * ops.tanh(0.5 * old + ops.tanh(w)),
    "kept": lambda old, v, w: old,
    "forgotten": lambda old, v, w: ops.tanh(w),
}
OUTPUTS: dict[str, Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], Any]] = {
    "state": lambda pool, old, new: new[0],
    "all_states": lambda pool, old, new: list(new),
    "old_state": lambda pool, old, new: old[-1],
    "last": lambda pool, old, new: pool[-1],
    "middle": lambda pool, old, new: ops.tanh(pool[len(pool) // 2]) * 2.0,
    "per_row": lambda pool, old, new: pool[-1].sum(axis=-1),
    "total": lambda pool, old, new: ops.square(pool[-2]).mean(),
    "class": lambda pool, old, new: ops.argmax(pool[-1], axis=-1),
    "constant": lambda pool, old, new: np.ones(2),
}

# ---------------------------------------------------------------------------- drawing a recipe

Choose = Callable[[Sequence[Any]], Any]


def recipe(choose: Choose, seed: int) -> Recipe:
    """A recipe from any way to choose one element of a list."""
    count = choose([1, 2, 3])
    widths = tuple(choose([1, 2, 3, 4, 6]) for _ in range(count))
    names = sorted(OPS)
    body = tuple(
        Step(choose(names), choose([1, 2, 3, 4, 5]), choose([1, 2, 3, 4, 5, 6]), choose([1, 2, 3, 4, 5]))
        for _ in range(choose(range(3, 11)))
    )
    return Recipe(
        seed,
        choose([1, 2, 3, 4]),
        choose([1, 2, 3, 4]),
        widths,
        body,
        tuple(choose(sorted(UPDATES)) for _ in widths),
        tuple(choose(sorted(OUTPUTS)) for _ in range(choose([1, 2, 3]))),
    )


def build(made: Recipe) -> RandomCell:
    """The cell of a recipe, its tensors filled with numbers."""

    def numbers(name: str, shape: Sequence[int], scale: float) -> Any:
        rng = np.random.default_rng([made.seed, zlib.crc32(name.encode())])
        return tg.tensor(scale * rng.standard_normal(tuple(shape)), requires_grad=True)

    rng = np.random.default_rng([made.seed, 1])
    t, batch = made.steps, made.batch
    xs = {
        "x": numbers("x", (t, batch, 3), 0.8),
        "token": tg.tensor(rng.integers(0, TOKENS, (t, batch))),
        "keep": tg.tensor(rng.random((t, batch, 1)) < 0.6),
    }
    init = tuple(numbers(f"init{k}", (batch, n), 0.5) for k, n in enumerate(made.widths))
    cell = RandomCell(made, lambda carry, x: (carry, x), init, xs)

    def get(name: str, *shape: int | None) -> Any:
        lengths = tuple(batch if n is None else n for n in shape)
        if name not in cell.captures:
            cell.captures[name] = numbers(name, lengths, 0.8 / max(len(lengths) and lengths[0], 1) ** 0.5)
        return cell.captures[name]

    def body(carry: Any, x: Any) -> tuple[Any, Any]:
        pool = [x["x"], *carry]
        for k, s in enumerate(made.body):
            a, b = pool[-min(s.i, len(pool))], pool[-min(s.j, len(pool))]
            own: Get = lambda name, *shape, k=k: get(f"{name}.{k}", *shape)
            pool.append(OPS[s.op](a, fit(b, a.shape[-1]), s, own, x))
        new = []
        for k, (old, how) in enumerate(zip(carry, made.updates, strict=True)):
            v, w = (fit(pool[-1 - (k + shift) % len(pool)], old.shape[-1]) for shift in (0, 1))
            new.append(UPDATES[how](old, v, w))
        return tuple(new), {f"{k}:{name}": OUTPUTS[name](pool, carry, new) for k, name in enumerate(made.outputs)}

    cell.body = body
    with tg.no_grad(), tg.eager():
        body(init, {name: leaf[0] for name, leaf in xs.items()})  # one step, which makes the captures
    return cell


def make(seed: int) -> RandomCell:
    """The cell with this number."""
    rng = np.random.default_rng(seed)
    return build(recipe(lambda options: options[int(rng.integers(len(options)))], seed))


@st.composite
def cells(draw: Any) -> RandomCell:
    """Random cells whose recipe is shrunk."""
    return build(recipe(lambda options: draw(st.sampled_from(list(options))), draw(st.integers(0, 99))))
