"""tg.compile against the plain function: values, gradients of any order, what is read again, and what is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import spread

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops, optim
from tinygrad_lstm.compiler.recording import Recording
from tinygrad_lstm.compiler.whole import executable
from tinygrad_lstm.tree import flatten

# ---------------------------------------------------------------------------- what is compiled


def smooth(a: Any, b: Any) -> Any:
    z = ops.tanh(a @ b) * 2.0 - ops.exp(-ops.square(a @ b))
    return z / (1.0 + ops.sum(ops.square(z), axis=0))


def indexed(a: Any, b: Any) -> Any:
    rows = ops.concatenate([a[::-1], a[:1] * b[0, 0]], axis=0)
    return ops.take(rows, np.array([0, 2, 2])) * ops.where(b[:, :1] > 0.1, b[:, :1].T[:, :1], 0.5)


def looped(a: Any, b: Any) -> Any:
    def body(h: Any, x: Any) -> Any:
        h = ops.tanh(h @ b[:2, :2] + x[:2])
        return h, h * 3.0

    last, ys = ops.scan(body, ops.stop_gradient(a[:1, :2]) + a[1:2, :2], a)
    return ops.sum(ys, axis=0) + last


FUNCTIONS = {"smooth": smooth, "indexed": indexed, "looped": looped}


def arguments(rows: int = 4, inner: int = 3, columns: int = 2) -> tuple[np.ndarray, np.ndarray]:
    return spread((rows, inner)), spread((inner, columns), -0.8, 0.9)


def weighted(f: Any) -> Any:
    """A scalar that depends on every output element in another way."""

    def scalar(*args: Any) -> Any:
        out = f(*args)
        return ops.sum(out * np.cos(np.arange(out.size)).reshape(out.shape))

    return scalar


def close(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    left, right = flatten(found)[0], flatten(expected)[0]
    assert len(left) == len(right)
    for x, y in zip(left, right, strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.shape == y.shape and x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


class Model(nn.Module):
    """Two recurrent layers and a readout, float64."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(3, 5, num_layers=2)
        self.readout = nn.Linear(5, 2)
        self.astype(np.float64)

    def forward(self, x: Any) -> Any:
        return self.readout(self.layer(x)[0][-1])


def loss_of(model: Any, x: Any, target: Any) -> Any:
    return nn.mse_loss(model(x), target)


def data() -> tuple[np.ndarray, np.ndarray]:
    return spread((6, 4, 3)), spread((4, 2))


def gradients(model: Any, loss: Any) -> dict[str, np.ndarray]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


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


# ---------------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_equal_those_of_the_plain_function(name: str) -> None:
    f = FUNCTIONS[name]
    fast = tg.compile(f)
    arrays = arguments()
    for _ in range(3):  # the first call records, the first backward derives, the third finds everything made
        results = []
        for function in (f, fast):
            a, b = (tg.tensor(x, requires_grad=True) for x in arrays)
            out = function(a, b)
            weighted(lambda t: t)(out).backward()
            results.append((out, a.grad, b.grad))
        close(results[1], results[0])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_of_every_kind(name: str) -> None:
    f = weighted(FUNCTIONS[name])
    fast = weighted(tg.compile(FUNCTIONS[name]))
    a, b = arguments()
    v, w = np.cos(a), np.sin(b)
    close(tg.grad(fast, (0, 1))(a, b), tg.grad(f, (0, 1))(a, b))
    close(tg.jvp(fast, (a, b), (v, w)), tg.jvp(f, (a, b), (v, w)))
    close(tg.hvp(fast, (a, b), (v, w)), tg.hvp(f, (a, b), (v, w)), 1e-11)
    close(tg.vjp(fast, a, b)[1](1.0), tg.vjp(f, a, b)[1](1.0))


def test_third_derivative() -> None:
    f = tg.compile(lambda x: x * ops.tanh(x))
    third = tg.grad(tg.grad(tg.grad(f)))
    close(third(0.7), tg.grad(tg.grad(tg.grad(lambda x: x * ops.tanh(x))))(0.7), 1e-5)


