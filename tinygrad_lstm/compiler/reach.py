"""What a function can reach besides its arguments: closed-over values, globals it names, modules and what is in them.

A compiled function is recorded once, so whatever it read while it was recorded must be the same at the next call,
or be read again.  A :class:`Reach` looks through an object and gives

* a *key*: equal keys mean that recording again would give the same program.  Tensors count by shape and dtype (and
  by which of them are the same object), numbers and strings by value, modules by what is in them, everything
  else by identity;
* the *places* of all tensors, from which they are read again at every call;
* a *guard*, a short list of comparisons that tells cheaply that nothing was rebound since.
"""

from __future__ import annotations

import dis
import functools
import sys
import weakref
import zlib
from collections.abc import Callable, Iterable, Sequence
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

from tinygrad_lstm.primitive import Primitive
from tinygrad_lstm.random import Generator
from tinygrad_lstm.tensor import Tensor

__all__ = [
    "Reach", "checked", "functions_of", "global_names", "global_paths", "is_foreign", "is_plain_object", "is_scalar",
    "scalar_key",
]  # fmt: skip

_SCALARS = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), slice, np.generic, np.dtype)
MOST_CHECKED = 1 << 26  # bytes of arrays; a data set, perhaps in many files, is not read through
_MOST = 20_000  # objects looked at: what lies behind is taken as it is
_FOREIGN = frozenset(sys.stdlib_module_names) | {"numpy", "numba", "scipy", "torch", "jax"}


def is_scalar(value: Any) -> bool:
    """Whether a value counts by what it is: a number, a string, None, a slice."""
    return isinstance(value, _SCALARS)


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


def checked(arrays: Iterable[np.ndarray]) -> list[tuple[np.ndarray, int]]:
    """Arrays with a checksum of what they hold, as far as it is not too much to read."""
    found, left = [], MOST_CHECKED
    for array in arrays:
        if array.nbytes <= left and not array.dtype.hasobject:
            left -= array.nbytes
            found.append((array, zlib.crc32(array.tobytes())))
    return found


class _Cell:
    """A closure cell read like a dict with one entry."""

    __slots__ = ("cell",)

    def __init__(self, cell: CellType) -> None:
        self.cell = cell

    def __getitem__(self, key: Any) -> Any:
        return self.cell.cell_contents

    def __setitem__(self, key: Any, value: Any) -> None:
        self.cell.cell_contents = value


