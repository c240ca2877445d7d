"""tinygrad-lstm export: what it writes, and one line for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors

import tinygrad_lstm as tg
from tinygrad_lstm import interop
from tinygrad_lstm.cli import main
from tinygrad_lstm.training.language_model import build, load_model, save_model

VOCABULARY = "abcdé\n "
CONFIG = {"hidden": 6, "layers": 2, "cell": "gru", "embedding": 3, "dropout": 0.2, "dtype": "float32"}


@pytest.fixture(autouse=True)
def in_a_folder_with_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    save_model("run/best.safetensors", CONFIG, VOCABULARY, build(CONFIG, len(VOCABULARY)).state_dict())


def test_safetensors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "run", "model.safetensors"]) == 0
    assert "parameters of run" in capsys.readouterr().out
    model, _ = load_model("run/best.safetensors")
    found = interop.load_safetensors("model.safetensors")
    assert found.keys() == model.state_dict().keys()
    assert all(np.array_equal(found[name], array) for name, array in model.state_dict().items())
    with safetensors.safe_open("model.safetensors", framework="numpy") as reader:
        notes = reader.metadata()
    assert notes["vocabulary"] == VOCABULARY and json.loads(notes["config"]) == CONFIG


@pytest.mark.conformance
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_onnx_generates_step_by_step(cell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx_parts import session

    config = {**CONFIG, "cell": cell}
    save_model("run/best.safetensors", config, VOCABULARY, build(config, len(VOCABULARY)).state_dict())
    assert main(["export", "run/best.safetensors", "model.onnx", "--state"]) == 0
    states = ["h_0", "c_0"][: 2 if cell == "lstm" else 1]
    assert capsys.readouterr().out.endswith(f"inputs tokens, {', '.join(states)}\n")
    running = session(Path("model.onnx"))
    assert running.get_modelmeta().custom_metadata_map["vocabulary"] == VOCABULARY
    tokens = np.random.default_rng(0).integers(0, len(VOCABULARY), (5, 2))
    model, _ = load_model("run/best.safetensors")
    with tg.no_grad():
        expected = model.eval()(tokens)[0].numpy()
    state = [np.zeros((2, 2, 6), np.float32) for _ in states]
    for t in range(5):
        logits, *state = running.run(None, {"tokens": tokens[t : t + 1], **dict(zip(states, state, strict=True))})
        np.testing.assert_allclose(logits[0], expected[t], rtol=1e-4, atol=1e-5)
    assert main(["export", "run", "whole.onnx"]) == 0
    (logits, *_) = session(Path("whole.onnx")).run(None, {"tokens": tokens})
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        (["run"], 2, "required: FILE"),
        (["run", "model.bin"], 2, "model.bin ends with neither .onnx nor .safetensors; give --format"),
        (["run", "x", "--format", "pickle"], 2, "invalid choice: 'pickle'"),
        (["run", "x.safetensors", "--state"], 2, "--state is about ONNX models"),
        (["nothing", "x.safetensors"], 1, "nothing: No such file or directory"),
        (["run", "run/best.safetensors", "--force"], 1, "is the checkpoint itself"),
        (["run", "old.safetensors"], 1, "old.safetensors exists already; give another file, or --force"),
        (["run", "no/x.safetensors"], 1, "cannot write no/x.safetensors: no such file or directory"),
        (["old.safetensors", "x.safetensors"], 1, "old.safetensors is cut off, damaged or no checkpoint"),
    ],
)
def test_bad_input(arguments: list[str], status: int, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("old.safetensors").write_text("old")
    before = Path("run/best.safetensors").read_bytes()
    assert main(["export", *arguments]) == status
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and reason in err
    assert Path("old.safetensors").read_text() == "old" and Path("run/best.safetensors").read_bytes() == before
    assert not Path("x.safetensors").exists()


def test_force_and_another_ending() -> None:
    Path("old.safetensors").write_text("old")
    assert main(["export", "run", "old.safetensors", "--force"]) == 0
    assert main(["export", "run", "model.bin", "--format", "safetensors"]) == 0
    assert Path("model.bin").read_bytes() == Path("old.safetensors").read_bytes()
