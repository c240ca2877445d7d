"""What a Trainer, a loader or an optimizer says when it is given something that cannot work."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import nn, optim
from tinygrad_lstm.data import DataLoader, SequenceDataset, TextStreams
from tinygrad_lstm.training import Callback, CharLM, Trainer

SEQUENCES = [np.ones((n, 2), np.float32) for n in (3, 3, 1, 2)]
DATA = SequenceDataset(SEQUENCES, [x[:, :1] for x in SEQUENCES])


def trainer(model: nn.Module, loss: Any = nn.mse_loss, **how: Any) -> Trainer:
    return Trainer(model, optim.SGD(model, lr=0.1), loss, **how)


class Spy(Callback):
    pass


class Short(Callback):
    def on_step(self, trainer: Any) -> None:  # type: ignore[override]
        pass


class Epochs(Callback):
    def on_epoch_end(self, trainer: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([print], r"callbacks\[0\] is <built-in function print>, expected an instance .*Callback.*on_step"),
        ([Spy(), object()], r"callbacks\[1\] is <object"),
        ([Spy], r"callbacks\[0\] is the class Spy, expected an instance: Spy\(\.\.\.\)"),
        (Spy(), "callbacks are a list, found a Spy"),
        ("on", "callbacks are a list, found a str"),
        ([Short()], r"^Trainer calls on_step\(trainer, row\); that of Short takes \(trainer\)"),
    ],
)
def test_what_is_no_callback(callbacks: Any, message: str) -> None:
    with pytest.raises(tg.DTypeError, match=message if message.startswith("^") else "Trainer: " + message):
        trainer(nn.Linear(1, 1), callbacks=callbacks)


def test_a_method_of_a_callback_that_nobody_calls() -> None:
    with pytest.warns(UserWarning, match=r"Epochs\.on_epoch_end is never called; .*or on_end; did you mean") as caught:
        trainer(nn.Linear(1, 1), callbacks=[Epochs()])
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (optim.StepLR, r"is the class StepLR, expected one, StepLR\(\.\.\.\)"),
        (lambda step: 1.0, r"Trainer calls schedule\(step, total\); this one takes \(step\)"),
    ],
)
def test_what_is_no_schedule(schedule: Any, message: str) -> None:
    with pytest.raises(tg.DTypeError, match=message):
        trainer(nn.Linear(1, 1), schedule=schedule)


def test_lengths_for_a_model_that_takes_none() -> None:
    model = nn.Sequential(nn.LSTM(2, 3), nn.Linear(3, 1))
    run = trainer(model)
    with pytest.raises(
        tg.DTypeError, match=r"the batches bring lengths.*Sequential\.forward takes none; .*lengths=None"
    ):
        run.fit(DataLoader(DATA, 4), epochs=1)
    assert run.fit(DataLoader(SequenceDataset(SEQUENCES[:2], [x[:, :1] for x in SEQUENCES[:2]]), 2), epochs=1).step == 1


def test_an_error_inside_of_a_forward_stays_what_it_is() -> None:
    class Broken(nn.Linear):
        def forward(self, x: Any, state: Any = None, lengths: Any = None) -> Any:
            raise TypeError("of the forward")

    for how in ({}, {"carry_state": True}):
        with pytest.raises(TypeError, match=r"^of the forward$"):
            trainer(Broken(2, 1), **how).fit(DataLoader(DATA, 4), epochs=1)

    def loss(output: Any, targets: Any) -> Any:
        raise TypeError("of the loss")

    with pytest.raises(TypeError, match=r"^of the loss$"):
        trainer(nn.Linear(2, 1), loss).fit(DataLoader(DATA, 1), epochs=1)


def test_a_state_that_is_returned_but_not_carried() -> None:
    model = CharLM(5, hidden=4)
    streams = TextStreams(np.arange(200) % 5, 3, 7)
    run = trainer(model, nn.cross_entropy)
    for go in (lambda: run.fit(streams, epochs=1), lambda: run.evaluate(streams)):
        with pytest.raises(tg.DTypeError, match=r"returned a tuple of 2, .*Trainer\(\.\.\., carry_state=True\)"):
            go()
    # A loss may take what the model returns.
    assert trainer(model, lambda out, y: nn.cross_entropy(out[0], y)).fit(streams, steps=1).step == 1


def test_a_state_for_a_model_that_has_none() -> None:
    class Alone(nn.Linear):
        def forward(self, x: Any, state: Any = None) -> Any:
            return super().forward(x)  # two rows: not to be taken for a pair

    batches = [(np.ones((2, 2), np.float32), np.ones((2, 1), np.float32))]
    for model, message in (
        (nn.Linear(2, 1), r"carry_state=True calls Linear\.forward\(inputs, state\), which does not take these"),
        (Alone(2, 1), r"carry_state=True expects Alone\.forward to return a pair \(output, state\), found a Tensor"),
    ):
        with pytest.raises(tg.DTypeError, match=message):
            trainer(model, carry_state=True).fit(batches, epochs=1)


def test_lengths_that_are_none() -> None:
    x, y = np.zeros((2, 2, 2), np.float32), np.zeros((2, 2), np.float32)
    for lengths, found in (([1.0, 2.0], "float32 of shape"), ([[1, 2]], r"int64 of shape \(1, 2\)")):
        with pytest.raises(tg.DTypeError, match=f"lengths are integers, one per sequence, found {found}"):
            trainer(nn.Linear(2, 1)).evaluate([(x, y, lengths)])


MISSPELT: dict[str, tuple[Any, str]] = {
    "sgd": (lambda m: optim.SGD(m, lr=0.1, momentm=0.9), r"SGD takes \(params, lr=, .*did you mean 'momentum'\?"),
    "adam": (lambda m: optim.Adam(m, beta=(0.9, 0.99)), r"Adam takes .*did you mean 'betas'\?"),
    "group": (lambda m: optim.SGD([{"params": m.parameters(), "lrr": 1}]), r"SGD: .*'momentum'.*did you mean 'lr'\?"),
    "schedule": (lambda m: optim.StepLR(optim.SGD(m), 1, gama=0.5), r"StepLR takes .*did you mean 'gamma'\?"),
    "trainer": (lambda m: trainer(m, clipnorm=1.0), r"Trainer takes .*did you mean 'clip_norm'\?"),
    "fit": (lambda m: trainer(m).fit([], epoch=2), r"Trainer\.fit takes \(batches, steps=, .*did you mean 'epochs'\?"),
    "loader": (lambda m: DataLoader(DATA, batchsize=2), r"DataLoader takes .*did you mean 'batch_size'\?"),
    "dataset": (lambda m: SequenceDataset([], perstep=True), r"SequenceDataset takes .*did you mean 'per_step'\?"),
    "missing": (lambda m: optim.SGD(), r"SGD takes .*missing a required argument: 'params'"),
}


@pytest.mark.parametrize("case", list(MISSPELT))
def test_misspelt_keywords(case: str) -> None:
    call, message = MISSPELT[case]
    with pytest.raises(tg.Error, match=message):
        call(nn.Linear(1, 1))


def test_an_optimizer_of_ones_own() -> None:
    class Quick(optim.SGD):
        def __init__(self, params: Any, speed: float = 1.0) -> None:
            super().__init__(params, lr=speed)

    with pytest.raises(tg.DTypeError, match=r"Quick takes \(params, speed=\): .*did you mean 'speed'\?"):
        Quick(nn.Linear(1, 1), sped=2.0)  # type: ignore[call-arg]
    assert Quick(nn.Linear(1, 1), speed=2.0).lr == 2.0
    assert list(inspect.signature(Quick).parameters) == ["params", "speed"]
    assert pickle.loads(pickle.dumps(optim.Adam(nn.Linear(1, 1), lr=0.5))).lr == 0.5


@pytest.mark.parametrize(
    ("factor", "error", "message"),
    [
        (None, tg.DTypeError, "factor at step 0 is a number, found None"),
        (np.nan, tg.ArgumentError, "factor at step 0 is nan, expected a finite number"),
    ],
)
def test_a_schedule_that_gives_no_rate(factor: Any, error: type[Exception], message: str) -> None:
    model = nn.Linear(2, 1)
    before = model.state_dict()
    with pytest.raises(error, match=message):
        trainer(model, schedule=lambda step, total: factor).fit(
            [(np.ones((3, 2), np.float32), np.ones((3, 1)))], steps=1
        )
    np.testing.assert_array_equal(model.state_dict()["weight"], before["weight"])


def test_a_run_that_failed_before_its_first_step_fixes_no_total() -> None:
    model = nn.Linear(3, 1)
    trainer = Trainer(model, optim.SGD(model, lr=0.1), nn.mse_loss)
    x = np.ones((4, 3), np.float32)
    with pytest.raises(tg.ShapeError):
        trainer.fit([(x, np.ones((4, 2), np.float32))], epochs=2)
    trainer.fit([(x, np.ones((4, 1), np.float32))] * 3, epochs=2)
    assert trainer.step == trainer.total == 6
