"""Locks that a fork does not leave held: in the child nobody is there to release them."""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType

__all__ = ["Lock"]

_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


class Lock:
    """As ``threading.Lock``; free in a forked child, whatever thread of the parent held it."""

    __slots__ = ("__weakref__", "plain")

    def __init__(self) -> None:
        self.plain = threading.Lock()  # of now: to be taken and given back in one go
        _locks.add(self)

    def acquire(self, blocking: bool = True) -> bool:
        """Take the lock; whether that was possible."""
        return self.plain.acquire(blocking)

    def release(self) -> None:
        """Give it back."""
        self.plain.release()

    def __enter__(self) -> None:
        self.plain.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.plain.release()

    def _renew(self) -> None:
        self.plain = threading.Lock()


def _after_fork() -> None:
    for lock in list(_locks):
        lock._renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