def test_gradcheck_of_both_orders() -> None:
    assert tg.gradcheck(tg.compile(smooth), *arguments(2, 2, 2), order=2)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_gradients(name: str) -> None:
    f = weighted(FUNCTIONS[name])
    a, b = arguments()
    both = tg.compile(tg.value_and_grad(f, (0, 1)))
    for _ in range(2):
        close(both(a, b), tg.value_and_grad(f, (0, 1))(a, b))
    close(
        tg.compile(tg.grad(lambda x: ops.sum(tg.grad(f)(x, b) ** 2)))(a),
        tg.grad(lambda x: ops.sum(tg.grad(f)(x, b) ** 2))(a),
    )
    # A compiled gradient is itself differentiable.
    close(tg.grad(lambda x: ops.sum(both(x, b)[1][0] ** 2))(a), tg.grad(lambda x: ops.sum(tg.grad(f)(x, b) ** 2))(a))


def test_a_tape_differentiates_through_a_compiled_call() -> None:
    a, b = map(tg.asarray, arguments())
    with tg.Tape() as tape:
        out = ops.sum(tg.compile(smooth)(a * 1.0, b))
    with tg.Tape() as plain:
        expected = ops.sum(smooth(a * 1.0, b))
    close(tape.gradient(out, [a, b]), plain.gradient(expected, [a, b]))
    assert [r.primitive.name for r in tape.records] == ["multiply", "compiled", "sum"]


@settings(max_examples=30)
@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_any_shape_and_memory_order(rows: int, inner: int, columns: int, transposed: bool) -> None:
    a, b = spread((rows, inner)), spread((inner, columns))
    if transposed:
        a, b = np.asfortranarray(a), b[:, ::-1]
    f = tg.compile(smooth)
    close(f(a, b), smooth(a, b))
    close(tg.grad(weighted(f), (0, 1))(a, b), tg.grad(weighted(smooth), (0, 1))(a, b))


def test_large_chains_run_natively() -> None:
    def f(a: Any, b: Any) -> Any:
        return ops.sigmoid(a) * b + ops.exp(-ops.square(a))

    a, b = spread((128, 64)).astype(np.float32), spread((128, 64), -1.0, 1.0, 1).astype(np.float32)
    fast = tg.compile(f)
    close(fast(a, b), f(a, b), 1e-5)
    (native,) = fast.explain().lowered
    assert native.endswith("-> float32[128,64]")
    close(tg.grad(weighted(fast), (0, 1))(a, b), tg.grad(weighted(f), (0, 1))(a, b), 1e-5)


def test_absent_cotangents_are_no_zeros() -> None:
    """The slope of the second result is infinite at 0; nobody asks for it, so it must not become NaN."""

    def f(x: Any) -> Any:
        return ops.sum(x * x), ops.sqrt(x)

    fast = tg.compile(f)
    for _ in range(3):
        x = tg.tensor(np.zeros(3), requires_grad=True)
        fast(x)[0].backward()
        assert x.grad.tolist() == [0.0, 0.0, 0.0]
        # Another choice of results in between changes nothing.
        y = tg.tensor(np.ones(3), requires_grad=True)
        ops.sum(fast(y)[1]).backward()
        assert y.grad.tolist() == [0.5, 0.5, 0.5]


def test_integers_booleans_and_results_of_several_dtypes() -> None:
    def f(x: Any, index: Any) -> Any:
        return {"rows": ops.take(x, index), "at": index + 1, "positive": x > 0, "arg": ops.argmax(x, axis=0)}

    x, index = spread((5, 2), -1.0, 1.0), np.array([4, 0, 0])
    close(tg.compile(f)(x, index), f(x, index))
    g = weighted(lambda t: tg.compile(f)(t, index)["rows"])
    close(tg.grad(g)(x), tg.grad(weighted(lambda t: f(t, index)["rows"]))(x))


# ---------------------------------------------------------------------------- modules


def test_a_recurrent_model() -> None:
    model, fast = Model(), tg.compile(loss_of)
    x, target = data()
    expected = gradients(model, loss_of(model, x, target))
    for _ in range(3):
        found = gradients(model, fast(model, x, target))
        assert found.keys() == expected.keys()
        close(found, expected)
    text = str(fast.explain())
    assert "compiled loss_of" in text and "scan of 6 steps" in text


