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

import functools
import weakref
import zlib
from collections.abc import Callable, Iterable, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

from tinygrad_lstm.compiler.reads import (
    FOREIGN,
    SCALARS,
    Cell,
    Slots,
    functions_of,
    global_names,
    global_paths,
    is_foreign,
    is_installed,
    is_plain_object,
    is_static,
    scalar_key,
    slots_of,
)  # fmt: skip
from tinygrad_lstm.tensor import Tensor

__all__ = ["LARGEST", "Reach", "checked"]

MOST_CHECKED = 1 << 26  # bytes of arrays; a data set, perhaps in many files, is not read through
_MOST, _DEEPEST = 20_000, 50  # objects looked at, one in another: what lies behind is taken as it is
LARGEST = 1 << 16  # bytes of arrays that are compared at every look


def checked(arrays: Iterable[np.ndarray]) -> list[tuple[np.ndarray, int]]:
    """Arrays with a checksum of what they hold, as far as it is not too much to read."""
    found, left = [], MOST_CHECKED
    for array in arrays:
        if array.nbytes <= left and not array.dtype.hasobject:
            left -= array.nbytes
            found.append((array, zlib.crc32(array.tobytes())))
    return found


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

    With ``places`` a tensor may be another one of its shape and dtype at the next look: who asks reads tensors again by
    their places.  Then small arrays are compared by what they hold.
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
        self._orders: list[tuple[Any, list[Any]]] = []  # dicts: their keys as they follow
        self._shapes: list[tuple[Any, Any, Any, Any]] = []  # holder, place, shape and dtype of a tensor, with places
        self._functions: list[tuple[Any, ...]] = []  # and what they run with: a reload changes them in place
        self._types: list[tuple[Any, type]] = []
        self._classes: set[type] = set()
        self._depth = 0
        self._sets: list[tuple[Any, frozenset[Any]]] = []
        self._keep: list[Any] = []  # what counts by identity: nothing else may get its id
        self._visit(root, None, None)
        for cls in classes:  # of the user's: what their methods read
            self._class(cls)
        self.key = tuple(self._key)
        del self._key
        small = [a for a in self.arrays() if a.nbytes <= LARGEST and not a.dtype.hasobject] if places else []
        self._arrays = [(array, array.tobytes()) for array in small]

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
        for container, keys in self._orders:
            if [*container] != keys:
                return False
        for reference, code, defaults, named in self._functions:
            function = reference()
            if function is None:
                continue
            if function.__code__ is not code or function.__defaults__ is not defaults:
                return False
            if function.__kwdefaults__ is not named:
                return False
        for value, kind in self._types:
            if type(value) is not kind:
                return False
        for array, held in self._arrays:
            if array.tobytes() != held:
                return False
        try:
            for holder, place, shape, dtype in self._shapes:
                tensor = holder[place]
                if not isinstance(tensor, Tensor) or tensor.shape != shape or tensor.dtype != dtype:
                    return False
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
        holders = [
            *(attributes for attributes, _, _ in self._modules), *(c for c, _ in (*self._lengths, *self._orders))
        ]  # fmt: skip
        dicts = [(each, dict(each)) for each in holders if isinstance(each, dict)]
        lists = [(each, list(each)) for each in holders if isinstance(each, list)]
        sets = [(each, set(each)) for each, _ in self._sets if isinstance(each, set)]
        arrays = [(array, array.copy()) for array, _ in checked(self.arrays()) if array.flags.writeable]
        places = [each for each in self._identities if isinstance(each[0], (dict, Cell, Slots))]

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
        if isinstance(value, SCALARS):
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
        elif number > _MOST or self._depth > _DEEPEST:
            self._opaque(value)
        else:
            self._depth += 1
            self._inner(value)
            self._depth -= 1

    def _inner(self, value: Any) -> None:
        """What is in an object that is no scalar, tensor or module."""
        key, kind = self._key, type(value)
        if isinstance(value, tuple):
            key.append((kind, len(value)))
            for k, item in enumerate(value):
                self._visit(item, value, k)
            self._object(value)
        elif isinstance(value, (set, frozenset)) and all(isinstance(item, SCALARS) for item in value):
            content = frozenset(map(scalar_key, value))
            key.append((kind, content))
            self._sets.append((value, content))
            self._object(value)
        elif isinstance(value, list):
            key.append((kind, len(value)))
            self._lengths.append((value, len(value)))
            self._entries(value, list(enumerate(value)))
            self._object(value)
        elif isinstance(value, dict):
            key.append((kind, tuple(scalar_key(k) if isinstance(k, SCALARS) else id(k) for k in value)))
            self._dict(value)
            for k in value:
                if not isinstance(k, SCALARS):
                    self._visit(k, (k,), 0)
            self._object(value)
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, (MethodType, BuiltinFunctionType)) and not is_static(value):
            key.append(("method", value.__name__))
            self._visit(getattr(value, "__func__", None), None, None)
            self._visit(value.__self__, (value.__self__,), 0)
            self._keep.append(value)
        elif isinstance(value, functools.partial):
            key.append("partial")
            for part in (value.func, value.args, value.keywords):
                self._visit(part, None, None)
        elif hasattr(kind, "__compiled_function__"):
            self._visit(value.__wrapped__, None, None)
        elif isinstance(value, type) and not (is_foreign(value) or is_installed(value)):
            key.append(("class", id(value)))
            for cls in value.__mro__:
                self._class(cls)
        elif is_plain_object(value) or slots_of(kind):
            key.append(kind)
            self._object(value)
        else:
            self._opaque(value)

    def _object(self, value: Any) -> None:
        """The attributes of an instance of a class that the user wrote, and what its methods read."""
        kind = type(value)
        if kind in _CONTAINERS or not (is_plain_object(value) or slots_of(kind)):
            return
        self._keep.append(kind)
        self._types.append((value, kind))
        if hasattr(value, "__dict__") and vars(value) is not value:
            self._key.append(tuple(vars(value)))
            self._dict(vars(value))
        members = slots_of(kind)
        if members:
            self._entries(Slots(value, members), [(name, Slots(value, members)[name]) for name in members])
        for cls in kind.__mro__:
            if not is_installed(cls):
                self._class(cls)

    def _opaque(self, value: Any) -> None:
        self._key.append(("object", id(value)))
        self._keep.append(value)
        self.opaque.append(value)

    def _entry(self, holder: Any, place: Any, value: Any) -> None:
        if not (self._places and isinstance(value, Tensor)):
            self._identities.append((holder, place, value))
        else:
            self._shapes.append((holder, place, value.shape, value.dtype))
        self._visit(value, holder, place)

    def _dict(self, container: Any) -> None:
        self._orders.append((container, list(container)))
        self._entries(container, list(container.items()))

    def _entries(self, container: Any, items: list[tuple[Any, Any]]) -> None:
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
        if is_foreign(cls):
            return
        if cls in self._classes:
            return
        self._classes.add(cls)
        opaque = len(self.opaque)  # descriptors, mostly
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
        del self.opaque[opaque:]

    def _function(self, function: FunctionType) -> None:
        self._key.append(("function", id(function.__code__)))
        self._keep.append(function.__code__)
        for cell in function.__closure__ or ():
            held = Cell(cell)
            try:
                value = held[0]
            except ValueError:
                self._key.append("empty cell")
                continue
            self._entry(held, 0, value)
        self._functions.append(
            (weakref.ref(function), function.__code__, function.__defaults__, function.__kwdefaults__)
        )
        for default in (function.__defaults__, function.__kwdefaults__, vars(function) or None):
            self._visit(default, None, None)
        names = function.__globals__
        home = str(names.get("__name__", "")).partition(".")[0]
        if home in FOREIGN or home == __name__.partition(".")[0]:
            return  # not the user's: its globals are its own business
        for name in global_names(function.__code__):
            if name in names:
                self._key.append(name)
                if isinstance(names[name], type):  # to make one, or to read what stands behind its name
                    self._identities.append((names, name, names[name]))
                    self._opaque(names[name])
                else:
                    self._entry(names, name, names[name])
        for first, *rest in global_paths(function.__code__):
            if first in names:
                self._path(names[first], rest)

    def _path(self, value: Any, names: Sequence[str]) -> None:
        """What stands behind names in a module, or in a class, of the user's: their other content does not matter."""
        for name in names:
            if not isinstance(value, (ModuleType, type)) or is_foreign(value) or is_installed(value):
                return
            places = [vars(c) for c in (value.__mro__ if isinstance(value, type) else (value,)) if name in vars(c)]
            if not places:
                return
            self._key.append(name)
            self._entry(places[0], name, places[0][name])
            value = places[0][name]


_CONTAINERS = frozenset({tuple, list, dict, set, frozenset})
