"""The training loop: what it computes, when it validates and stops, and that resuming changes nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops, optim
from tinygrad_lstm.data import DataLoader, SequenceDataset, TextStreams
from tinygrad_lstm.errors import ArgumentError
from tinygrad_lstm.training import Callback, CharLM, Constant, DivergedError, ProgressBar, Trainer, WarmupCosine
from tinygrad_lstm.training.batches import unpack


class Linear(nn.Module):
    """y = x w, so that every expected number can be worked out by hand."""

    def __init__(self, w: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(np.array([w]))

    def forward(self, x: Any) -> Any:
        return x * self.w


def line(n: int = 4, slope: float = 2.0) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.array([1.0]), np.array([slope])) for _ in range(n)]


def trainer_for(model: nn.Module, lr: float = 0.25, **how: Any) -> Trainer:
    return Trainer(model, optim.SGD(model.parameters(), lr=lr), nn.mse_loss, **how)


# -- what a step does ----------------------------------------------------------------------------------


def test_steps_are_gradient_descent() -> None:
    model = Linear()
    trainer = trainer_for(model).fit(line(), steps=3)
    # d/dw (w - 2)^2 = 2 (w - 2): each step of .25 halves the distance.
    assert model.w.data.tolist() == [2 - 2 / 8]
    assert trainer.history["loss"] == [4.0, 1.0, 0.25]
    assert trainer.history["step"] == [1, 2, 3] and trainer.history["lr"] == [0.25] * 3
    assert trainer.stop_reason == "complete" and trainer.step == trainer.total == 3


def test_clipping_and_schedule() -> None:
    model = Linear()
    trainer = trainer_for(model, lr=0.5, clip_norm=1.0, schedule=lambda step, total: (step + 1) / total)
    trainer.fit(line(), steps=4)
    # Gradients 4, then -> clipped to 1 while the distance is above .5.
    np.testing.assert_allclose(trainer.history["lr"], [0.125, 0.25, 0.375, 0.5])
    np.testing.assert_allclose(trainer.history["grad_norm"][:2], [4.0, 3.75])
    np.testing.assert_allclose(model.w.data, [0.125 + 0.25 + 0.375 + 0.5], rtol=1e-5)


def test_epochs_are_counted_and_the_total_is_fixed() -> None:
    trainer = trainer_for(Linear()).fit(line(3), epochs=2)
    assert trainer.total == 6 and trainer.epoch == 2
    assert trainer.history["epoch"] == [0, 0, 0, 1, 1, 1]


def test_every_step_sees_the_schedule_with_the_same_total() -> None:
    seen: list[tuple[int, int]] = []

    def schedule(step: int, total: int) -> float:
        seen.append((step, total))
        return 1.0

    trainer = trainer_for(Linear(), schedule=schedule)
    trainer.fit(line(), steps=5, time_limit=1e-9)
    assert trainer.step == 1 and trainer.stop_reason == "time limit"
    trainer.fit(line())
    assert seen == [(n, 5) for n in range(5)]


def test_evaluation_is_weighted_and_leaves_the_model_alone() -> None:
    model = Linear(1.0)
    trainer = trainer_for(model)
    batches = [(np.ones(3), np.full(3, 2.0)), (np.ones(1), np.full(1, 5.0))]
    assert trainer.evaluate(batches) == (3 * 1.0 + 1 * 16.0) / 4
    model.train()
    trainer.evaluate(batches)
    assert model.training
    model.eval()
    trainer.evaluate(batches)
    assert not model.training and model.w.grad is None
    with pytest.raises(ArgumentError, match="no batches"):
        trainer.evaluate([])


def test_weights_of_batches() -> None:
    lengths, time_first, batch_first = np.array([5, 2, 1]), np.zeros((5, 3, 2)), np.zeros((3, 5, 2))
    assert unpack((time_first, np.zeros((5, 3)), lengths)).weight == 8
    assert unpack((batch_first, np.zeros((3, 5, 2)), lengths)).weight == 8
    assert unpack((time_first, np.zeros(3), lengths)).weight == 3
    assert unpack((time_first, np.zeros((4, 3)))).weight == 12


def test_predict() -> None:
    trainer = trainer_for(Linear(3.0))
    found = trainer.predict(np.array([1.0, 2.0]))
    assert isinstance(found, np.ndarray) and found.tolist() == [3.0, 6.0]
    assert [p.tolist() for p in trainer.predict(line(2))] == [[3.0], [3.0]]


def test_lengths_reach_the_model_only_where_they_differ() -> None:
    class Spy(Linear):
        def forward(self, x: Any, lengths: Any = None) -> Any:
            seen.append(None if lengths is None else lengths.tolist())
            return ops.sum(x * self.w, axis=(0, 2))

    seen: list[Any] = []
    data = SequenceDataset([np.ones((t, 1)) for t in (2, 2, 3, 1)], np.zeros(4))
    trainer_for(Spy()).fit(DataLoader(data, 2), epochs=1)
    assert seen == [None, [3, 1]]


def test_wrong_arguments() -> None:
    trainer = trainer_for(Linear())
    with pytest.raises(ArgumentError, match=r"steps=\.\.\. or epochs"):
        trainer.fit(line())
    with pytest.raises(ArgumentError, match="not both"):
        trainer.fit(line(), steps=1, epochs=1)
    with pytest.raises(ArgumentError, match="steps is at least 1, found 0"):
        trainer.fit(line(), steps=0)
    with pytest.raises(ArgumentError, match="no batches"):
        trainer.fit([], steps=1)
    with pytest.raises(ArgumentError, match="a batch is"):
        trainer.fit([np.ones(3)], steps=1)
    with pytest.raises(ArgumentError, match="clip_norm"):
        trainer_for(Linear(), clip_norm=0.0)
    with pytest.raises(ArgumentError, match="no parameters are the best"):
        trainer_for(Linear()).load_best()


def no_len() -> Any:
    class Endless:
        def __iter__(self) -> Any:
            return iter(line())

    return Endless()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"batches": None}, "batches are an iterable of batches, found a NoneType"),
        ({"batches": (batch for batch in line())}, "a generator, which can be gone through only once"),
        ({"batches": no_len()}, "Endless without a length"),
        ({"validation": (batch for batch in line())}, "validation batches are a generator"),
        ({"validation": 3}, "validation batches are an iterable"),
        ({"steps": 2.5}, r"steps is an int, found 2\.5"),
        ({"steps": None, "epochs": 1.5}, r"epochs is an int, found 1\.5"),
        ({"validate_every": 0}, "validate_every is at least 1, found 0"),
        ({"checkpoint_every": -1}, "checkpoint_every is at least 1, found -1"),
        ({"time_limit": -1}, "time_limit is a number of seconds, at least 0, found -1"),
        ({"time_limit": "1 h"}, "time_limit is a number, found '1 h'"),
        ({"patience": 0, "validation": line(1)}, "patience is at least 1, found 0"),
        ({"patience": 3}, "patience=3 counts validations, but there are no validation batches"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_fit_refuses(how: dict[str, Any], message: str) -> None:
    model = Linear()
    arguments = {"batches": line(), "steps": 2, **how}
    with pytest.raises(tg.Error, match="Trainer.fit: .*" + message):
        trainer_for(model).fit(arguments.pop("batches"), **arguments)
    assert model.w.data.tolist() == [0.0]


def test_what_a_trainer_is_not_made_of() -> None:
    model = Linear()
    sgd = optim.SGD(model)
    for make, message in (
        (lambda: Trainer(None, sgd, nn.mse_loss), "the model is a Module, found a NoneType"),
        (lambda: Trainer(model, None, nn.mse_loss), "the optimizer is one of tg.optim, found a NoneType"),
        (lambda: Trainer(model, sgd, None), "the loss is a function .*, found a NoneType"),
        (lambda: Trainer(model, sgd, nn.mse_loss, schedule=0.1), "the schedule is .*, found a float"),
        (lambda: Trainer(model, sgd, nn.mse_loss, clip_norm="a"), "clip_norm is a number, found 'a'"),
        (lambda: Trainer(model, sgd, nn.mse_loss, callbacks=3), "callbacks are a list, found a int"),
        (lambda: Trainer(model, optim.LBFGS(model), nn.mse_loss), "LBFGS .*closure"),
    ):
        with pytest.raises(tg.Error, match="Trainer: .*" + message):
            make()


def test_an_optimizer_or_a_schedule_of_something_else() -> None:
    model, other = nn.Linear(1, 2), Linear()
    with pytest.raises(ArgumentError, match=r"none of the 1 parameters of the SGD .*Linear: weight, bias.*model.param"):
        Trainer(model, optim.SGD(other, lr=0.1), nn.mse_loss)
    model.bias = nn.Parameter(np.zeros(2))  # some of them suffice: the others are frozen, or of the loss
    Trainer(model, optim.SGD([model.weight, *other.parameters()], lr=0.1), nn.mse_loss)
    mine, another = (optim.SGD(other, lr=0.1) for _ in range(2))
    with pytest.raises(ArgumentError, match="the StepLR was made for another optimizer"):
        Trainer(other, mine, nn.mse_loss, schedule=optim.StepLR(another, 1))

    class WithWeight(Linear):
        def forward(self, output: Any, target: Any) -> Any:
            return nn.mse_loss(output, target) * self.w

    Trainer(other, optim.SGD(loss := WithWeight(), lr=0.1), loss)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda out, y: None, tg.DTypeError, "the loss is a NoneType, expected a scalar Tensor; it returned nothing"),
        (lambda out, y: 0.5, tg.DTypeError, "the loss is a float, .*with ops"),
        (lambda out, y: np.mean(out.numpy()), tg.DTypeError, "the loss is a float64, .*without .numpy"),
        (lambda out, y: (out.sum(), 1), tg.DTypeError, "the loss is a tuple"),
        (lambda out, y: ops.stack([out, out]), tg.ShapeError, r"the loss has shape \(2, 1\), .*reduce"),
    ],
)
def test_losses_that_are_no_scalar(loss: Any, error: type[Exception], message: str) -> None:
    model = Linear()
    trainer = Trainer(model, optim.SGD(model, lr=0.1), loss)
    for run in (lambda: trainer.fit(line(), steps=1), lambda: trainer.evaluate(line())):
        with pytest.raises(error, match=message):
            run()


def test_a_plateau_is_stepped_with_the_validation_loss() -> None:
    class Still(Linear):
        def forward(self, x: Any) -> Any:
            return ops.stop_gradient(super().forward(x)) + 0.0 * self.w

    def made() -> Trainer:
        model = Still(1.0)
        optimizer = optim.SGD(model, lr=0.5)
        return Trainer(
            model, optimizer, nn.mse_loss, schedule=optim.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
        )

    trainer = made().fit(line(), steps=6, validation=line(1), validate_every=2)
    # The loss stays 1: after the first validation each one lowers the rate of the steps after it.
    np.testing.assert_allclose(trainer.history["lr"], [0.5, 0.5, 0.5, 0.5, 0.05, 0.05])
    np.testing.assert_allclose(trainer.optimizer.lr, 0.005)
    assert trainer.schedule.best == 1.0
    with pytest.raises(tg.ArgumentError, match=r"ReduceLROnPlateau .*no validation batches"):
        made().fit(line(), steps=6)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.RNN])
def test_divergence_is_said_once(layer: Any) -> None:
    """By the error: NumPy's warnings of overflow, which are errors in these tests, do not come before it."""
    model = nn.Sequential(layer(2, 3, dtype=np.float64), nn.Linear(3, 1, dtype=np.float64))
    trainer = Trainer(model, optim.SGD(model, lr=1e200), nn.mse_loss)
    with pytest.raises(DivergedError, match=r"the loss is (inf|nan) at step"):
        trainer.fit([(np.ones((4, 5, 2)), np.zeros((4, 5, 1)))], steps=20)


