"""The cache of compiled code: later processes, concurrent ones, damaged files, directories not to trust."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Prints the values, and how many programs were compiled rather than loaded.
SCRIPT = """
import sys, warnings
from tinygrad_lstm.kernels import codecache
source = '''
from tinygrad_lstm.kernels.memory import load64, stack, store64
from tinygrad_lstm.kernels.dialect import entry, private

@private
def helper(n):
    place = stack(1)
    store64(place, n + 1)
    return load64(place)

@entry
def twice(n):
    return 2 * helper(n)
'''
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    program = codecache.load(source, stem="test")
    assert codecache.load(source, stem="test") is program
    other = codecache.load(source + "# other\\n", stem="test")
compiled = sum(program.compiled for program in (program, other))
print(program.function("twice")(20), other.function("twice")(1), compiled, [w.category.__name__ for w in caught])
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

    files = sorted(directory.iterdir())
    assert len(files) == 2 and {path.stat().st_mode & 0o777 for path in files} == {0o600}
    for place in (0, 70, -100):  # in the checksum, in the names, in the machine code: one flipped bit
        for path in files:
            content = bytearray(path.read_bytes())
            content[place] ^= 1
            path.write_bytes(content)
        assert run(directory) == COLD
        assert run(directory) == WARM
    whole = files[0].read_bytes()
    for content in (b"", whole[:-1], whole[: len(whole) // 2], whole + b"more", b"\n", b"no checksum"):
        files[0].write_bytes(content)
        assert run(directory) == "42 4 1 []"
        assert files[0].read_bytes() == whole, "compiled again, it is the same"


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
        codecache.load("1 / 0\n", stem="broken")
    assert not any(name.startswith("broken_") for name in sys.modules)
    assert not list((tmp_path / "own").iterdir())


def test_another_cpu_named_by_the_program_itself_is_kept_out_of_the_folder(tmp_path: Path) -> None:
    """The name of a file tells the CPU that the environment names."""
    code = """if True:
        import numba
        from tinygrad_lstm.kernels import codecache
        numba.config.CPU_NAME = {!r}
        head = "from tinygrad_lstm.kernels.dialect import entry\\n"
        program = codecache.load(head + "@entry\\ndef f():\\n    return 7\\n", stem="test")
        print(program.function("f")(), program.compiled)"""
    environment = os.environ | {"TINYGRAD_LSTM_CACHE_DIR": str(tmp_path)}
    for name, files in (("generic", 0), (None, 1), ("generic", 1)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(name)], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.stdout.split() == ["7", "True"], done.stderr
        assert len(list(tmp_path.glob("*.code"))) == files
