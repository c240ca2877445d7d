"""Calls of layers that are known already: every change that matters is seen, and nothing else differs."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops
from tinygrad_lstm.nn import ready
from tinygrad_lstm.nn.programs import known_of

T, B, F, H = 4, 3, 2, 5
LAYERS: dict[str, Callable[[], Any]] = {
    "lstm": lambda: nn.LSTM(F, H, dtype=np.float64),
    "gru": lambda: nn.GRU(F, H, dtype=np.float64),
    "rnn": lambda: nn.RNN(F, H, dtype=np.float64),
    "projection": lambda: nn.LSTM(F, H, proj_size=3, dtype=np.float64),
    "two layers": lambda: nn.LSTM(F, H, 2, dtype=np.float64),
    "two directions": lambda: nn.GRU(F, H, bidirectional=True, dtype=np.float64),
    "two of both": lambda: nn.LSTM(F, H, 2, bidirectional=True, dropout=0.5, dtype=np.float64).eval(),
}


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of a layer was a known one."""
    seen: list[bool] = []
    captures = ready._Ready.captures

    def watched(self: Any, cells: Any, current: Any) -> Any:
        found = captures(self, cells, current)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(ready._Ready, "captures", watched)
    return seen


def sequence(seed: int = 0, steps: int = T) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((steps, B, F))


def parts(layer: Any, x: Any) -> list[Any]:
    y, state = layer(x)
    return [y, *(state if isinstance(state, tuple) else (state,))]


def everything(layer: Any, seed: int = 0) -> list[np.ndarray]:
    """Outputs, states, and the gradients of a loss that reads all of them."""
    x = tg.tensor(sequence(seed), requires_grad=True)
    layer.zero_grad()
    found = parts(layer, x)
    weights = [np.random.default_rng(k).standard_normal(part.shape) for k, part in enumerate(found)]
    loss = sum((ops.square(part) * w).sum() for part, w in zip(found, weights, strict=True))
    loss.backward()
    return [*(part.numpy() for part in found), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]


def plainly(layer: Any, seed: int = 0) -> list[np.ndarray]:
    with tg.eager():
        return everything(layer, seed)


