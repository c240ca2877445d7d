"""The cache of compiled code: later processes, concurrent ones, damaged files, directories not to trust."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Prints the value, and how many functions were compiled rather than loaded.
SCRIPT = """
import sys, warnings
from tinygrad_lstm.kernels import codecache
source = '''
from numba import njit, types
from tinygrad_lstm.kernels.memory import load64, stack, store64

@njit(types.int64(types.int64), nogil=True, cache=True)
def helper(n):
    place = stack(1)
    store64(place, n + 1)
    return load64(place)

@njit(types.int64(types.int64), nogil=True, cache=True)
def twice(n):
    return 2 * helper(n)
'''
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    function = codecache.load(source, "twice", stem="test")
    assert codecache.load(source, "twice", stem="test") is function
    other = codecache.load(source + "# other\\n", "twice", stem="test")
compiled = sum(sum(function.stats.cache_misses.values()) for function in (function, other))
print(function(20), other(1), compiled, [w.category.__name__ for w in caught])
"""


def start(directory: Path, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "TINYGRAD_LSTM_CACHE_DIR": str(directory), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output.strip()


def run(directory: Path, **environment: str) -> str:
    return finish(start(directory, **environment))


COLD = "42 4 2 []"
WARM = "42 4 0 []"


def test_second_process_loads_and_damage_is_repaired(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    assert run(directory) == COLD
    assert directory.stat().st_mode & 0o777 == 0o700
    assert run(directory) == WARM
    assert not list(directory.glob(".*")), "temporary files were left behind"

    for path in directory.rglob("*.nbc"):  # machine code: one flipped byte in the middle
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    assert run(directory) == COLD
    assert run(directory) == WARM

    for path in directory.rglob("*.nbi"):
        path.write_bytes(b"")
    for path in directory.glob("*.py"):
        path.write_text("1 +")
    assert run(directory) == COLD
    assert run(directory) == WARM


def test_concurrent_processes(tmp_path: Path) -> None:
    processes = [start(tmp_path / "cache") for _ in range(3)]
    assert {finish(process)[:4] for process in processes} == {"42 4"}
    assert run(tmp_path / "cache").startswith("42 4")
    assert run(tmp_path / "cache") == WARM


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_a_directory_that_others_can_write_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    directory.mkdir()
    directory.chmod(0o777)
    assert run(directory) == "42 4 2 ['RuntimeWarning']"
    assert not list(directory.iterdir())


def test_no_usable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert run(tmp_path / "file" / "cache") == "42 4 2 ['RuntimeWarning']"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_directory(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    directory.mkdir(mode=0o500)
    assert run(directory) == "42 4 2 ['RuntimeWarning']"


def test_directory_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinygrad_lstm.kernels import codecache

    monkeypatch.setenv("TINYGRAD_LSTM_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert codecache.cache_directory() == tmp_path / "xdg" / "tinygrad_lstm"
    monkeypatch.setenv("TINYGRAD_LSTM_CACHE_DIR", str(tmp_path / "own"))
    assert codecache.cache_directory() == tmp_path / "own"


def test_an_error_in_the_source_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinygrad_lstm.kernels import codecache

    monkeypatch.setenv("TINYGRAD_LSTM_CACHE_DIR", str(tmp_path / "own"))
    with pytest.raises(ZeroDivisionError):
        codecache.load("1 / 0\n", "f", stem="broken")
    assert not any(name.startswith("tinygrad_lstm") and "broken" in name for name in sys.modules)
    assert not any(name.startswith("broken") for name in sys.modules)
