"""The command line: what it leaves on disk and prints, how it resumes, and one line for bad input."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm.cli import main
from tinygrad_lstm.cli.options import duration, program
from tinygrad_lstm.hints import how_to_install

TEXT = "".join(f"{n} green bottles hanging on the wall, number {n * n}.\n" for n in range(60))
SMALL = ["--hidden", "8", "--embedding", "4", "--batch", "4", "--seq-len", "10", "--eval-every", "20"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)


def train(*more: str) -> int:
    return main(["train", "--text", "text.txt", *SMALL, *more])


def rows(folder: str) -> list[dict[str, str]]:
    with open(Path(folder) / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def weights(path: str) -> dict[str, Any]:
    return tg.load(path)["model"]


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith("\n") and err.startswith("tinygrad-lstm"), (out, err)
    assert "Traceback" not in err
    return err


# -- train ---------------------------------------------------------------------------------------------


def test_train_leaves_its_files_and_reports(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--steps", "30", "--out", "run") == 0
    out, err = capsys.readouterr()
    assert re.search(r"sha256 [0-9a-f]{64}\n", out)
    bits = float(re.search(r"held out: ([0-9.]+) bits per character \(model of step (20|30)\)", out)[1])  # type: ignore[index]
    assert 0 < bits < 8
    assert "tok/s=" in err and "bits=" in err and "30/30" in err
    files = {"best.safetensors", "last.safetensors", "metrics.csv"}
    pytest.importorskip("matplotlib")
    assert set(os.listdir("run")) == files | {"loss.png"}
    assert Path("run/loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    table = rows("run")
    assert [int(row["step"]) for row in table] == list(range(1, 31))
    held = {row["step"]: row["held_out_bits_per_character"] for row in table if row["held_out_bits_per_character"]}
    assert set(held) == {"20", "30"}
    assert min(map(float, held.values())) == pytest.approx(bits, abs=5e-5)


def test_training_learns_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--steps", "150", "--out", "run", "--lr", "0.02", "--quiet") == 0
    out, err = capsys.readouterr()
    assert err == "" and len(out.splitlines()) == 1
    table = rows("run")
    assert float(table[0]["bits_per_character"]) > 4.5
    assert float(table[-1]["held_out_bits_per_character"]) < 3.2


def test_without_matplotlib_one_line_says_how(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [m for m in sys.modules if m == "matplotlib" or m.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert train("--steps", "3", "--out", "run") == 0
    assert how_to_install("plots") in capsys.readouterr().out
    assert not Path("run/loss.png").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--cell", "gru"], ["--cell", "rnn"], ["--layers", "1", "--dropout", "0.2"], ["--embedding", "0"],
        ["--dtype", "float64"], ["--seed", "5"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_options_reach_the_model(options: list[str]) -> None:
    assert train("--steps", "3", "--out", "run", "--quiet", *options) == 0
    assert train("--steps", "3", "--out", "plain", "--quiet") == 0
    assert not same(weights("run/last.safetensors"), weights("plain/last.safetensors"))
    dtypes = {array.dtype.name for array in weights("run/last.safetensors").values()}
    assert dtypes == {"float64" if "float64" in options else "float32"}
    assert main(["evaluate", "run"]) == 0


def test_epochs_and_equal_seeds() -> None:
    assert train("--epochs", "1", "--out", "a", "--quiet") == 0
    assert train("--epochs", "1", "--out", "b", "--quiet") == 0
    n = len(TEXT) - round(len(TEXT) * 0.05)
    assert len(rows("a")) == (n - 1) // 4 // 10
    assert rows("a") == rows("b") and same(weights("a/last.safetensors"), weights("b/last.safetensors"))


def test_nothing_is_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--steps", "3", "--out", "run", "--quiet") == 0
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    capsys.readouterr()
    assert train("--steps", "3", "--out", "run", "--quiet", "--seed", "1") == 1
    assert "run holds a run already" in one_line(capsys)
    assert before == {path: path.read_bytes() for path in Path("run").iterdir()}
    assert train("--steps", "3", "--quiet") == 0
    assert train("--steps", "3", "--quiet") == 0
    assert sorted(os.listdir("runs")) == ["char-lm-1", "char-lm-2"]


def test_without_text_it_trains_on_pythons_own(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--hidden", "4", "--layers", "1", "--embedding", "2", "--batch", "2", "--seq-len", "5", "--steps", "2"]
    assert main(["train", *small, "--out", "run"]) == 0
    assert "Python's help topics" in capsys.readouterr().out
    assert main(["evaluate", "run"]) == 0
    assert "held-out part of Python's help topics" in capsys.readouterr().out


# -- stop and resume ---------------------------------------------------------------------------------------


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGINT) -> pytest.MonkeyPatch:
    """A user who presses Ctrl-C during some step."""
    from tinygrad_lstm.training import Trainer

    real = Trainer._train_step

    def pressed(self: Trainer, batch: Any) -> dict[str, float]:
        if self.step == step - 1:
            signal.raise_signal(number)
        return real(self, batch)

    monkeypatch.setattr(Trainer, "_train_step", pressed)
    return monkeypatch


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_a_checkpoint_and_resume_repeats_the_straight_run(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--steps", "60", "--out", "straight", "--dropout", "0.3", "--quiet") == 0
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        stop_after(25, patch, number)
        assert train("--steps", "60", "--out", "run", "--dropout", "0.3", "--quiet") == 128 + number
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert len(rows("run")) == 25 and tg.load("run/last.safetensors")["trainer"]["progress"]["step"] == 25
    out, err = capsys.readouterr()
    assert "step 25 of 60" in out and "--resume run" in out and err == ""
    assert main(["train", "--resume", "run", "--quiet"]) == 0
    for name in ("last", "best"):
        assert same(weights(f"run/{name}.safetensors"), weights(f"straight/{name}.safetensors"))
    assert rows("run") == rows("straight")
    straight, resumed = capsys.readouterr().out.splitlines()[-1:], tg.load("run/best.safetensors")["result"]
    assert f"{resumed['held_out_bits_per_character']:.4f}" in straight[0]


def test_time_limit_only_stops(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--steps", "40", "--out", "straight", "--quiet") == 0
    capsys.readouterr()
    assert train("--steps", "40", "--out", "run", "--time-limit", "0.000001", "--quiet") == 0
    assert "time limit after step 1 of 40" in capsys.readouterr().out
    assert main(["train", "--out", "run", "--resume", "--quiet"]) == 0
    assert rows("run") == rows("straight")


def test_what_resume_can_mean(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--steps", "9", "--quiet", "--time-limit", "0.000001") == 0
    assert main(["train", "--resume", "--quiet"]) == 0  # the newest run in runs/
    assert len(rows("runs/char-lm-1")) == 9
    # A finished run only reports again.
    assert main(["train", "--resume", "runs/char-lm-1", "--quiet"]) == 0
    assert len(rows("runs/char-lm-1")) == 9
    # Another folder: the old one stays as it is, and the new one is complete.
    before = Path("runs/char-lm-1/last.safetensors").read_bytes()
    assert main(["train", "--resume", "runs/char-lm-1/last.safetensors", "--out", "other", "--quiet"]) == 0
    assert {"best.safetensors", "last.safetensors", "metrics.csv"} <= set(os.listdir("other"))
    assert Path("runs/char-lm-1/last.safetensors").read_bytes() == before
    # The text may move, as long as it is the same.
    Path("text.txt").rename("moved.txt")
    capsys.readouterr()
    assert main(["train", "--resume", "other", "--quiet"]) == 1
    assert "text.txt" in one_line(capsys)
    assert main(["train", "--resume", "other", "--text", "moved.txt", "--quiet"]) == 0


@pytest.mark.slow
def test_ctrl_c_in_a_real_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tinygrad_lstm", "train", "--text", "text.txt", *SMALL]
    command += ["--steps", "1000000", "--out", "run", "--quiet", "--eval-every", "5"]
    environment = {**os.environ, "PYTHONPATH": str(Path(tg.__file__).parents[1])}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while process.poll() is None and not Path("run/last.safetensors").exists():
        pass  # the first checkpoint shows that training is under way
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "" and "go on with" in out
    assert tg.load("run/last.safetensors")["trainer"]["progress"]["step"] == len(rows("run"))


# -- sample, evaluate ---------------------------------------------------------------------------------------


@pytest.fixture
def run() -> str:
    assert train("--steps", "3", "--out", "run", "--quiet") == 0
    return "run"


def test_sample(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    def sample(*more: str) -> str:
        assert main(["sample", run, "--prompt", "green ", "--length", "40", *more]) == 0
        return capsys.readouterr().out

    capsys.readouterr()
    first = sample("--seed", "1")
    assert first.startswith("green ") and len(first) == len("green ") + 40 + 1
    assert set(first) <= set(TEXT)
    assert sample("--seed", "1") == first != sample("--seed", "2")
    assert sample("--temperature", "0") == sample("--temperature", "0", "--seed", "7")
    assert sample("--temperature", "1e-300") == sample("--temperature", "0")
    assert main(["sample", f"{run}/last.safetensors", "--length", "0", "--prompt", "a"]) == 0
    assert capsys.readouterr().out == "a\n"


def test_evaluate(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    stored = tg.load(f"{run}/best.safetensors")["result"]["held_out_bits_per_character"]
    capsys.readouterr()
    assert main(["evaluate", run]) == 0
    assert capsys.readouterr().out.startswith(f"{stored:.4f} bits per character on the held-out part of ")
    Path("other.txt").write_text(TEXT[:300])
    assert main(["evaluate", run, "--text", "other.txt"]) == 0
    plain = capsys.readouterr().out
    assert "on other.txt (300 characters)" in plain
    assert main(["evaluate", run, "--text", "other.txt", "--skip-unknown"]) == 0
    assert capsys.readouterr().out == plain
    Path("other.txt").write_text(f"{TEXT[:100]}☃{TEXT[100:200]}üü{TEXT[200:300]}☃☃☃")
    assert main(["evaluate", run, "--text", "other.txt", "--skip-unknown"]) == 0
    skipped = capsys.readouterr().out
    assert skipped == plain.replace("rs)", "rs; 6 unknown ones were skipped: '☃' (4), 'ü' (2))")


def test_hints_name_the_program_as_it_was_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "with a blank" / "tinygrad-lstm"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-X", "dev", "-m", "tinygrad_lstm", "train"])
    assert program() == "python3 -X dev -m tinygrad_lstm"
    monkeypatch.setattr(sys, "orig_argv", ["python3", str(script), "train", "-m", "pytest"])
    monkeypatch.setattr(sys, "argv", [str(script), "train"])
    monkeypatch.setenv("PATH", "")
    assert program() == f"'{script}'"
    monkeypatch.setenv("PATH", str(script.parent))
    assert program() == "tinygrad-lstm"
    monkeypatch.setattr(sys, "argv", ["notebook.py"])
    assert program() == "tinygrad-lstm"


# -- the program --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["train"], ["sample"], ["evaluate"]], ids=" ".join)
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: tinygrad-lstm") and err == ""


def test_version_and_module(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tinygrad-lstm {tg.__version__}\n"
    environment = {**os.environ, "PYTHONPATH": str(Path(tg.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "tinygrad_lstm", "sample", "nowhere"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "tinygrad-lstm sample: nowhere: No such file or directory\n"


def test_a_closed_pipe_is_no_error(run: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(tg.__file__).parents[1])}
    command = f"{sys.executable} -m tinygrad_lstm sample {run} --length 1 | true"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_a_terminal_that_lacks_the_characters() -> None:
    Path("text.txt").write_text(TEXT.replace("green", "grün"), encoding="utf-8")
    assert train("--steps", "1", "--out", "run", "--quiet") == 0
    environment = {**os.environ, "PYTHONPATH": str(Path(tg.__file__).parents[1]), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "tinygrad_lstm", "sample", "run", "--prompt", "grün", "--length", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "gr\\xfcn\n"


def test_durations() -> None:
    assert [duration(t) for t in ("90", "90s", "1.5m", "2h")] == [90, 90, 90, 7200]
