"""Loops in native code give what eager execution gives: values, gradients, errors, and nothing shared."""

from __future__ import annotations

import inspect
import itertools
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from native_cells import CASES, TOLERANCE, F, H, assert_same, cases, check, gradients, leaves_of, loss_of, outcome, runs

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops
from tinygrad_lstm.tree import flatten

__all__ = ["runs"]

Runs = list[bool]

# ---------------------------------------------------------------------------- bodies of many kinds


@pytest.mark.parametrize("case", [*cases(slow=False), *cases(slow=True)])
def test_bodies(case: Any, runs: Runs) -> None:
    check(case, runs)
    check(case, runs, seed=1, rows=H)  # a batch as large as the layer is wide


@pytest.mark.slow
@pytest.mark.parametrize("case", [*cases(slow=False), *cases(slow=True)])
@pytest.mark.parametrize("rows", [1, 2, 13])
def test_bodies_of_other_batches(case: Any, rows: int, runs: Runs) -> None:
    for steps, reverse in ((1, False), (4, True)):
        check(case, runs, steps=steps, rows=rows, reverse=reverse)


def test_any_number_of_steps_and_rows(runs: Runs) -> None:
    for steps, rows in itertools.product((0, 1, 2, 7), (0, 1, 2, 5, 13)):
        check(CASES["in_loop_input"], runs, seed=steps, steps=steps, rows=rows, reverse=rows == 5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [[4, 3, 0, 1, 2], [0] * 5, [4] * 5])
def test_lengths(lengths: list[int], reverse: bool, runs: Runs) -> None:
    check(CASES["in_loop_input"], runs, steps=4, lengths=lengths, reverse=reverse)


