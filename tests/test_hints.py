"""Names that do not exist: what the message points to."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import hints, nn

MODULES = {place: importlib.import_module(f"tinygrad_lstm.{place}" if place else "tinygrad_lstm") for place in (
    "", "ops", "nn", "nn.init", "optim", "data", "training", "inspect", "interop"
)}  # fmt: skip
HINTS = {
    ("", "graad"): "did you mean tg.grad",
    ("", "Tensr"): "did you mean tg.Tensor",
    ("", "zeros"): r"tg.tensor\(np.zeros",
    ("", "randn"): "default_rng",
    ("", "from_numpy"): "tg.asarray",
    ("", "Variable"): "requires_grad=True",
    ("", "cat"): "use ops.concatenate",
    ("", "LSTM"): "it is nn.LSTM",
    ("nn", "ReLU"): "use ops.relu, a function, which nn.Sequential takes",
    ("nn", "Relu"): "use ops.relu",
    ("nn", "ModuleList"): "a plain list of modules",
    ("nn", "functional"): "use ops",
    ("nn", "CrossEntropyLoss"): "use nn.cross_entropy",
    ("nn", "lstm"): "did you mean nn.LSTM",
    ("nn", "relu"): "it is ops.relu",
    ("nn.init", "xavier_uniform_"): "did you mean nn.init.xavier_uniform",
    ("optim", "lr_scheduler"): "optim.StepLR",
    ("optim", "clip_grad_norm_"): "did you mean optim.clip_grad_norm",
    ("ops", "mul"): "use ops.multiply",
    ("ops", "permute"): "use ops.transpose",
    ("ops", "softmax_cross_entropy"): "use nn.cross_entropy",
    ("ops", "sigmod"): "did you mean ops.sigmoid",
    ("data", "Dataloader"): "did you mean data.DataLoader",
    ("training", "Trainr"): "did you mean training.Trainer",
    ("inspect", "equation"): "did you mean inspect.equations",
    ("interop", "from_onx"): "did you mean interop.from_onnx",
}


@pytest.mark.parametrize(("place", "name"), HINTS, ids=lambda part: part or "tg")
def test_a_missing_name_says_what_was_meant(place, name):
    assert not hasattr(MODULES[place], name)
    with pytest.raises(AttributeError, match=f"has no attribute {name!r}; .*{HINTS[place, name]}") as caught:
        getattr(MODULES[place], name)
    assert isinstance(caught.value, tg.Error)


def test_names_of_nothing():
    for module in MODULES.values():
        with pytest.raises(AttributeError, match=r"has no attribute '__qqq__'$"):
            module.__qqq__  # noqa: B018
        with pytest.raises(AttributeError, match=r"has no attribute 'qqqqqqqq'$"):
            module.qqqqqqqq  # noqa: B018


def test_what_a_hint_names_exists():
    for place, table in hints._TORCH.items():
        for name, text in table.items():
            assert not hasattr(MODULES[place], name), f"{place}.{name} exists; it needs no hint"
            for word in text.replace("(", " ").replace(",", " ").replace(":", " ").split():
                where, _, last = word.rpartition(".")
                if where in ("tg", "ops", "nn", "optim"):
                    assert last == "" or hasattr(MODULES["" if where == "tg" else where], last), word


def test_a_probe_imports_nothing():
    code = (
        "import sys, tinygrad_lstm as tg; assert not hasattr(tg, 'cat'); "
        "assert not {'tinygrad_lstm.nn', 'difflib'} & sys.modules.keys(); assert tg.nn and tg.data.DataLoader"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_parts_of_a_sequence_that_are_none():
    with pytest.raises(tg.DTypeError, match=r"part 1 is the class Dropout, .*make one: Dropout\(\.\.\.\)"):
        nn.Sequential(nn.Linear(2, 3), nn.Dropout)
    with pytest.raises(tg.DTypeError, match=r"part 0 is a list, .*write Sequential\(\*parts\)"):
        nn.Sequential([nn.Linear(2, 3)])
