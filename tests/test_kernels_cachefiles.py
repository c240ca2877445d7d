"""The bound on the cache of compiled code: what is deleted, what never is, and processes that meet there."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import pytest

import tinygrad_lstm as tg
from tinygrad_lstm.cli import main
from tinygrad_lstm.kernels import cachefiles, codecache

SOURCE = """
from numba import njit, types

@njit(types.int64(types.int64), nogil=True, cache=True)
def add(n):
    return n + {number}
"""
OLD = 40 * 86_400.0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for this test alone."""
    path = tmp_path / "cache"
    path.mkdir(mode=0o700)
    monkeypatch.setenv("TINYGRAD_LSTM_CACHE_DIR", str(path))
    monkeypatch.setattr(codecache, "_loaded", {})
    monkeypatch.setattr(codecache, "_held", {})
    monkeypatch.setattr(codecache, "_warned", False)
    return path


def add(number: int) -> types.FunctionType:
    return codecache.load(SOURCE.format(number=number), "add", stem="adds")  # type: ignore[return-value]


def compiled(function: object) -> int:
    return sum(function.stats.cache_misses.values())  # type: ignore[attr-defined]


def again(number: int) -> object:
    """As another process finds it."""
    codecache._loaded.clear()
    return add(number)


def program(folder: Path, number: int, size: int, unused: float, part: bool = False) -> str:
    """The files of a program that was not used for so many seconds."""
    name = f"kind_{number:032x}"
    (folder / "__pycache__").mkdir(exist_ok=True)
    for path, content in (
        (folder / f"{name}.py", b"x" * 10), (folder / f"{name}.sum", b"y" * 10),
        (folder / "__pycache__" / f"{name}.f-1.py311.1.nbc", b"z" * (size - 20)),
    ):  # fmt: skip
        if not (part and path.suffix == ".sum"):
            path.write_bytes(content)
            os.utime(path, (time.time() - unused,) * 2)
    os.utime(folder / f"{name}.py", (1e9, 1e9))
    return name


def left(folder: Path) -> set[str]:
    return {file.program for file in cachefiles.inventory(folder).files}


def test_what_was_not_used_for_longest_goes_first(folder):
    names = [program(folder, k, 1000, unused) for k, unused in enumerate((OLD, 3 * OLD, 2 * OLD, 5.0, 4 * OLD))]
    assert cachefiles.trim(folder, 5000) == 5000 and left(folder) == set(names)
    assert cachefiles.trim(folder, 4000) == 3000  # down to nine tenths
    assert left(folder) == {names[0], names[2], names[3]}
    cachefiles.touch(folder, names[2])
    assert cachefiles.trim(folder, 10) == 2000  # what is in use stays, whatever the limit
    assert left(folder) == {names[2], names[3]}


def test_a_program_that_is_being_made_stays_and_what_was_left_unfinished_goes(folder):
    fresh, stale = program(folder, 1, 1000, 5.0, part=True), program(folder, 2, 1000, OLD, part=True)
    for name, unused in ((f".{fresh}.sum.abcd1234", 60.0), (f".{stale}.py.abcd1234", OLD)):
        (folder / name).write_bytes(b"w" * 100)
        os.utime(folder / name, (time.time() - unused,) * 2)
    assert cachefiles.trim(folder, 10**9) == 990 + 990 + 100  # nothing but the leftover of a killed process
    cachefiles.trim(folder, 1)
    assert left(folder) == {fresh}


def test_nothing_that_is_not_ours_is_deleted(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    name = program(folder, 1, 1000, OLD)
    foreign = [folder / "notes.txt", folder / "model_12.py", folder / f"{name}.bin", folder / "__pycache__" / "my.pyc"]
    for path in foreign:
        path.write_text("mine")
    (folder / f"link_{'0' * 32}.py").symlink_to(foreign[0])
    (folder / f"folder_{'0' * 32}.sum").mkdir()
    cachefiles.trim(folder, 1)
    assert left(folder) == set()
    assert all(path.read_text() == "mine" for path in foreign)
    assert (folder / f"link_{'0' * 32}.py").is_symlink() and (folder / f"folder_{'0' * 32}.sum").is_dir()
    program(folder, 2, 1000, OLD)
    (folder / "__pycache__").rename(tmp_path / "elsewhere" / "code")
    (folder / "__pycache__").symlink_to(tmp_path / "elsewhere" / "code")
    before = sorted((tmp_path / "elsewhere" / "code").iterdir())
    cachefiles.trim(folder, 1)
    assert sorted((tmp_path / "elsewhere" / "code").iterdir()) == before


@pytest.mark.parametrize(
    ("text", "limit"),
    [("", 512 * 10**6), ("2048", 2048), ("1.5G", 1_500_000_000), ("20 mb", 20 * 10**6), ("0", 0), ("None", None)],
)
def test_the_limit(text, limit, monkeypatch, folder, capsys):
    monkeypatch.setenv("TINYGRAD_LSTM_CACHE_LIMIT", text)
    assert cachefiles.limit_bytes() == limit
    assert main(["cache", "show"]) == 0
    shown = "none" if limit is None else f"{limit / 1e6:.1f} MB" if limit >= 1e5 else f"{limit / 1e3:.1f} kB"
    assert f"limit     {shown} (TINYGRAD_LSTM_CACHE_LIMIT)" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["much", "-1", "5T", "1e9"])
