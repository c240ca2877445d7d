"""Mistakes that used to pass in silence, or to show an error from inside: what is said of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops, optim

X = np.ones((5, 2, 3), np.float32)


class Cell(nn.Module):
    def __init__(self, state_dtype: Any = np.float32, **more: Any) -> None:
        super().__init__()
        self.w, self.u = nn.Parameter(np.ones((3, 4), np.float32)), nn.Parameter(np.ones((4, 4), np.float32))
        self.state_dtype = state_dtype

    def initial_state(self, batch: int) -> Any:
        return np.zeros((batch, 4), self.state_dtype)

    def forward(self, x: Any, h: Any) -> Any:
        h = ops.tanh(x @ self.w + h @ self.u)
        return h, h


# ---------------------------------------------------------------------------- recurrent layers


def test_a_state_of_another_dtype_than_x():
    with pytest.raises(
        tg.DTypeError, match=r"Cell: x is float32, the state .* is float64; give initial_state .*float32"
    ):
        nn.Recurrent(Cell(np.float64))(X)
    with pytest.raises(tg.DTypeError, match="x is float32, the state that it starts from is float64"):
        nn.Recurrent(Cell())(X, np.zeros((2, 4)))

    class Mixed(Cell):
        def initial_state(self, batch: int) -> Any:
            return np.zeros((batch, 4), np.float32), np.zeros(batch), np.zeros(batch, np.int64)

        def forward(self, x: Any, state: Any) -> Any:
            h, total, n = state
            h = ops.tanh(x @ self.w + h @ self.u)
            return h, (h, total + h.sum(axis=1).astype(np.float64), n + 1)

    assert nn.Recurrent(Mixed())(X)[1][1].dtype == np.float64  # several dtypes are meant so

    class Tokens(Cell):
        def forward(self, x: Any, h: Any) -> Any:
            return super().forward(ops.one_hot(x, 3, dtype=np.float32), h)

    assert nn.Recurrent(Tokens())(np.ones((5, 2), np.int64))[1].dtype == np.float32


def test_x_that_is_nothing_or_nested_lists():
    for layer in (nn.Recurrent(Cell()), nn.LSTM(3, 4), nn.Bidirectional(nn.GRUCell(3, 4), nn.GRUCell(3, 4))):
        with pytest.raises(tg.DTypeError, match=r"x is None, expected an array"):
            layer(None)
        np.testing.assert_array_equal(layer(X.tolist())[0].numpy(), layer(X)[0].numpy())
    with pytest.raises(tg.DTypeError, match=r"x is \(\)"):
        nn.Recurrent(Cell())(())
    with pytest.raises(tg.ShapeError, match=r"Recurrent: x has shape \(3,\), expected at least two axes"):
        nn.Recurrent(Cell())([1.0, 2.0, 3.0])
    with pytest.raises(tg.ShapeError, match="unequal lengths"):
        nn.Recurrent(Cell())([[1.0], [2.0, 3.0]])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell])
def test_a_misspelt_argument(kind):
    with pytest.raises(tg.DTypeError, match=rf"^{kind.__name__} takes no argument hiden, wrong; it takes input_size"):
        kind(3, 4, wrong=1, hiden=2)
    with pytest.raises(TypeError, match="proj_size"):
        nn.GRU(3, 4, proj_size=2)
    assert nn.RNN(3, 4, nonlinearity="relu").nonlinearity == "relu" and nn.LSTM(3, 4, proj_size=2).proj_size == 2


def test_values_inside_of_a_cell_that_is_recorded():
    class Peeks(Cell):
        def __init__(self, how: Any) -> None:
            super().__init__()
            self.how = how

        def forward(self, x: Any, h: Any) -> Any:
            h = super().forward(x, h)[0]
            self.how(h)
            return h, h

    for how, said in (
        (lambda h: h.numpy(), r"by \.numpy\(\)\); .*compute with ops on the tensor itself"),
        (lambda h: h.data, r"by \.data"),
        (np.asarray, "as a NumPy array"), (lambda h: h.tolist(), r"by \.tolist"),
        (lambda h: bool(h.sum() > 0), r"test_silent_traps.py:\d+\); .*use ops.where instead of if"),
    ):  # fmt: skip
        layer = nn.Recurrent(Peeks(how))
        assert layer(X)[1].shape == (2, 4)  # right, step by step, and explained
        (note,) = tg.explain().notes
        with pytest.raises(tg.TraceError, match=said):
            tg.compile(lambda layer=layer: layer(X)[0])()
        assert "step by step" in note and "test_silent_traps.py" in note


# ---------------------------------------------------------------------------- names


def test_a_name_is_given_to_a_tensor():
    for value in (3.0, np.ones(3), None, [tg.tensor(1.0)]):
        with pytest.raises(tg.DTypeError, match=rf"name: .* found {type(value).__name__}"):
            tg.name(value, "i")
    with pytest.raises(tg.DTypeError, match="a name is a string, found 5"):
        tg.name(tg.tensor(1.0), 5)


def test_one_name_for_several_values_of_a_step():
    class Twice(Cell):
        def forward(self, x: Any, h: Any) -> Any:
            a = tg.name(ops.tanh(x @ self.w), "a")
            b = tg.name(ops.sigmoid(h @ self.u), "a")
            tg.name(b, "a.1")
            h = tg.name(a + b, "h")
            return h, h

    traj = nn.Recurrent(Twice(), return_gates=True)(X)[2]
    assert set(traj) == {"h", "a", "a.1"}
    np.testing.assert_allclose((traj["a"] + traj["a.1"]).numpy(), traj["h"].numpy(), rtol=1e-6)


# ---------------------------------------------------------------------------- modules and optimizers


def test_a_plain_value_in_place_of_a_parameter():
    cell = Cell()
    for value in (np.zeros((3, 4), np.float32), tg.tensor(1.0), 2.0, "w"):
        with pytest.raises(tg.DTypeError, match=r"Cell\.w is a Parameter; .*w\.data = array, or assign nn\.Parameter"):
            cell.w = value
    assert [name for name, _ in cell.named_parameters()] == ["w", "u"]
    cell.w = nn.Parameter(np.zeros((3, 4), np.float32))
    assert len(cell.parameters() if isinstance(cell.parameters(), list) else list(cell.parameters())) == 2
    cell.w = None
    cell.w = np.zeros(3)  # no Parameter stands there
    assert [name for name, _ in cell.named_parameters()] == ["u"]


@pytest.mark.parametrize("make", [optim.SGD, optim.RMSprop, optim.Adagrad, optim.Adadelta, optim.Adam, optim.NAdam])
def test_options_of_optimizers_are_numbers(make):
    for lr in ("a", None, True, [0.1]):
        if lr == [0.1]:
            continue
        with pytest.raises(tg.DTypeError, match=rf"{make.__name__}: lr is a number, found {lr!r}"):
            make(Cell(), lr=lr)
    make(Cell(), lr=np.float32(0.1)), make(Cell(), lr=np.array(0.1))
    with pytest.raises(tg.DTypeError, match="weight_decay is a number"):
        make([{"params": [nn.Parameter([1.0])], "weight_decay": "much"}])


@pytest.mark.parametrize("betas", [0.9, ("a", 0.9), (0.9,), None, (0.9, 0.99, 0.999)])
def test_betas_are_a_pair(betas):
    for make in (optim.Adam, optim.AdamW, optim.NAdam):
        with pytest.raises(tg.DTypeError, match="betas is a pair of numbers"):
            make(Cell(), betas=betas)
    assert optim.Adam(Cell(), betas=[0.8, 0.9]).param_groups[0]["betas"] == (0.8, 0.9)


# ---------------------------------------------------------------------------- ops and explain


def test_keywords_of_numpy_that_ops_do_not_take():
    t = tg.tensor(np.ones((2, 3), np.float32))
    for call, said in (
        (lambda: np.var(t, dtype=np.float64), r"numpy\.var .* takes a, axis, keepdims, ddof; it has no dtype"),
        (lambda: np.mean(t, out=np.empty(())), "it has no out"),
        (lambda: np.concatenate([t, t], dtype="f8"), "numpy.concatenate on a Tensor .* it has no dtype"),
        (lambda: np.reshape(t, (3, 2), "C", 1, 2), "numpy.reshape|too many|takes"),
    ):  # fmt: skip
        with pytest.raises((tg.ArgumentError, TypeError), match=said):
            call()
    assert np.sum(t, axis=1, keepdims=True).shape == (2, 1)


def test_values_that_an_operation_refuses_are_no_shape_problem():
    n = tg.tensor(np.arange(3))
    for power in (-1, tg.tensor(np.full(3, -1))):
        with pytest.raises(tg.ArgumentError, match=r"power\(.*negative integer power.*astype") as caught:
            n**power
        assert not isinstance(caught.value, tg.ShapeError)
    with pytest.raises(tg.ShapeError, match="shapes"):
        n ** tg.tensor(np.ones(2))


def test_explain_after_an_eager_block():
    layer, f = nn.GRU(3, 4), tg.compile(lambda x: ops.tanh(x) * 2.0)
    for call in (lambda: layer(X), lambda: f(X)):
        call()
        assert "op by op" not in str(tg.explain())
        with tg.eager():
            call()
        assert "the last call ran op by op, inside of tg.eager()" in str(tg.explain())
    f(X)
    assert "op by op" not in str(tg.explain())


# ---------------------------------------------------------------------------- requests for values that are caught


def caught(z: Any) -> float:
    try:
        return float(abs(z).max())
    except Exception:
        return 0.0


def test_a_body_that_catches_the_request_for_a_value_runs_step_by_step() -> None:
    class Scaled(nn.Module):
        def initial_state(self, batch: int) -> Any:
            return np.zeros((batch, 3))

        def forward(self, x: Any, h: Any) -> Any:
            h = 0.5 * h + x * caught(x)
            return h, h

    layer, x = nn.Recurrent(Scaled()), np.random.default_rng(0).standard_normal((4, 2, 3))
    found = [layer(x)[0].numpy() for _ in range(3)]
    with tg.eager():
        expected = layer(x)[0].numpy()
    assert np.abs(expected).max() > 0.1
    for y in found:
        np.testing.assert_allclose(y, expected)
    final, _ = ops.scan(lambda c, v: (c + caught(v) * v, None), np.zeros(3), x[:, 0])
    np.testing.assert_allclose(final.numpy(), sum(np.abs(v).max() * v for v in x[:, 0]))


def test_a_compiled_function_that_catches_the_request_for_a_value_is_refused() -> None:
    @tg.compile
    def f(x: Any) -> Any:
        return x + caught(x)

    line = caught.__code__.co_firstlineno + 2
    for _ in range(2):
        with pytest.raises(tg.TraceError, match=rf"test_silent_traps.py:{line}"):
            f(np.ones(2))
