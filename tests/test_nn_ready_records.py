"""Known calls of layers that are differentiated: what they record, and for whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_nn_ready import LAYERS, F, H, agree, everything, given_state, sequence

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops
from tinygrad_lstm.nn import ready


def test_a_write_to_an_output_between_forward_and_backward_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In native loops an output lies where the residuals do."""
    monkeypatch.setenv("TINYGRAD_LSTM_COMPILE", "always")
    layer = LAYERS["lstm"]()
    for _ in range(2):
        y, _ = layer(tg.tensor(sequence(), requires_grad=True))
        y.numpy()[0, 0, 0] += 1.0
        with pytest.raises(tg.GraphError, match="changed in place"):
            (y * 2.0).sum().backward()


@pytest.mark.parametrize("seen_before", [False, True])
@pytest.mark.parametrize("which", ["x", "weight_hh_l0", "bias_ih_l0"])
def test_a_write_to_an_operand_between_forward_and_backward_is_noticed(which: str, seen_before: bool) -> None:
    layer = LAYERS["lstm"]()
    for _ in range(4):
        x = tg.tensor(sequence(), requires_grad=True)
        operand = x if which == "x" else getattr(layer, which)
        array = operand.numpy() if seen_before else None
        y, _ = layer(x)
        (operand.numpy() if array is None else array).reshape(-1)[0] += 1.0
        with pytest.raises(tg.GraphError, match="changed in place"):
            (y * 2.0).sum().backward()


def test_records_of_known_calls_are_as_those_of_ordinary_ones() -> None:
    layer = LAYERS["lstm"]()
    x = tg.tensor(sequence(), requires_grad=True)
    described, kept = set(), set()
    for k in range(4):
        with tg.scope(f"part{k % 2}"):
            y, (h, c) = layer(x)
        record = y._node.record
        if k:  # else the state is stacked by operations of its own
            assert all(out._node.record is record for out in (h, c))
            assert [out._node.index for out in (h, c, y)] == [0, 1, 2]
            assert [(o._node.shape, o._node.dtype) for o in (h, c, y)] == [(o.shape, o.dtype) for o in (h, c, y)]
        described.add(record.describe())
        kept.add(tuple(id(t) for t in record.saved[2:-1]))
    assert len(kept) == 1  # x and the parameters
    line = next(
        n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "y, (h, c) = layer(x)" in text
    )
    assert described == {f"'scan' (part{k}, {__file__}:{line})" for k in range(2)}


def test_records_of_composed_layers_name_the_line_that_called_them() -> None:
    first, second = nn.GRUCell(F, H), nn.GRUCell(H, H)
    for layer in nn.Bidirectional(first, nn.GRUCell(F, H)), nn.Stack([first, second], dropout=0.5):
        with tg.Tape() as tape:
            layer(tg.tensor(sequence().astype(np.float32)))
        assert {record.source_line().rpartition(":")[0] for record in tape.records} == {__file__}


@pytest.mark.parametrize("name", ["lstm", "two layers", "two of both"])
def test_known_calls_for_every_choice_of_what_is_trained(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LAYERS[name]()
    names = [name for name, _ in layer.named_parameters()]
    met, unknown = ready.ReadyLayers._met, []
    monkeypatch.setattr(ready.ReadyLayers, "_met", lambda *given: unknown.append(True) or met(*given))

    def outcome(turn: int, with_x: bool) -> list[Any]:
        x = tg.tensor(sequence(turn), requires_grad=with_x)
        layer.zero_grad()
        y, _ = layer(x)
        ops.square(y).sum().backward()
        assert (x.grad is not None) == with_x
        return [y.numpy(), *([x.grad] if with_x else []), *(p.grad for p in layer.parameters() if p.requires_grad)]

    everything(layer)  # from then on the call is known
    for turn in range(2):
        unknown.clear()
        for frozen in (*([name] for name in names), names[:-1], names[: len(names) // 2], names[1:], names, []):
            for name, p in layer.named_parameters():
                p.requires_grad = name not in frozen
            for with_x in (False, True):
                if with_x or len(frozen) < len(names):
                    found = outcome(turn, with_x)
                    with tg.eager():
                        agree(found, outcome(turn, with_x))
        assert bool(unknown) == (turn == 0)


def test_a_known_call_links_only_what_is_trained() -> None:
    layer = LAYERS["lstm"]()
    layer.weight_ih_l0.requires_grad = False
    for _ in range(4):
        record = layer(tg.tensor(sequence()))[0]._node.record
        linked = [saved for saved, parent in zip(record.saved, record.parents, strict=False) if parent is not None]
        assert {id(p) for p in layer.parameters() if p.requires_grad} == {id(p) for p in linked}


@pytest.mark.parametrize("name", ["lstm", "gru", "two layers"])
def test_a_state_may_be_all_that_is_differentiated(name: str) -> None:
    layer = LAYERS[name]()
    for p in layer.parameters():
        p.requires_grad = False
    for _ in range(4):
        state = given_state(layer)
        leaves = list(state) if isinstance(state, tuple) else [state]
        for leaf in leaves:
            leaf.requires_grad = True
        ops.square(layer(tg.tensor(sequence()), state)[0]).sum().backward()
        found = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        with tg.eager():
            ops.square(layer(tg.tensor(sequence()), state)[0]).sum().backward()
        agree(found, [leaf.grad for leaf in leaves])