def test_the_forward_loop_runs_once_in_a_compiled_gradient() -> None:
    """Its residuals come from the loop that computes the value."""
    fast = tg.compile(tg.value_and_grad(loss_of))
    model = Model()
    fast(model, *data())
    entry = fast._last
    scans = [e for e in executable(entry.program).program.equations if e.primitive.name == "scan"]
    assert len(scans) == 4  # two layers, forward and backward


def test_gradients_of_a_module_argument_come_by_name() -> None:
    model, fast = Model(), tg.compile(tg.value_and_grad(loss_of))
    (value, grads), (expected, names) = fast(model, *data()), tg.value_and_grad(loss_of)(model, *data())
    close(value, expected)
    close(grads, names)
    assert list(grads) == [name for name, _ in model.named_parameters()]
    assert not any(type(p) is not nn.Parameter for p in model.parameters())  # no variable is left in the module


def test_outside_gradients_reach_parameters_through_a_compiled_call() -> None:
    model, fast = Model(), tg.compile(loss_of)
    x, target = data()
    close(tg.grad(lambda m: fast(m, x, target))(model), tg.grad(lambda m: loss_of(m, x, target))(model))
    close(tg.grad(lambda m: fast(m, x, target))(model), tg.grad(lambda m: loss_of(m, x, target))(model))


def test_lengths_and_trajectories() -> None:
    layer = nn.GRU(3, 4, bidirectional=True).astype(np.float64)
    x = data()[0]
    x[4:, 1] = np.nan  # padding

    def f(layer: Any, x: Any) -> Any:
        return layer(x, lengths=[6, 4, 6, 6], return_states=True)

    close(tg.compile(f)(layer, x), f(layer, x))


def test_parameters_are_read_again(recordings: list[str]) -> None:
    model, fast = nn.Linear(3, 2), tg.compile(lambda m, x: m(x))
    x = np.ones((1, 3), np.float32)
    fast(model, x)
    model.weight.data = np.full((2, 3), 2.0, np.float32)
    model.bias.data[...] = 1.0
    assert fast(model, x).tolist() == [[7.0, 7.0]]
    model.weight = nn.Parameter(np.full((2, 3), 3.0, np.float32))  # replaced
    model.load_state_dict({"bias": np.zeros(2)}, strict=False)
    assert fast(model, x).tolist() == [[9.0, 9.0]]
    assert len(recordings) == 1
    model.astype(np.float64)
    assert fast(model, x.astype(np.float64)).dtype == np.float64
    model.eval()
    fast(model, x.astype(np.float64))
    assert len(recordings) == 3


