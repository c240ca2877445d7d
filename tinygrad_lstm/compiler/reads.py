"""What objects and functions of the user's read: attributes, slots, closure cells, globals by name."""

from __future__ import annotations

import dis
import functools
import sys
from types import CellType, CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np

from tinygrad_lstm.primitive import Primitive
from tinygrad_lstm.random import Generator

__all__ = [
    "FOREIGN", "SCALARS", "Cell", "Slots", "functions_of", "global_names", "global_paths", "is_foreign", "is_installed",
    "is_plain_object", "is_scalar", "is_static", "scalar_key", "slots_of",
]  # fmt: skip

SCALARS = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), slice, np.generic, np.dtype)
FOREIGN = frozenset(sys.stdlib_module_names) | {"numpy", "numba", "scipy", "torch", "jax"}
_NAMESPACES = {("types", "SimpleNamespace"), ("argparse", "Namespace")}  # attributes are all that they are


def is_scalar(value: Any) -> bool:
    """Whether a value counts by what it is: a number, a string, None, a slice."""
    return isinstance(value, SCALARS)


def scalar_key(value: Any) -> Any:
    """A number or string as a part of a key: 1, 1.0 and True differ, and so do 0.0 and -0.0; NaN equals itself."""
    return value.__class__, repr(value) if isinstance(value, (float, complex, slice, np.generic)) else value


@functools.lru_cache(maxsize=4096)
def global_names(code: CodeType) -> tuple[str, ...]:
    """The globals that a function names, also in functions and comprehensions inside of it."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names.update(global_names(constant))
    return tuple(sorted(names))


@functools.lru_cache(maxsize=4096)
def global_paths(code: CodeType) -> tuple[tuple[str, ...], ...]:
    """Attributes of globals that a function names, as ``settings.scale``: (global, attribute, attribute of that...)."""
    found: set[tuple[str, ...]] = set()
    path: tuple[str, ...] = ()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and path:
            path = (*path, instruction.argval)
            found.add(path)
        elif instruction.opname not in ("CACHE", "EXTENDED_ARG"):
            path = (instruction.argval,) if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME") else ()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found.update(global_paths(constant))
    return tuple(sorted(found))


class Cell:
    """A closure cell read like a dict with one entry."""

    __slots__ = ("cell",)

    def __init__(self, cell: CellType) -> None:
        self.cell = cell

    def __getitem__(self, key: Any) -> Any:
        return self.cell.cell_contents

    def __setitem__(self, key: Any, value: Any) -> None:
        self.cell.cell_contents = value


class Slots:
    """The attributes of an object that stand in ``__slots__``, read like a dict; None where one is not set."""

    __slots__ = ("members", "value")

    def __init__(self, value: Any, members: dict[str, Any]) -> None:
        self.value, self.members = value, members

    def __getitem__(self, name: Any) -> Any:
        try:
            return self.members[name].__get__(self.value)
        except AttributeError:
            return None

    def __setitem__(self, name: Any, value: Any) -> None:
        self.members[name].__set__(self.value, value)


def functions_of(value: Any) -> list[FunctionType]:
    """The functions that an attribute of a class runs."""
    if isinstance(value, property):
        return [value.fget] if isinstance(value.fget, FunctionType) else []
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    return [value] if isinstance(value, FunctionType) else []


def is_foreign(value: Any) -> bool:
    """Whether a module or class is not the user's."""
    home = str(getattr(value, "__name__" if isinstance(value, ModuleType) else "__module__", "")).partition(".")[0]
    return home in FOREIGN or home == __name__.partition(".")[0]


def is_installed(value: Any) -> bool:
    """Whether a module or class comes with an installed package, whose content is its own business."""
    module = value if isinstance(value, ModuleType) else sys.modules.get(value.__module__)
    file = getattr(module, "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def is_plain_object(value: Any) -> bool:
    """An instance of a class that the user wrote in Python; its attributes are looked at."""
    if isinstance(value, (type, Primitive, Generator)) or not hasattr(value, "__dict__"):
        return False
    kind = type(value)
    return not is_foreign(kind) or (kind.__module__, kind.__name__) in _NAMESPACES


def slots_of(kind: type) -> dict[str, Any]:
    """The slots of a class that the user wrote."""
    classes = [cls for cls in reversed(kind.__mro__) if not is_foreign(cls)]
    return {name: m for cls in classes for name, m in vars(cls).items() if isinstance(m, MemberDescriptorType)}


def is_static(value: Any) -> bool:
    """Whether it is a function of a module or class in C, which has no object that it reads."""
    return not isinstance(value, MethodType) and isinstance(value.__self__, (ModuleType, type, type(None)))
