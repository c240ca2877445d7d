"""The bound on the cache of compiled code: what is deleted, what never is, and processes that meet there."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import tinygrad_lstm as tg
from tinygrad_lstm.cli import main
from tinygrad_lstm.kernels import cachefiles, codecache

SOURCE = """
from tinygrad_lstm.kernels.dialect import entry

@entry
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


def load(number: int) -> codecache.Program:
    return codecache.load(SOURCE.format(number=number), stem="adds")


def again(number: int) -> codecache.Program:
    """As another process finds it."""
    codecache._loaded.clear()
    return load(number)


def program(folder: Path, number: int, size: int, unused: float) -> str:
    """The file of a program that was not used for so many seconds."""
    name = f"kind_{number:032x}"
    write(folder / f"{name}.code", size, unused)
    return name


def write(path: Path, size: int, unused: float) -> None:
    path.write_bytes(b"x" * size)
    os.utime(path, (time.time() - unused,) * 2)


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


def test_a_file_that_is_being_written_stays_and_what_was_left_unfinished_goes(folder):
    name = program(folder, 1, 1000, OLD)
    write(folder / f".{name}.code.abcd1234", 100, 60.0)
    write(folder / f".{name}.code.wxyz1234", 100, OLD)
    assert cachefiles.trim(folder, 10**9) == 1000 + 100  # nothing but the leftover of a killed process
    assert cachefiles.trim(folder, 1) == 100
    assert (folder / f".{name}.code.abcd1234").exists()


def test_programs_of_earlier_versions_go_like_any_other(folder):
    (folder / "__pycache__").mkdir()
    names = [f"kind_{number:032x}" for number in range(3)]
    for name, unused in zip(names, (OLD, 2 * OLD, 5.0), strict=True):
        for file in (f"{name}.py", f"__pycache__/{name}.f.py311.1.nbc"):
            write(folder / file, 100, 9 * OLD)
        write(folder / f"{name}.sum", 100, unused)
    assert cachefiles.trim(folder, 900) == 900
    assert cachefiles.trim(folder, 700) == 600 and left(folder) == {names[0], names[2]}
    assert cachefiles.trim(folder, 1) == 300 and left(folder) == {names[2]}


def test_nothing_that_is_not_ours_is_deleted(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    name = program(folder, 1, 1000, OLD)
    (folder / "__pycache__").mkdir()
    foreign = [
        folder / "notes.txt",
        folder / "model_12.code",
        folder / f"{name}.bin",
        folder / "__pycache__" / "my.pyc",
    ]
    for path in foreign:
        path.write_text("mine")
    (folder / f"link_{'0' * 32}.code").symlink_to(foreign[0])
    (folder / f"folder_{'0' * 32}.code").mkdir()
    cachefiles.trim(folder, 1)
    assert left(folder) == set()
    assert all(path.read_text() == "mine" for path in foreign)
    assert (folder / f"link_{'0' * 32}.code").is_symlink() and (folder / f"folder_{'0' * 32}.code").is_dir()
    write(folder / "__pycache__" / f"{name}.f-1.py311.1.nbc", 1000, OLD)
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
        load(1)
    assert main(["cache", "show"]) == 1 and "TINYGRAD_LSTM_CACHE_LIMIT" in capsys.readouterr().err


def test_compiling_keeps_the_folder_within_the_limit(folder, monkeypatch):
    monkeypatch.setattr(cachefiles, "GRACE", 0.0)
    start = time.time() - OLD

    def made(number):
        """Code number so-and-so, made so many seconds after the start."""
        code = load(number)
        for path in folder.glob(f"{code.name}*"):
            os.utime(path, (start + number,) * 2)
        return code

    first = made(1)
    size = cachefiles.inventory(folder).total()
    monkeypatch.setenv("TINYGRAD_LSTM_CACHE_LIMIT", str(3 * size))
    names = [first.name]
    for number in range(2, 8):
        names.append(made(number).name)
        assert cachefiles.inventory(folder).total() <= 3.2 * size
        load(1)  # in memory already: no use of the disk
    kept = left(folder)
    assert names[-1] in kept and names[0] not in kept
    assert load(1) is first and first.function("add")(1) == 2  # what is loaded goes on working
    assert not again(7).compiled and again(1).compiled


def test_loading_is_use(folder, monkeypatch):
    monkeypatch.setattr(cachefiles, "GRACE", 0.0)
    for number in (1, 2):
        load(number)
    for path in folder.glob("*.code"):
        os.utime(path, (time.time() - OLD,) * 2)
    again(1)
    cachefiles.trim(folder, cachefiles.inventory(folder).total() - 1)
    assert not again(1).compiled and again(2).compiled


def test_another_process_deletes_what_is_being_loaded(folder, monkeypatch):
    name = load(1).name
    touch = codecache.touch

    def interrupted(*arguments: object) -> None:
        touch(*arguments)  # type: ignore[arg-type]
        (folder / f"{name}.code").unlink()

    monkeypatch.setattr(codecache, "touch", interrupted)
    found = again(1)
    assert found.compiled and found.function("add")(1) == 2
    monkeypatch.setattr(codecache, "touch", touch)
    assert not again(1).compiled  # and the cache is whole again


def test_another_process_deletes_what_was_just_written(folder, monkeypatch):
    write = codecache._write

    def vanishing(path: Path, content: bytes) -> None:
        write(path, content)
        path.unlink()

    monkeypatch.setattr(codecache, "_write", vanishing)
    assert load(1).function("add")(1) == 2
    codecache._held[folder] = 10
    assert again(2).function("add")(1) == 3


def test_an_upgrade_leaves_programs_that_are_never_found_again(folder, monkeypatch):
    old = load(1).name
    environment = codecache._environment()
    monkeypatch.setattr(codecache, "_environment", lambda: f"{environment} of another version")
    new = again(1)
    assert new.compiled and new.name != old
    assert len(left(folder)) == 2
    monkeypatch.setattr(cachefiles, "GRACE", 0.0)
    cachefiles.trim(folder, cachefiles.inventory(folder).total() - 1)
    assert left(folder) == {new.name}


def test_a_read_only_folder_warns_once_and_compiles_in_memory(folder, monkeypatch):
    def refused(*_: object, **__: object) -> object:
        raise OSError(errno.EROFS, "Read-only file system", str(folder))

    codecache._usable.cache_clear()
    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.warns(RuntimeWarning, match=r"the cache of compiled code is off: .*Read-only.*TINYGRAD_LSTM_CACHE_DIR"):
        assert load(1).function("add")(1) == 2
    assert load(2).function("add")(1) == 3  # no second warning: those are errors here
    assert not left(folder)
    codecache._usable.cache_clear()


def test_a_full_disk_warns_and_compiles_in_memory(folder, monkeypatch):
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(codecache, "_write", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        assert load(1).function("add")(1) == 2


PROCESS = """
import sys
from tinygrad_lstm.kernels import cachefiles, codecache
cachefiles.GRACE = 0.02
source = sys.stdin.read()
for number in [*range(6), *range(6)]:
    codecache._loaded.clear()
    assert codecache.load(source.format(number=number), stem="adds").function("add")(1) == 1 + number
print("right")
"""


def test_processes_that_fill_and_empty_one_folder(folder):
    environment = {**os.environ, "TINYGRAD_LSTM_CACHE_LIMIT": "5K"}  # two programs
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
    cachefiles.trim(folder, 5_000)
    assert len(left(folder)) < 6
