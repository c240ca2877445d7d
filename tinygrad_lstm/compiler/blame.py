"""Whose line it was: errors of a recording in terms of the user's code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from tinygrad_lstm.autodiff.standins import lock_of
from tinygrad_lstm.errors import Error, GraphError, TraceError

__all__ = ["explained", "is_ours", "line_where", "locked", "user_line", "users_level", "within"]

_PACKAGE = __name__.partition(".")[0]


def _home(frame: Any) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def is_ours(frame: Any) -> bool:
    home = _home(frame)
    # Code that the package generates has no name; what its libraries do in between is not the user's either.
    return home in (_PACKAGE, "", "numpy", "numba", "llvmlite") or home.startswith("namedtuple_")


def user_line() -> str:
    """``file:line`` of the innermost frame outside of this package."""
    frame: Any = sys._getframe(1)
    while frame is not None and is_ours(frame):
        frame = frame.f_back
    return "<unknown>" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def users_level() -> int:
    """The ``stacklevel`` with which a warning of the caller names the user's line."""
    level = 0
    frame: Any = sys._getframe(1)
    while frame is not None and (is_ours(frame) or _home(frame) == "contextlib"):
        level, frame = level + 1, frame.f_back
    return level if frame is None else level + 1


def within(modules: frozenset[str]) -> bool:
    """Whether a function of one of these modules is at work between the user's code and here."""
    frame: Any = sys._getframe(1)
    while frame is not None and is_ours(frame):
        if frame.f_globals.get("__name__") in modules:
            return True
        frame = frame.f_back
    return False


# What a user may call that needs values, by the name of the method, and what to do instead.
_INSTEAD = {
    "backward": "calls backward(); return the loss and call backward() on it, or compile tg.value_and_grad(loss)",
    "step": "calls step(); return the gradients and step outside of the compiled function",
}


def explained(error: Error, name: str) -> Error:
    """The error of a recording; one that says that it cannot be recorded gets the line of the user's code."""
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    users = [k for k, (frame, _) in enumerate(frames) if not is_ours(frame)]
    if not users:
        return error
    frame, line = frames[users[-1]]
    where = f"{frame.f_code.co_filename}:{line}"
    called = frames[users[-1] + 1][0].f_code.co_name if users[-1] + 1 < len(frames) else ""
    if called in _INSTEAD:
        return TraceError(f"{name} {_INSTEAD[called]} ({where})")
    if not isinstance(error, GraphError):
        return error
    text = str(error) if where in str(error) else f"{error} ({where})"
    return type(error)(f"{name} cannot be compiled: {text}")


def line_where(run: Callable[[], Any], happened: Callable[[], bool]) -> str:
    """Run something line by line; ``file:line`` of the user's line after which ``happened()`` is true."""
    found: list[str] = []
    last, here = "<unknown>", sys._getframe()

    def hidden(frame: Any) -> bool:
        return is_ours(frame) or _home(frame) in sys.stdlib_module_names

    def look(frame: Any, event: str, argument: Any) -> Any:
        nonlocal last
        if hidden(frame):
            return None
        if not found and happened():
            found.append(last)
        # What comes back has no part in the rest of the line that called it (or in the middle of which Python did).
        at = frame.f_back if event == "return" else frame
        while at is not here and hidden(at):
            at = at.f_back
        if at is not here:
            last = f"{at.f_code.co_filename}:{at.f_lineno}"
        return look

    before = sys.gettrace()
    sys.settrace(look)
    try:
        run()
    except Exception:  # the first run said what there is to say
        pass
    finally:
        sys.settrace(before)
    return found[0] if found else last


@contextmanager
def locked(reaches: Sequence[Any]) -> Iterator[None]:
    """Hold the locks of all modules in the reaches, without waiting for one while holding another."""
    modules = [module for reach in reaches for reference in reach.modules if (module := reference()) is not None]
    locks = list({id(module): lock_of(module) for module in modules}.values())
    while True:
        with ExitStack() as held:
            busy = None
            for lock in locks:
                if not lock.acquire(blocking=False):
                    busy = lock
                    break
                held.callback(lock.release)
            if busy is None:
                yield
                return
        with busy:
            pass