def test_divergence_is_noticed_before_the_step(tmp_path: Path) -> None:
    model = Linear(1.0)
    bad = [(np.array([1.0]), np.array([2.0])), (np.array([math.inf]), np.array([2.0]))]
    trainer = trainer_for(model)
    with pytest.raises(DivergedError, match="the loss is inf at step 1"):
        trainer.fit(bad, steps=4, checkpoint=tmp_path / "c", checkpoint_every=100)
    assert model.w.data.tolist() == [1.5] and not (tmp_path / "c").exists()


# -- truncated BPTT ------------------------------------------------------------------------------------


def test_the_state_is_carried_detached_and_dropped_at_an_epochs_start() -> None:
    class Counter(nn.Module):
        """Its state is the number of batches since it began, as a Tensor that depends on w."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(np.array([1.0]))

        def forward(self, x: Any, state: Any = None) -> Any:
            seen.append(0.0 if state is None else float(state.numpy()[0]))
            if state is not None:
                assert not state.requires_grad
            new = self.w * 0 + 1 + (0 if state is None else state)
            return x * self.w, new

    seen: list[float] = []
    trainer_for(Counter(), lr=0.0, carry_state=True).fit(line(3), epochs=2)
    assert seen == [0, 1, 2, 0, 1, 2]


def test_truncated_bptt_of_a_language_model_equals_a_hand_written_loop() -> None:
    ids = np.random.default_rng(0).integers(0, 5, 200)
    streams = TextStreams(ids, 3, 7)

    def make() -> CharLM:
        tg.seed(3)
        return CharLM(5, hidden=6, layers=2, embedding=4)

    model = make()
    Trainer(
        model, optim.Adam(model.parameters(), lr=0.01), nn.cross_entropy, clip_norm=0.5, carry_state=True
    ).fit(streams, steps=12)  # fmt: skip
    other = make()
    adam = optim.Adam(other.parameters(), lr=0.01)
    step, state = 0, None
    while step < 12:
        state = None
        for inputs, targets in TextStreams(ids, 3, 7):
            adam.zero_grad()
            logits, state = other(inputs, state)
            nn.cross_entropy(logits, targets).backward()
            optim.clip_grad_norm(other.parameters(), 0.5)
            adam.step()
            state = tuple(s.detach() for s in state)
            step += 1
            if step == 12:
                break
    for name, array in model.state_dict().items():
        assert np.array_equal(array, other.state_dict()[name]), name


# -- validation, early stopping, callbacks -----------------------------------------------------------------


class Recorder(Callback):
    def __init__(self, stop_at: int | None = None) -> None:
        self.events: list[Any] = []
        self.stop_at = stop_at

    def on_start(self, trainer: Trainer) -> None:
        self.events.append("start")

    def on_step(self, trainer: Trainer, row: dict[str, float]) -> None:
        self.events.append(row["step"])
        if row["step"] == self.stop_at:
            trainer.stop("enough")

    def on_validation(self, trainer: Trainer, value: float, is_best: bool) -> None:
        self.events.append(("validation", is_best))

    def on_end(self, trainer: Trainer) -> None:
        self.events.append("end")


def test_callbacks_and_validation_come_in_order() -> None:
    recorder = Recorder()
    trainer = trainer_for(Linear(), callbacks=[recorder])
    trainer.fit(line(), steps=3, validation=line(1), validate_every=2)
    assert recorder.events == ["start", 1, ("validation", True), 2, ("validation", True), 3, "end"]
    assert trainer.validations == {"step": [2, 3], "loss": [0.25, 0.0625]}


def test_early_stopping_keeps_the_best() -> None:
    model = Linear(2.0)  # the training data pull it away from what validation wants
    trainer = trainer_for(model)
    trainer.fit(line(slope=6.0), steps=100, validation=line(1), validate_every=1, patience=3)
    assert trainer.stop_reason == "early stopping" and trainer.step == 4
    assert trainer.best is not None and trainer.best["step"] == 1
    trainer.load_best()
    assert model.w.data.tolist() == [4.0]
    trainer.fit(line(slope=6.0))  # this run is over
    assert trainer.step == 4 and model.w.data.tolist() == [4.0]


def test_a_callback_stops_the_run_and_on_end_always_comes() -> None:
    recorder = Recorder(stop_at=2)
    trainer = trainer_for(Linear(), callbacks=[recorder]).fit(line(), steps=9)
    assert trainer.stop_reason == "enough" and recorder.events[-1] == "end" and trainer.step == 2
    with pytest.raises(ArgumentError, match="9 steps in all"):
        trainer.fit(line(), steps=10)

    class Fails(Callback):
        def on_step(self, trainer: Trainer, row: dict[str, float]) -> None:
            raise KeyError("boom")

    recorder = Recorder()
    with pytest.raises(KeyError, match="boom"):
        trainer_for(Linear(), callbacks=[recorder, Fails()]).fit(line(), steps=9)
    assert recorder.events == ["start", 1, "end"]


def test_an_epoch_shorter_than_announced() -> None:
    class Liar(list):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 5

    trainer = trainer_for(Linear()).fit(Liar(line(2)), steps=5)
    assert trainer.history["epoch"] == [0, 0, 1, 1, 2]
    with pytest.raises(ArgumentError, match="came out empty"):
        trainer_for(Linear()).fit(Liar(), steps=5)


def test_progress_bar_shows_loss_and_rate() -> None:
    import io

    out = io.StringIO()
    bar = ProgressBar("tok", 10, lambda loss, trainer: {"twice": f"{2 * loss:.0f}"}, file=out)
    trainer_for(Linear(), callbacks=[bar]).fit(line(), steps=30)
    shown = out.getvalue()
    assert "30/30" in shown and "loss=" in shown and "twice=" in shown


# -- schedules -----------------------------------------------------------------------------------------------


def test_warmup_cosine() -> None:
    schedule = WarmupCosine(warmup=10, floor=0.1)
    rates = [schedule(step, 110) for step in range(110)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert rates[10] == 1.0 and math.isclose(rates[-1], 0.1)
    np.testing.assert_allclose(rates[10:], 0.1 + 0.45 * (1 + np.cos(np.pi * np.arange(100) / 99)))
    assert all(0 < WarmupCosine(50)(step, 2) <= 1 for step in range(1))
    assert [WarmupCosine()(0, 1), Constant()(5, 9)] == [1.0, 1.0]
    for bad in ({"warmup": -1}, {"floor": 1.5}):
        with pytest.raises(ArgumentError):
            WarmupCosine(**bad)  # type: ignore[arg-type]


def test_any_number_is_better_than_a_validation_that_was_nan() -> None:
    class Told(Trainer):
        losses = iter([math.nan, math.nan, 3.0, math.nan, 2.0, 2.5, 2.5])

        def evaluate(self, batches: Any) -> float:
            return next(self.losses)

    model = Linear(1.0)
    trainer = Told(model, optim.SGD(model.parameters(), lr=0.1), nn.mse_loss)
    trainer.fit(line(), steps=20, validation=line(), validate_every=1, patience=2)
    assert (trainer.step, trainer.stop_reason) == (7, "early stopping")
    assert trainer.best is not None and (trainer.best["step"], trainer.best["loss"]) == (5, 2.0)
