"""The commands inspect, gradcheck and bench: what they print and write, and one line for bad input."""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import inspect, nn
from tinygrad_lstm.cli import main
from tinygrad_lstm.cli.subjects import CELLS, LAYERS

TEXT = "".join(f"{n} green bottles hanging on the wall, number {n * n}.\n" for n in range(60))
OWN = """
import numpy as np
import tinygrad_lstm as tg
from tinygrad_lstm import nn, ops


class Cell(nn.Module):
    def __init__(self, inputs, hidden):
        super().__init__()
        self.W, self.U = nn.init.xavier_uniform((hidden, inputs)), nn.init.orthogonal((hidden, hidden))

    def initial_state(self, batch):
        return np.zeros((batch, len(self.U)), self.U.dtype)

    def forward(self, x, h):
        h = tg.name(ops.tanh(x @ self.W.T + h @ self.U.T), "h")
        return h, h


class Raises(Cell):
    def forward(self, x, h):
        raise KeyError("what")


class Three(nn.Module):
    def __init__(self, a, b, c):
        super().__init__()


_slope = tg.REGISTRY.get("off_by_a_percent") or tg.primitive(
    "off_by_a_percent", forward=np.sin, vjp=lambda g, x: 1.01 * g * ops.cos(x)
)


class Wrong(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(np.ones(2))

    def forward(self, x):
        return _slope(x * self.w)


made = Cell(2, 4)
number = 3
"""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> str:
    Path("text.txt").write_text(TEXT)
    small = ["--hidden", "8", "--embedding", "4", "--batch", "4", "--seq-len", "10", "--eval-every", "20"]
    assert main(["train", "--text", "text.txt", *small, "--steps", "3", "--out", "run", "--quiet"]) == 0
    capsys.readouterr()
    return "run"


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith("\n") and err.startswith("tinygrad-lstm"), (out, err)
    return err


def data_of(page: str) -> dict[str, object]:
    return json.loads(re.search(r'id="data">(.*)</script>', Path(page).read_text())[1])  # type: ignore[index]


# -- inspect ---------------------------------------------------------------------------------------------


def test_equations(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "inspect", "gru") == inspect.equations(nn.GRUCell(2, 3)) + "\n"
    text = printed(capsys, "inspect", "lstm", "--rename", "g=a", "--rename", "c=s", "--latex")
    assert text == inspect.equations(nn.LSTMCell(2, 3), latex=True, rename={"g": "a", "c": "s"}) + "\n"
    assert "0:7, 7:14" in printed(capsys, "inspect", "gru", "--hidden", "7", "--input", "5")
    assert printed(capsys, "inspect", "own.py:Cell") == "h_t = tanh(x_t W^T + h_{t-1} U^T)\n"
    assert printed(capsys, "inspect", "own.py:made") == "h_t = tanh(x_t W^T + h_{t-1} U^T)\n"
    for name in (*CELLS, *LAYERS):
        assert " = " in printed(capsys, "inspect", name)


def test_of_a_run(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "inspect", run).startswith("# recurrent.l0: LSTMCell, recurrent.l1: LSTMCell\n")
    out = printed(capsys, "inspect", run, "--player", "p.html", "--draw", "m.svg", "--flow", "--prompt", "green bottle")
    assert out.startswith("wrote m.svg\nwrote p.html\nloss ") and "11 steps" in out and "embedding.weight" in out
    found = data_of("p.html")
    assert found["steps"] == 11 and found["title"] == "run: 11 steps"
    texts = {text.text for text in ET.parse("m.svg").getroot().iter("{http://www.w3.org/2000/svg}text")}
    assert {"tokens", "embedding.weight", "output.bias"} <= texts
    assert "5 steps" in printed(capsys, "inspect", run, "--flow", "--steps", "5")
    # The loss is that of predicting each next character.
    from tinygrad_lstm.training.language_model import load_model

    model, tree = load_model(f"{run}/best.safetensors")
    ids = np.asarray([tree["vocabulary"].index(c) for c in "green bottle"])
    with tg.no_grad():
        expected = nn.cross_entropy(model.eval()(ids[:-1, None])[0], ids[1:, None]).item()
    assert found["loss"] == pytest.approx(expected, rel=1e-3)


