"""Targets per step of sequences of different lengths: a Trainer computes what the sequences give one by one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops, optim
from tinygrad_lstm.data import Batch, DataLoader, SequenceDataset
from tinygrad_lstm.training import Trainer
from tinygrad_lstm.training.batches import unpack

FLOAT_LOSSES = {"mse": nn.mse_loss, "l1": nn.l1_loss, "huber": nn.huber_loss, "logits": nn.bce_with_logits}


class Tagger(nn.Module):
    """A value, or the logits of classes, for every step."""

    def __init__(self, outputs: int = 1, batch_first: bool = False, squash: bool = False) -> None:
        super().__init__()
        self.rnn = nn.GRU(2, 3, batch_first=batch_first)
        self.out = nn.Linear(3, outputs)
        self.squash = squash
        self.astype(np.float64)

    def forward(self, x: Any, lengths: Any = None) -> Any:
        y = self.out(self.rnn(x, lengths=lengths)[0])
        return ops.sigmoid(y) if self.squash else y


def sequences(lengths: list[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(len(lengths))
    return [rng.normal(size=(n, 2)) for n in lengths]


def one_by_one(model: nn.Module, xs: list[np.ndarray], ys: list[np.ndarray], loss: Any, first: bool) -> Any:
    """The mean over all steps, from sequences that were never padded."""
    axis = 0 if first else 1
    total = sum(
        loss(model(np.expand_dims(x, axis)), np.expand_dims(y, axis), reduction="sum")
        for x, y in zip(xs, ys, strict=True)
    )
    return total / sum(y.size for y in ys)


def gradients(model: nn.Module) -> list[np.ndarray]:
    return [np.zeros(p.shape) if p.grad is None else np.array(p.grad) for p in model.parameters()]


def one_step(model: nn.Module, loss: Any, batch: Any) -> tuple[float, list[np.ndarray]]:
    """The loss that a Trainer reports for a step, and the gradient it went by."""
    model = copy.deepcopy(model)
    trainer = Trainer(model, optim.SGD(model, lr=0.0), loss).fit([batch], steps=1)
    return trainer.history["loss"][0], gradients(model)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from([*FLOAT_LOSSES, "bce"]),
    st.sampled_from([0.0, np.nan, -7.0]),
)
def test_float_losses(lengths: list[int], first: bool, name: str, pad: float) -> None:
    tg.seed(1)
    model = Tagger(batch_first=first, squash=name == "bce")
    loss: Any = nn.bce_loss if name == "bce" else FLOAT_LOSSES[name]
    xs = sequences(lengths)
    ys = [(np.sin(x[:, :1]) + 1) / 2 for x in xs]
    loader = DataLoader(
        SequenceDataset(xs, ys, per_step=True), len(xs), batch_first=first, target_pad_value=pad
    )  # fmt: skip
    batch = next(iter(loader))
    expected = one_by_one(model, xs, ys, loss, first)
    expected.backward()
    value, slopes = one_step(model, loss, batch)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-12)
    for found, wanted in zip(slopes, gradients(model), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(Trainer(model, optim.SGD(model), loss).evaluate(loader), value, rtol=1e-12)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.booleans())
def test_classes_are_what_ignoring_the_padding_gives(lengths: list[int], first: bool) -> None:
    tg.seed(2)
    model = Tagger(3, batch_first=first)
    xs = sequences(lengths)
    ys = [np.arange(len(x)) % 3 for x in xs]
    if len(xs[0]) > 1:
        ys[0][0] = -100  # not to be predicted, though it is no padding
    batch = next(iter(DataLoader(SequenceDataset(xs, ys, per_step=True), len(xs), batch_first=first)))
    expected = nn.cross_entropy(model(batch.inputs, lengths=batch.lengths), batch.targets)
    expected.backward()
    value, slopes = one_step(model, nn.cross_entropy, batch)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-12)
    for found, wanted in zip(slopes, gradients(model), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_the_padding_of_integers_is_no_number() -> None:
    xs = sequences([4, 2])
    ys = [np.arange(len(x))[:, None] for x in xs]
    batch = next(iter(DataLoader(SequenceDataset(xs, ys), 2)))
    assert batch.targets.min() == -100
    model = Tagger()
    expected = one_by_one(model, xs, ys, nn.mse_loss, False)
    np.testing.assert_allclose(one_step(model, nn.mse_loss, batch)[0], expected.item(), rtol=1e-12)


def test_the_mean_over_batches_counts_real_steps() -> None:
    xs = sequences([1, 4, 2, 2, 5])
    ys = [x[:, :1] for x in xs]
    model = Tagger()
    found = Trainer(model, optim.SGD(model), nn.mse_loss).evaluate(DataLoader(SequenceDataset(xs, ys), 2))
    np.testing.assert_allclose(found, one_by_one(model, xs, ys, nn.mse_loss, False).item(), rtol=1e-12)


def test_what_a_loss_sees() -> None:
    seen: list[Any] = []

    def loss(output: Any, targets: Any) -> Any:
        seen.append((output.shape, targets[..., 0].reshape(-1).tolist()))
        return nn.mse_loss(output, targets)

    xs = [np.full((n, 2), float(10 * n)) + np.arange(n)[:, None] for n in (1, 3, 2, 2)]
    loader = DataLoader(SequenceDataset(xs, [x[:, :1] for x in xs]), 2)
    model = Tagger()
    Trainer(model, optim.SGD(model), loss).fit(loader, epochs=1)
    # The steps in their order, at each of them the sequences that have it; whole arrays where nothing is padded.
    assert seen == [((4, 1), [10.0, 30.0, 31.0, 32.0]), ((2, 2, 1), [20.0, 20.0, 21.0, 21.0])]


def test_trees_of_outputs_and_targets_and_joined_axes() -> None:
    x, lengths = np.zeros((4, 3, 2)), np.array([4, 1, 2])
    y = np.arange(12.0).reshape(4, 3)

    class Two(Tagger):
        def forward(self, x: Any, lengths: Any = None) -> Any:
            out = super().forward(x, lengths)
            return {"steps": out[..., 0], "rows": out.reshape(-1, 1), "whole": out[-1]}

    def loss(output: Any, targets: Any) -> Any:
        shapes.append([*(output[key].shape for key in output), *(t.shape for t in targets)])
        return sum(ops.mean(output[key]) for key in output)

    shapes: list[Any] = []
    one_step(Two(), loss, (x, (y, y[0]), lengths))
    assert shapes == [[(7,), (7, 1), (3, 1), (7,), (3,)]]


def test_padding_beyond_the_longest_sequence() -> None:
    # Batches that a loader pads to one size for all.
    xs = sequences([3, 3])
    ys = [x[:, :1] for x in xs]
    x, y = np.full((5, 2, 2), 9.0), np.zeros((5, 2, 1))
    x[:3], y[:3] = np.stack(xs, 1), np.stack(ys, 1)
    model = Tagger()
    expected = one_by_one(model, xs, ys, nn.mse_loss, False)
    np.testing.assert_allclose(one_step(model, nn.mse_loss, (x, y, [3, 3]))[0], expected.item(), rtol=1e-12)


def test_as_many_steps_as_sequences() -> None:
    x, y, lengths = np.zeros((3, 3, 2)), np.zeros((3, 3)), np.array([2, 1, 3])
    time_first = [[True, True, True], [True, False, True], [False, False, True]]
    batch_first = np.transpose(time_first).tolist()
    plain, wide = (x, y, lengths), Tagger(batch_first=True)
    assert unpack(plain, Tagger()).mask.tolist() == time_first  # type: ignore[union-attr]
    assert unpack(plain, wide).mask.tolist() == batch_first  # type: ignore[union-attr]
    assert unpack(Batch(*plain, batch_first=False), wide).mask.tolist() == time_first  # type: ignore[union-attr]
    assert unpack(Batch(*plain, batch_first=True), None).mask.tolist() == batch_first  # type: ignore[union-attr]
    one_each = unpack(Batch(*plain, per_step=False), Tagger())
    assert one_each.mask is None and one_each.weight == 3


def test_vectors_as_long_as_the_batch_are_no_steps() -> None:
    lengths = np.array([4, 2])
    assert unpack((np.zeros((4, 2, 5)), np.zeros((2, 4)), lengths)).mask is None
    assert unpack((np.zeros((2, 4, 5)), np.zeros((4, 2)), lengths)).mask.shape == (4, 2)  # type: ignore[union-attr]
    xs = sequences([4, 2])
    one_each = next(iter(DataLoader(SequenceDataset(xs, np.zeros((2, 4))), 2, batch_first=True)))
    assert unpack(one_each).mask is None and unpack(one_each).weight == 2


def test_inputs_in_a_tree_beside_arrays_without_steps() -> None:
    # An initial state (layers, B, units) and numbers for each sequence (B, numbers) are shorter than the sequences.
    inputs = {"state": np.zeros((1, 3, 6)), "about": np.zeros((3, 2)), "x": np.zeros((4, 3, 2))}
    found = unpack((inputs, np.zeros((4, 3)), [4, 2, 1]))
    assert found.mask.shape == (4, 3) and found.weight == 7  # type: ignore[union-attr]
    assert unpack((inputs, np.zeros((1, 3)), [4, 2, 1])).mask is None


def test_an_output_that_has_no_steps() -> None:
    class Last(Tagger):
        def forward(self, x: Any, lengths: Any = None) -> Any:
            return super().forward(x, lengths)[-1]

    xs = sequences([4, 2, 1])
    batch = next(iter(DataLoader(SequenceDataset(xs, [x[:, :1] for x in xs]), 3)))
    with pytest.raises(tg.ShapeError, match=r"output has shape \(3, 1\); expected \(4, 3, \.\.\.\)"):
        one_step(Last(), nn.mse_loss, batch)


def test_a_batch_is_a_tuple_of_three_and_keeps_what_it_says() -> None:
    xs = sequences([2, 1])
    batch = next(iter(DataLoader(SequenceDataset(xs, [x[:, :1] for x in xs]), 2, batch_first=True)))
    inputs, targets, lengths = batch
    assert inputs.shape == (2, 2, 2) and targets.shape == (2, 2, 1) and lengths.tolist() == [2, 1]
    assert batch.mask.tolist() == [[True, True], [True, False]]
    np.testing.assert_array_equal(targets[batch.mask], np.concatenate([x[:, :1] for x in xs]))
    for other in (pickle.loads(pickle.dumps(batch)), copy.copy(batch)):
        assert (other.per_step, other.batch_first) == (True, True) and isinstance(other, Batch)


@pytest.mark.parametrize("lengths", [[3], [4] * 5, [5, 6], [2, 2, 2]])
def test_lengths_that_fit_no_axis_of_the_batch_are_refused(lengths):
    with pytest.raises(tg.ShapeError, match=f"a batch has {len(lengths)} lengths of up to .* inputs of 5 x 2"):
        unpack((np.zeros((5, 2, 3)), np.zeros((5, 2, 3)), lengths))
