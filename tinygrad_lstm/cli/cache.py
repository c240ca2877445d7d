"""The compiled code that is kept on disk: show what is there, or clear it.

Only files that the cache itself has made are counted and deleted; they are known by their names.  What is
cleared is compiled again when it is needed.  The folder is $TINYGRAD_LSTM_CACHE_DIR, else
$XDG_CACHE_HOME/tinygrad_lstm, else ~/.cache/tinygrad_lstm.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tinygrad_lstm.errors import Error

NAME = "cache"
HELP = "show or clear the compiled code that is kept on disk"

CODE = "__pycache__"
# A program is <kind>_<32 hexadecimal digits>.  What else is written: a name with a dot and an ending of its own is of
# a process that was killed while it wrote; Numba (.tmp.) and Python (.pyc.) have their own such endings.
_PROGRAM = r"(?P<program>(?P<kind>[A-Za-z]\w*)_[0-9a-f]{32})"
_OURS = {
    "": [re.compile(rf"{_PROGRAM}\.(py|sum)"), re.compile(rf"\.{_PROGRAM}\.(py|sum)\.\w{{8}}")],
    CODE: [
        re.compile(rf"{_PROGRAM}\..+\.py\d+\w*\.(nbi|\d+\.nbc)(\.tmp\.\w+)?"),
        re.compile(rf"{_PROGRAM}\.cpython-\d+[\w.-]*\.pyc(\.\d+)?"),
    ],
}


class Inventory(NamedTuple):
    """What a folder holds: our files by kind, and the number of other entries."""

    files: list[tuple[Path, str, int]]  # path, kind, bytes
    programs: Counter[str]
    others: int

    def total(self, kind: str | None = None) -> int:
        """The bytes of one kind, or of all."""
        return sum(size for _, of, size in self.files if kind is None or of == kind)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("action", choices=("show", "clear"), help="show what is kept; clear: delete it")


def run(args: argparse.Namespace) -> int:
    """Print the report, or clear."""
    from tinygrad_lstm.kernels.codecache import wanted_directory

    folder = wanted_directory()
    return show(folder) if args.action == "show" else clear(folder)


def inventory(folder: Path) -> Inventory:
    """What is in ``folder``; a folder that is not there is empty."""
    files: list[tuple[Path, str, int]] = []
    programs: dict[str, str] = {}
    others = 0
    for place in _OURS:
        for entry in _entries(folder / place):
            status = entry.stat(follow_symlinks=False)
            if entry.name in _OURS and stat.S_ISDIR(status.st_mode):
                continue
            matches = (pattern.fullmatch(entry.name) for pattern in _OURS[place])
            match = next((found for found in matches if found), None)
            if match is None or not stat.S_ISREG(status.st_mode):
                others += 1
                continue
            files.append((Path(entry.path), match["kind"], status.st_size))
            programs[match["program"]] = match["kind"]
    return Inventory(files, Counter(programs.values()), others)


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    if folder.name == CODE and folder.is_symlink():
        return  # it leads to a folder that is not ours
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        yield from entries


def show(folder: Path) -> int:
    """Print the folder, what it holds, and whether it can be used."""
    from tinygrad_lstm.kernels.codecache import trouble

    found = inventory(folder)
    reason = trouble(folder) if folder.exists() else ""
    usable = f"no: {reason}" if reason else "yes" if folder.exists() else "not made yet"
    print(f"folder    {folder}")
    print(f"usable    {usable}")
    print(f"programs  {found.programs.total()} ({_size(found.total())})")
    for kind, count in sorted(found.programs.items(), key=lambda item: -found.total(item[0])):
        print(f"{count:10d}  {kind} ({_size(found.total(kind))})")
    if found.others:
        print(f"others    {found.others}, not made by the cache")
    return 0


def clear(folder: Path) -> int:
    """Delete what the cache has made, and nothing else."""
    from tinygrad_lstm.kernels.codecache import trouble

    found = inventory(folder)
    if not found.files:
        if found.others:
            raise Error(
                f"{folder} holds nothing that this cache has made, so it may be another folder; nothing deleted"
            )
        print(f"nothing to clear in {folder}")
        return 0
    reason = trouble(folder)
    if reason:
        raise Error(f"{reason}, so it is not a folder that this cache uses; nothing deleted")
    for path, _, _ in found.files:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody else's files are in it
        (folder / CODE).rmdir()
    left = f"; {found.others} others left alone" if found.others else ""
    print(f"cleared {found.programs.total()} programs, {found.total()} bytes, in {folder}{left}")
    return 0


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
