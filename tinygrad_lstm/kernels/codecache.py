"""Functions generated as source text, compiled by Numba, and kept on disk by content.

Each source becomes one module file ``<stem>_<hash>.py`` in the cache directory; Numba's own cache puts the
machine code next to it.  The hash covers the source, the sources of this package's generators, and the
versions of Numba, NumPy and Python with the target CPU and its features, so a stale file cannot be found.
A checksum file guards the machine code, which Numba itself would load unseen.  What was not used for longest is
deleted when there is more than ``$TINYGRAD_LSTM_CACHE_LIMIT`` (see :mod:`.cachefiles`).

The directory is ``$TINYGRAD_LSTM_CACHE_DIR``, else ``$XDG_CACHE_HOME/tinygrad_lstm``, else
``~/.cache/tinygrad_lstm``; it is made with mode 0700.  One that is not ours, not writable, or writable by
others would let somebody else's code in: then everything is compiled in memory, after one RuntimeWarning.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.abc
import importlib.machinery
import linecache
import os
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .cachefiles import limit_bytes, touch, trim

__all__ = ["cache_directory", "load", "trouble", "wanted_directory"]

_PREFIX = "_tinygrad_lstm_cache"
_PACKAGE = Path(__file__).resolve().parent.parent
# Every directory whose code decides what is generated.
_GENERATORS = ("kernels", "compiler")
NOTICE = 1.0  # seconds of compiling in this process, after which a terminal is told
_MTIME = 1_000_000_000  # Numba's index trusts size and mtime: the same for the same content, whoever wrote it

_lock = threading.RLock()
_loaded: dict[tuple[str, str], Any] = {}
_warned = False
_compiling = 0.0  # seconds so far
_announced = False
_held: dict[Path, int] = {}  # bytes in a folder: counted when this process first adds to it, and what it added


def _after_fork() -> None:
    """Another thread of the parent may have held the lock; it is not there to release it."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _Finder:
    """Finds cached modules by name, so that pickled references into them resolve in a later process."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(_PREFIX + "_"):
            return None
        directory = cache_directory()
        base = name[len(_PREFIX) + 1 :]
        if directory is None:
            return None
        file = directory / f"{base}.py"
        try:
            source = file.read_bytes().decode()
        except (OSError, UnicodeDecodeError):
            return None
        if _base(source, base.rpartition("_")[0]) != base:
            return None  # not what was written under that name
        if not _checksums_hold(directory, base):
            _discard(directory, base)
        touch(directory, base)
        return importlib.machinery.ModuleSpec(name, _Loader(source, str(file)), origin=str(file))


class _Loader(importlib.abc.Loader):
    """Runs the source that was looked at: no bytecode of Python's stands beside it that could be damaged."""

    def __init__(self, source: str, filename: str) -> None:
        self.source, self.filename = source, filename

    def exec_module(self, module: types.ModuleType) -> None:
        module.__file__ = self.filename
        exec(compile(self.source, self.filename, "exec"), module.__dict__)


def wanted_directory() -> Path:
    """The directory that the environment asks for; nothing is looked at or made."""
    explicit = os.environ.get("TINYGRAD_LSTM_CACHE_DIR")
    if explicit:
        return Path(explicit).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "tinygrad_lstm"


def cache_directory() -> Path | None:
    """The directory in use, created where needed; None (and one warning) when it cannot be trusted."""
    path = wanted_directory()
    return path if _usable(path, os.getpid()) else None


@functools.lru_cache(maxsize=16)
def _usable(path: Path, pid: int) -> bool:
    """Whether ``path`` exists (or could be made), is ours alone, and takes a file.  Asked once a process."""
    reason = trouble(path, make=True)
    if reason:
        _warn(
            f"the cache of compiled code is off: {reason}; code is compiled again in every process. "
            "Set TINYGRAD_LSTM_CACHE_DIR to a directory of your own."
        )
    return not reason


def trouble(path: Path, make: bool = False) -> str:
    """Why ``path`` cannot be used as a cache, "" if it can; with ``make`` it is created where needed."""
    try:
        if make:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
        if hasattr(os, "geteuid"):
            if status.st_uid != os.geteuid():
                return f"{path} belongs to another user"
            if status.st_mode & 0o022:
                return f"{path} is writable by other users"
        with tempfile.TemporaryFile(dir=path):
            return ""
    except OSError as error:
        return str(error)


