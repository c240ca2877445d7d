"""Resuming: a run that was stopped, or killed, repeats the uninterrupted one bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import nn, optim
from tinygrad_lstm.data import DataLoader, SequenceDataset, TextStreams
from tinygrad_lstm.errors import CheckpointError
from tinygrad_lstm.training import Callback, CharLM, Trainer, WarmupCosine


class StopAt(Callback):
    """Stops after some step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Trainer, row: dict[str, float]) -> None:
        if row["step"] == self.step:
            trainer.stop("enough")


class Linear(nn.Module):
    """y = x w."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(np.zeros(1))

    def forward(self, x: Any) -> Any:
        return x * self.w


def trainer_for(model: nn.Module, **how: Any) -> Trainer:
    return Trainer(model, optim.SGD(model.parameters(), lr=0.25), nn.mse_loss, **how)


def language_run() -> tuple[Trainer, Any, Any]:
    """Dropout, carried state, a schedule, Adam: everything that has a state."""
    ids = np.random.default_rng(1).integers(0, 6, 400)
    tg.seed(11)
    model = CharLM(6, hidden=8, layers=2, embedding=3, dropout=0.3)
    trainer = Trainer(
        model,
        optim.Adam(model.parameters(), lr=0.02),
        nn.cross_entropy,
        schedule=WarmupCosine(5),
        clip_norm=1.0,
        carry_state=True,
    )
    return trainer, TextStreams(ids[:300], 2, 9), TextStreams(ids[300:], 1, 20, drop_last=False)


def shuffled_run() -> tuple[Trainer, Any, Any]:
    """A shuffling loader with the default generator, which dropout uses too; batches of unequal lengths."""
    rng = np.random.default_rng(2)
    sequences = [rng.normal(size=(t, 2)).astype(np.float32) for t in rng.integers(1, 6, 23)]
    data = SequenceDataset(sequences, np.array([s.sum() for s in sequences], np.float32))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.drop, self.out = nn.GRU(2, 5), nn.Dropout(0.2), nn.Linear(5, 1)

        def forward(self, x: Any, lengths: Any = None) -> Any:
            _, h = self.rnn(x, lengths=lengths)
            return self.out(self.drop(h[-1]))[:, 0]

    tg.seed(12)
    model = Net()
    trainer = Trainer(model, optim.SGD(model.parameters(), lr=0.05, momentum=0.9), nn.mse_loss)
    return trainer, DataLoader(data, 4, shuffle=True), DataLoader(data, 8)


def tagging_run() -> tuple[Trainer, Any, Any]:
    """Targets per step of sequences of different lengths."""
    rng = np.random.default_rng(4)
    sequences = [rng.normal(size=(t, 2)).astype(np.float32) for t in rng.integers(1, 6, 23)]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.GRU(2, 5), nn.Linear(5, 1)

        def forward(self, x: Any, lengths: Any = None) -> Any:
            return self.out(self.rnn(x, lengths=lengths)[0])

    tg.seed(13)
    model = Net()
    trainer = Trainer(model, optim.Adam(model.parameters(), lr=0.05), nn.mse_loss)
    data = SequenceDataset(sequences, [np.cumsum(s[:, :1], axis=0) for s in sequences])
    return trainer, DataLoader(data, 4, shuffle=True), DataLoader(data, 8)


def compare(a: Trainer, b: Trainer) -> None:
    """Equal bit for bit, but for the wall clock."""
    for name, array in a.model.state_dict().items():
        assert np.array_equal(array, b.model.state_dict()[name]), name
    for column in set(a.history) - {"seconds"}:
        assert np.array_equal(a.history[column], b.history[column], equal_nan=True), column
    assert a.validations == b.validations
    assert a.best is not None and b.best is not None and a.best["step"] == b.best["step"]


@pytest.mark.parametrize("make", [language_run, shuffled_run, tagging_run])
@pytest.mark.parametrize("stops", [[1], [5, 6], [16], [12, 31]])
def test_a_resumed_run_repeats_the_straight_one(make: Any, stops: list[int], tmp_path: Path) -> None:
    straight, batches, held_out = make()
    straight.fit(batches, steps=40, validation=held_out, validate_every=10)
    path = tmp_path / "run"
    for n, stop in enumerate([*stops, 99]):
        trainer, batches, held_out = make()
        trainer.callbacks.append(StopAt(stop))
        if n > 0:
            tg.seed(1000 + n)  # whatever a new process has drawn before
            trainer.load(path)
        trainer.fit(
            batches,
            steps=40 if n == 0 else None,
            validation=held_out,
            validate_every=10,
            checkpoint=path,
            checkpoint_every=3,
        )
    assert trainer.step == 40
    compare(straight, trainer)


def test_a_checkpoint_in_the_middle_is_as_good_as_a_stop(tmp_path: Path) -> None:
    """A killed process leaves the last regular checkpoint; going on from it repeats what was lost."""
    straight, batches, held_out = language_run()
    straight.fit(batches, steps=40, validation=held_out, validate_every=10)

    class Killed(Callback):
        def on_step(self, trainer: Trainer, row: dict[str, float]) -> None:
            if row["step"] == 23:
                raise KeyboardInterrupt

    killed, batches, held_out = language_run()
    killed.callbacks.append(Killed())
    how: dict[str, Any] = {"validate_every": 10, "checkpoint": tmp_path / "run", "checkpoint_every": 7}
    with pytest.raises(KeyboardInterrupt):
        killed.fit(batches, steps=40, validation=held_out, **how)
    resumed, batches, held_out = language_run()
    resumed.load(tmp_path / "run")
    assert resumed.step == 21
    resumed.fit(batches, validation=held_out, **how)
    compare(straight, resumed)


def test_batches_without_a_state_are_skipped() -> None:
    rng = np.random.default_rng(3)
    data = [(rng.normal(size=2), rng.normal(size=2)) for _ in range(5)]
    straight = trainer_for(Linear()).fit(data, steps=12, validation=data)
    stopped = trainer_for(Linear(), callbacks=[StopAt(7)]).fit(data, steps=12, validation=data)
    resumed = trainer_for(Linear())
    resumed.load_state_dict(stopped.state_dict())
    compare(straight, resumed.fit(data, validation=data))


def test_going_on_in_the_same_process() -> None:
    straight, batches, held_out = shuffled_run()
    straight.fit(batches, steps=20, validation=held_out)
    trainer, batches, held_out = shuffled_run()
    trainer.callbacks.append(StopAt(9))
    trainer.fit(batches, steps=20, validation=held_out)
    assert trainer.step == 9
    trainer.fit(batches, validation=held_out)
    compare(straight, trainer)


def test_a_finished_run_is_followed_by_a_new_one() -> None:
    data = [(np.array([1.0]), np.array([2.0]))]
    trainer = trainer_for(Linear()).fit(data, steps=2)
    trainer.fit(data, steps=3)
    assert trainer.step == 3 and trainer.history["loss"][0] == 0.25


def test_states_of_something_else(tmp_path: Path) -> None:
    trainer = trainer_for(Linear())
    tg.save(tmp_path / "other", [1, 2])
    with pytest.raises(CheckpointError, match="no run of a Trainer"):
        trainer.load(tmp_path / "other")
    for bad in ({}, {"progress": 3}, {"progress": {}}):
        with pytest.raises(CheckpointError, match="no state of a Trainer"):
            trainer.load_state_dict(bad)
    with pytest.raises(FileNotFoundError):
        trainer.load(tmp_path / "none")


def test_a_run_of_another_optimizer_is_refused_with_nothing_changed(tmp_path: Path) -> None:
    tg.seed(3)
    batches = [(np.ones(1), np.array([2.0]))] * 4
    model = Linear()
    saved = Trainer(model, optim.Adam(model, lr=0.1), nn.mse_loss).fit(batches, steps=3)
    saved.save(tmp_path / "adam")
    other = Linear()
    optimizer = optim.SGD(other, lr=0.25, momentum=0.9)
    trainer = Trainer(other, optimizer, nn.mse_loss, schedule=optim.StepLR(optimizer, 1)).fit(batches, steps=2)
    before = str(trainer.state_dict())
    with pytest.raises(tg.Error, match=r"SGD\.load_state_dict: this is the state of another optimizer"):
        trainer.load(tmp_path / "adam")
    assert str(trainer.state_dict()) == before
    trainer.optimizer = optim.Adam(other, lr=0.1)
    before = str(trainer.state_dict())
    with pytest.raises(tg.CheckpointError):  # its schedule is missing: after model and optimizer were loaded
        trainer.load(tmp_path / "adam")
    assert str(trainer.state_dict()) == before


class Peek(Callback):
    """Looks at the training data in between."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def on_step(self, trainer: Trainer, row: dict[str, float]) -> None:
        trainer.predict(self.batches)


@pytest.mark.parametrize("make", [language_run, shuffled_run])
@pytest.mark.parametrize("stop", [2, 4, 7])
def test_validating_on_the_training_data_leaves_their_place(make: Any, stop: int, tmp_path: Path) -> None:
    def run(at: int | None, load: bool = False) -> Trainer:
        trainer, batches, _ = make()
        trainer.callbacks = [Peek(batches), *([] if at is None else [StopAt(at)])]
        if load:
            trainer.load(tmp_path / "run")
        return trainer.fit(
            batches, steps=None if load else 14, validation=batches, validate_every=2, checkpoint=tmp_path / "run"
        )

    straight = run(None)
    assert straight.history["epoch"] == [step // (len(straight.batches)) for step in range(14)]  # type: ignore[arg-type]
    run(stop)
    compare(straight, run(None, load=True))
