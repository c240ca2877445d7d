"""The command line given bad input: one clear line, the right exit status, nothing lost on disk."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

import tinygrad_lstm as tg
from tinygrad_lstm.cli import main

TEXT = "".join(f"{n} green bottles hanging on the wall, number {n * n}.\n" for n in range(60))
SMALL = ["--hidden", "8", "--embedding", "4", "--batch", "4", "--seq-len", "10", "--eval-every", "20"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)


def train(*more: str) -> int:
    return main(["train", "--text", "text.txt", *SMALL, *more])


@pytest.fixture
def run() -> str:
    assert train("--steps", "3", "--out", "run", "--quiet") == 0
    return "run"


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith("\n") and err.startswith("tinygrad-lstm"), (out, err)
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["trian"], "did you mean 'train'?"),
        (["train", "--cell", "lsmt"], "did you mean 'lstm'?"),
        (["cache", "clean"], "did you mean 'clear'?"),
        (["train", "--hiden", "3"], "tinygrad-lstm train: unrecognized arguments: --hiden 3; did you mean '--hidden'?"),
        (["evaluate", "x", "--txt=f"], "did you mean '--text'?"),
        (["evaluate", "x", "--skip-unknown"], "--skip-unknown is for another text"),
        (["train", "--cell", "transformer"], "invalid choice: 'transformer'"),
        (["train", "--hidden", "0"], "0 is less than 1"),
        (["train", "--hidden", "many"], "'many' is not a whole number"),
        (["train", "--lr", "nan"], "nan is not above 0"),
        (["train", "--dropout", "1"], "1 is not below 1"),
        (["train", "--held-out", "1"], "not below 1"),
        (["train", "--steps", "3", "--epochs", "3"], "not allowed with"),
        (["train", "--time-limit", "soon"], "'soon' is no time; write seconds, or a number with s, m or h"),
        (["train", "--time-limit", "3x"], "'3x' is no time"),
        (["train", "--time-limit", "m"], "'m' is no time"),
        (["train", "--time-limit", "0m"], "0 is not above 0"),
        (["train", "--seed", "-1"], "-1 is less than 0"),
        (["sample"], "required: CHECKPOINT"),
        (["sample", "x", "--prompt", ""], "--prompt is empty"),
        (["sample", "x", "--temperature", "-1"], "not at least 0"),
    ],
)
def test_wrong_arguments(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert reason in one_line(capsys)
    assert os.listdir() == ["text.txt"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"), (b"", "is empty"), (b"ab", "too short"), (b"x" * 50, "too short for --batch"),
        (b"\xff\xfe\x00" * 999, "not text in utf-8"),
    ],
)  # fmt: skip
def test_bad_text_files(content: bytes | None, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        Path("bad.txt").write_bytes(content)
    assert main(["train", "--text", "bad.txt", "--out", "run"]) == 1
    line = one_line(capsys)
    assert reason in line and "bad.txt" in line
    assert not Path("run").exists() and not Path("runs").exists()


def test_a_folder_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--text", ".", "--out", "run"]) == 1
    one_line(capsys)


@pytest.mark.parametrize("out", ["text.txt", "text.txt/sub", "/dev/null/run", "n" * 300, "/proc/run"])
@pytest.mark.skipif(sys.platform != "linux", reason="paths of Linux")
def test_folders_that_cannot_be_written(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--steps", "3", "--out", out) == 1
    assert "cannot" in one_line(capsys)
    assert os.listdir() == ["text.txt"]


@pytest.mark.parametrize("command", [["sample"], ["evaluate"], ["train", "--resume"]], ids=" ".join)
@pytest.mark.parametrize("kind", ["missing", "empty", "text", "other tree", "folder", "broken"])
def test_files_that_are_no_checkpoint(
    command: list[str], kind: str, capsys: pytest.CaptureFixture[str], run: str
) -> None:
    path = Path("file")
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text(TEXT)
    elif kind == "other tree":
        tg.save(path, {"a": 1})
    elif kind == "folder":
        path.mkdir()
    elif kind == "broken":
        path.write_bytes(Path("run/last.safetensors").read_bytes()[:-1])
    capsys.readouterr()
    assert main([*command, "file"]) == 1
    assert "file" in one_line(capsys)


def test_a_model_without_a_run_cannot_be_resumed(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["train", "--resume", f"{run}/best.safetensors"]) == 1
    assert "holds a model only" in one_line(capsys)
    assert main(["train", "--resume"]) == 1
    assert "no run to resume" in one_line(capsys)


@pytest.mark.parametrize(
    "option", [["--hidden", "9"], ["--steps", "4"], ["--cell", "gru"], ["--lr", "0.1"], ["--epochs", "1"]], ids=" ".join
)
def test_resume_with_conflicting_options(run: str, option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["train", "--resume", run, *option]) == 2
    assert f"{option[0]} {option[1]} does not fit the run" in one_line(capsys)
    assert main(["train", "--resume", run, "--hidden", "8", "--steps", "3", "--quiet"]) == 0


def test_resume_with_another_text(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.txt").write_text(TEXT + "more")
    for more in ([], ["--text", "text.txt"]):
        capsys.readouterr()
        assert main(["train", "--resume", run, *more]) == 1
        assert "text.txt is not the text of the training" in one_line(capsys)


def test_a_prompt_with_unknown_characters(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["sample", run, "--prompt", "ÄX"]) == 2
    assert "unknown characters 'X', 'Ä'" in one_line(capsys)
    Path("other.txt").write_text("ÄX")
    assert main(["evaluate", run, "--text", "other.txt"]) == 1
    assert "other.txt has 2 characters, of 2, that the model does not know: 'Ä' (1), 'X' (1); " in one_line(capsys)
    assert main(["evaluate", run, "--text", "other.txt", "--skip-unknown"]) == 1
    assert "has 0 characters: at least 2" in one_line(capsys)


def test_a_full_disk_while_training(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert train("--steps", "3", "--out", "run", "--quiet") == 1
    assert "no space left" in one_line(capsys)
    assert os.listdir("run") == []


@pytest.mark.parametrize("text", ["", "g", "gr", "green"])
def test_evaluate_on_a_short_text(run: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    Path("short.txt").write_text(text)
    status = main(["evaluate", run, "--text", "short.txt"])
    if len(text) > 1:
        assert status == 0 and "bits per character on short.txt" in capsys.readouterr().out
    else:
        assert status == 1
        assert f"short.txt has {len(text)} characters: at least 2 are needed" in one_line(capsys)


def test_resuming_a_complete_run_says_so(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    before = Path("run/last.safetensors").read_bytes()
    assert main(["train", "--resume", "run", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "the run in run is complete already: 3 of 3 steps" in out and "held out:" in out
    assert Path("run/last.safetensors").read_bytes() == before
