"""Checkpoints: a tree of arrays and plain values in one safetensors file.

The file is an ordinary `safetensors <https://github.com/huggingface/safetensors>`_ file, so any
reader of that format sees the arrays under readable names (``model/lstm.weight_ih_l0``).  Its
metadata hold one JSON text: the tree with every array replaced by its name, the user's metadata, and a
checksum of the data.  In the tree JSON's own types stand for themselves; everything else is an object
with one key that starts with ``$`` (see :func:`_encode`).  Nothing is ever unpickled or executed.
"""

from __future__ import annotations

import json
import math
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tinygrad_lstm.errors import ArgumentError, CheckpointError, DTypeError, FileError
from tinygrad_lstm.tensor import Tensor

__all__ = ["load", "read_metadata", "save"]

_VERSION = 1
_KEY = "tinygrad_lstm"
_MAX_HEADER = 100_000_000  # the limit of the format's reference implementation
DTYPES = frozenset(
    np.dtype(name)
    for name in "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64".split()  # noqa: SIM905
)

PathLike = str | os.PathLike[str]


def save(path: PathLike, tree: Any, metadata: dict[str, Any] | None = None) -> None:
    """Write a tree to one file, atomically.

    A tree is made of dicts (str or int keys), lists and tuples; its leaves are arrays and
    NumPy scalars (bool, int8 .. int64, uint8 .. uint64, float16, float32, float64), Tensors (saved as
    arrays), Python numbers (ints of any size; NaN and infinity too), strings, booleans and None.

    The new content goes to a temporary file in the same folder, is flushed to the disk and then
    renamed over ``path``: at any moment ``path`` is the whole old file or the whole new one.  Like
    ``open(path, "wb")``, a symbolic link is followed, an existing file keeps its permissions, and a
    new one gets those of the umask.

    Parameters
    ----------
    path : str or path-like
    tree : tree as above
    metadata : dict of plain values, optional
        A note about the file, which :func:`read_metadata` reads without the arrays.

    Raises
    ------
    FileError
        The file could not be written.  The old file, if any, is still there; no stray file is.
    DTypeError
        A leaf, a dtype or a key that a checkpoint cannot hold; the message names its place in the tree.
    ArgumentError
        A tree that contains itself, or that is too deep or too large.

    Examples
    --------
    >>> import os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "run.safetensors")
    >>> save(path, {"w": np.arange(3), "step": 7, "best": float("inf")}, metadata={"note": "demo"})
    >>> load(path)
    {'w': array([0, 1, 2]), 'step': 7, 'best': inf}
    >>> read_metadata(path)
    {'note': 'demo'}
    """
    if metadata is not None and not isinstance(metadata, dict):
        raise DTypeError(f"metadata is a dict or None, found {type(metadata).__name__}")
    arrays: dict[str, np.ndarray] = {}
    try:
        tree_json = _encode(tree, (), arrays, set())
        metadata_json = _encode(metadata or {}, ("metadata",), None, set())
        record = json.dumps(
            {"version": _VERSION, "tree": tree_json, "metadata": metadata_json, "data_crc32": _data_checksum(arrays)},
            separators=(",", ":"),
        )
    except RecursionError:
        raise ArgumentError("the tree is nested too deeply to be saved") from None
    if len(record) > _MAX_HEADER:
        raise ArgumentError(
            f"the tree's plain values take {len(record)} bytes of JSON, at most {_MAX_HEADER} are possible; "
            "turn long lists of numbers into arrays"
        )
    from safetensors.numpy import save as serialised

    # One entry: the writer keeps several in no fixed order, and equal trees shall make equal files.
    note = {_KEY: f"{_header_checksum(arrays, record):08x}{record}"}
    with replacing(path) as file:
        file.write(serialised(arrays, note))


def load(path: PathLike) -> Any:
    """Read back the tree that :func:`save` wrote.

    Everything comes back as it was saved, except that Tensors become arrays, arrays are C-contiguous,
    writable and in native byte order, and subclasses of built-in types become those.

    Raises
    ------
    FileNotFoundError
        There is no such file.  (Other errors of the operating system pass through too.)
    CheckpointError
        The file is damaged or was not written by :func:`save`.
    """
    arrays, record = _read(path, with_arrays=True)
    return _decoded(record, "tree", arrays, path)