class WithLoss(nn.Module):
    """A model that compiles a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(spread((3,)))
        self.fast = tg.compile(self.loss)

    def loss(self, x: Any) -> Any:
        return (x * self.w).sum()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_compiles_its_own_method(copied: Any) -> None:
    model, x = WithLoss(), spread((3,))
    before = model.fast(x).item()
    other = copied(model)
    other.w.data *= 2
    loss = other.fast(x)
    assert (loss.item(), model.fast(x).item()) == (pytest.approx(2 * before), before)
    loss.backward()
    np.testing.assert_array_equal(other.w.grad, x)
    assert model.w.grad is None


def test_a_parameter_of_another_dtype_is_recorded_again(recordings: list[str]) -> None:
    """``astype`` sets no attribute, so only the parameter itself tells."""
    model, fast = nn.Linear(3, 2), tg.compile(lambda m, x: ops.matmul(x, m.weight.T))
    x = np.ones((1, 3), np.float32)
    for dtype in (np.float32, np.float64, np.float32):
        model.astype(dtype)
        close(fast(model, x), ops.matmul(x, model.weight.T))
    assert len(recordings) == 2


def test_one_recording_serves_models_of_one_structure(recordings: list[str]) -> None:
    fast, x, target = tg.compile(loss_of), *data()
    models = [Model(), Model()]
    for model in (*models, *models):
        close(gradients(model, fast(model, x, target)), gradients(model, loss_of(model, x, target)))
    assert recordings == ["loss_of"]


def test_attributes_of_a_module_are_part_of_the_signature(recordings: list[str]) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(np.ones(2))
            self.factors = [1.0, 2.0]
            self.state = tg.tensor(np.zeros(2))

        def forward(self, x: Any) -> Any:
            return self.w * x * self.factors[1] + self.state

    model, fast = Scaled(), None
    fast = tg.compile(model)
    x = np.array([1.0, 2.0])
    assert fast(x).tolist() == [2.0, 4.0]
    model.factors[1] = 5.0
    assert fast(x).tolist() == [5.0, 10.0]
    assert len(recordings) == 2
    model.state = tg.tensor(np.ones(2))  # another tensor of the same kind is read, not recorded again
    assert fast(x).tolist() == [6.0, 11.0]
    assert len(recordings) == 2


def test_shared_parameters() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(np.eye(2) * 2.0)
            self.b = self.a

        def forward(self, x: Any) -> Any:
            return x @ self.a @ self.b

    model, x = Tied(), np.ones((1, 2))
    fast = tg.compile(model)
    close(gradients(model, ops.sum(fast(x))), gradients(model, ops.sum(model(x))))
    model.b = nn.Parameter(np.eye(2) * 3.0)  # shared no longer
    close(gradients(model, ops.sum(fast(x))), gradients(model, ops.sum(model(x))))
    assert fast(x).tolist() == [[6.0, 6.0]]


def test_outputs_that_are_inputs_or_constants() -> None:
    x = tg.tensor(np.array([1.0, 2.0]), requires_grad=True)
    dropout = nn.Dropout(0.5).eval()
    assert tg.compile(lambda d, t: d(t))(dropout, x) is x
    same = tg.compile(lambda t: t)
    for _ in range(2):
        (same(x) * 3.0).sum().backward()
    assert x.grad.tolist() == [6.0, 6.0]
    assert tg.grad(lambda t: (same(t) * t).sum())(x).tolist() == [2.0, 4.0]
    assert tg.jvp(same, (x,), (np.array([5.0, 6.0]),))[1].tolist() == [5.0, 6.0]
    assert tg.compile(lambda t: 3.0)(x) == 3.0
    assert tg.compile(lambda t: {"a": None, "b": [t, "text"]})(x) == {"a": None, "b": [x, "text"]}
    layer = nn.Linear(2, 1)
    found = tg.compile(lambda m: dict(m.named_parameters()))(layer)
    assert found == {"weight": layer.weight, "bias": layer.bias}
    assert "0 equations" in str(same.explain())
    with tg.Tape() as tape:
        value = same(x) * 2.0
    assert tape.gradient(value, x, np.ones(2)).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("inside", [False, True])
def test_training_equals_the_plain_loop(inside: bool) -> None:
    """20 steps of Adam on an LSTM; gradients by backward, or inside of the compiled function."""
    histories = []
    for how in (lambda f: f, tg.compile):
        tg.seed(3)
        model = Model()
        optimizer = optim.Adam(model, lr=0.02)
        function = how(tg.value_and_grad(loss_of)) if inside else how(loss_of)
        losses = []
        for k in range(20):
            x, target = (a * np.cos(k) for a in data())
            if inside:
                value, grads = function(model, x, target)
                for name, p in model.named_parameters():
                    p.grad = grads[name].numpy()
            else:
                value = function(model, x, target)
                optimizer.zero_grad()
                value.backward()
            optimizer.step()
            losses.append(value.item())
        histories.append((np.array(losses), model.state_dict()))
    close(histories[1], histories[0], 1e-9)
    assert histories[0][0][-1] < histories[0][0][0]


def test_the_method_of_a_tensor() -> None:
    w = tg.tensor(np.ones((2, 2)), requires_grad=True)
    fast, total = tg.compile(w.__matmul__), w.sum
    assert fast(np.ones(2)).tolist() == [2.0, 2.0]
    w.data = 2.0 * w.data
    assert fast(np.ones(2)).tolist() == [4.0, 4.0]
    assert tg.compile(lambda x: x * total())(2.0).item() == 16.0
