"""What known replays leave to the general one, and what they notice."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from test_replays import LEAVES, Counter, counter, generally, gradients, nothing_is_known

import tinygrad_lstm as tg
from tinygrad_lstm import ops, replays
from tinygrad_lstm.errors import GraphError
from tinygrad_lstm.primitive import Primitive
from tinygrad_lstm.tape import state

__all__ = ["counter", "nothing_is_known"]


def product(a: Any, b: Any) -> Any:
    return (ops.tanh(a) * ops.sin(b)).sum()


@pytest.fixture
def pair(rng: Any) -> list[tg.Tensor]:
    """Two leaves; gradients of their product are known."""
    leaves = [tg.tensor(rng.standard_normal(4), requires_grad=True) for _ in range(2)]
    for _ in range(5):
        gradients(product, leaves)
    return leaves


def test_hooks_see_every_gradient(pair: list[tg.Tensor], counter: Counter) -> None:
    a, _ = pair
    seen: list[Any] = []
    remove = a.register_hook(lambda g: seen.append(g.tolist()))
    gradients(product, pair)
    assert seen == [a.grad.tolist()]
    assert counter.general == 1
    remove()
    gradients(product, pair)
    assert counter.general == 1

    def hooked(a: Any, b: Any) -> Any:
        t = ops.tanh(a)
        t.register_hook(lambda g: g * 2.0)
        return (t * ops.sin(b)).sum()

    before = a.grad
    for _ in range(5):
        gradients(hooked, pair)
        np.testing.assert_allclose(a.grad, 2.0 * before, rtol=1e-15)


def test_retained_gradients(pair: list[tg.Tensor], counter: Counter) -> None:
    kept = []

    def loss(a: Any, b: Any) -> Any:
        t = ops.tanh(a)
        if kept is not None and counter.general % 2:
            t.retain_grad()
        kept.append(t)
        return (t * ops.sin(b)).sum()

    for _ in range(8):
        counter.general += 1 - counter.general % 2  # odd: retain
        gradients(loss, pair)
        np.testing.assert_array_equal(kept[-1].grad, np.sin(pair[1].numpy()))


def test_tapes_keep_what_they_recorded(pair: list[tg.Tensor]) -> None:
    for _ in range(5):
        with tg.Tape() as tape:
            out = product(*pair)
        out.backward()
        first = tape.gradient(out, pair[0])
        np.testing.assert_array_equal(first, tape.gradient(out, pair[0]))


def test_what_only_a_tape_recorded_is_a_constant_when_it_has_died(counter: Counter, rng: Any) -> None:
    x, constant = tg.tensor(rng.standard_normal(4), requires_grad=True), tg.tensor(rng.standard_normal(4))
    for _ in range(6):
        x.grad = None
        with tg.Tape() as tape:
            out = (ops.sin(constant * constant) * x).sum()
        del tape
        out.backward()
        np.testing.assert_array_equal(x.grad, np.sin(constant.numpy() ** 2))
        assert constant.grad is None
    assert counter.general == 2


def test_one_leaf_in_two_places(pair: list[tg.Tensor], counter: Counter) -> None:
    (a, _) = pair
    expected = generally(lambda a: product(a, a), [a])
    for _ in range(3):
        np.testing.assert_array_equal(gradients(lambda a: product(a, a), [a])[0], expected[0])
    # Added up first, and then to what is there: the bits differ otherwise.
    for scale in np.logspace(-3, 3, 20):
        found = []
        for known in (True, False):
            a.grad = np.full(4, scale)
            if known:
                product(a, a).backward()
            else:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(LEAVES, "known_replay", lambda *args: False)
                    product(a, a).backward()
            found.append(a.grad)
        np.testing.assert_array_equal(*found)
    assert counter.general == 21  # the expected one: this is another form, known at once at a place that is known


def test_other_shapes_dtypes_and_requirements(pair: list[tg.Tensor], rng: Any) -> None:
    others = [
        [tg.tensor(rng.standard_normal(5), requires_grad=True) for _ in range(2)],
        [tg.tensor(rng.standard_normal((3, 4)), requires_grad=True), pair[1]],  # broadcast
        [pair[0], tg.tensor(rng.standard_normal((3, 4)), requires_grad=True)],
        [tg.tensor(rng.standard_normal(4).astype(np.float32), requires_grad=True), pair[1]],
        [pair[0], tg.tensor(rng.standard_normal(4))],
        [tg.tensor(rng.standard_normal(4)), pair[1]],
    ]
    for leaves in others:
        for _ in range(5):
            expected = generally(product, leaves)
            for a, b in zip(gradients(product, leaves), expected, strict=True):
                np.testing.assert_array_equal(a, b, strict=True)


@pytest.mark.parametrize("axis", [0, 1])
def test_other_parameters_of_the_same_shape(axis: int, rng: Any) -> None:
    """A sum over the one axis and over the other of a square matrix look alike but for a parameter."""
    x = tg.tensor(rng.standard_normal((3, 3)), requires_grad=True)
    weights = rng.standard_normal(3)

    def loss(x: Any, axis: int) -> Any:
        return (ops.sum(x, axis=axis) * weights).sum()

    for k in range(10):
        x.grad = None
        loss(x, (axis + (k > 5)) % 2).backward()
        expected = np.broadcast_to(weights if (axis + (k > 5)) % 2 == 0 else weights[:, None], (3, 3))
        np.testing.assert_array_equal(x.grad, expected)


def test_the_order_in_which_branches_ran(rng: Any) -> None:
    """Three shares are added up in the order of the tape: floating sums differ otherwise."""
    x = tg.tensor(rng.standard_normal(50).astype(np.float32), requires_grad=True)
    scales = [np.float32(s) for s in (1e-3, 7.0, 3e4)]

    def loss(x: Any, order: tuple[int, ...]) -> Any:
        parts = {}
        for k in order:
            parts[k] = ops.sin(x * tg.tensor(np.full(50, scales[k])))
        return (parts[0] + parts[1] + parts[2]).sum()

    for order in [(0, 1, 2)] * 5 + [(2, 1, 0)] * 5 + [(1, 2, 0)] * 5:
        expected = generally(lambda x, order=order: loss(x, order), [x])
        np.testing.assert_array_equal(gradients(lambda x, order=order: loss(x, order), [x])[0], expected[0])


def test_changed_values_are_noticed(pair: list[tg.Tensor]) -> None:
    a, b = pair
    out = product(a, b)
    array = b.numpy()
    array[0] += 1.0
    with pytest.raises(GraphError, match="changed in place"):
        out.backward()
    out = product(a, b)
    array[0] += 1.0  # of which it has a fingerprint
    with pytest.raises(GraphError, match="changed in place"):
        out.backward()
    out = product(a, b)
    b.data = b.numpy() + 1.0
    with pytest.raises(GraphError, match="changed in place"):
        out.backward()


def test_a_graph_is_freed_or_kept(pair: list[tg.Tensor], counter: Counter) -> None:
    out = product(*pair)
    for leaf in pair:
        leaf.grad = None
    out.backward(retain_graph=True)
    once = [leaf.grad for leaf in pair]
    out.backward()
    assert counter.general == 0
    for leaf, first in zip(pair, once, strict=True):
        np.testing.assert_array_equal(leaf.grad, first * 2.0)
    with pytest.raises(GraphError, match="freed by an earlier backward"):
        out.backward()


def test_a_cotangent_of_ones_own(counter: Counter, rng: Any) -> None:
    x = tg.tensor(rng.standard_normal(4), requires_grad=True)
    seed = rng.standard_normal(4)
    for _ in range(6):
        x.grad = None
        ops.reshape(ops.tanh(x), (2, 2)).backward(seed.reshape(2, 2))
        np.testing.assert_array_equal(x.grad, seed * (1 - np.tanh(x.numpy()) ** 2))
        x.grad[:] = 0.0
    for _ in range(6):
        x.grad = None
        ops.reshape(x, (2, 2)).backward(seed.reshape(2, 2))
        x.grad[:] = 0.0
    assert seed.all()


def test_gradients_are_nobody_elses(rng: Any) -> None:
    a, b = (tg.tensor(rng.standard_normal(4), requires_grad=True) for _ in range(2))
    for _ in range(6):
        a.grad = b.grad = None
        (a + b).sum().backward()
        a.grad[:] = 7.0
        np.testing.assert_array_equal(b.grad, np.ones(4))


def test_parts_are_not_added_to_what_another_leaf_has(counter: Counter, rng: Any) -> None:
    a, b = (tg.tensor(rng.standard_normal(4), requires_grad=True) for _ in range(2))
    weights = rng.standard_normal(4)
    for _ in range(6):
        a.grad = b.grad = None
        part = a[1:3]
        both = a + b  # replayed first: one cotangent for both
        ((both * weights).sum() + part.sum()).backward()
        np.testing.assert_array_equal(b.grad, weights)
        np.testing.assert_array_equal(a.grad, weights + [0, 1, 1, 0])
    assert counter.general == 2


def test_sums_without_axes_are_arrays(rng: Any) -> None:
    """A slice goes into the sum of two shares that are one array, and neither has an axis."""

    def loss(x: Any) -> Any:
        part, twice = x[()], x + x
        return twice * twice + part * part

    for first in (lambda x: x, ops.sin):  # of a leaf, and of a record
        x = tg.tensor(rng.standard_normal(()), requires_grad=True)
        for _ in range(6):
            expected = generally(lambda x, first=first: loss(first(x)), [x])
            found = gradients(lambda x, first=first: loss(first(x)), [x])
            np.testing.assert_array_equal(found[0], expected[0], strict=True)


@pytest.mark.parametrize("inner", [lambda t: t, ops.sin, lambda t: ops.split(t, 2)[0]])
def test_inputs_without_a_rule(inner: Any, counter: Counter, rng: Any) -> None:
    """No gradient flows to a condition, nor to what is behind it."""
    condition = tg.tensor(rng.integers(0, 2, 4).astype(np.float64), requires_grad=True)
    a = tg.tensor(rng.standard_normal(inner(condition).shape), requires_grad=True)
    for both in (False, True):
        for _ in range(6):
            a.grad = condition.grad = None
            chosen = ops.where(inner(condition), a * a, 0.0).sum()
            (chosen + (condition * 3.0).sum() if both else chosen).backward()
            np.testing.assert_array_equal(a.grad, np.where(inner(condition).numpy(), 2.0 * a.numpy(), 0.0))
            if both:
                np.testing.assert_array_equal(condition.grad, np.full(4, 3.0))
            else:
                assert condition.grad is None
    assert counter.general == 4


def test_rules_that_may_skip_inputs_are_left_to_the_general_replay(pair: list[tg.Tensor]) -> None:
    a, b = pair
    functions = [
        lambda a, b: ops.sin(a), lambda a, b: ops.sin(a) * b.detach(), lambda a, b: (ops.sin(a), ops.cos(b))[0],
    ]  # fmt: skip
    for function in functions:
        for _ in range(6):
            a.grad = b.grad = None
            tg.checkpoint(function)(a, b).sum().backward()
            assert a.grad is not None
            assert b.grad is None


def test_gradients_of_a_known_replay_add_up(pair: list[tg.Tensor], counter: Counter) -> None:
    first = gradients(product, pair)
    kept = pair[0].grad
    product(*pair).backward()
    assert counter.general == 0
    np.testing.assert_array_equal(pair[0].grad, first[0] * 2.0)
    np.testing.assert_array_equal(kept, first[0])


def test_rules_that_are_declared_anew(rng: Any) -> None:
    x = tg.tensor(rng.standard_normal(3), requires_grad=True)
    tanh = tg.REGISTRY["tanh"]
    rules = tanh.rules

    def loss(x: Any) -> Any:
        return ops.tanh(x).sum()

    for _ in range(5):
        (before,) = gradients(loss, [x])
    try:
        tanh.set_rules([lambda g, out: 2.0 * g * (1.0 - out * out)])
        (after,) = gradients(loss, [x])
    finally:
        tanh.set_rules(rules)
    np.testing.assert_allclose(after, 2.0 * before, rtol=1e-14)


def test_primitives_of_users_are_replayed_generally(counter: Counter, rng: Any) -> None:
    twice: Primitive = tg.primitive("twice_of_test_replays", lambda x: 2.0 * x, lambda g: g * 2.0)
    x = tg.tensor(rng.standard_normal(3), requires_grad=True)
    try:
        for k in range(5):
            (found,) = gradients(lambda x: twice(x).sum(), [x])
            np.testing.assert_array_equal(found, np.full(3, 2.0))
            assert counter.general == k + 1
    finally:
        del tg.REGISTRY["twice_of_test_replays"]


def test_many_forms_at_one_place(counter: Counter, rng: Any) -> None:
    """Where every tape is another one, looking stops."""
    for n in range(1, 60):
        x = tg.tensor(rng.standard_normal(n), requires_grad=True)
        (found,) = gradients(lambda x: ops.tanh(x).sum(), [x])
        np.testing.assert_allclose(found, 1 - np.tanh(x.numpy()) ** 2)
    (place,) = replays._places.values()
    assert len(place.forms) <= replays.MOST_FORMS
    assert place.left == 0


def test_long_tapes_are_replayed_generally(counter: Counter, rng: Any) -> None:
    def loss(x: Any) -> Any:
        for _ in range(replays.MOST_RECORDS + 1):
            x = ops.sin(x)
        return x.sum()

    x = tg.tensor(rng.standard_normal(3), requires_grad=True)
    for _ in range(5):
        gradients(loss, [x])
    assert counter.general == 5


def test_an_interrupt_leaves_recording_as_it_was(pair: list[tg.Tensor]) -> None:
    """Wherever in this package it comes: a state that is not restored would end all recording."""
    for k in range(200):
        out, calls = product(*pair), [0]

        def trace(frame: Any, event: str, argument: Any, k: int = k, calls: list[int] = calls) -> None:
            if frame.f_code.co_filename.endswith(("tensor.py", "leaves.py", "replays.py", "ownership.py")):
                calls[0] += 1
                if calls[0] > k:
                    sys.settrace(None)
                    raise KeyboardInterrupt

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            out.backward()
        except KeyboardInterrupt:
            pass
        else:
            break  # all calls were interrupted once
        finally:
            sys.settrace(before)
        assert state().enabled
    assert 4 < k < 199


def test_wide_tapes_are_replayed_generally(counter: Counter, rng: Any) -> None:
    leaves = [tg.tensor(rng.standard_normal(1), requires_grad=True) for _ in range(replays.MOST_INPUTS + 1)]
    for _ in range(5):
        gradients(lambda *xs: ops.concatenate(list(xs)).sum(), leaves)
    assert counter.general == 5


def test_an_error_in_a_rule_leaves_gradients_alone(pair: list[tg.Tensor], counter: Counter) -> None:
    a, b = pair
    failing = [False]

    def rule(g: Any, x: Any, position: int) -> Any:
        if failing[0]:
            raise RuntimeError("in the rule")
        return g * ops.cos(x)

    sine = Primitive("sine_of_test_replays", lambda x: np.sin(x), (rule,), register=False)

    def loss(a: Any, b: Any) -> Any:
        return (sine(a) * b).sum()

    for _ in range(5):
        gradients(loss, pair)
    assert counter.general == 2
    for leaf in pair:
        leaf.grad = None
    out = loss(a, b)
    failing[0] = True
    with pytest.raises(RuntimeError, match="in the rule"):
        out.backward()
    assert counter.general == 2
    assert a.grad is None
    assert b.grad is None
