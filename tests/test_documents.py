"""The code in the documents runs and prints what stands below it."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```(python|text)\n(.*?)```", re.DOTALL)
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_code_blocks(path: Path) -> None:
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


def test_a_wrong_promise_is_noticed(tmp_path: Path) -> None:
    document = tmp_path / "wrong.md"
    document.write_text("```python\nprint(1)\n```\n```text\n2\n```\n")
    with pytest.raises(AssertionError, match="other output"):
        test_code_blocks(document)


def test_the_list_of_names_is_what_the_package_has() -> None:
    written = (ROOT / "docs" / "names.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "docs" / "names.py"))["document"]() == written, "run python docs/names.py"