def read_metadata(path: PathLike) -> dict[str, Any]:
    """The ``metadata`` given to :func:`save`; reads the header only.  Errors as for :func:`load`."""
    _, record = _read(path, with_arrays=False)
    metadata = _decoded(record, "metadata", {}, path)
    if not isinstance(metadata, dict):
        raise _damaged(path, "its metadata are no dict")
    return metadata


# -- the tree as JSON --------------------------------------------------------------------------


def _encode(value: Any, place: tuple[Any, ...], arrays: dict[str, np.ndarray] | None, parents: set[int]) -> Any:
    """The JSON form of ``value``; arrays move to ``arrays`` (None: they are not allowed here)."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (np.ndarray, np.generic, Tensor)) and not isinstance(value, np.str_):
        # np.float64 is also a float: NumPy's types have to be asked for first.
        return {"$scalar" if isinstance(value, np.generic) else "$array": _enrol(value, place, arrays)}
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        # Readers of JSON in other languages stop at 64 bits, Python's at 4300 digits.
        return int(value) if -(2**63) <= value < 2**63 else {"$int": hex(value)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if not isinstance(value, (dict, list, tuple)):
        hint = "; save module.state_dict()" if hasattr(value, "state_dict") else ""
        raise DTypeError(f"{_where(place)} is of type {type(value).__name__}, which a checkpoint cannot hold{hint}")
    if id(value) in parents:
        raise ArgumentError(f"{_where(place)} contains itself; a checkpoint holds trees only")
    parents.add(id(value))
    try:
        if isinstance(value, dict):
            return _encode_dict(value, place, arrays, parents)
        items = [_encode(item, (*place, i), arrays, parents) for i, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    finally:
        parents.discard(id(value))


def _encode_dict(
    value: dict[Any, Any], place: tuple[Any, ...], arrays: dict[str, np.ndarray] | None, parents: set[int]
) -> dict[str, Any]:
    for key in value:
        if isinstance(key, bool) or not isinstance(key, (str, int)):
            raise DTypeError(f"{_where(place)} has the key {key!r}; keys are strings or ints")
    pairs = [(key, _encode(item, (*place, key), arrays, parents)) for key, item in value.items()]
    if all(isinstance(key, str) and not key.startswith("$") for key, _ in pairs):
        return {str(key): item for key, item in pairs}
    return {"$dict": [[str(key) if isinstance(key, str) else int(key), item] for key, item in pairs]}


def _enrol(value: Any, place: tuple[Any, ...], arrays: dict[str, np.ndarray] | None) -> str:
    """Put an array into ``arrays`` under a readable name of its own; returns the name."""
    if arrays is None:
        raise DTypeError(f"{_where(place)} is an array; metadata are plain values, arrays belong into the tree")
    array = value.data if isinstance(value, Tensor) else np.asarray(value)
    if isinstance(value, np.ma.MaskedArray):
        raise DTypeError(f"{_where(place)} is a masked array, which a checkpoint cannot hold; save data and mask")
    dtype = array.dtype.newbyteorder("=")
    if dtype not in DTYPES:
        raise DTypeError(
            f"{_where(place)} has dtype {array.dtype}, which a checkpoint cannot hold; "
            "bool, (u)int8 .. 64 and float16 .. 64 are possible"
        )
    path = "/".join(str(part) for part in place).encode("utf-8", "backslashreplace").decode("utf-8") or "value"
    name, n = path, 2
    while name in arrays or name == "__metadata__":
        name, n = f"{path}#{n}", n + 1
    # ascontiguousarray would turn a 0-d array into a 1-d one.
    arrays[name] = np.asarray(array, dtype, order="C")
    return name


def _decoded(record: dict[str, Any], part: str, arrays: dict[str, np.ndarray], path: PathLike) -> Any:
    try:
        return _decode(record[part], arrays)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise _damaged(path, f"its {part} cannot be read") from None


def _decode(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, list):
        return [_decode(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not (tag := next(iter(value))).startswith("$"):
        return {key: _decode(item, arrays) for key, item in value.items()}
    content = value[tag]
    if tag == "$array":
        return arrays[content]
    if tag == "$scalar":
        return arrays[content][()]
    if tag == "$int":
        return int(content, 16)
    if tag == "$float":
        return float(content)
    if tag == "$tuple":
        return tuple(_decode(item, arrays) for item in content)
    if tag == "$dict":
        return {key: _decode(item, arrays) for key, item in content}
    raise ValueError(tag)


def _where(place: tuple[Any, ...]) -> str:
    return "the tree" + "".join(f"[{part!r}]" for part in place)


# -- the file ------------------------------------------------------------------------------------


def _data_checksum(arrays: dict[str, np.ndarray]) -> int:
    checksum = 0
    for name in sorted(arrays):
        little = arrays[name].astype(arrays[name].dtype.newbyteorder("<"), copy=False)
        checksum = zlib.crc32(np.ascontiguousarray(little).reshape(-1).view(np.uint8).data, checksum)
    return checksum


def _header_checksum(arrays: dict[str, np.ndarray], record: str) -> int:
    entries = [[name, arrays[name].dtype.name, list(arrays[name].shape)] for name in sorted(arrays)]
    return zlib.crc32(json.dumps([entries, record]).encode("ascii"))


def _read(path: PathLike, with_arrays: bool) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays by name, and our record."""
    import safetensors

    target = regular_file(path, "checkpoint")
    with open(target, "rb") as file:  # the system's own errors, a missing file above all
        size = os.fstat(file.fileno()).st_size
    arrays: dict[str, np.ndarray] = {}
    try:
        with safetensors.safe_open(target, framework="numpy") as reader:
            note = reader.metadata() or {}
            if _KEY in note and with_arrays:
                # A copy of its own: what comes from the reader may be read-only.
                arrays = {name: np.array(reader.get_tensor(name)) for name in reader.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError, OverflowError, MemoryError):
        what = "is empty" if size == 0 else "is cut off, damaged or no checkpoint"
        raise CheckpointError(f"{target} {what}: its {size} bytes are no whole safetensors file") from None
    if _KEY not in note:
        raise CheckpointError(
            f"{target} is a safetensors file, but not one that tg.save wrote; read it with the safetensors package"
        )
    try:
        checksum, text = note[_KEY][:8], note[_KEY][8:]
        record = json.loads(text)
        version = int(record["version"])
        whole = not with_arrays or int(checksum, 16) == _header_checksum(arrays, text)
    except (KeyError, ValueError, TypeError, RecursionError):
        raise _damaged(path, "its header was changed") from None
    if version > _VERSION:
        raise CheckpointError(
            f"{target} has format version {version}, this release reads up to {_VERSION}; upgrade tinygrad-lstm"
        )
    if not whole:
        raise _damaged(path, "its header was changed")
    if with_arrays and record.get("data_crc32") != _data_checksum(arrays):
        raise _damaged(path, "its data are not those that were saved")
    return arrays, record