def test_drawings_and_pages_of_cells_and_layers(capsys: pytest.CaptureFixture[str]) -> None:
    equation = printed(capsys, "inspect", "own.py:Cell")
    assert printed(capsys, "inspect", "own.py:Cell", "--draw", "a.svg") == f"wrote a.svg\n{equation}"
    renamed = printed(capsys, "inspect", "own.py:Cell", "--draw", "a.svg", "--rename", "h=s", "--latex")
    assert renamed == "wrote a.svg\n" + printed(capsys, "inspect", "own.py:Cell", "--rename", "h=s", "--latex")
    assert printed(capsys, "inspect", "own.py:Wrong", "--draw", "w.svg") == "wrote w.svg\n"  # no cell, no equations
    printed(capsys, "inspect", "own.py:Cell", "--draw", "c.svg", "--player", "c.html", "--steps", "4")
    assert data_of("c.html")["steps"] == 4
    printed(capsys, "inspect", "lstm-layers", "--draw", "l.dot", "--flow")
    assert "scan" in Path("l.dot").read_text()
    first = printed(capsys, "inspect", "lstm", "--flow")
    assert printed(capsys, "inspect", "lstm", "--flow") == first
    assert printed(capsys, "inspect", "lstm", "--flow", "--seed", "1") != first


# -- gradcheck -------------------------------------------------------------------------------------------


def test_the_librarys_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--input", "1", "--hidden", "2", "--steps", "2", "--batch", "1"]
    lines = printed(capsys, "gradcheck", *small).splitlines()
    assert [line.split()[0] for line in lines] == [*CELLS, *LAYERS]
    assert all(line.split()[1] == "ok" for line in lines)
    assert "order 2" in printed(capsys, "gradcheck", "rnn", "own.py:Cell", "--order", "2", *small)


def test_a_wrong_gradient_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gradcheck", "rnn", "own.py:Wrong", "own.py:Cell"]) == 1
    out, err = capsys.readouterr()
    assert [line.split()[1] for line in out.splitlines()] == ["ok", "WRONG", "ok"]
    assert "argument 0['w'], index (0,): analytic gradient" in out
    assert err == "tinygrad-lstm gradcheck: 1 of 3 gradients are wrong: own.py:Wrong\n"


def test_gradients_of_a_run(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "gradcheck", run, "--steps", "2", "--batch", "1").startswith("run            ok ")


# -- bench -----------------------------------------------------------------------------------------------


SMALL = ["--steps", "5", "--batch", "2", "--input", "3", "--hidden", "4", "--rounds", "2"]


def test_bench_reports(capsys: pytest.CaptureFixture[str]) -> None:
    before = tg.get_num_threads()
    out = printed(capsys, "bench", *SMALL, "--threads", "1", "--dtype", "float64")
    assert tg.get_num_threads() == before
    head, step, products, throughput = out.splitlines()
    assert head.startswith("lstm, T=5 B=2 input=3 hidden=4, float64, 1 thread, ")
    ms, low, high, fastest = map(float, re.findall(r"[\d.]+(?:e[+-]\d+)?", step)[:4])
    assert fastest <= low <= ms <= high and "2 rounds" in step
    # 24 T B H (I + H) for a gradient step of an LSTM.
    gflops, mflop = map(float, re.search(r"([\d.e+-]+) GFLOP/s \(([\d.e+-]+) MFLOP", products).groups())  # type: ignore[union-attr]
    assert mflop == pytest.approx(24 * 5 * 2 * 4 * (3 + 4) / 1e6, rel=5e-3)
    assert gflops == pytest.approx(mflop / ms, rel=0.02)
    tokens = float(throughput.split()[1].replace(",", ""))
    assert tokens == pytest.approx(10 / ms * 1e3, rel=0.02)


