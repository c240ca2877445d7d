"""Known calls of nn.Recurrent with cells of users: whatever a call may depend on is looked at."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_nn_ready import F, H, agree, sequence, used

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops

__all__ = ["used"]


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
    assert used == [True, False, False], "the call that is known, the one after the change, the eager one"


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