def test_a_limit_that_is_none(text, monkeypatch, folder, capsys):
    monkeypatch.setenv("TINYGRAD_LSTM_CACHE_LIMIT", text)
    with pytest.raises(tg.ArgumentError, match=f"TINYGRAD_LSTM_CACHE_LIMIT is '{text}'; expected bytes"):
        add(1)
    assert main(["cache", "show"]) == 1 and "TINYGRAD_LSTM_CACHE_LIMIT" in capsys.readouterr().err


def test_compiling_keeps_the_folder_within_the_limit(folder, monkeypatch):
    monkeypatch.setattr(cachefiles, "GRACE", 0.0)
    first = add(1)
    size = cachefiles.inventory(folder).total()
    monkeypatch.setenv("TINYGRAD_LSTM_CACHE_LIMIT", str(3 * size))
    names = [first.py_func.__module__]
    for number in range(2, 8):
        time.sleep(0.02)  # times of files are told apart
        names.append(add(number).py_func.__module__)
        assert cachefiles.inventory(folder).total() <= 3.2 * size
        add(1)  # in memory already: no use of the disk
    kept = {f"_tinygrad_lstm_cache_{name}" for name in left(folder)}
    assert names[-1] in kept and names[0] not in kept
    assert add(1) is first and first(1) == 2  # what is loaded goes on working
    assert compiled(again(7)) == 0 and compiled(again(1)) == 1


def test_loading_is_use(folder, monkeypatch):
    monkeypatch.setattr(cachefiles, "GRACE", 0.0)
    for number in (1, 2):
        add(number)
    for path in folder.glob("*.sum"):
        os.utime(path, (time.time() - OLD,) * 2)
    again(1)
    cachefiles.trim(folder, cachefiles.inventory(folder).total() - 1)
    assert compiled(again(1)) == 0 and compiled(again(2)) == 1


@pytest.mark.parametrize("what", ["*.py", "*.sum", "__pycache__/*.nbi", "__pycache__/*.nbc", "**/*.*"])
def test_another_process_deletes_what_is_being_loaded(what, folder, monkeypatch):
    add(1)
    execute = codecache._execute
    times = []

    def interrupted(*arguments: object) -> object:
        if not times:
            times.append(1)
            for path in folder.glob(what):
                path.unlink()
        return execute(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(codecache, "_execute", interrupted)
    assert again(1)(1) == 2  # type: ignore[operator]
    monkeypatch.setattr(codecache, "_execute", execute)
    again(1)
    assert compiled(again(1)) == 0  # and the cache is whole again


def test_an_upgrade_leaves_programs_that_are_never_found_again(folder, monkeypatch):
    old = add(1).py_func.__module__
    environment = codecache._environment()
    monkeypatch.setattr(codecache, "_environment", lambda: f"{environment} of another version")
    new = again(1)
    assert compiled(new) == 1 and new.py_func.__module__ != old  # type: ignore[attr-defined]
    assert len(left(folder)) == 2
    monkeypatch.setattr(cachefiles, "GRACE", 0.0)
    cachefiles.trim(folder, cachefiles.inventory(folder).total() - 1)
    assert left(folder) == {new.py_func.__module__.removeprefix("_tinygrad_lstm_cache_")}  # type: ignore[attr-defined]


def test_what_is_found_by_name_is_checked_before_it_is_loaded(folder, monkeypatch):
    name = add(1).py_func.__module__
    base = name.removeprefix("_tinygrad_lstm_cache_")
    monkeypatch.delitem(sys.modules, name)
    (code,) = (folder / "__pycache__").glob("*.nbc")
    code.write_bytes(b"damaged" + code.read_bytes()[7:])
    assert compiled(importlib.import_module(name).add) == 1
    monkeypatch.delitem(sys.modules, name)
    (folder / f"{base}.py").write_text("raise SystemExit('somebody else wrote this')\n")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)


def test_a_read_only_folder_warns_once_and_compiles_in_memory(folder, monkeypatch):
    def refused(*_: object, **__: object) -> object:
        raise OSError(errno.EROFS, "Read-only file system", str(folder))

    codecache._usable.cache_clear()
    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.warns(RuntimeWarning, match=r"the cache of compiled code is off: .*Read-only.*TINYGRAD_LSTM_CACHE_DIR"):
        assert add(1)(1) == 2
    assert add(2)(1) == 3  # no second warning: those are errors here
    assert not left(folder)
    codecache._usable.cache_clear()


def test_a_full_disk_warns_and_compiles_in_memory(folder, monkeypatch):
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(codecache, "_write", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        assert add(1)(1) == 2


PROCESS = """
import sys
from tinygrad_lstm.kernels import cachefiles, codecache
cachefiles.GRACE = 0.02
source = sys.stdin.read()
for number in [*range(6), *range(6)]:
    codecache._loaded.clear()
    assert codecache.load(source.format(number=number), "add", stem="adds")(1) == 1 + number
print("right")
"""


def test_processes_that_fill_and_empty_one_folder(folder):
    environment = {**os.environ, "TINYGRAD_LSTM_CACHE_LIMIT": "12K"}  # two programs
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PROCESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=environment, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(SOURCE)
        process.stdin.close()
        process.stdin = None
    for process in processes:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0 and out == "right\n", errors
    cachefiles.trim(folder, 12_000)
    assert len(left(folder)) < 6