def regular_file(path: PathLike, what: str) -> str:
    """The path as text; raises CheckpointError where something else than a file stands there."""
    target = _fspath(path)
    if os.path.exists(target) and not os.path.isfile(target):
        # Opening a pipe would wait for ever.
        kind = "a folder" if os.path.isdir(target) else "no regular file"
        raise CheckpointError(f"{target} is {kind}, no {what}")
    return target


@contextmanager
def replacing(path: PathLike) -> Iterator[BinaryIO]:
    """A file to write to; it takes the place of ``path`` when the block ends without an error."""
    shown = _fspath(path)
    created = False
    try:
        target = Path(os.path.realpath(shown))
        temporary = target.parent / f".tg-{os.urandom(6).hex()}.tmp"
        mode = _mode_of_existing(target)
        # 0o666 is what open() asks for: the umask decides.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        created = True
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(temporary, mode)
        os.replace(temporary, target)
        created = False
        _sync_folder(target.parent)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise FileError(f"cannot write {shown}: {reason[:1].lower()}{reason[1:]}") from error
    finally:
        if created:
            temporary.unlink(missing_ok=True)


def _mode_of_existing(target: Path) -> int | None:
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        raise OSError("it is a folder" if stat.S_ISDIR(mode) else "it is no regular file")
    if not os.access(target, os.W_OK):
        # A rename would replace a write-protected file without asking.
        raise OSError("the file is write-protected")
    return stat.S_IMODE(mode)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system lets a folder be synchronised."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _fspath(path: PathLike) -> str:
    if not isinstance(path, (str, os.PathLike)):
        raise DTypeError(f"a path is a str or path-like, found {type(path).__name__}")
    return os.fspath(path)


def _damaged(path: PathLike, why: str) -> CheckpointError:
    return CheckpointError(f"{_fspath(path)} is damaged: {why}")
