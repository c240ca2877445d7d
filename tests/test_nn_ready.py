"""Calls of layers that are known already: every change that matters is seen, and nothing else differs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

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
    "batch first": lambda: nn.LSTM(F, H, batch_first=True, dtype=np.float64),
    "two of both": lambda: nn.LSTM(F, H, 2, bidirectional=True, dropout=0.5, dtype=np.float64).eval(),
}


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of a layer was a known one."""
    seen: list[bool] = []
    captures, whole = ready._Ready.captures, ready.ReadyLayers.whole

    def watched(self: Any, cells: Any, current: Any) -> Any:
        found = captures(self, cells, current)
        seen.append(found is not None)
        return found

    def watched_whole(self: Any, *arguments: Any) -> Any:
        before = len(seen)
        found = whole(self, *arguments)
        if len(seen) == before:  # not asked for captures
            seen.append(found is not None)
        return found

    monkeypatch.setattr(ready._Ready, "captures", watched)
    monkeypatch.setattr(ready.ReadyLayers, "whole", watched_whole)
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


@pytest.mark.parametrize("name", ["lstm", "gru", "batch first", "two of both"])
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


def test_arrays_are_as_known_as_tensors(used: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, cell = LAYERS["lstm"](), nn.Recurrent(nn.GRUCell(F, H, dtype=np.float64))
    kept: list[bool] = []
    monkeypatch.setattr(ready, "_put", lambda *given, put=ready._put: kept.append(True) or put(*given))
    for k in range(3):
        expected, found = (layer(x)[0].numpy() for x in (tg.tensor(sequence(k)), sequence(k)))
        np.testing.assert_array_equal(expected, found)
        cell(sequence(k))
    assert used == [True] * 7 and len(kept) == 2


def given_state(layer: Any, seed: int = 0) -> Any:
    """A state in PyTorch's form, as tensors."""
    rng = np.random.default_rng(seed)
    _, like = layer(sequence(seed))
    made = [tg.tensor(rng.standard_normal(part.shape)) for part in (like if isinstance(like, tuple) else (like,))]
    return tuple(made) if isinstance(like, tuple) else made[0]


def from_state(layer: Any, state: Any, wanted: bool = True) -> list[np.ndarray]:
    """Everything of a call from a state, and the gradients of its parts."""
    leaves = list(state) if isinstance(state, tuple) else [state]
    x = tg.tensor(sequence(1), requires_grad=wanted)
    layer.zero_grad()
    for leaf in leaves:
        leaf.grad = None
        leaf.requires_grad = wanted
    y, final = layer(x, state)
    found = [y, *(final if isinstance(final, tuple) else (final,))]
    sum((ops.square(part) * (k + 1.0)).sum() for k, part in enumerate(found)).backward()
    return [*(p.numpy() for p in found), *(t.grad for t in [x, *leaves, *layer.parameters()] if t.grad is not None)]


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_a_given_state(name: str, wanted: bool, used: list[bool]) -> None:
    layer, state = LAYERS[name](), given_state(LAYERS[name]())
    used.clear()
    first = from_state(layer, state, wanted)
    assert used == []
    again = from_state(layer, state, wanted)
    assert used == [True]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    with tg.eager():
        agree(again, from_state(layer, state, wanted))
    # Without a state it is the same known call.
    used.clear()
    found = everything(layer)
    assert used == [True]
    agree(found, plainly(layer))
    with tg.no_grad():
        y, final = layer(tg.tensor(sequence(1)), state)
    agree([y.numpy()], again[:1])
    assert not y.requires_grad and all(not part.requires_grad for part in (final if name != "gru" else [final]))


def test_states_that_do_not_fit() -> None:
    """What a known call does not take is what any other call says of it."""
    layer = LAYERS["lstm"]()
    h, c = given_state(layer)
    x = tg.tensor(sequence())
    layer(x)
    for wrong in ((h,), h, (h, c, c), (h, tg.tensor(np.zeros((1, B + 1, H)))), (h, tg.tensor(c.numpy()[0]))):
        with pytest.raises(tg.ShapeError, match=r"state|initial"):
            layer(x, wrong)
    with pytest.raises(tg.DTypeError, match="initial c is float32"):
        layer(x, (h, c.astype(np.float32)))
    agree([layer(x, [h, c])[0].numpy()], [layer(x, (h.numpy(), c.numpy()))[0].numpy()])
    assert np.isfinite(layer(x, (nn.Parameter(h.numpy()), c))[0].numpy()).all()


@pytest.mark.parametrize("known", [False, True])
def test_a_write_to_a_given_state_is_noticed(known: bool) -> None:
    """A gradient that is itself differentiated runs the forward again, from the state."""
    layer = LAYERS["lstm"]()
    h, c = given_state(layer)
    x = tg.tensor(sequence(), requires_grad=True)
    if known:
        layer(x)
    with tg.Tape() as tape:
        loss = ops.square(layer(x, (h, c))[0]).sum()
    h.data[...] = 0.0
    with pytest.raises(tg.GraphError, match="changed in place"):
        tape.gradient(loss, x)
    loss = ops.square(layer(x, (h, c))[0]).sum()
    c.data[...] = 0.0
    with pytest.raises(tg.GraphError, match="changed in place"):
        loss.backward()


def test_a_layer_is_recorded_once_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinygrad_lstm.nn import programs

    layer, recorded = LAYERS["two of both"](), []
    record = programs.record_body
    monkeypatch.setattr(programs, "record_body", lambda *given: recorded.append(given) or record(*given))
    for lengths in ([4, 2, 0], [1, 1, 3]):
        layer(sequence(), lengths=lengths)
    assert len(recorded) == 4


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


def test_what_was_patched_before_the_first_call_without_gradients_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = LAYERS["rnn"](), tg.tensor(sequence())
    layer(x)  # kept here
    monkeypatch.setattr(nn.RNNCell, "forward", lambda self, x, h: (h + 1.0, h + 1.0))
    with tg.no_grad():
        found = layer(x)[0]
    assert found.tolist() == np.broadcast_to(np.arange(1.0, T + 1)[:, None, None], (T, B, H)).tolist()


def test_a_patched_call_of_the_cell_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = LAYERS["rnn"](), tg.tensor(sequence())
    layer(x), layer(x)
    monkeypatch.setattr(nn.RNNCell, "__call__", lambda self, x, h=None: (h + 1.0, h + 1.0))
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


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_that_is_dropped_is_freed_at_once(name: str) -> None:
    layer = LAYERS[name]()
    for _ in range(3):
        (layer(tg.tensor(sequence()))[0] * 2.0).sum().backward()
        with tg.no_grad():
            layer(tg.tensor(sequence()))
    alive = [weakref.ref(p) for p in layer.parameters()]
    gc.collect()
    gc.disable()  # counting references is enough
    try:
        del layer
        assert all(reference() is None for reference in alive)
    finally:
        gc.enable()


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
    assert used == [True]  # compiled functions record the layer itself


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


@pytest.mark.parametrize("name", LAYERS)
def test_calls_with_other_tensors_in_place_of_parameters_are_known(name: str, used: list[bool]) -> None:
    layer, other = LAYERS[name](), LAYERS[name]()
    x = sequence(2)

    def loss(m: Any) -> Any:
        return sum(ops.square(part).sum() for part in parts(m, x))

    def curved(m: Any) -> Any:
        return sum(ops.square(g).sum() for g in tg.grad(loss)(m).values())

    before = everything(other)
    found = [tg.grad(loss)(layer) for _ in range(3)]
    assert used == [True, True]
    agree(everything(other), before)
    assert used.pop() is True, "another layer's calls stay known"
    second = [tg.grad(curved)(layer) for _ in range(2)]
    assert used.pop() is True
    doubled = {name: 2.0 * value for name, value in layer.state_dict().items()}
    out, pull = tg.vjp(lambda m: parts(m, x)[0], layer)
    moved = tg.jvp(loss, (layer,), (doubled,))
    with tg.eager():
        agree([g.numpy() for g in found[-1].values()], [g.numpy() for g in tg.grad(loss)(layer).values()])
        agree([g.numpy() for g in second[-1].values()], [g.numpy() for g in tg.grad(curved)(layer).values()])
        plain, pull_plainly = tg.vjp(lambda m: parts(m, x)[0], layer)
        agree([part.numpy() for part in moved], [part.numpy() for part in tg.jvp(loss, (layer,), (doubled,))])
        weights = np.random.default_rng(1).standard_normal(out.shape)
        agree([out.numpy()], [plain.numpy()])
        expected = pull_plainly(weights)[0]
    agree([g.numpy() for g in pull(weights)[0].values()], [g.numpy() for g in expected.values()])
    agree(everything(layer), plainly(layer))


def test_what_stood_in_for_parameters_dies(used: list[bool]) -> None:
    layer = LAYERS["lstm"]()
    x = sequence(2)
    seen: list[Any] = []

    def loss(m: Any) -> Any:
        assert type(m.weight_hh_l0) is tg.Tensor
        seen.append(weakref.ref(m.weight_hh_l0))
        return ops.square(m(x)[0]).sum()

    for _ in range(3):
        tg.grad(loss)(layer)
    assert used == [True, True]
    gc.collect()
    assert [stand_in() for stand_in in seen] == [None] * 3


def test_what_is_kept_dies_with_the_layer() -> None:
    layer = LAYERS["lstm"]()
    for steps in range(1, 80):
        layer(tg.tensor(sequence(0, steps)))
    kept = known_of(layer)
    assert 0 < len(kept) <= 32
    run = weakref.ref(next(iter(kept.values())))
    del kept, layer
    assert run() is None, "at once"
