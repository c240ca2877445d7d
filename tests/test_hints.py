"""Names that do not exist: what the message points to."""

from __future__ import annotations

import copy
import importlib
import pickle
import re
import subprocess
import sys
from typing import Any

import numpy as np
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
    ("", "vmap"): "one more axis in front",
    ("", "jacrev"): "use tg.jacobian",
    ("", "lax"): "use ops.scan",
    ("", "functional_call"): "functions of a Module",
    ("optim", "LambdaLR"): r"optim\.Schedule with next_rate",
    ("ops", "fori_loop"): r"ops\.scan with xs=None",
    ("ops", "while_loop"): r"ops\.scan over the most steps",
    ("ops", "log_sigmoid"): r"use -ops\.softplus\(-x\)",
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


# ---------------------------------------------------------------------------- attributes of objects


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(2, 3)

    @property
    def broken(self) -> int:
        return self.encoder.wieght


ATTRIBUTES = {
    ("t", "view"): r"use t\.reshape\(shape\)$",
    ("t", "unsqueeze"): r"use t\.expand_dims\(axis\)$",
    ("t", "permute"): r"use t\.transpose\(axes\)$",
    ("t", "to"): r"use t\.astype\(dtype\)",
    ("t", "cpu"): "all runs on the CPU",
    ("t", "float"): r"use t\.astype\(np\.float32\)$",
    ("t", "mm"): "use t @ other$",
    ("t", "t"): r"use t\.T$",
    ("t", "contiguous"): "use t itself",
    ("t", "expand"): r"use t\.broadcast_to\(shape\)$",
    ("t", "pow"): r"use t \*\* exponent$",
    ("t", "masked_fill"): r"use ops\.where\(mask, value, t\)$",
    ("t", "gather"): r"use ops\.take_along_axis\(t, index, axis\)$",
    ("t", "requires_grad_"): "use t.requires_grad = True$",
    ("t", "at"): r"use ops\.scatter_add\(t, index, value\)",
    ("t", "dim"): r"use t\.ndim$",
    ("t", "numel"): r"use t\.size$",
    ("t", "clone"): r"tg\.tensor\(t\)",
    ("t", "sin"): r"use ops\.sin$",
    ("t", "clamp"): r"use ops\.clip$",
    ("layer", "cuda"): "all runs on the CPU",
    ("layer", "weight_ih_l9"): "did you mean 'weight_ih_l0'",
    ("layer", "hiden_size"): "did you mean 'hidden_size'",
    ("p", "view"): r"'Parameter' object has no attribute 'view'; use t\.reshape",
    ("net", "cuda"): "all runs on the CPU",
    ("net", "to"): r"use module\.astype\(dtype\)",
    ("net", "half"): r"use module\.astype\(np\.float16\)$",
    ("net", "apply"): r"for part in module\.modules\(\): f\(part\)$",
    ("net", "register_buffer"): r"self\.name = tg\.tensor\(array\)",
    ("net", "register_parameter"): r"self\.name = nn\.Parameter\(array\)$",
    ("net", "add_module"): r"self\.name = module$",
    ("net", "requires_grad_"): r"p\.requires_grad = False$",
}


def objects() -> dict[str, Any]:
    return {"t": tg.tensor([[1.0, 2.0]]), "p": nn.Parameter([1.0]), "net": Net(), "layer": nn.LSTM(2, 3)}


@pytest.mark.parametrize(("which", "name"), ATTRIBUTES)
def test_a_missing_attribute_says_what_was_meant(which, name):
    value = objects()[which]
    assert not hasattr(value, name)
    assert getattr(value, name, 5) == 5
    with pytest.raises(AttributeError, match=f"object has no attribute {name!r}; .*") as caught:
        getattr(value, name)
    assert isinstance(caught.value, tg.Error) and re.search(ATTRIBUTES[which, name], str(caught.value))


def test_what_a_hint_of_an_attribute_names_exists():
    there = {"t": tg.Tensor, "module": nn.Module, "ops": tg.ops, "nn": nn, "tg": tg, "np": np}
    for kind, table in hints._ATTRIBUTES.items():
        cls = {"Tensor": tg.Tensor, "Module": nn.Module}[kind]
        for name, text in table.items():
            assert not hasattr(cls, name), f"{kind}.{name} exists; it needs no hint"
            for where, last in re.findall(r"\b(t|module|ops|nn|tg|np)\.(\w+)", text):
                assert hasattr(there[where], last), text


def test_attributes_that_are_nothing_or_private_have_no_hint():
    for value in objects().values():
        for name in ("qqqqqqqq", "_hidden", "__array_struct__"):
            with pytest.raises(AttributeError, match=f"has no attribute '{name}'$"):
                getattr(value, name)


def test_a_layer_that_is_not_made_yet():
    with pytest.raises(AttributeError, match="'LSTM' object has no attribute 'cuda'; use nothing"):
        nn.LSTM.__new__(nn.LSTM).cuda()


def test_a_subclass_has_its_own_way_with_attributes():
    class Delegating(Net):
        def __getattr__(self, name: str) -> Any:
            if name == "seven":
                return 7
            raise AttributeError(name)

    net = Delegating()
    assert net.seven == 7 and not hasattr(net, "eight") and not hasattr(net, "cuda")


def test_an_attribute_of_ones_own_comes_before_a_hint():
    net = Net()
    net.to = nn.Linear(2, 2)
    assert net.to is dict(net.named_modules())["to"] if hasattr(net, "named_modules") else net.to is not None
    assert "to.weight" in net.state_dict()

    class Half(Net):
        def half(self) -> int:
            return 5

    assert Half().half() == 5


def test_attributes_are_found_without_a_detour():
    """With __getattr__ in the class, CPython would look up every attribute more slowly."""
    for cls in (tg.Tensor, nn.Module, nn.Linear, nn.Parameter):
        assert not hasattr(cls, "__getattr__")


def test_copies_pickles_and_arrays_are_as_before():
    for value in objects().values():
        for twin in (copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
            assert type(twin) is type(value)
    t = objects()["t"]
    assert np.asarray(t) is t.data and np.array([t.data[0], t.data[0]]).shape == (2, 2)
    assert (np.ones((1, 2)) * t).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        ({}, "pip install 'tinygrad-lstm[onnx]'"),
        ({"url": "file:///src/tg%20lstm", "dir_info": {}}, "pip install '.[onnx]' in /src/tg lstm"),
        (
            {"url": "https://example.org/tg.git", "vcs_info": {"vcs": "git", "commit_id": "0"}},
            "pip install 'tinygrad-lstm[onnx] @ git+https://example.org/tg.git'",
        ),
        (
            {"url": "https://example.org/tg-1.whl", "archive_info": {}},
            "pip install 'tinygrad-lstm[onnx] @ https://example.org/tg-1.whl'",
        ),
    ],
)
def test_how_to_install_an_extra(origin, command, tmp_path):
    assert hints._install_command("onnx", tmp_path, origin) == command
    (tmp_path / "pyproject.toml").touch()
    assert hints._install_command("onnx", tmp_path, origin) == f"pip install -e '.[onnx]' in {tmp_path}"


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
