"""What makes tg.compile record again, what it refuses (and at which line), and how it behaves as a function."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import threading
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
from samples import spread

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops
from tinygrad_lstm.compiler.draws import CompileWarning
from tinygrad_lstm.compiler.function import MOST_ENTRIES
from tinygrad_lstm.compiler.recording import Recording

SCALE = 2.0
WEIGHT = tg.tensor([1.0, 2.0], requires_grad=True)
X = np.float32([0.5, 1.5])


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the functions that were recorded during the test, in order."""
    names: list[str] = []
    entry = Recording.entry

    def noted(self: Recording) -> Any:
        names.append(self.name)
        return entry(self)

    monkeypatch.setattr(Recording, "entry", noted)
    return names


# ---------------------------------------------------------------------------- signatures


def test_shapes_dtypes_structure_and_static_values_are_the_signature(recordings: list[str]) -> None:
    def f(tree: Any, power: int = 2, *, mode: str = "sum") -> Any:
        total = tree["a"] ** power + tree["b"][0]
        return ops.sum(total) if mode == "sum" else ops.mean(total)

    fast = tg.compile(f)
    a, b = spread((3,)), spread((3,), 1.0, 2.0)
    calls: list[tuple[Any, dict[str, Any]]] = [
        (({"a": a, "b": [b]},), {}),
        (({"a": a, "b": (b,)},), {}),
        (({"a": a[:2], "b": [b[:2]]},), {}),
        (({"a": a.astype(np.float32), "b": [b]},), {}),
        (({"a": a, "b": [b]}, 3), {}),
        (({"a": a, "b": [b]}, 3.0), {}),
        (({"a": a, "b": [b]}, 3), {"mode": "mean"}),
        (({"a": a, "b": [2.0]},), {}),
        (({"a": a, "b": [np.float64(2.5)]},), {}),
        (({"a": a, "b": [-0.0]},), {}),
        (({"a": a, "b": [0.0]},), {}),
    ]
    for _ in range(2):
        for args, kwargs in calls:
            found, expected = fast(*args, **kwargs), f(*args, **kwargs)
            assert found.dtype == expected.dtype
            np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-7)
    assert len(recordings) == len(calls)
    fast({"a": tg.tensor(a), "b": [tg.tensor(b, requires_grad=True)]})  # tensors and arrays are alike
    assert len(recordings) == len(calls)


def test_numbers_that_compare_equal_are_different_signatures() -> None:
    fast = tg.compile(lambda x, kind: x * 0.0 + {bool: 1.0, int: 2.0, float: 3.0}[type(kind)])
    for value, expected in ((1, 2.0), (True, 1.0), (1.0, 3.0), (1, 2.0)):
        assert fast(X, value)[0].item() == expected


def test_nan_as_a_number_is_one_signature(recordings: list[str]) -> None:
    fast = tg.compile(lambda x, fill: ops.where(x > 1.0, x, fill))
    for _ in range(3):
        assert np.isnan(fast(X, float("nan")).numpy()).tolist() == [True, False]
    assert len(recordings) == 1


def test_results_keep_their_structure() -> None:
    w = tg.tensor([3.0], requires_grad=True)

    def f(x: Any) -> Any:
        return {"n": 3, "none": None, "text": ("a", [x * 2.0]), "given": x, "closed": w, "again": (x + w, x + w)}

    fast = tg.compile(f)
    x = tg.tensor([1.0], requires_grad=True)
    for _ in range(2):
        out = fast(x)
        assert out["n"] == 3 and out["none"] is None and out["text"][0] == "a"
        assert out["given"] is x and out["closed"] is w
        assert out["text"][1][0].tolist() == [2.0]
        one, two = out["again"]
        one.data[...] = 9.0
        assert two.tolist() == [4.0]  # no memory is shared between results
    out = fast(x)
    (out["text"][1][0] * out["given"] * out["closed"]).backward()
    assert x.grad.tolist() == [12.0] and w.grad.tolist() == [2.0]


def test_results_share_no_memory_with_arguments() -> None:
    fast = tg.compile(lambda x: (ops.transpose(x), x[0], ops.reshape(x, (4,)), ops.broadcast_to(x[:1], (3, 2))))
    x = np.ones((2, 2))
    for out in fast(x):
        out.data[...] = 5.0
    assert (x == 1.0).all()


