"""The compiled code that is kept on disk: show what is there, or clear it.

Only files that the cache itself has made are counted and deleted; they are known by their names.  What is
cleared is compiled again when it is needed.  By itself the cache deletes what was not used for longest once it
holds more than $TINYGRAD_LSTM_CACHE_LIMIT (512M; "none" for no limit).  The folder is $TINYGRAD_LSTM_CACHE_DIR, else
$XDG_CACHE_HOME/tinygrad_lstm, else ~/.cache/tinygrad_lstm.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from tinygrad_lstm.errors import Error
from tinygrad_lstm.kernels.cachefiles import LIMIT, OLD, inventory, limit_bytes

NAME = "cache"
HELP = "show or clear the compiled code that is kept on disk"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument(
        "action", choices=("show", "clear"), metavar="{show,clear}", help="show what is kept; clear: delete it"
    )


def run(args: argparse.Namespace) -> int:
    """Print the report, or clear."""
    from tinygrad_lstm.kernels.codecache import wanted_directory

    folder = wanted_directory()
    return show(folder) if args.action == "show" else clear(folder)


def show(folder: Path) -> int:
    """Print the folder, what it holds, and whether it can be used."""
    from tinygrad_lstm.kernels.codecache import trouble

    found = inventory(folder)
    reason = trouble(folder) if folder.exists() else ""
    usable = f"no: {reason}" if reason else "yes" if folder.exists() else "not made yet"
    print(f"folder    {folder}")
    print(f"usable    {usable}")
    limit = limit_bytes()
    print(f"limit     {'none' if limit is None else _size(limit)} ({LIMIT}); what was not used for longest goes first")
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
    for file in found.files:
        file.path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody else's files are in it
        (folder / OLD).rmdir()
    left = f"; {found.others} others left alone" if found.others else ""
    print(f"cleared {found.programs.total()} programs, {found.total()} bytes, in {folder}{left}")
    return 0


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