def test_what_the_padding_holds_changes_nothing(runs: Runs) -> None:
    case = CASES["in_loop_input"]
    lengths = np.array([4, 3, 0, 1, 2])
    init, xs, captures = case.arrays(0, 4, 5)
    clean = outcome(case.make, init, xs, captures, eager=False, lengths=lengths)
    dirty = xs.copy()
    for n, bad in zip(lengths, itertools.cycle([np.nan, np.inf, -np.inf])):
        dirty[n:, np.flatnonzero(lengths == n)] = bad
    found = outcome(case.make, init, dirty, captures, eager=False, lengths=lengths)
    for a, b in zip((*clean[0], *clean[1]), (*found[0], *found[1]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert runs == [True] * 4 and np.isnan(dirty).any()


def test_nan_and_infinity_come_out_where_eager_has_them(runs: Runs) -> None:
    case = CASES["rows_normalised"]
    init, xs, captures = case.arrays(0, 4, 6)
    xs[1, 0, 2], xs[1, 1], xs[2, 2], xs[2, 3, 0] = np.nan, np.inf, -np.inf, -np.inf
    xs[0, 4] *= 1e4
    with np.errstate(all="ignore"):
        found = outcome(case.make, init, xs, captures, eager=False)
        expected = outcome(case.make, init, xs, captures, eager=True)
    assert runs == [True, True]
    assert_same(found[0], expected[0])
    assert_same(found[1], expected[1])
    assert np.isnan(found[0][1]).any() and np.isinf(found[0][1]).any() and np.isfinite(found[0][1]).any()


# ---------------------------------------------------------------------------- inputs however they lie in memory

rng = np.random.default_rng(7)
PLAIN = rng.standard_normal((4, 5, H))
LAYOUTS = {
    "fortran": np.asfortranarray(PLAIN),
    "batch first": np.ascontiguousarray(PLAIN.swapaxes(0, 1)).swapaxes(0, 1),
    "time backwards": PLAIN[::-1],
    "batch backwards": PLAIN[:, ::-1],
    "features backwards": PLAIN[..., ::-1],
    "every second of all": rng.standard_normal((8, 11, 2 * H))[::2, :10:2, ::2],
    "one step for all": np.broadcast_to(PLAIN[:1], PLAIN.shape),
    "one row for all": np.broadcast_to(PLAIN[:, :1], PLAIN.shape),
    "one number for all": np.broadcast_to(PLAIN[..., :1], PLAIN.shape),
    "other byte order": PLAIN.astype(">f8"),
    "one byte off": np.frombuffer(b"." + PLAIN.tobytes(), np.uint8)[1:].view(np.float64).reshape(PLAIN.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(layout: str, runs: Runs) -> None:
    xs = LAYOUTS[layout]
    h = np.asfortranarray(rng.standard_normal((5, H)))
    weights = {"U": rng.standard_normal((H, H)).T[::-1]}

    def values(xs: Any) -> list[np.ndarray]:
        body = CASES["in_loop_input"].make({name: tg.asarray(a) for name, a in weights.items()})
        return [leaf.numpy() for leaf in flatten(ops.scan(body, tg.asarray(h), tg.asarray(xs)))[0]]

    found = values(xs)
    assert runs == [True] * xs.dtype.isnative  # swapped bytes are left to NumPy
    with tg.eager():
        assert_same(found, values(np.ascontiguousarray(xs, np.float64)))


# ---------------------------------------------------------------------------- layers


def filled(layer: Any, seed: int = 3, scale: float = 0.5) -> Any:
    generator = np.random.default_rng(seed)
    for p in layer.parameters():
        p.data = (scale * generator.standard_normal(p.shape)).astype(p.dtype)
    return layer


def trained(layer: Any, x: np.ndarray, eager: bool = False, **options: Any) -> list[np.ndarray]:
    """Everything that a call gives, and all gradients."""
    tg.seed(1)
    leaf = tg.tensor(x, requires_grad=True)
    layer.zero_grad()
    with tg.eager() if eager else nullcontext():
        out = layer(leaf, **options)
    loss_of(out).backward()
    return [*(v.numpy().copy() for v in flatten(out)[0]), leaf.grad, *(p.grad for p in layer.parameters())]


SIZES: dict[str, Any] = {"dtype": np.float64}
slow = lambda *parameters: pytest.param(*parameters, marks=pytest.mark.slow)
LAYERS = [
    (nn.LSTM(F, H, 2, bidirectional=True, **SIZES), 8),
    (nn.Recurrent(nn.LayerNormLSTMCell(F, H, **SIZES)), 2),
    (nn.GRU(F, H, return_states=True, return_gates=True, **SIZES), 2),
    slow(nn.LSTM(F, H, return_gates=True, **SIZES), 2),
    slow(nn.LSTM(F, H, bias=False, **SIZES), 2),
    slow(nn.LSTM(F, H, proj_size=2, **SIZES), 2),
    slow(nn.RNN(F, H, **SIZES), 2),
    slow(nn.RNN(F, H, nonlinearity="relu", **SIZES), 2),
    slow(nn.Recurrent(nn.PeepholeLSTMCell(F, H, **SIZES)), 2),
    slow(nn.Recurrent(nn.LayerNormLSTMCell(F, H, proj_size=2, **SIZES), reverse=True), 2),
    slow(nn.Recurrent(nn.GRUCell(F, H, **SIZES), learn_state=True), 2),
    slow(nn.Recurrent(nn.Zoneout(nn.LSTMCell(F, H, **SIZES), p=(0.2, 0.4))), 2),
    slow(nn.Stack([nn.LSTMCell(F, 5, **SIZES), nn.GRUCell(5, 4, **SIZES)], dropout=0.3), 4),
]


@pytest.mark.parametrize(("layer", "loops"), LAYERS)
@pytest.mark.parametrize("lengths", [None, slow([4, 0, 2, 3, 1])])
def test_layers(layer: Any, loops: int, lengths: Any, runs: Runs) -> None:
    filled(layer)
    x = np.random.default_rng(0).standard_normal((4, 5, F))
    found = trained(layer, x, lengths=lengths)
    assert runs == [True] * loops
    assert_same(found, trained(layer, x, eager=True, lengths=lengths))


def lstm(**options: Any) -> Any:
    return filled(nn.LSTM(F, H, **(SIZES | options)))


X = np.random.default_rng(5).standard_normal((4, 5, F))


def test_batch_first_no_grad_and_a_memory_budget(runs: Runs) -> None:
    layer = lstm(batch_first=True)
    x = X.swapaxes(0, 1)
    expected = trained(layer, x, eager=True)
    assert_same(trained(layer, x), expected)
    assert_same(trained(layer, x, memory=0.5), expected)
    before = len(runs)
    with tg.no_grad():
        y, _ = layer(x)
    assert len(runs) == before + 1 >= 4
    assert_same([y.numpy()], expected[:1])


def test_float32(runs: Runs) -> None:
    """Against float64: some dozen roundings a step, of numbers up to the largest gradient."""
    single, double = nn.LSTM(F, 17), nn.LSTM(F, 17, **SIZES)
    filled(double)
    single.load_state_dict(double.state_dict())
    for x in (X, np.random.default_rng(1).standard_normal((20, 3, F))):
        found = trained(single, x.astype(np.float32))
        for a, b in zip(found, trained(double, x.astype(np.float32).astype(np.float64), eager=True), strict=True):
            assert a.dtype == np.float32
            bound = 4 * len(x) * np.finfo(np.float32).eps * max(1.0, np.abs(b).max())
            np.testing.assert_allclose(a, b, rtol=0, atol=bound)
    assert runs == [True] * 4


def test_parameters_and_captures_are_read_at_every_call(runs: Runs) -> None:
    layer = lstm()
    for change in ("nothing", "data", "in place", "another parameter"):
        if change == "data":
            layer.weight_hh_l0.data = layer.weight_hh_l0.data * 0.5
        elif change == "in place":
            layer.weight_ih_l0.data[...] += 0.25
        elif change == "another parameter":
            layer.bias_hh_l0 = nn.Parameter(np.linspace(-1.0, 1.0, 4 * H))
        assert_same(trained(layer, X), trained(layer, X, eager=True))
    case = CASES["attention"]
    for seed in range(3):
        check(case, runs, seed=seed)
    assert runs == [True, True]


# ---------------------------------------------------------------------------- differentiated again, declared anew


def second_order(f: Any, primals: Any) -> list[np.ndarray]:
    value, products = tg.hvp(f, primals, tuple(np.cos(np.arange(p.size)).reshape(p.shape) for p in primals))
    return [value.numpy(), *(p.numpy() for p in products)]


def test_second_order(runs: Runs) -> None:
    init, xs, captures = CASES["in_loop_input"].arrays(0, 3, 5)
    f = lambda h, x, u: ops.sin(ops.scan(CASES["in_loop_input"].make({"U": u}), h, x)[1]).sum()
    found = second_order(f, (init, xs, captures["U"]))
    assert len(runs) >= 4 and all(runs)
    with tg.eager():
        assert_same(found, second_order(f, (init, xs, captures["U"])))


@pytest.mark.slow
def test_second_order_of_an_lstm(runs: Runs) -> None:
    layer = lstm()
    state = np.random.default_rng(2).standard_normal((2, 1, 5, H))
    f = lambda x, h, c: ops.sin(layer(x, (h, c))[0]).sum()
    found = second_order(f, (X, *state))
    assert len(runs) >= 4 and all(runs)
    with tg.eager():
        assert_same(found, second_order(f, (X, *state)))


def doubled(rule: Any) -> Any:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        return rule(*args, **kwargs) * 2.0

    wrong.__signature__ = inspect.signature(rule)  # type: ignore[attr-defined]
    return wrong


def test_a_derivative_declared_anew(runs: Runs) -> None:
    """Tanh's derivative doubled: native and eager gradients change alike, for there is no other backward."""
    case = CASES["in_loop_input"]
    arrays = case.arrays(0, 3, 5)
    tanh = tg.REGISTRY["tanh"]
    rules, accumulate = tanh.rules, tanh.accumulate
    right = outcome(case.make, *arrays, eager=False)
    try:
        tanh.set_rules(tuple(map(doubled, rules)))
        wrong = outcome(case.make, *arrays, eager=False)
        assert_same(wrong[1], outcome(case.make, *arrays, eager=True)[1])
    finally:
        tanh.set_rules(rules)
        tanh.accumulate = accumulate  # new rules drop it
    assert runs == [True] * 4
    assert all(np.abs(a - b).max() > 0.1 for a, b in zip(right[1], wrong[1], strict=True))
    assert_same(outcome(case.make, *arrays, eager=False)[1], right[1], tolerance=0.0)


# ---------------------------------------------------------------------------- errors


def test_an_index_out_of_range(runs: Runs) -> None:
    case = CASES["lookup_in_a_stack"]
    (h, token), (x, following), captures = case.arrays(0, 3, 5)
    following[1, 2] = 99
    messages = []
    for eager in (False, True):
        with pytest.raises(tg.OutOfRangeError, match="index 99 is outside of an axis of length 7") as caught:
            outcome(case.make, [h, token], [x, following], captures, eager=eager)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and not runs
    check(case, runs)  # the loop still works


# ---------------------------------------------------------------------------- who owns what


def test_a_layer_called_twice_before_backward(runs: Runs) -> None:
    def both() -> list[np.ndarray]:
        layer = lstm()
        first, second = (tg.tensor(x, requires_grad=True) for x in (X, 2.0 * X[:, ::-1]))
        a, b = layer(first)[0], layer(second)[0]
        del b
        c = layer(first * 0.5)[0]
        (loss_of(a) + 3.0 * loss_of(c)).backward(retain_graph=True)
        once = [p.grad.copy() for p in layer.parameters()]
        (loss_of(a) + 3.0 * loss_of(c)).backward()
        return [*once, first.grad, *(p.grad for p in layer.parameters())]

    found = both()
    assert runs == [True] * 7
    with tg.eager():
        assert_same(found, both())


def test_what_a_call_returned_stays_as_it_was(runs: Runs) -> None:
    """With arrays large enough to come from the pool, whose memory is used again."""
    layer = filled(nn.LSTM(F, 64, **SIZES), scale=0.1)
    kept = []
    for seed in range(5):
        x = np.random.default_rng(seed).standard_normal((12, 48, F))
        found = [a.view() for a in trained(layer, x)]
        kept.append((found, [a.copy() for a in found]))
        del found
    assert len(runs) == 10
    for found, copies in kept:
        for a, b in zip(found, copies, strict=True):
            np.testing.assert_array_equal(a, b)


def outputs_of(case: Any, arrays: Any) -> tuple[Any, list[Any], list[Any]]:
    """(loss, outputs, inputs) of a case whose loss is linear: it saves nothing of the outputs."""
    init, xs, captures = (leaves_of(a) for a in arrays)
    out = flatten(ops.scan(case.make(captures), init, xs))[0]
    loss = sum(((leaf * (1.0 + k)).sum() for k, leaf in enumerate(out)), start=tg.tensor(0.0, dtype=np.float64))
    return loss, out, [t for t in flatten((init, xs, captures))[0] if t.dtype.kind == "f"]


@pytest.mark.parametrize("name", ["lstm", "carries"])
def test_outputs_share_no_memory(name: str, runs: Runs) -> None:
    arrays = CASES[name].arrays(0, 3, 5)
    _, out, inputs = outputs_of(CASES[name], arrays)
    assert runs == [True]
    for a, b in itertools.combinations([t.numpy() for t in (*out, *inputs)], 2):
        assert not np.may_share_memory(a, b)
    assert all(t.numpy().flags.writeable for t in out)


@pytest.mark.parametrize("name", ["lstm", "carries"])
def test_an_output_written_to_before_backward(name: str, runs: Runs) -> None:
    """Either the write is noticed, or it changes no gradient."""
    arrays = CASES[name].arrays(0, 3, 5)
    loss, out, inputs = outputs_of(CASES[name], arrays)
    loss.backward()
    expected = gradients(inputs)
    for k in range(len(out)):
        loss, out, inputs = outputs_of(CASES[name], arrays)
        out[k].data[...] = 77.0
        try:
            loss.backward()
        except tg.GraphError as error:
            assert "changed in place" in str(error)
        else:
            assert_same(gradients(inputs), expected, tolerance=0.0)
    assert all(runs)


@pytest.mark.parametrize("what", ["x", "weights", "initial state"])
def test_an_input_written_to_before_backward(what: str, runs: Runs) -> None:
    case = CASES["in_loop_input"]
    for eager in (False, True):
        h, xs, captures = (leaves_of(a) for a in case.arrays(0, 3, 5))
        with tg.eager() if eager else nullcontext():
            y = ops.scan(case.make(captures), h, xs)[1]
        loss = y.sum()
        {"x": xs, "weights": captures["U"], "initial state": h}[what].data[...] = 5.0
        with pytest.raises(tg.GraphError, match="changed in place"):
            loss.backward()
    assert runs == [True]


def test_a_nested_scan(runs: Runs) -> None:
    """The outer loop has no native form, the inner one has."""

    def make(c: Any) -> Any:
        def body(h: Any, x: Any) -> Any:
            inner = lambda a, b: (ops.tanh(a @ c["U"] + b),) * 2
            h, ys = ops.scan(inner, h, ops.stack([x, 0.5 * x]))
            return h, ys.sum(axis=0)

        return body

    arrays = CASES["in_loop_input"].arrays(0, 3, 5)
    found = outcome(make, *arrays, eager=False)
    assert runs and all(runs)
    expected = outcome(make, *arrays, eager=True)
    assert_same((*found[0], *found[1]), (*expected[0], *expected[1]), TOLERANCE)