@pytest.mark.parametrize("what", ["gru", "layer-norm", "zoneout", "rnn-layers", "own.py:Cell"])
def test_bench_of_others(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "tokens/s" in printed(capsys, "bench", what, *SMALL)


def test_bench_of_a_run(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "bench", run, "--steps", "4", "--batch", "2", "--rounds", "2").startswith("run, T=4 B=2, ")


# -- wrong input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["inspect"], "required: WHAT"),
        (["inspect", "lstmm"], "'lstmm' is none of lstm, gru"),
        (["inspect", "layernorm"], "not FILE.py:NAME; did you mean 'layer-norm'?"),
        (
            ["inspect", "own.py"],
            "own.py is Python; name one of its modules: own.py:Cell, own.py:Raises, own.py:Three, ",
        ),
        (["inspect", "lstm", "--rename", "g"], "'g' is not OLD=NEW"),
        (["inspect", "lstm", "--rename", "q=a"], "rename has 'q'; the names are"),
        (["inspect", "lstm", "--rename", "g=i"], "two values would be called 'i'"),
        (["inspect", "lstm", "--draw", "a.xyz"], "'a.xyz' does not end in .svg"),
        (["inspect", "lstm", "--player", "a.svg"], "'a.svg' does not end in .html"),
        (["inspect", "lstm", "--latex", "--flow"], "are for the equations"),
        (["inspect", "lstm", "--prompt", "a"], "--prompt is for the model of a run"),
        (["inspect", "lstm", "--steps", "0", "--flow"], "0 is less than 1"),
        (["inspect", "own.py:Nothing"], "own.py has no 'Nothing'; its modules are Cell, Raises, Three, Wrong"),
        (["inspect", "own.py:Three"], "takes a, b, c"),
        (["inspect", "own.py:number"], "is a int, expected a Module"),
        (["gradcheck", "lstm", "nope"], "'nope' is none of"),
        (["gradcheck", "--order", "3"], "invalid choice"),
        (["bench", "--threads", "0"], "0 is less than 1"),
        (["bench", "lstm", "gru"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert reason in one_line(capsys)
    assert [name for name in os.listdir() if name != "__pycache__"] == ["own.py"]


SINGLE = """
import sys
import numpy as np
from tinygrad_lstm import nn, tensor

class Single(nn.Module):
    def initial_state(self, batch):
        return tensor(np.zeros((batch, 2)))

    def forward(self, x, h):
        return x + h

def exits():
    sys.exit(0)
"""


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["inspect", "no.py:Cell"], "no.py: No such file"),
        (["inspect", "no/folder"], "no/folder: No such file"),
        (["inspect", "."], "a folder without best.safetensors"),
        (["inspect", "text.txt"], "no checkpoint"),
        (["inspect", "bad.py:Cell"], "bad.py cannot be imported: SyntaxError"),
        (["inspect", "exits.py:Cell"], "exits.py cannot be imported: SystemExit: done"),
        (["gradcheck", "exits.py:Cell"], "exits.py cannot be imported: SystemExit: done"),
        (["bench", "single.py:exits"], "single.py:exits cannot be made: SystemExit: 0"),
        (["gradcheck", "single.py:Single"], "Single.forward returned Tensor, expected a pair (output, state)"),
        (["inspect", "own.py:Raises", "--flow"], "KeyError: 'what'"),
        (["bench", "own.py:Raises"], "own.py:Raises failed (own.py:"),
        (["gradcheck", "own.py:Raises"], "own.py:Raises failed (own.py:"),
        (["inspect", "own.py:Wrong"], "Wrong has no recurrent cell"),
        (["inspect", "lstm", "--draw", "no/a.svg"], "cannot write no/a.svg"),
        (["inspect", "lstm", "--player", "no/a.html"], "cannot write no/a.html"),
    ],
)
def test_what_fails(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.py").write_text("class Cell(:\n")
    Path("exits.py").write_text("import sys\nsys.exit('done')\n")
    Path("single.py").write_text(SINGLE)
    Path("text.txt").write_text("some text")
    assert main(arguments) == 1
    assert reason in one_line(capsys)


@pytest.mark.parametrize("prompt", ["a", "日本"])
def test_prompts_that_cannot_be_read(run: str, prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", run, "--flow", "--prompt", prompt]) == 2
    assert "--prompt" in one_line(capsys)


@pytest.mark.parametrize("command", ["inspect", "gradcheck", "bench"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, command, "--help").startswith(f"usage: tinygrad-lstm {command} ")
