"""Functions written as source text, compiled by :mod:`.translate` and Numba's code generator, and
kept on disk by content.

Each source becomes one file ``<stem>_<hash>.code`` in the cache directory: a checksum, the names of its functions,
and the machine code.  The hash covers the source, the sources of this package's generators, and the versions of
Numba, LLVM, NumPy and Python with the target CPU and its features, so a stale file cannot be found.  The checksum is
compared before anything is loaded.  Files are written aside and renamed, so a reader sees all of one or none.
What was not used for longest is deleted when there is more than ``$TINYGRAD_LSTM_CACHE_LIMIT`` (see
:mod:`.cachefiles`).

The directory is ``$TINYGRAD_LSTM_CACHE_DIR``, else ``$XDG_CACHE_HOME/tinygrad_lstm``, else
``~/.cache/tinygrad_lstm``; it is made with mode 0700.  One that is not ours, not writable, or writable by
others would let somebody else's code in: then everything is compiled in memory, after one RuntimeWarning.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .cachefiles import CODE, limit_bytes, touch, trim

__all__ = ["Program", "cache_directory", "load", "trouble", "wanted_directory"]

_PACKAGE = Path(__file__).resolve().parent.parent
# Every directory whose code decides what is generated.
_GENERATORS = ("kernels", "compiler")
NOTICE = 1.0  # seconds of compiling in this process, after which a terminal is told

_lock = threading.RLock()
_loaded: dict[tuple[str, str], Program] = {}
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


class Program:
    """The functions of one source, in memory."""

    def __init__(self, name: str, functions: dict[str, bool], code: bytes, compiled: bool) -> None:
        from . import machine

        self.name = name
        self.compiled = compiled  # rather than found on the disk
        symbols = [f"{name}.{function}" for function in functions]
        symbols += [f"{name}.{function}.python" for function, called in functions.items() if called]
        self._addresses = dict(zip(symbols, machine.load(code, symbols), strict=True))
        self._functions: dict[str, Callable[..., Any]] = {}

    def address(self, function: str) -> int:
        """The address of an exported function."""
        return self._addresses[f"{self.name}.{function}"]

    def symbol(self, function: str) -> str:
        """The name by which programs that are loaded later may call an exported function."""
        return f"{self.name}.{function}"

    def function(self, function: str) -> Callable[..., Any]:
        """An entry as a function of Python: it takes integers, and runs without the GIL."""
        found = self._functions.get(function)
        if found is None:
            from .machine import python_function

            address = self._addresses[f"{self.name}.{function}.python"]
            found = self._functions[function] = python_function(address, function)
        return found


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
    import numpy

    from .machine import compiler

    digest = hashlib.sha256()
    for folder in _GENERATORS:
        for file in sorted((_PACKAGE / folder).glob("*.py")):
            digest.update(f"{folder}/{file.name}\0".encode() + file.read_bytes() + b"\0")
    return f"{digest.hexdigest()} {numpy.__version__} {sys.version} {compiler()}"


def load(source: str, *, stem: str) -> Program:
    """The functions of the text ``source`` (see :mod:`.translate`); the same object for the same source.

    ``stem`` starts the file's name (letters, digits, underscore).
    """
    key = (source, stem)
    with _lock:
        program = _loaded.get(key)
        if program is None:
            program = _loaded[key] = _program(source, stem)
    return program


def _program(source: str, stem: str) -> Program:
    digest = hashlib.sha256(f"{_environment()}\0{source}".encode()).hexdigest()[:32]
    name = f"{stem}_{digest}"
    limit = limit_bytes()
    from .machine import overridden

    directory = None if overridden() else cache_directory()
    if directory is None:
        return _compiled(source, name, None)
    touch(directory, name)  # first, so that no other process deletes it now
    file = directory / f"{name}{CODE}"
    found = _read(file)
    if found is not None:
        return Program(name, *found, compiled=False)
    program = _compiled(source, name, file)
    if limit is not None:
        with contextlib.suppress(OSError):  # another process deletes too
            _keep_within(limit, file)
    return program


def _compiled(source: str, name: str, file: Path | None) -> Program:
    from .machine import machine_code
    from .translate import translate

    with _notice(file):
        text, functions = translate(source, name, f"<{name}>")
        code = machine_code(text)
    if file is not None:
        try:
            _write(file, _sealed(functions, code))
        except OSError as error:  # the disk is full, or the directory went away meanwhile
            _warn(f"the cache of compiled code is off: {error}")
    return Program(name, functions, code, compiled=True)


def _sealed(functions: dict[str, bool], code: bytes) -> bytes:
    """What is written: a checksum of all that follows, what is in the code, the code."""
    content = json.dumps(functions).encode() + b"\n" + code
    return hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def _read(file: Path) -> tuple[dict[str, bool], bytes] | None:
    """What :func:`_sealed` has sealed; None where there is nothing, or it was damaged."""
    try:
        seal, _, content = file.read_bytes().partition(b"\n")
    except OSError:
        return None
    if hashlib.sha256(content).hexdigest().encode() != seal:
        return None
    head, _, code = content.partition(b"\n")
    try:
        return json.loads(head), code
    except ValueError:
        return None


def _keep_within(limit: int, file: Path) -> None:
    """Delete what was not used for longest where the directory has grown beyond the limit.

    All of it is looked at when this process first adds something, and when by its own account the limit is passed.
    """
    directory = file.parent
    held = _held.get(directory)
    if held is not None:
        held += file.stat().st_size
    if held is None or held > limit:
        held = trim(directory, limit)
    _held[directory] = held


@contextlib.contextmanager
def _notice(file: Path | None) -> Iterator[None]:
    """Says once, to a terminal, that compiling is what takes so long, while it does."""
    global _compiling

    def say() -> None:
        global _announced
        _announced = True
        kept = "kept for this process only" if file is None else f"kept in {file.parent} for the next time"
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


def _write(path: Path, content: bytes) -> None:
    """Atomically: a reader sees the old file or the new one."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
