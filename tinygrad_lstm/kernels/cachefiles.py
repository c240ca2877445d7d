"""The files of the cache of compiled code: which are ours, when a program was last used, and a bound on their size.

A program ``<kind>_<32 hexadecimal digits>`` is one file; its time says when it was last used.  Versions up to 0.1 wrote
several: a ``.py`` file, a ``.sum`` file with checksums, and Numba's files in ``__pycache__``.  They are still known, so
that they go like any other program that is not used.

Nothing here takes a lock.  A program that vanishes while another process loads it is compiled again there, and those
that were used a moment ago are left alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import ArgumentError

__all__ = ["CODE", "LIMIT", "OLD", "Inventory", "inventory", "limit_bytes", "touch", "trim"]

LIMIT = "TINYGRAD_LSTM_CACHE_LIMIT"
DEFAULT_LIMIT = "512M"
GRACE = 600.0  # seconds after its last use in which a program is not deleted
_FULL = 0.9  # of the limit is left when it was passed: not every program that is added deletes another one
_STALE = 86_400.0  # seconds after which an unfinished file belongs to a process that was killed
_UNITS = {"": 1, "K": 1_000, "M": 1_000_000, "G": 1_000_000_000}

CODE = ".code"
OLD = "__pycache__"
# A name with a dot and an ending of its own is of a process that was killed while it wrote; Numba (.tmp.) and Python
# (.pyc.) had their own such endings.
_PROGRAM = r"(?P<program>(?P<kind>[A-Za-z]\w*)_[0-9a-f]{32})"
_OURS = {
    "": [
        re.compile(rf"{_PROGRAM}\.(code|py|sum)"),
        re.compile(rf"\.{_PROGRAM}\.(code|py|sum)(?P<part>\.\w{{8}})"),
    ],
    OLD: [
        re.compile(rf"{_PROGRAM}\..+\.py\d+\w*\.(nbi|\d+\.nbc)(?P<part>\.tmp\.\w+)?"),
        re.compile(rf"{_PROGRAM}\.cpython-\d+[\w.-]*\.pyc(?P<part>\.\d+)?"),
    ],
}


class File(NamedTuple):
    """One of our files."""

    path: Path
    program: str
    kind: str
    size: int
    time: float
    part: bool  # unfinished


class Inventory(NamedTuple):
    """What a folder holds: our files, the programs of each kind, and the number of other entries."""

    files: list[File]
    programs: Counter[str]
    others: int

    def total(self, kind: str | None = None) -> int:
        """The bytes of one kind, or of all."""
        return sum(file.size for file in self.files if kind is None or file.kind == kind)


def inventory(folder: Path) -> Inventory:
    """What is in ``folder``; a folder that is not there is empty."""
    files: list[File] = []
    programs: dict[str, str] = {}
    others = 0
    for place, patterns in _OURS.items():
        for entry in _entries(folder / place):
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # another process has deleted it
                continue
            if entry.name in _OURS and stat.S_ISDIR(status.st_mode):
                continue
            match = next((found for pattern in patterns if (found := pattern.fullmatch(entry.name))), None)
            if match is None or not stat.S_ISREG(status.st_mode):
                others += 1
                continue
            part = match.groupdict().get("part") is not None
            path = Path(entry.path)
            files.append(File(path, match["program"], match["kind"], status.st_size, status.st_mtime, part))
            programs[match["program"]] = match["kind"]
    return Inventory(files, Counter(programs.values()), others)


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    if folder.name == OLD and folder.is_symlink():
        return  # it leads to a folder that is not ours
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        yield from entries


def touch(folder: Path, program: str) -> None:
    """Note that a program is used now."""
    with contextlib.suppress(OSError):
        os.utime(folder / f"{program}{CODE}")


def limit_bytes() -> int | None:
    """The most that is kept on disk, from the environment; None for no limit."""
    text = os.environ.get(LIMIT) or DEFAULT_LIMIT
    if text.lower() == "none":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?)B?", text.strip().upper())
    if match is None:
        raise ArgumentError(
            f"the environment variable {LIMIT} is {text!r}; expected bytes, or a number with K, M or G (512M), or none"
        )
    return int(float(match[1]) * _UNITS[match[2]])


def trim(folder: Path, limit: int) -> int:
    """Delete the programs that were not used for longest until the rest fits; returns the bytes that are left.

    What was used within :data:`GRACE` seconds stays, and so does whatever is not ours.
    """
    found = inventory(folder)
    left, now = found.total(), time.time()
    for file in found.files:
        if file.part and now - file.time > _STALE:
            left -= _delete([file])
    if left <= limit:
        return left
    programs: dict[str, list[File]] = {}
    for file in found.files:
        if not file.part:
            programs.setdefault(file.program, []).append(file)
    for used, program in sorted((_used(files), program) for program, files in programs.items()):
        if left <= _FULL * limit or now - used < GRACE:
            break
        # Asked again: another process may have begun to use it.
        with contextlib.suppress(OSError):
            if time.time() - (folder / f"{program}{CODE}").stat().st_mtime < GRACE:
                continue
        left -= _delete(programs[program])
    return left


def _used(files: list[File]) -> float:
    """When a program was last used."""
    return max(file.time for file in files)


def _delete(files: list[File]) -> int:
    """Delete files and return how many bytes that were."""
    gone = 0
    for file in files:
        with contextlib.suppress(OSError):
            file.path.unlink()
            gone += file.size
    return gone