def _warn(message: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(message, RuntimeWarning, stacklevel=3)


@functools.lru_cache(maxsize=1)
def _environment() -> str:
    """What besides the source decides the machine code."""
    import numba
    import numpy
    from numba.core.registry import cpu_target

    digest = hashlib.sha256()
    for folder in _GENERATORS:
        for file in sorted((_PACKAGE / folder).glob("*.py")):
            digest.update(f"{folder}/{file.name}\0".encode() + file.read_bytes() + b"\0")
    machine = cpu_target.target_context.codegen().magic_tuple()
    return f"{digest.hexdigest()} {numba.__version__} {numpy.__version__} {sys.version} {machine}"


def load(source: str, function_name: str, *, stem: str) -> Callable[..., Any]:
    """The function ``function_name`` of the module text ``source``; the same object for the same source.

    ``source`` is a whole module that imports what it needs and decorates with
    ``numba.njit(..., cache=True)``; give signatures explicitly, so that compiling happens here, where a
    damaged cache is recovered from.  ``stem`` starts the file's name (letters, digits, underscore).
    """
    key = (source, stem)
    with _lock:
        module = _loaded.get(key)
        if module is None:
            module = _loaded[key] = _module(source, stem)
    function: Callable[..., Any] = getattr(module, function_name)
    return function


def _base(source: str, stem: str) -> str:
    """The name of a program: its kind, and a hash of all that its machine code depends on."""
    digest = hashlib.sha256(f"{_environment()}\0{source}".encode()).hexdigest()[:32]
    return f"{stem}_{digest}"


def _module(source: str, stem: str) -> types.ModuleType:
    base = _base(source, stem)
    directory = cache_directory()
    if directory is None:
        return _in_memory(source, base)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
    try:
        try:
            return _on_disk(source, base, directory)
        except Exception:
            # Whatever Numba found in a damaged index, or missed of what another process deleted meanwhile: once more
            # from nothing, then errors are real.
            _discard(directory, base)
            return _on_disk(source, base, directory)
    except OSError as error:  # the disk is full, or the directory went away meanwhile
        _warn(f"the cache of compiled code is off: {error}")
        return _in_memory(source, base)


def _on_disk(source: str, base: str, directory: Path) -> types.ModuleType:
    """A module from its files in the directory, which are made (again) where they are missing or damaged."""
    limit = limit_bytes()
    touch(directory, base)  # first, so that no other process deletes it now
    file = directory / f"{base}.py"
    if not _holds(file, source.encode()):
        _write(file, source.encode())
    if not _checksums_hold(directory, base):
        _discard(directory, base)
    kept = bool(_machine_code(directory, base))
    with contextlib.nullcontext() if kept else _notice(directory):
        module = _execute(source, base, str(file))
    _write_checksums(directory, base)
    if not kept and limit is not None:
        with contextlib.suppress(OSError):  # another process deletes too
            _keep_within(limit, directory, base)
    return module


def _keep_within(limit: int, directory: Path, base: str) -> None:
    """Delete what was not used for longest where the directory has grown beyond the limit.

    All of it is looked at when this process first adds something, and when by its own account the limit is passed.
    """
    held = _held.get(directory)
    if held is not None:
        held += sum(path.stat().st_size for path in (*_machine_code(directory, base), directory / f"{base}.py"))
    if held is None or held > limit:
        held = trim(directory, limit)
    _held[directory] = held


def _execute(source: str, base: str, filename: str) -> types.ModuleType:
    name = f"{_PREFIX}_{base}"
    module = types.ModuleType(name)
    module.__file__ = filename
    # Before it runs: Numba pickles references to the module by name.
    sys.modules[name] = module
    try:
        exec(compile(source, filename, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _in_memory(source: str, base: str) -> types.ModuleType:
    filename = f"<tinygrad_lstm {base}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    with _notice(None):
        return _execute(source.replace("cache=True", "cache=False"), base, filename)


@contextlib.contextmanager
def _notice(directory: Path | None) -> Iterator[None]:
    """Says once, to a terminal, that compiling is what takes so long, while it does."""
    global _compiling

    def say() -> None:
        global _announced
        _announced = True
        kept = "kept for this process only" if directory is None else f"kept in {directory} for the next time"
        print(f"tinygrad_lstm: compiling native code, {kept}", file=sys.stderr, flush=True)

    start = time.monotonic()
    timer = None
    if not _announced and sys.stderr is not None and sys.stderr.isatty():
        timer = threading.Timer(max(0.0, NOTICE - _compiling), say)
        timer.daemon = True
        with contextlib.suppress(RuntimeError):  # no more threads
            timer.start()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()
        _compiling += time.monotonic() - start


def _machine_code(directory: Path, base: str) -> list[Path]:
    """Numba's files for one module: ``<base>.<function>-<line>.py311.nbi`` and ``...1.nbc``."""
    found = [p for p in (directory / "__pycache__").glob(f"{base}.*") if p.suffix in {".nbi", ".nbc"}]
    return sorted(found)


def _checksums(directory: Path, base: str) -> bytes:
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()} {p.name}\n" for p in _machine_code(directory, base)]
    return "".join(lines).encode()


def _checksums_hold(directory: Path, base: str) -> bool:
    return _holds(directory / f"{base}.sum", _checksums(directory, base))


def _write_checksums(directory: Path, base: str) -> None:
    content = _checksums(directory, base)
    if not _holds(directory / f"{base}.sum", content):
        _write(directory / f"{base}.sum", content)
        touch(directory, base)


def _discard(directory: Path, base: str) -> None:
    for path in _machine_code(directory, base):
        path.unlink(missing_ok=True)


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except OSError:
        return False


def _write(path: Path, content: bytes) -> None:
    """Atomically: a reader sees the old file or the new one."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        os.utime(temporary, (_MTIME, _MTIME))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
