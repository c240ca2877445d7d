"""``tinygrad-lstm cache``: what it shows, what it deletes, and what it never touches; the notice while compiling."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinygrad_lstm.cli import main

FILL = """
import sys
from tinygrad_lstm.kernels import codecache

source = '''
from tinygrad_lstm.kernels.dialect import entry

@entry
def {name}(n):
    return n + 1
'''
codecache.NOTICE = float(sys.argv[1]) if sys.argv[1:] else 3600.0
functions = [codecache.load(source.format(name=name), stem=stem).function(name)
             for name, stem in (("alpha", "kind_one"), ("beta", "kind_one"), ("gamma", "other"))]
assert functions[2](1) == 2
"""


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "TINYGRAD_LSTM_CACHE_DIR": str(folder)}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of a cache that a process has filled."""
    folder = tmp_path_factory.mktemp("cache") / "inner"
    subprocess.run([sys.executable, "-c", FILL], env=environment(folder), timeout=120, check=True)
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert sorted({Path(name).suffix for name in files}) == [".code"]
    return files


@pytest.fixture
def folder(tmp_path: Path, written: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that cache, which the commands are pointed at."""
    path = tmp_path / "cache"
    path.mkdir(mode=0o700)
    for name, content in written.items():
        (path / name).write_bytes(content)
    monkeypatch.setenv("TINYGRAD_LSTM_CACHE_DIR", str(path))
    return path


def entries(path: Path) -> set[str]:
    return {str(p.relative_to(path)) for p in path.rglob("*")}


def size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str], status: int = 1) -> str:
    assert main(arguments) == status
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("tinygrad-lstm")
    return err


def test_show(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = entries(folder)
    assert main(["cache", "show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"folder    {folder}", "usable    yes"]
    assert lines[2].startswith("limit     512.0 MB (TINYGRAD_LSTM_CACHE_LIMIT)")
    assert lines[3] == f"programs  3 ({size(folder) / 1e3:.1f} kB)"
    assert [line.split("(")[0].split() for line in lines[4:]] == [["2", "kind_one"], ["1", "other"]]
    total = sum(float(line.split("(")[1].split()[0]) for line in lines[4:])
    assert total == pytest.approx(size(folder) / 1e3, abs=0.11)
    assert entries(folder) == before


def test_clear_deletes_all_that_was_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    total = size(folder)
    assert main(["cache", "clear"]) == 0
    assert capsys.readouterr().out == f"cleared 3 programs, {total} bytes, in {folder}\n"
    assert entries(folder) == set()
    assert main(["cache", "clear"]) == 0
    assert capsys.readouterr().out == f"nothing to clear in {folder}\n"
    assert main(["cache", "show"]) == 0
    assert "programs  0 (0.0 kB)\n" in capsys.readouterr().out
    subprocess.run([sys.executable, "-c", FILL], env=environment(folder), timeout=120, check=True)


H = "0123456789abcdef" * 2
LEFTOVERS = [  # of processes that were killed, and of earlier versions
    f".layout_{H}.code.abcd1234", f"layout_{H}.py", f"layout_{H}.sum",
    f".layout_{H}.py.a1_b2c3d", f".layout_{H}.sum.qwertz99", f"__pycache__/layout_{H}.reach-89.py311.nbi.tmp.{H}",
    f"__pycache__/layout_{H}.f-4.py314t.12.nbc", f"__pycache__/layout_{H}.cpython-314.opt-1.pyc.140234567",
]  # fmt: skip
FOREIGN = [
    "notes.txt", f"layout_{H}.coder", f"layout_{H}.code.abcd1234", f".layout_{H}.code",
    "model_1234.py", f"layout_{H}.txt", f"layout_{H}0.py", f"{H}.py", f"layout_{H[:-1]}.py", f"layout_{H}",
    f"LICENSE_{H}.PY", f".layout_{H}.py", f"layout_{H}.py.a1b2c3d4", f"layout-{H}.py", f"layout_{H.upper()}.sum",
    "__pycache__/mine.cpython-311.pyc", f"__pycache__/layout_{H}.py", f"layout_{H}.f-4.py311.nbi",
    f"__pycache__/notes_{H}.txt", "sub/__pycache__/x", f"sub/layout_{H}.py",
]  # fmt: skip


def test_clear_leaves_the_files_of_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in LEFTOVERS + FOREIGN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("something")
    (folder / f"folder_{H}.code").mkdir()
    (folder / f"link_{H}.code").symlink_to(folder / "notes.txt")
    kept = {*FOREIGN, "__pycache__", "sub", "sub/__pycache__", f"folder_{H}.code", f"link_{H}.code"}
    others = len([n for n in FOREIGN if not n.startswith("sub/")]) + 3  # sub, and the two above
    assert main(["cache", "show"]) == 0
    out = capsys.readouterr().out
    assert "programs  4" in out and f"others    {others}, not made by the cache\n" in out
    assert main(["cache", "clear"]) == 0
    assert capsys.readouterr().out.endswith(f" in {folder}; {others} others left alone\n")
    assert entries(folder) == kept


def test_a_linked_code_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / f"layout_{H}.f-4.py311.1.nbc").write_text("something")
    (folder / "__pycache__").symlink_to(tmp_path / "elsewhere")
    before = entries(tmp_path / "elsewhere")
    assert main(["cache", "clear"]) == 0
    assert entries(tmp_path / "elsewhere") == before and entries(folder) == {"__pycache__"}


def test_a_folder_that_is_not_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.py").write_text("years of work")
    monkeypatch.setenv("TINYGRAD_LSTM_CACHE_DIR", str(tmp_path))
    assert "holds nothing that this cache has made" in failure(["cache", "clear"], capsys)
    assert entries(tmp_path) == {"thesis.py"}


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_folder_that_is_not_ours_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = entries(folder)
    folder.chmod(0o777)
    assert "is writable by other users" in failure(["cache", "clear"], capsys)
    assert entries(folder) == before
    assert main(["cache", "show"]) == 0
    out = capsys.readouterr().out
    assert f"usable    no: {folder} is writable by other users\n" in out and "programs  3 " in out


def test_no_folder_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TINYGRAD_LSTM_CACHE_DIR", str(tmp_path / "a" / "b"))
    assert main(["cache", "show"]) == 0
    out = capsys.readouterr().out
    assert "usable    not made yet\n" in out and "programs  0" in out
    assert main(["cache", "clear"]) == 0
    assert entries(tmp_path) == set()


def test_a_file_in_place_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("content")
    monkeypatch.setenv("TINYGRAD_LSTM_CACHE_DIR", str(tmp_path / "file"))
    for action in ("show", "clear"):
        assert "Not a directory" in failure(["cache", action], capsys)
    assert (tmp_path / "file").read_text() == "content"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "required: {show,clear}"),
        (["empty"], "invalid choice: 'empty'"),
        (["clear", "all"], "unrecognized arguments: all"),
    ],
)
def test_wrong_arguments(arguments: list[str], reason: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = entries(folder)
    assert reason in failure(["cache", *arguments], capsys, status=2)
    assert entries(folder) == before


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "--help"]) == 0
    assert "TINYGRAD_LSTM_CACHE_DIR" in capsys.readouterr().out


# ---------------------------------------------------------------------------- the notice while compiling


def fill_at_a_terminal(folder: Path, seconds: str) -> str:
    """What a process that fills the cache says on a standard error that is a terminal."""
    terminal, end = os.openpty()
    try:
        subprocess.run(
            [sys.executable, "-c", FILL, seconds], env=environment(folder), stderr=end, timeout=120, check=True
        )
        os.close(end)
        try:
            return os.read(terminal, 10_000).decode().replace("\r\n", "\n")
        except OSError:  # nothing, and nobody is left who could write
            return ""
    finally:
        os.close(terminal)


@pytest.mark.skipif(sys.platform != "linux", reason="pseudo-terminals of Linux")
def test_long_compiling_is_announced_at_a_terminal_once(tmp_path: Path) -> None:
    assert fill_at_a_terminal(tmp_path / "a", "3600") == ""
    said = fill_at_a_terminal(tmp_path / "b", "0")
    assert said == f"tinygrad_lstm: compiling native code, kept in {tmp_path / 'b'} for the next time\n"
    assert fill_at_a_terminal(tmp_path / "b", "0") == "", "nothing is compiled"
    command = [sys.executable, "-c", FILL, "0"]
    piped = subprocess.run(command, env=environment(tmp_path / "c"), capture_output=True, timeout=120, check=True)
    assert piped.stderr == b"", "not a terminal"