def test_closed_over_values_are_seen(recordings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    offset = 1.0
    bias = tg.tensor([1.0, 1.0], requires_grad=True)
    settings = {"sign": 1.0}

    def helper(x: Any) -> Any:
        return x * SCALE * settings["sign"]

    @tg.compile
    def f(x: Any) -> Any:
        return ops.sum(helper(x) * WEIGHT + offset + bias)

    assert f(X).item() == 11.0
    bias.data = np.float32([2.0, 2.0])  # a value
    assert f(X).item() == 13.0
    bias = tg.tensor([0.0, 0.0], requires_grad=True)  # another tensor of the same kind
    monkeypatch.setitem(globals(), "WEIGHT", tg.tensor([0.0, 1.0], requires_grad=True))
    assert f(X).item() == 5.0
    assert len(recordings) == 1
    f(X).backward()
    assert bias.grad.tolist() == [1.0, 1.0] and WEIGHT.grad.tolist() == [1.0, 3.0]
    offset = 2.0  # numbers are constants of a recording: it is made anew
    assert f(X).item() == 7.0
    settings["sign"] = -1.0
    assert f(X).item() == 1.0
    monkeypatch.setitem(globals(), "SCALE", 4.0)
    assert f(X).item() == -2.0
    assert len(recordings) == 4


def test_an_object_of_the_user_is_looked_through(recordings: list[str]) -> None:
    class Scaler:
        def __init__(self) -> None:
            self.by = 2.0
            self.model = nn.Linear(2, 1)
            self.offset = tg.tensor([0.0])

        @tg.compile
        def __call__(self, x: Any) -> Any:
            return self.model(x) * self.by + self.offset

    scaler, other = Scaler(), Scaler()
    other.model.load_state_dict(scaler.model.state_dict())
    first = scaler(X).item()
    assert other(X).item() == first
    scaler.offset = tg.tensor([1.0])
    np.testing.assert_allclose(scaler(X).item(), first + 1.0, rtol=1e-6)
    assert len(recordings) == 1
    scaler.by = 4.0
    np.testing.assert_allclose(scaler(X).item(), 2.0 * first + 1.0, rtol=1e-5)
    assert other(X).item() == first
    assert len(recordings) == 2


def test_functions_as_arguments(recordings: list[str]) -> None:
    fast = tg.compile(lambda act, x: act(x) * 2.0)
    for act in (ops.tanh, ops.sigmoid, functools.partial(ops.leaky_relu, negative_slope=0.5), nn.Linear(2, 2)):
        for _ in range(2):
            np.testing.assert_allclose(fast(act, X).numpy(), (act(X) * 2.0).numpy(), rtol=1e-6)
    assert len(recordings) == 4


def test_a_rule_declared_anew_is_followed() -> None:
    doubled = tg.primitive("compiled_double", forward=lambda x: 2.0 * x, vjp=(lambda g: 2.0 * g,))
    try:
        fast = tg.compile(lambda x: ops.sum(doubled(x)))
        slope = tg.compile(tg.grad(lambda x: ops.sum(doubled(x))))
        for factor, rule in ((2.0, lambda g: 2.0 * g), (7.0, lambda g: 7.0 * g)):
            doubled.set_rules((rule,))
            x = tg.tensor([1.0], requires_grad=True)
            fast(x).backward()
            assert x.grad.tolist() == [factor]
            assert slope(x).tolist() == [factor]
    finally:
        del tg.REGISTRY["compiled_double"]


def test_only_so_many_signatures_are_kept() -> None:
    fast = tg.compile(lambda x: x * 2.0)
    for n in range(MOST_ENTRIES + 10):
        assert fast(np.ones(n, np.float32)).shape == (n,)
    assert repr(fast) == f"<compiled <lambda>, {MOST_ENTRIES} signatures>"


def test_numbers_that_change_at_every_call_do_not_pile_up() -> None:
    factor = 0.0
    fast = tg.compile(lambda x: x * factor)
    for k in range(300):
        factor = float(k)
        assert fast(X)[0].item() == 0.5 * k
    assert len(fast._entries) <= MOST_ENTRIES


def test_a_model_is_not_kept_alive() -> None:
    fast = tg.compile(lambda m, x: m(x))
    model = nn.Linear(2, 2)
    fast(model, X)
    alive = [weakref.ref(model), weakref.ref(model.weight)]
    del model
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


# ---------------------------------------------------------------------------- as a function


def test_it_looks_like_the_function() -> None:
    @tg.compile
    def f(x: Any) -> Any:
        """Twice x."""
        return x * 2.0

    assert (f.__name__, f.__doc__) == ("f", "Twice x.")
    assert list(inspect.signature(f).parameters) == ["x"]
    assert "not called yet" in str(f.explain())
    with pytest.raises(tg.DTypeError, match="found a int"):
        tg.compile(3)  # type: ignore[type-var]


def test_methods_and_modules() -> None:
    class Double(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter([2.0, 2.0])

        @tg.compile
        def forward(self, x: Any) -> Any:
            return self.w * x

    first, second = Double(), Double()
    second.w = nn.Parameter([3.0, 3.0])
    assert first(X).tolist() == [1.0, 3.0] and second(X).tolist() == [1.5, 4.5]
    assert "compiled forward" in str(first.forward.explain())


def test_eager_runs_the_plain_function(recordings: list[str]) -> None:
    fast = tg.compile(lambda x: ops.tanh(x) * 2.0)
    with tg.eager(), tg.Tape() as tape:
        fast(X)
    assert [record.primitive.name for record in tape.records] == ["tanh", "multiply"]
    assert recordings == []


def test_compiled_functions_in_compiled_functions_and_scans(recordings: list[str]) -> None:
    inner = tg.compile(lambda h, x: ops.tanh(h * x))
    outer = tg.compile(lambda h, x: inner(h, x) + inner(x, h))
    assert outer(X, X).tolist() == (2.0 * ops.tanh(X * X)).tolist()
    assert recordings == ["<lambda>"]
    last, _ = ops.scan(lambda h, x: (inner(h, x), None), X[0], np.float32([1.0, 2.0]))
    np.testing.assert_allclose(last.item(), np.tanh(np.tanh(0.5) * 2.0), rtol=1e-6)


def test_no_grad_outside_and_inside() -> None:
    w = tg.tensor([3.0, 4.0], requires_grad=True)

    def f(x: Any) -> Any:
        with tg.no_grad():
            frozen = w * x
        return ops.sum(frozen * w)

    fast = tg.compile(f)
    with tg.no_grad():
        assert not fast(X).requires_grad
    fast(X).backward()
    assert w.grad.tolist() == [1.5, 6.0]


def test_changes_between_forward_and_backward_are_noticed() -> None:
    fast = tg.compile(lambda w, x: ops.sum(ops.exp(w) * x))
    w = tg.tensor([1.0, 2.0], requires_grad=True)
    for _ in range(2):
        out = fast(w, X)
        w.data = np.float32([0.0, 0.0])
        with pytest.raises(tg.GraphError, match="was changed in place"):
            out.backward()
        fast(w, X).backward()
    fast = tg.compile(lambda w: ops.exp(w))
    first = fast(w)
    first.data[...] = 0.0  # nobody saved it: the first backward computes what it needs again
    ops.sum(first).backward()
    second = fast(w)
    second.data[...] = 0.0
    with pytest.raises(tg.GraphError, match="was changed in place"):
        ops.sum(second).backward()


def test_an_old_graph_can_be_used_after_later_calls() -> None:
    fast = tg.compile(lambda w: ops.sum(ops.tanh(w) ** 2))
    for _ in range(2):
        w = tg.tensor([0.5, 1.0], requires_grad=True)
        first = fast(w)
        fast(tg.tensor([7.0, 7.0], requires_grad=True))
        first.backward()
        expected = tg.grad(lambda v: ops.sum(ops.tanh(v) ** 2))(w.numpy())
        np.testing.assert_allclose(w.grad, expected.numpy(), rtol=1e-6)


def test_two_backwards() -> None:
    fast = tg.compile(lambda w: ops.sum(w**3))
    w = tg.tensor([2.0], requires_grad=True)
    for _ in range(2):
        w.zero_grad()
        out = fast(w)
        out.backward(retain_graph=True)
        out.backward()
        assert w.grad.tolist() == [24.0]
        with pytest.raises(tg.GraphError, match="retain_graph"):
            out.backward()


def test_threads() -> None:
    """Several threads on one function and one model, with and without gradients, from the first call on."""
    layer = nn.LSTM(2, 3).astype(np.float64)
    fast = tg.compile(lambda m, x: ops.sum(m(x)[0]))
    slopes = tg.compile(tg.grad(lambda m, x: ops.sum(m(x)[0])))
    inputs = [spread((length, 2, 2)) for length in (3, 4, 5)]
    expected = [
        (fast.__wrapped__(layer, x).item(), slopes.__wrapped__(layer, x)["weight_ih_l0"].numpy()) for x in inputs
    ]
    failures: list[Any] = []
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        try:
            for k in range(24):
                x, (value, slope) = inputs[k % 3], expected[k % 3]
                np.testing.assert_allclose(fast(layer, x).item(), value, rtol=1e-12)
                np.testing.assert_allclose(slopes(layer, x)["weight_ih_l0"].numpy(), slope, rtol=1e-10, atol=1e-12)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert all(type(p) is nn.Parameter for p in layer.parameters())


def test_a_recording_waits_while_another_thread_has_variables_in_the_module() -> None:
    layer = nn.Linear(2, 1)
    inside, go = threading.Event(), threading.Event()

    def slow(m: Any, x: Any) -> Any:
        inside.set()
        assert go.wait(60.0)
        return ops.sum(m(x))

    fast = tg.compile(lambda m, x: ops.sum(m(x)))
    results: list[Any] = []
    first = threading.Thread(target=tg.compile(tg.grad(slow)), args=(layer, X))
    second = threading.Thread(target=lambda: results.append(fast(layer, X)))
    first.start()
    assert inside.wait(60.0)
    second.start()
    second.join(0.2)  # time to go wrong: without the lock it meets the other thread's data-free tensors
    go.set()
    first.join()
    second.join()
    results[0].backward()
    assert layer.weight.grad.tolist() == [X.tolist()]


@pytest.mark.parametrize(
    "read",
    [
        lambda w: w.item(), lambda w: float(w), lambda w: 2.0 * w.data, lambda w: w.numpy().sum(), lambda w: w.tolist(),
        lambda w: np.asarray(w) + 1.0, lambda w: w.copy(), lambda w: copy.copy(w).item(),
        lambda w: copy.deepcopy(w).item(), lambda w: tg.tensor(w),
    ],
    ids=["item", "float", "data", "numpy", "tolist", "asarray", "copy", "copy.copy", "deepcopy", "tensor"],
)  # fmt: skip
def test_values_that_python_reads_of_a_closed_over_tensor(read: Any) -> None:
    """They are no part of the program: with other values, another one."""
    w = tg.tensor(np.array(3.0))

    def f(x: Any) -> Any:
        return x * read(w)

    fast = tg.compile(f)
    for value in (3.0, 4.0, 4.0, 5.0):
        w.data = np.array(value)
        assert fast(np.ones(2)).tolist() == f(tg.tensor(np.ones(2))).tolist()


def test_a_closed_over_tensor_that_is_detached() -> None:
    """It is read again at every call, and gets no gradient."""
    w = tg.tensor(np.array(3.0), requires_grad=True)
    fast = tg.compile(lambda x: x * w * w.detach())
    for value in (3.0, 4.0):
        w.data, w.grad = np.array(value), None
        y = fast(np.ones(2))
        assert y.tolist() == [value**2] * 2
        y.backward(np.ones(2))
        assert w.grad == 2 * value


def test_values_that_are_no_numbers_are_the_same_again(recordings: list[str]) -> None:
    w = tg.tensor(np.array(np.nan))
    fast = tg.compile(lambda x: x * (2.0 if w.item() > 0 else 3.0))
    assert [fast(np.ones(1)).tolist() for _ in range(3)] == [[3.0]] * 3
    assert len(recordings) == 1
    w.data = np.array(1.0)
    assert fast(np.ones(1)).tolist() == [2.0]


def test_the_sign_of_a_zero_that_is_read() -> None:
    w = tg.tensor(np.array(0.0))
    fast = tg.compile(lambda x: x * np.copysign(1.0, w.item()))
    assert fast(np.ones(1)).tolist() == [1.0]
    w.data = np.array(-0.0)
    assert fast(np.ones(1)).tolist() == [-1.0]


def test_a_shape_that_is_read_through_data_is_warned_of(recordings: list[str]) -> None:
    """What was made use of, the shape or the values, cannot be told."""
    model = nn.Linear(20, 3)

    def f(x: Any) -> Any:
        return model(x) + np.zeros(model.weight.data.shape[0], model.weight.data.dtype)

    fast = tg.compile(f)

    def call(k: int) -> None:
        model.weight.data = np.full((3, 20), float(k), np.float32)
        assert fast(np.ones(20, np.float32)).tolist() == (20.0 * k + model.bias.data).tolist()

    for k in range(3):
        call(k)
    with pytest.warns(CompileWarning, match=r"f was recorded 3 times more, to the same program"):
        call(3)
    call(4)
    assert len(recordings) == 5


def test_a_limit_that_many_values_cross() -> None:
    w = tg.tensor(np.zeros((5, 5)))
    fast = tg.compile(lambda x: x * (10.0 if np.abs(w.numpy()).max() > 1.0 else 1.0))
    for k in (0.1, 0.2, 0.3, 2.0, 0.5):
        w.data = np.full((5, 5), k)
        assert fast(np.ones(1)).tolist() == [10.0 if k > 1.0 else 1.0]


def test_a_counter_that_is_compared_with_a_limit() -> None:
    step = tg.tensor(np.array(0))

    def f(x: Any) -> Any:
        return x * (2.0 if step.data > 3 else 1.0)

    fast = tg.compile(f)
    for k in (0, 1, 2, 5, 6, 0):
        step.data = np.array(k)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CompileWarning)
            assert fast(np.ones(1)).tolist() == [2.0 if k > 3 else 1.0]