class Reach:
    """What can be reached from one object.

    Attributes
    ----------
    key : tuple
        Hashable; see the module.
    tensors : list of (holder, place)
        One for every tensor that was found, in a fixed order: ``holder[place]`` is the tensor now.
    modules : list of weak references
        The modules that stand in no other module: those that a gradient may swap variables into.
    opaque : list
        What counts by identity alone, whatever it may hold.
    number : int
        Set by whoever keeps reaches: equal numbers, equal keys.

    With ``places`` a tensor may be another one at the next look: who asks reads tensors again by their places.
    """

    def __init__(self, root: Any, classes: Iterable[type] = (), places: bool = False) -> None:
        self._places = places
        self.opaque: list[Any] = []
        self.tensors: list[tuple[Any, Any]] = []
        self.modules: list[Any] = []
        self._inside = 0  # how many modules we are in
        self.number = -1
        self.number_of: dict[int, int] = {}  # index into tensors, by the tensor's id at the time of looking
        self._seen: dict[int, int] = {}
        self._key: list[Any] = []
        self._identities: list[tuple[Any, Any, Any]] = []  # holder, place, object
        self._modules: list[tuple[dict[str, Any], int, Any]] = []  # attributes, version, training
        self._lengths: list[tuple[Any, int]] = []
        self._sets: list[tuple[Any, frozenset[Any]]] = []
        self._keep: list[Any] = []  # what counts by identity: nothing else may get its id
        self._visit(root, None, None)
        for cls in classes:  # of the user's: what their methods read
            self._class(cls)
        self.key = tuple(self._key)
        del self._key

    def unchanged(self) -> bool:
        """Whether every place still holds the object that was found there.  False only means: look again."""
        for attributes, version, training in self._modules:
            if attributes.get("_version") != version or attributes.get("training") is not training:
                return False
        for container, length in self._lengths:
            if len(container) != length:
                return False
        for items, content in self._sets:
            if frozenset(map(scalar_key, items)) != content:
                return False
        try:
            for holder, place, found in self._identities:
                if holder[place] is not found:
                    return False
        except (LookupError, ValueError):  # ValueError: a cell that was emptied
            return False
        return True

    def arrays(self) -> list[np.ndarray]:
        """The NumPy arrays that were found; as objects they count by identity."""
        return [value for value in self._keep if isinstance(value, np.ndarray)]

    def by_content(self) -> tuple[Any, ...]:
        """The key with arrays by what they hold: other numbers, another result."""
        known = {("object", id(a)): (a.shape, a.dtype, number) for a, number in checked(self.arrays())}
        return tuple([known.get(part, part) if part.__class__ is tuple else part for part in self.key])

    def kept(self) -> Callable[[], None]:
        """A function that puts back what now stands in all places: attributes, items, globals, numbers in arrays."""
        holders = [*(attributes for attributes, _, _ in self._modules), *(c for c, _ in self._lengths)]
        dicts = [(each, dict(each)) for each in holders if isinstance(each, dict)]
        lists = [(each, list(each)) for each in holders if isinstance(each, list)]
        sets = [(each, set(each)) for each, _ in self._sets if isinstance(each, set)]
        arrays = [(array, array.copy()) for array, _ in checked(self.arrays()) if array.flags.writeable]
        places = [each for each in self._identities if isinstance(each[0], (dict, _Cell))]

        def put_back() -> None:
            for attributes, items in dicts:
                for name in attributes.keys() - items.keys():
                    del attributes[name]
                attributes.update(items)
            for sequence, values in lists:
                sequence[:] = values
            for content, members in sets:
                content.clear()
                content.update(members)
            for array, numbers in arrays:
                np.copyto(array, numbers)
            for holder, place, found in places:
                holder[place] = found

        return put_back

    # ------------------------------------------------------------------ looking

    def _visit(self, value: Any, holder: Any, place: Any) -> None:
        key = self._key
        if isinstance(value, _SCALARS):
            key.append(scalar_key(value))
            return
        known = self._seen.get(id(value))
        if known is not None:
            key.append(("again", known))
            return
        number = self._seen[id(value)] = len(self._seen)
        if isinstance(value, Tensor):
            key.append(("tensor", value.shape, value.dtype))
            self.number_of[id(value)] = len(self.tensors)
            self.tensors.append((holder, place))
        elif hasattr(type(value), "__tree_swap__"):  # of the type: some objects have every attribute
            self._module(value)
        elif number > _MOST:
            self._opaque(value)
        elif isinstance(value, tuple):
            key.append((type(value), len(value)))
            for k, item in enumerate(value):
                self._visit(item, value, k)
        elif isinstance(value, (set, frozenset)) and all(isinstance(item, _SCALARS) for item in value):
            content = frozenset(map(scalar_key, value))
            key.append((type(value), content))
            self._sets.append((value, content))
        elif isinstance(value, list):
            key.append((type(value), len(value)))
            self._container(value, list(enumerate(value)))
        elif isinstance(value, dict):
            key.append((type(value), tuple(scalar_key(k) if isinstance(k, _SCALARS) else id(k) for k in value)))
            self._container(value, list(value.items()))
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, MethodType):
            key.append("method")
            self._visit(value.__func__, None, None)
            self._visit(value.__self__, (value.__self__,), 0)
            self._keep.append(value)
        elif isinstance(value, functools.partial):
            key.append("partial")
            for part in (value.func, value.args, value.keywords):
                self._visit(part, None, None)
        elif hasattr(value, "__compiled_function__"):
            self._visit(value.__wrapped__, None, None)
        elif is_plain_object(value):
            key.append((type(value), tuple(vars(value))))
            self._keep.append(type(value))
            self._container(vars(value), list(vars(value).items()))
        else:
            self._opaque(value)

    def _opaque(self, value: Any) -> None:
        self._key.append(("object", id(value)))
        self._keep.append(value)
        self.opaque.append(value)

    def _entry(self, holder: Any, place: Any, value: Any) -> None:
        if not (self._places and isinstance(value, Tensor)):
            self._identities.append((holder, place, value))
        self._visit(value, holder, place)

    def _container(self, container: Any, items: list[tuple[Any, Any]]) -> None:
        self._lengths.append((container, len(container)))
        for place, value in items:
            self._entry(container, place, value)

    def _module(self, module: Any) -> None:
        attributes = module.__dict__
        self._key.append((type(module), type(module).forward, module.training))
        self._keep.append(type(module).forward)
        for cls in type(module).__mro__:
            self._class(cls)
        if not self._inside:
            self.modules.append(weakref.ref(module))
        self._modules.append((attributes, attributes.get("_version"), attributes.get("training")))
        self._inside += 1
        for name, value in list(attributes.items()):
            if name in ("_version", "_label", "training"):
                continue
            self._key.append(name)
            self._visit(value, attributes, name)  # the version tells when an attribute is set
        self._inside -= 1

    def _class(self, cls: type) -> None:
        """What the methods of a user's class read, and its other attributes."""
        if is_foreign(cls) or id(cls) in self._seen:
            return
        self._seen[id(cls)] = len(self._seen)
        self._keep.append(cls)
        attributes: Any = vars(cls)
        self._lengths.append((attributes, len(attributes)))  # an attribute that is added may hide one of a base class
        for name, value in list(attributes.items()):
            functions = functions_of(value)
            if functions or not name.startswith("__"):
                self._identities.append((attributes, name, value))
            for function in functions:
                self._function(function)
            if not functions and not name.startswith("__"):
                self._key.append(name)
                self._visit(value, attributes, name)

    def _function(self, function: FunctionType) -> None:
        self._key.append(("function", id(function.__code__)))
        self._keep.append(function.__code__)
        for cell in function.__closure__ or ():
            held = _Cell(cell)
            try:
                value = held[0]
            except ValueError:
                self._key.append("empty cell")
                continue
            self._entry(held, 0, value)
        for default in (function.__defaults__, function.__kwdefaults__):
            self._visit(default, None, None)
        names = function.__globals__
        home = str(names.get("__name__", "")).partition(".")[0]
        if home in _FOREIGN or home == __name__.partition(".")[0]:
            return  # not the user's: its globals are its own business
        for name in global_names(function.__code__):
            if name in names:
                self._key.append(name)
                self._entry(names, name, names[name])
        for first, *rest in global_paths(function.__code__):
            if first in names:
                self._path(names[first], rest)

    def _path(self, value: Any, names: Sequence[str]) -> None:
        """What stands behind names in a module, or in a class, of the user's: their other content does not matter."""
        for name in names:
            if not isinstance(value, (ModuleType, type)) or is_foreign(value) or _is_installed(value):
                return
            places = [vars(c) for c in (value.__mro__ if isinstance(value, type) else (value,)) if name in vars(c)]
            if not places:
                return
            self._key.append(name)
            self._entry(places[0], name, places[0][name])
            value = places[0][name]


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
    return home in _FOREIGN or home == __name__.partition(".")[0]


def _is_installed(value: Any) -> bool:
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


_NAMESPACES = {("types", "SimpleNamespace"), ("argparse", "Namespace")}  # attributes are all that they are
