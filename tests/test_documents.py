"""The code in the documents runs and prints what stands below it."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import nn

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```(python|text)\n(.*?)```", re.DOTALL)
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_code_blocks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYGRAD_LSTM_COMPILE", "auto")  # as for a reader
    namespace: dict[str, object] = {}
    printed = ""
    for kind, body in BLOCK.findall(path.read_text()):
        if kind == "text":
            assert printed == body, f"{path.name} promises other output"
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(body, path.name, "exec"), namespace)
        printed = out.getvalue()


def test_a_wrong_promise_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = tmp_path / "wrong.md"
    document.write_text("```python\nprint(1)\n```\n```text\n2\n```\n")
    with pytest.raises(AssertionError, match="other output"):
        test_code_blocks(document, monkeypatch)


def test_the_list_of_names_is_what_the_package_has() -> None:
    written = (ROOT / "docs" / "names.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "docs" / "names.py"))["document"]() == written, "run python docs/names.py"


def test_every_name_is_listed_once() -> None:
    written = (ROOT / "docs" / "names.md").read_text(encoding="utf-8")
    for section in written.split("\n## ")[1:]:
        names = re.findall(r"^\| `(\w+)", section, re.MULTILINE)
        assert len(names) == len(set(names)), section[:40]


def test_what_is_said_to_those_who_come_from_pytorch() -> None:
    x = tg.tensor(np.float32([[1, 3], [5, 2]]))
    assert x.max(axis=1).tolist() == [3.0, 5.0] and x.argmax(axis=1).tolist() == [1, 0]
    assert x.sum(axis=1, keepdims=True).shape == (2, 1)
    assert not hasattr(x, "add_") and not hasattr(x, "zero_")
    p = before = nn.Parameter(np.ones(2))
    (p * p).sum().backward()
    p.data -= 0.25 * p.grad
    assert p is before and p.tolist() == [0.5, 0.5] and isinstance(p.grad, np.ndarray)
    with tg.no_grad(), pytest.raises(tg.GraphError, match=r"p\.data -= "):
        p -= 1.0
    assert p is before and before.tolist() == [0.5, 0.5]
    x -= 1.0
    assert x.tolist() == [[0.0, 2.0], [4.0, 1.0]]