def agree(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_a_known_call_computes_the_same(name: str, used: list[bool]) -> None:
    layer = LAYERS[name]()
    first = everything(layer)
    assert used == []
    again = everything(layer)
    assert used == [True]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    agree(again, plainly(layer))
    agree(everything(layer, 1), plainly(layer, 1))


@pytest.mark.parametrize("name", ["lstm", "gru", "two of both"])
def test_without_gradients(name: str, used: list[bool]) -> None:
    layer = LAYERS[name]()
    for _ in range(2):
        with tg.no_grad():
            found = parts(layer, tg.tensor(sequence()))
    assert used == [True] and not any(part.requires_grad for part in found)
    with tg.eager():
        agree([part.numpy() for part in found], [part.numpy() for part in parts(layer, tg.tensor(sequence()))])
    for p in layer.parameters():
        p.requires_grad = False
    assert not any(part.requires_grad for part in parts(layer, tg.tensor(sequence())))


def changed_data(layer: Any) -> None:
    layer.weight_hh_l0.data = 0.5 * layer.weight_hh_l0.data


def changed_in_place(layer: Any) -> None:
    layer.bias_ih_l0.data[:] += 1.0


def replaced(layer: Any) -> None:
    layer.weight_ih_l0 = nn.Parameter(layer.weight_ih_l0.numpy() * 2.0)


def loaded(layer: Any) -> None:
    layer.load_state_dict({name: 0.3 * value for name, value in layer.state_dict().items()})


def frozen(layer: Any) -> None:
    layer.weight_hh_l0.requires_grad = False


@pytest.mark.parametrize("change", [changed_data, changed_in_place, replaced, loaded, frozen])
def test_changes_of_parameters_count(change: Callable[[Any], None]) -> None:
    layer = LAYERS["lstm"]()
    before = everything(layer)
    everything(layer)
    change(layer)
    found = everything(layer)
    agree(found, plainly(layer))
    assert len(found) != len(before) or any(not np.allclose(a, b) for a, b in zip(found, before, strict=True))


def test_changes_of_dtype_and_mode_count() -> None:
    layer = nn.LSTM(F, H, 2, dropout=0.5, dtype=np.float64).eval()
    everything(layer), everything(layer)
    layer.train()
    tg.seed(0)
    first = layer(tg.tensor(sequence()))[0].numpy()
    assert not np.allclose(first, layer(tg.tensor(sequence()))[0].numpy()), "dropout is on"
    layer.eval().astype(np.float32)
    with pytest.raises(tg.DTypeError, match="float64"):
        layer(tg.tensor(sequence()))
    assert layer(tg.tensor(sequence().astype(np.float32)))[0].dtype == np.float32


def test_an_option_of_the_layer_counts() -> None:
    layer = LAYERS["lstm"]()
    x = tg.tensor(sequence())
    layer(x), layer(x)
    layer.return_states = True
    assert len(layer(x)) == 3
    layer.return_states = False
    assert len(layer(x)) == 2


def test_equations_of_the_cell_count(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = LAYERS["rnn"](), tg.tensor(sequence())
    layer(x), layer(x)
    monkeypatch.setattr(nn.RNNCell, "forward", lambda self, x, h: (h + 1.0, h + 1.0))
    assert layer(x)[0].tolist() == np.broadcast_to(np.arange(1.0, T + 1)[:, None, None], (T, B, H)).tolist()


def test_an_initial_state_of_the_users_own_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = LAYERS["rnn"](), tg.tensor(sequence())
    layer(x), layer(x)
    start = nn.Parameter(np.ones((B, H)))
    monkeypatch.setattr(nn.RNNCell, "initial_state", lambda self, batch: start * 1.0)
    expected = layer(x, np.ones((1, B, H)))[0].numpy()
    np.testing.assert_array_equal(layer(x)[0].numpy(), expected)
    monkeypatch.undo()

    class Learned(nn.RNN):
        @staticmethod
        def make_cell(input_size: int, hidden_size: int, bias: bool, **options: Any) -> Any:
            cell = nn.RNN.make_cell(input_size, hidden_size, bias, **options)
            cell.initial_state = lambda batch: start * 1.0
            return cell

    learned = Learned(F, H, dtype=np.float64)
    for value in (1.0, 2.0, 3.0):
        start.data = np.full((B, H), value)
        start.zero_grad()
        y, _ = learned(x)
        np.testing.assert_allclose(y.numpy(), learned(x, np.full((1, B, H), value))[0].numpy(), rtol=1e-12)
        y.sum().backward()
        assert np.abs(start.grad).max() > 0


def test_changes_behind_the_back_of_the_modules_count() -> None:
    layer, x = nn.LSTM(H, H, 2, dtype=np.float64), tg.tensor(np.ones((T, B, H)))
    layer(x), layer(x)
    layer._cells.reverse()
    with tg.eager():
        expected = layer(x)[0].numpy()
    np.testing.assert_allclose(layer(x)[0].numpy(), expected, rtol=1e-12)
    vars(layer._cells[1])["weight_hh"] = nn.Parameter(np.zeros((4 * H, H)))
    with tg.eager():
        expected = layer(x)[0].numpy()
    np.testing.assert_allclose(layer(x)[0].numpy(), expected, rtol=1e-12)


def test_stand_ins_of_parameters_do_not_live_on() -> None:
    layer = LAYERS["lstm"]()
    alive: list[Any] = []

    def loss(layer: Any) -> Any:
        alive.append(weakref.ref(layer.weight_hh_l0))
        return layer(tg.tensor(sequence()))[0].sum()

    for _ in range(2):
        tg.grad(loss)(layer)
    gc.collect()
    assert alive and all(reference() is None for reference in alive)


def test_whoever_looks_at_single_operations_gets_them(used: list[bool]) -> None:
    layer, x = LAYERS["lstm"](), tg.tensor(sequence(), requires_grad=True)
    layer(x), layer(x)
    with tg.Tape() as tape, tg.eager():
        layer(x)
    assert sum(record.primitive.name == "tanh" for record in tape.records) == 2 * T
    with tg.Tape() as tape:
        y, _ = layer(x)
        loss = y.sum()
    assert tape.gradient(loss, x).shape == x.shape
    compiled = tg.compile(lambda x: layer(x)[0].sum())
    np.testing.assert_allclose(compiled(x).item(), loss.item(), rtol=1e-12)
    assert used == [True, False, False]  # compiled functions record the layer itself


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_second_derivatives_through_the_final_state(name: str, used: list[bool]) -> None:
    layer = LAYERS[name]()
    vector = np.random.default_rng(3).standard_normal((T, B, F))

    def slope(x: Any) -> Any:
        gradient = tg.grad(lambda x: sum(ops.sin(part).sum() for part in parts(layer, x)))
        return (gradient(x) * vector).sum()

    slope(sequence())
    found = tg.grad(slope)(sequence()).numpy()
    assert True in used
    with tg.eager():
        agree([found], [tg.grad(slope)(sequence()).numpy()])


def test_a_write_to_an_output_between_forward_and_backward_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In native loops an output lies where the residuals do."""
    monkeypatch.setenv("TINYGRAD_LSTM_COMPILE", "always")
    layer = LAYERS["lstm"]()
    for _ in range(2):
        y, _ = layer(tg.tensor(sequence(), requires_grad=True))
        y.numpy()[0, 0, 0] += 1.0
        with pytest.raises(tg.GraphError, match="changed in place"):
            (y * 2.0).sum().backward()


def test_earlier_results_stay() -> None:
    layer = LAYERS["lstm"]()
    x = tg.tensor(sequence(), requires_grad=True)
    calls = [parts(layer, x) for _ in range(3)]
    copies = [[part.numpy().copy() for part in call] for call in calls]
    gradients = []
    for call in reversed(calls):
        x.zero_grad()
        sum(ops.square(part).sum() for part in call).backward()
        gradients.append(x.grad)
    for gradient in gradients[1:]:
        np.testing.assert_array_equal(gradient, gradients[0])
    for call, copied in zip(calls, copies, strict=True):
        for part, copy in zip(call, copied, strict=True):
            np.testing.assert_array_equal(part.numpy(), copy)


def test_what_is_kept_dies_with_the_layer() -> None:
    layer = LAYERS["lstm"]()
    for steps in range(1, 80):
        layer(tg.tensor(sequence(0, steps)))
    kept = known_of(layer)
    assert 0 < len(kept) <= 32
    from tinygrad_lstm.nn import programs

    identity = id(layer)
    del layer
    gc.collect()
    assert identity not in programs._programs or programs._programs[identity] is not kept


# ---------------------------------------------------------------------------- cells of users

FACTOR = 1.5


def helper(h: Any) -> Any:
    return h * FACTOR


class Own(nn.Module):
    """Everything that a call may depend on."""

    scale = 0.5

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        rng = np.random.default_rng(5)
        self.w = nn.Parameter(rng.standard_normal((F, H)))
        self.u = nn.Parameter(0.3 * rng.standard_normal((H, H)))
        self.first = nn.Parameter(np.full(H, start))
        self.shift = 0.1
        self.calls = 0

    def initial_state(self, batch: int) -> Any:
        return {"h": ops.broadcast_to(self.first, (batch, H)), "n": np.full((batch, H), FACTOR)}

    def forward(self, x: Any, state: Any) -> Any:
        h = ops.tanh(x @ self.w + helper(state["h"]) @ self.u * self.scale + self.shift)
        h = h * (2.0 if self.training else 1.0)
        return (h, state["n"]), {"h": h, "n": state["n"] + h}


class Listed(Own):
    def __init__(self) -> None:
        super().__init__()
        self.table = [2.0]

    def forward(self, x: Any, state: Any) -> Any:
        return super().forward(x * self.table[0], state)


def of_own(layer: Any, seed: int = 0) -> list[np.ndarray]:
    x = tg.tensor(sequence(seed), requires_grad=True)
    layer.zero_grad()
    (y, n), state = layer(x)
    found = [y, n, state["h"], state["n"]]
    loss = sum((ops.square(part) * (k + 1.0)).sum() for k, part in enumerate(found))
    loss.backward()
    gradients = [np.zeros(p.shape) if p.grad is None else p.grad for p in layer.parameters()]
    return [*(part.numpy() for part in found), x.grad, *gradients]


def of_own_plainly(layer: Any, seed: int = 0) -> list[np.ndarray]:
    with tg.eager():
        return of_own(layer, seed)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_users_cell(reverse: bool, used: list[bool]) -> None:
    layer = nn.Recurrent(Own(0.2), reverse=reverse)
    first = of_own(layer)
    assert used == []
    again = of_own(layer)
    assert used == [True]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    agree(of_own(layer, 1), of_own_plainly(layer, 1))
    assert again[-1].any(), "the initial state is trained"


def changed_global(layer: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(globals(), "FACTOR", 0.7)


def changed_helper(layer: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(globals(), "helper", lambda h: h * 0.1)


def changed_class_attribute(layer: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Own, "scale", 0.9)


def changed_attribute(layer: Any, patch: pytest.MonkeyPatch) -> None:
    layer.cell.shift = -0.4


def changed_mode(layer: Any, patch: pytest.MonkeyPatch) -> None:
    layer.eval()


def changed_parameter(layer: Any, patch: pytest.MonkeyPatch) -> None:
    layer.cell.u.data = 2.0 * layer.cell.u.data


def replaced_parameter(layer: Any, patch: pytest.MonkeyPatch) -> None:
    layer.cell.u = nn.Parameter(0.1 * layer.cell.u.numpy())


def changed_method(layer: Any, patch: pytest.MonkeyPatch) -> None:
    forward = Own.forward
    patch.setattr(Own, "forward", lambda self, x, state: forward(self, -x, state))


def changed_start(layer: Any, patch: pytest.MonkeyPatch) -> None:
    start = Own.initial_state
    patch.setattr(Own, "initial_state", lambda self, batch: {**start(self, batch), "n": np.zeros((batch, H))})


def another_cell(layer: Any, patch: pytest.MonkeyPatch) -> None:
    layer.cell = Own(0.6)


def other_direction(layer: Any, patch: pytest.MonkeyPatch) -> None:
    layer.reverse = True


@pytest.mark.parametrize(
    "change",
    [changed_global, changed_helper, changed_class_attribute, changed_attribute, changed_mode, changed_parameter,
     replaced_parameter, changed_method, changed_start, another_cell, other_direction],
)  # fmt: skip
def test_changes_of_a_users_cell_count(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Recurrent(Own(0.2))
    before = of_own(layer)
    of_own(layer)
    change(layer, monkeypatch)
    found = of_own(layer)
    agree(found, of_own_plainly(layer))
    assert any(not np.allclose(a, b) for a, b in zip(found, before, strict=True))


def test_lists_of_a_users_cell_are_looked_into(used: list[bool]) -> None:
    layer = nn.Recurrent(Listed())
    of_own(layer), of_own(layer)
    layer.cell.table[0] = 0.3
    agree(of_own(layer), of_own_plainly(layer))
    assert True not in used


def test_another_initial_state_is_asked_for(used: list[bool]) -> None:
    class Growing(Own):
        def initial_state(self, batch: int) -> Any:
            self.__dict__["calls"] += 1  # unseen
            return {"h": np.zeros((batch, H)), "n": np.full((batch, H), float(self.calls))}

    layer = nn.Recurrent(Growing())
    x = tg.tensor(sequence())
    before = None
    for _ in range(4):
        _, state = layer(x)
        now = state["n"].numpy()
        if before is not None:
            assert (now > before).all()
        before = now
    assert used[-1] is True


def test_an_initial_state_of_another_kind(used: list[bool]) -> None:
    class Changing(nn.Module):
        def initial_state(self, batch: int) -> Any:
            dtype, parts = self.__dict__.get("kind", (np.float32, tuple))  # unseen
            start = np.zeros((batch, F), dtype)
            return start if parts is None else parts([start])

        def forward(self, x: Any, state: Any) -> Any:
            (h,) = state if isinstance(state, tuple) else (state,)
            h = h + x
            return h, type(state)([h]) if isinstance(state, tuple) else h

    layer = nn.Recurrent(Changing())
    x = tg.tensor(sequence().astype(np.float32))
    for _ in range(3):
        assert isinstance(layer(x)[1], tuple)
    assert used == [True, True]
    layer.cell.__dict__["kind"] = np.float32, None
    for _ in range(3):
        assert isinstance(layer(x)[1], tg.Tensor)
    layer.cell.__dict__["kind"] = np.float64, tuple
    with pytest.raises(tg.DTypeError, match="float64"):
        layer(x)


def test_only_the_initial_state_is_trained(used: list[bool]) -> None:
    layer = nn.Recurrent(Own(0.2))
    for p in layer.parameters():
        p.requires_grad = p is layer.cell.first
    for _ in range(3):
        layer.zero_grad()
        (y, _), _ = layer(tg.tensor(sequence()))
        y.sum().backward()
        found = layer.cell.first.grad
    assert used == [True, True]
    layer.zero_grad()
    with tg.eager():
        layer(tg.tensor(sequence()))[0][0].sum().backward()
    np.testing.assert_allclose(found, layer.cell.first.grad, rtol=1e-12)


def closing_over(memory: Any) -> Any:
    class Closed(nn.Module):
        def initial_state(self, batch: int) -> Any:
            return np.zeros((batch, F))

        def forward(self, x: Any, h: Any) -> Any:
            h = ops.tanh(h + x * memory)
            return h, h

    return Closed()


def test_what_a_users_cell_closes_over_is_not_frozen(used: list[bool]) -> None:
    memory = tg.tensor(np.ones(F), requires_grad=True)

    layer = nn.Recurrent(closing_over(memory))
    for scale in (1.0, 2.0, 3.0):
        memory.data = np.full(F, scale)
        memory.grad = None
        layer(tg.tensor(sequence()))[0].sum().backward()
        expected = memory.grad
        memory.grad = None
        with tg.eager():
            layer(tg.tensor(sequence()))[0].sum().backward()
        np.testing.assert_allclose(memory.grad, expected, rtol=1e-12)
    assert True not in used


def test_noise_is_drawn_at_every_call(used: list[bool]) -> None:
    layer = nn.Recurrent(nn.Zoneout(nn.LSTMCell(F, H, dtype=np.float64), p=(0.5, 0.5)))
    x = tg.tensor(sequence())
    outs = [layer(x)[0].numpy() for _ in range(3)]
    assert not np.allclose(outs[1], outs[2])
    assert True not in used


def test_cells_of_the_library_in_recurrent(used: list[bool]) -> None:
    for cell in (nn.PeepholeLSTMCell(F, H, dtype=np.float64), nn.LayerNormLSTMCell(F, H, dtype=np.float64)):
        layer = nn.Recurrent(cell)
        used.clear()
        for seed in range(3):
            found = parts_of(layer, seed)
        assert used == [True, True]
        with tg.eager():
            agree(found, parts_of(layer, seed))


def parts_of(layer: Any, seed: int) -> list[Any]:
    x = tg.tensor(sequence(seed), requires_grad=True)
    y, (h, c) = layer(x)
    layer.zero_grad()
    ((y * y).sum() + (h * c).sum()).backward()
    return [y.numpy(), h.numpy(), c.numpy(), x.grad, *(p.grad for p in layer.parameters())]


def test_an_array_to_start_from_is_the_callers(used: list[bool]) -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.zeros = np.zeros((B, F))

        def initial_state(self, batch: int) -> Any:
            return self.zeros

        def forward(self, x: Any, h: Any) -> Any:
            h = h * h + x
            return h, h

    layer = nn.Recurrent(Kept())
    for k in range(3):
        layer.cell.zeros[:] = k
        x = tg.tensor(sequence(), requires_grad=True)
        y, state = layer(x)
        layer.cell.zeros[:] = -7.0  # after the forward has saved what it was
        y.sum().backward()
        h, grad = np.full((B, F), float(k)), []
        for row in sequence():
            grad.append(2.0 * h)
            h = h * h + row
        np.testing.assert_allclose(state.numpy(), h)
        later = np.ones((B, F))
        for t in range(T - 1, -1, -1):
            np.testing.assert_allclose(x.grad[t], later)
            later = 1.0 + later * grad[t]


@pytest.mark.parametrize("wanted", [{"return_states": True}, {"return_gates": True}])
@pytest.mark.parametrize("make", [lambda **wanted: nn.Recurrent(Own(), **wanted), functools.partial(nn.GRU, F, H)])
def test_trajectories_that_one_call_did_without(make: Any, wanted: dict[str, bool], used: list[bool]) -> None:
    layer = make(**wanted)
    x = tg.tensor(sequence().astype(next(iter(layer.parameters())).dtype))
    for _ in range(3):
        assert len(layer(x, return_states=False, return_gates=False)) == 2
        assert len(layer(x)) == 3
    assert True not in used


@pytest.mark.parametrize("kind", ["LSTM", "Recurrent", "Closed"])
def test_calls_that_are_not_kept_do_not_make_later_ones_run_step_by_step(kind: str) -> None:
    """After a call op by op, or with a captured tensor outside of the cell, there is nothing recorded to keep."""
    memory = tg.tensor(np.ones(F), requires_grad=True)
    layer = nn.LSTM(F, H, dtype=np.float64) if kind == "LSTM" else nn.Recurrent(
        nn.LSTMCell(F, H, dtype=np.float64) if kind == "Recurrent" else closing_over(memory)
    )  # fmt: skip
    x = tg.tensor(sequence(), requires_grad=True)
    with tg.eager():
        layer(x)
    for _ in range(3):
        y, _ = layer(x)
        assert y._node.record.primitive.name == "scan"
    layer(x, memory=0.5)


class Twice(nn.Module):
    """Both outputs are the state."""

    def initial_state(self, batch: int) -> Any:
        return np.zeros((batch, F))

    def forward(self, x: Any, h: Any) -> Any:
        h = ops.tanh(h + x)
        return (h, h), h


@pytest.mark.parametrize("requires_grad", [False, True])
def test_outputs_of_a_known_call_share_no_memory(requires_grad: bool, used: list[bool]) -> None:
    layer = nn.Recurrent(Twice())
    x = tg.tensor(sequence(), requires_grad=requires_grad)
    for _ in range(3):
        (a, b), h = layer(x)
        assert not np.shares_memory(a.numpy(), b.numpy())
        assert not np.shares_memory(a.numpy(), h.numpy())
    assert used == [True, True]


def test_the_initial_state_is_asked_for_once_a_call(used: list[bool]) -> None:
    """It may be drawn at random, or count."""

    class Counting(Own):
        kind = np.float64

        def initial_state(self, batch: int) -> Any:
            self.__dict__["calls"] += 1  # unseen
            return {"h": np.zeros((batch, H)), "n": np.zeros((batch, H))}

    class Seen(Own):
        def initial_state(self, batch: int) -> Any:
            self.calls += 1
            return super().initial_state(batch)

    for cell in (Counting(), Seen()):
        layer = nn.Recurrent(cell)
        for k in range(1, 5):
            layer(tg.tensor(sequence()))
            assert cell.calls == k
    assert True in used


def test_what_a_cell_started_from_does_not_live_on(used: list[bool]) -> None:
    class Given(Own):
        def initial_state(self, batch: int) -> Any:
            return {"h": self.__dict__["given"], "n": np.zeros((batch, H))}  # unseen

    layer = nn.Recurrent(Given())
    for _ in range(3):
        past = tg.tensor(np.ones((B, H)), requires_grad=True)
        layer.cell.__dict__["given"] = ops.sin(past)
        layer(tg.tensor(sequence()))
        del layer.cell.__dict__["given"]
        past = weakref.ref(past)
        gc.collect()
        assert past() is None
    assert used == [True, True]


def test_a_cell_that_was_replaced_does_not_live_on() -> None:
    layer = nn.Recurrent(Own())
    layer(tg.tensor(sequence()))
    layer(tg.tensor(sequence()[:2]))
    cell = weakref.ref(layer.cell)
    layer.cell = Own()
    layer(tg.tensor(sequence()[:3]))
    gc.collect()
    assert cell() is None


@pytest.mark.parametrize("instance", [False, True])
def test_a_layer_that_starts_in_a_way_of_its_own(instance: bool, used: list[bool]) -> None:
    class Started(nn.Recurrent):
        def start(self, batch: int, given: Any = None) -> Any:
            return np.full((batch, F), 3.0)

    layer = nn.Recurrent(Twice()) if instance else Started(Twice())
    if instance:
        layer.start = lambda batch, given: np.full((batch, F), 3.0)
    expected = np.full((B, F), 3.0)
    for row in sequence():
        expected = np.tanh(expected + row)
    for _ in range(3):
        np.testing.assert_allclose(layer(tg.tensor(sequence()))[1].numpy(), expected)
    assert used == []


SETTINGS = {"gain": 2.0}


class Methodical(Own):
    """Equations in many places."""

    gains: ClassVar[list[float]] = [1.5]
    named: ClassVar[dict[str, float]] = {"gain": 1.2}

    @property
    def gain(self) -> float:
        return SETTINGS["gain"]

    @staticmethod
    def fixed(h: Any) -> Any:
        return h * SETTINGS["gain"]

    @classmethod
    def shared(cls, h: Any) -> Any:
        return h * SETTINGS["gain"] * cls.named["gain"]

    def gate(self, h: Any) -> Any:
        return h * 0.9

    def initial_state(self, batch: int) -> Any:
        return {"h": np.zeros((batch, H)), "n": np.zeros((batch, H))}

    def forward(self, x: Any, state: Any) -> Any:
        return super().forward(x, {**state, "h": self.part(state["h"])})

    def part(self, h: Any) -> Any:
        return h


METHODICAL: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "method": (lambda s, h: s.gate(h), lambda p: p.setattr(Methodical, "gate", lambda self, h: -h)),
    "property": (lambda s, h: h * s.gain, lambda p: p.setitem(SETTINGS, "gain", 0.3)),
    "static": (lambda s, h: s.fixed(h), lambda p: p.setitem(SETTINGS, "gain", 0.3)),
    "class": (lambda s, h: s.shared(h), lambda p: p.setitem(SETTINGS, "gain", 0.3)),
    "list": (lambda s, h: h * s.gains[0], lambda p: p.setattr(Methodical, "gains", [0.3])),
    "dict": (lambda s, h: h * s.named["gain"], lambda p: p.setitem(Methodical.named, "gain", 0.3)),
    "hidden": (lambda s, h: h * s.scale, lambda p: p.setattr(Methodical, "scale", 0.1, raising=False)),
}


@pytest.mark.parametrize("name", METHODICAL)
def test_changes_of_a_users_class_count(name: str, monkeypatch: pytest.MonkeyPatch, used: list[bool]) -> None:
    part, change = METHODICAL[name]
    monkeypatch.setattr(Methodical, "part", lambda self, h: part(self, h))
    layer = nn.Recurrent(Methodical())
    for _ in range(3):
        before = of_own(layer)
    assert used == [True, True]
    change(monkeypatch)
    found = of_own(layer)
    agree(found, of_own_plainly(layer))
    assert any(not np.allclose(a, b) for a, b in zip(found, before, strict=True))
