"""Changes in place: what a tensor and its views share, and how a backward notices that it was written to.

A tensor has a :class:`Storage` only if something could write to it behind the tape's back, or if a view
shares its memory: it was aliased, its ``data`` was read or set, an optimizer updated it, or a primitive made a
view of it.  All others pay for one attribute.

* ``data = array`` and optimizers bump the *version*; a record remembers the version of what it saved.
* Reading ``data`` hands the array out.  From then on only the content tells: a *fingerprint* of the whole
  memory is taken at that moment if some record has saved it, and one of the saved part at every later save.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_lstm.errors import ArgumentError, GraphError, OutOfRangeError, ShapeError
from tinygrad_lstm.record import Output, Record, now

if TYPE_CHECKING:
    from tinygrad_lstm.tensor import Tensor

__all__ = ["Storage", "assign", "fingerprint", "guards_of", "last_change", "share", "verify"]


# The serial of the last time that any memory was exposed or changed: older records are looked at, younger ones cannot
# have been touched (unless they took a fingerprint).
last_change = [0]
_noting = threading.RLock()  # a finalizer may come here in the middle of it


def _note() -> None:
    with _noting:
        serial = now()
        if serial > last_change[0]:
            last_change[0] = serial


def untouched(record: Record) -> bool:
    """Whether nothing that this record saved can have been changed since, at one look."""
    return record.serial > last_change[0] and not record.marked


class Storage:
    """The state of a piece of memory, shared by a tensor and its views."""

    __slots__ = ("exposed", "fingerprint", "memory", "used", "version")

    def __init__(self, memory: np.ndarray, used: bool) -> None:
        self.memory = memory
        self.used = used  # some record has saved it, or a view of it
        self.version = 0
        self.exposed = False  # somebody outside holds the array
        self.fingerprint: Any = None  # of the whole memory, if it was exposed after it was saved

    def __reduce__(self) -> Any:
        """None in deep copies and pickles: a tensor has memory of its own there, which nobody has seen."""
        return type(None), ()

    def bump(self) -> None:
        """Note that the content was changed."""
        self.version += 1
        _note()

    def expose(self) -> None:
        """Note that somebody outside gets hold of the array."""
        if not self.exposed and self.used:
            # The last moment at which the content is surely what was saved.
            self.fingerprint = fingerprint(self.memory)
        self.exposed = True
        _note()


def fingerprint(array: np.ndarray) -> Any:
    """A value that almost surely changes when the array is written to; runs at memory bandwidth.

    Sums of machine words in 61 columns: a prime width, so that moved blocks and sign flips do not cancel.
    """
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    n = flat.size // 8
    words, rest = flat[: n * 8].view(np.uint64), flat[n * 8 :]
    rows = n // 61
    columns = words[: rows * 61].reshape(rows, 61).sum(axis=0, dtype=np.uint64)
    return columns.tobytes(), words[rows * 61 :].tobytes(), rest.tobytes()


def share(source: Any, views: tuple[Tensor, ...]) -> None:
    """Views of a tensor share its storage: a write to one is a write to all."""
    storage = source._store()
    for view in views:
        view._storage = storage


def guards_of(saved: Sequence[Any]) -> tuple[dict[int, Any] | None, bool]:
    """What a record remembers of the tensors that it saves, by position: (version, fingerprint or None), where that is
    anything; and whether a fingerprint is among it."""
    guards: dict[int, Any] = {}
    marked = False
    for index, value in enumerate(saved):
        storage = getattr(value, "_storage", None)
        if storage is not None:
            storage.used = True
            if storage.exposed:
                guards[index] = storage.version, fingerprint(value._data)
                marked = True
            elif storage.version:
                guards[index] = storage.version, None
    return guards or None, marked


def watch_output(node: Any, storage: Storage, always: bool = False) -> None:
    """A record that saved one of its own outputs (or has residuals where one lies) watches the storage that the output
    got later."""
    record = node
    if node.__class__ is Output:
        record = node.record
        always = always or (record.saved is not None and node.index in getattr(record.saved[-1], "shared", ()))
        if not always:
            return
    if isinstance(record, Record) and record.saved is not None and (always or record.primitive.saves_out):
        guards = record.guards or {}
        record.guards = {**guards, -1: (*guards.get(-1, ()), (storage, storage.version))}


def verify(record: Record) -> None:
    """Raise if a value that the record saved was changed since; the common path only looks."""
    guards = record.guards or {}
    for storage, version in guards.get(-1, ()):
        if _differs(storage, version, None, None):
            raise _changed(f"the output of {record.describe()}", record)
    for index, saved in enumerate(record.saved or ()):
        if saved is None or (storage := getattr(saved, "_storage", None)) is None:
            continue
        version, mark = guards.get(index, (0, None))
        if _differs(storage, version, mark, saved._data):
            meta = saved._meta
            label = f" {meta.label!r}" if meta is not None and meta.label else ""
            raise _changed(f"input {index}{label} of shape {saved.shape} of {record.describe()}", record)


def _differs(storage: Storage, version: int, mark: Any, part: np.ndarray | None) -> bool:
    if storage.version != version:
        return True
    if mark is not None and part is not None:
        return bool(mark != fingerprint(part))
    return storage.fingerprint is not None and bool(storage.fingerprint != fingerprint(storage.memory))


def _changed(what: str, record: Record) -> GraphError:
    return GraphError(
        f"{what} was changed in place after it was saved for the backward pass; change it (or call optimizer.step()) "
        "after backward(), or write to a copy"
    )


def assign(array: np.ndarray, index: Any, value: Any) -> None:
    """``array[index] = value`` for a number or an array; what does not fit is said in words of our own."""
    if not array.flags.writeable:
        raise ArgumentError(f"the array of this tensor of shape {array.shape} is read-only; tg.tensor makes a copy")
    try:
        array[index] = value
    except IndexError:
        raise OutOfRangeError(f"index {index!r:.80} does not fit an array of shape {array.shape}") from None
    except OverflowError:
        raise OutOfRangeError(f"{value!r} does not fit the dtype {array.dtype}") from None
    except ValueError:
        if not np.ndim(value):
            raise ArgumentError(f"{value!r} does not fit the dtype {array.dtype}") from None
        raise ShapeError(f"a value of shape {value.shape} for t[{index!r:.80}] of shape {array[index].shape}") from None
