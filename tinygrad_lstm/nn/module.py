"""Module and Parameter: named trees of trainable arrays.

A Module is an ordinary object.  Its parameters and submodules are whatever Parameters and Modules stand in its
attributes, also inside lists and dicts; nothing is registered, the tree is read when somebody asks for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from tinygrad_lstm.calls import misfit
from tinygrad_lstm.checks import check_dtype
from tinygrad_lstm.dtypes import check_differentiable
from tinygrad_lstm.errors import ArgumentError, DTypeError, GraphError, ShapeError
from tinygrad_lstm.foreign import array_of
from tinygrad_lstm.hints import explain_missing, suffix_hint
from tinygrad_lstm.kernels.pool import on_lines
from tinygrad_lstm.leaves import no_gradients
from tinygrad_lstm.nn.containers import CONTAINERS, further, name_part, plain_values
from tinygrad_lstm.tape import _STATE
from tinygrad_lstm.tensor import Tensor, to_array

__all__ = ["LoadResult", "Module", "Parameter", "changes"]

M = TypeVar("M", bound="Module")

_versions = itertools.count(1)
# Another number whenever any module was changed: attributes set or deleted, modes, dtypes.  As long as it is the same,
# what was found out about modules holds.  (Lists and dicts change without it, and tensors stand in for parameters.)
_changes = [0]


def changes() -> int:
    """A number that is another one after any change to any module."""
    return _changes[0]


# Tensors that stand in for parameters while a function of them is being differentiated, by id.
_stand_ins: dict[int, Tensor] = {}


class Parameter(Tensor):
    """A tensor that a Module trains: a copy of ``array``, with ``requires_grad=True``.

    Parameters
    ----------
    array : array, Tensor, number, or nested lists of numbers
        Arrays keep their (floating) dtype; Python floats become float32.

    Examples
    --------
    >>> from tinygrad_lstm import nn
    >>> nn.Parameter([1.0, 2.0]).requires_grad
    True
    """

    __slots__ = ()

    def __init__(self, array: Any, requires_grad: bool = True) -> None:
        found = to_array(array)
        check_differentiable(found.dtype)
        super().__init__(on_lines(found), requires_grad)

    def __repr__(self) -> str:
        return "Parameter" + super().__repr__()[len("tensor") :]


def _refused(operator: str) -> Any:
    def method(self: Parameter, other: Any) -> Any:
        raise GraphError(
            f"p {operator}= ... would leave a Parameter of shape {self.shape} as it is and make p the name of another "
            f"tensor; write p.data {operator}= ... to change its values, or p = p {operator} ... for a new tensor"
        )

    return method


# An augmented assignment rebinds the name; of a Parameter, that is never meant.
for _name, _operator in (
    ("add", "+"), ("sub", "-"), ("mul", "*"), ("truediv", "/"), ("floordiv", "//"), ("mod", "%"), ("pow", "**"),
    ("matmul", "@"),
):  # fmt: skip
    setattr(Parameter, f"__i{_name}__", _refused(_operator))


class Place(NamedTuple):
    """Where a parameter stands: ``holder[key]``, under a name."""

    name: str
    holder: Any  # the __dict__ of a module, or a list or dict in it
    key: Any

    @property
    def value(self) -> Tensor:
        """The Parameter, or what stands in for it just now."""
        return self.holder[self.key]


class LoadResult(NamedTuple):
    """What :meth:`Module.load_state_dict` found with ``strict=False``: names on one side only."""

    missing: list[str]
    unexpected: list[str]


# What most attributes are: nothing that the tree is made of, told apart by one look-up.
_PLAIN = frozenset({type(None), bool, int, float, str, type, np.ndarray, Tensor})


def _is_parameter(value: Any) -> bool:
    return isinstance(value, Parameter) or (isinstance(value, Tensor) and id(value) in _stand_ins)


def _contents(holder: Any, above: tuple[int, ...] = ()) -> Iterator[tuple[Place, Any]]:
    """Parameters and Modules in an attribute dict, with those in nested lists and dicts."""
    for key, value in list(holder.items()) if isinstance(holder, dict) else enumerate(holder):
        kind = value.__class__
        if kind in _PLAIN and not (_stand_ins and id(value) in _stand_ins):
            continue
        if kind is Parameter or isinstance(value, (Module, Parameter)) or _is_parameter(value):
            yield Place(str(name_part(key)), holder, key), value
        elif isinstance(value, (list, dict, tuple)):
            for place, part in _contents(value, further(value, above)):
                yield Place(f"{name_part(key)}.{place.name}", place.holder, place.key), part


def _forget_gradients(values: Iterable[Any], seen: set[int]) -> None:
    """Set the gradient of every parameter among the values, and in what they hold, to None."""
    for value in values:
        kind = value.__class__
        if kind is Parameter:
            if value._meta is not None:
                value._meta.grad = None
        elif kind in _PLAIN and not (_stand_ins and id(value) in _stand_ins):
            continue
        elif isinstance(value, Module):
            if id(value) not in seen:
                seen.add(id(value))
                _forget_gradients(list(value.__dict__.values()), seen)
        elif isinstance(value, Tensor):
            if _is_parameter(value):
                value.grad = None
        elif isinstance(value, (list, tuple, dict)) and id(value) not in seen:
            seen.add(id(value))
            _forget_gradients(list(value.values()) if isinstance(value, dict) else value, seen)


class Module:
    """Base class of everything with parameters: subclass it, set attributes, write ``forward``.

    Attributes that are Parameters or Modules, and lists or dicts of them, form the tree.  A subclass's
    ``__init__`` calls ``super().__init__()`` first.

    Examples
    --------
    >>> import numpy as np
    >>> from tinygrad_lstm import nn
    >>> class Scale(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.factor = nn.Parameter([2.0])
    ...     def forward(self, x):
    ...         return x * self.factor
    >>> model = Scale()
    >>> model(np.float32([1.0, 3.0])).tolist()
    [2.0, 6.0]
    >>> model
    Scale()  1 parameters
      factor: (1,) float32
    """

    # What is known of its calls (programs.py): no attribute, and no part of a copy.
    __slots__ = ("__dict__", "__weakref__", "_known")

    training: bool = True
    _label: str | None = None  # the name under which a parent holds this module, for provenance
    _version: int = 0

    def __init__(self) -> None:
        self.__dict__["_version"] = next(_versions)
        _changes[0] = next(_versions)

    # ------------------------------------------------------------------ calling

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes; subclasses write it."""
        raise ArgumentError(f"{type(self).__name__} has no forward(); define it in the subclass")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        label = self._label
        token = None
        if label is not None:
            current = _STATE.get()
            token = _STATE.set(current.at(f"{current.where}.{label}" if current.where else label))
        try:
            return self.forward(*args, **kwargs)
        except TypeError as error:
            if error.__traceback__ is None or error.__traceback__.tb_next is not None:
                raise  # of what forward does
            raise misfit(error, f"{type(self).__name__}.forward", self.forward, args, kwargs) from None
        finally:
            if token is not None:
                _STATE.reset(token)

    # ------------------------------------------------------------------ attributes

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, (Module, Parameter, list, tuple, dict)):
            self._adopt(name, value)
        elif value is not None and isinstance(self.__dict__.get(name), Parameter):
            who = f"{type(self).__name__}.{name}"
            raise DTypeError(
                f"{who} is a Parameter; in its place, this {type(value).__name__} would not be trained: set its values "
                f"by {who.partition('.')[2]}.data = array, or assign nn.Parameter(array) (None takes it away)"
            )
        self.__dict__[name] = value
        _changes[0] = next(_versions)
        if "_version" in self.__dict__:
            self.__dict__["_version"] = next(_versions)

    def __delattr__(self, name: str) -> None:
        object.__delattr__(self, name)
        self.__dict__["_version"] = next(_versions)
        _changes[0] = next(_versions)

    def _adopt(self, name: str, value: Any) -> None:
        """Check a value that joins the tree and tell submodules their names."""
        found = list(_contents({name: value}))
        if found and "_version" not in self.__dict__:
            raise ArgumentError(
                f"{type(self).__name__}.__init__ sets {name!r} before it calls super().__init__(); "
                "make that call its first line"
            )
        for place, part in found:
            if isinstance(part, Module):
                part.__dict__["_label"] = place.name
            elif isinstance(place.holder, tuple):
                raise DTypeError(
                    f"{type(self).__name__}.{name} is a tuple that holds Parameters, which cannot be replaced in it; "
                    "use a list"
                )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    @property
    def version(self) -> tuple[Any, ...]:
        """Changes whenever an attribute of this module or of one below it was set or deleted.

        Plain numbers and strings in lists and dicts count too, since those can change without an attribute being set.
        Values of parameters and the mode (train, eval) are no part of it.
        """
        seen: dict[int, Any] = {}
        self._versions_into(seen)
        return tuple(seen.values())

    def _versions_into(self, seen: dict[int, Any]) -> None:
        plain = [plain_values(value) for value in self.__dict__.values() if isinstance(value, CONTAINERS)]
        seen[id(self)] = (self._version, *plain) if any(plain) else self._version
        for _, part in _contents(self.__dict__):
            if isinstance(part, Module) and id(part) not in seen:
                part._versions_into(seen)

    # ------------------------------------------------------------------ the tree

    def _places(self) -> Iterator[Place]:
        """Parameters of this module itself.  A layer may override this to give them other names."""
        for place, part in _contents(self.__dict__):
            if not isinstance(part, Module):
                yield place

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """The modules directly below this one, with their names."""
        for place, part in _contents(self.__dict__):
            if isinstance(part, Module):
                yield place.name, part

    def children(self) -> Iterator[Module]:
        """The modules directly below this one."""
        for _, child in self.named_children():
            yield child

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below it, each once, with dotted names (this one's is the prefix)."""
        yield from self._modules_into(prefix, set())

    def _modules_into(self, prefix: str, seen: set[int]) -> Iterator[tuple[str, Module]]:
        if id(self) in seen:
            return
        seen.add(id(self))
        yield prefix, self
        for name, child in self.named_children():
            yield from child._modules_into(f"{prefix}.{name}" if prefix else name, seen)

    def modules(self) -> Iterator[Module]:
        """This module and all below it, each once."""
        for _, module in self.named_modules():
            yield module

    def _all_places(self, prefix: str = "", above: tuple[int, ...] = ()) -> Iterator[Place]:
        """Every name of every parameter; a shared one comes once for each of its names."""
        for place in self._places():
            yield Place(prefix + place.name, place.holder, place.key) if prefix else place
        for name, child in self.named_children():
            if id(child) not in above:
                yield from child._all_places(f"{prefix}{name}.", (*above, id(self)))

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter once, with its (first) dotted name."""
        seen: set[int] = set()
        for place in self._all_places():
            if id(place.value) not in seen:
                seen.add(id(place.value))
                yield place.name, place.value

    def parameters(self) -> Iterator[Tensor]:
        """Every parameter once; a shared one is counted once."""
        for _, parameter in self.named_parameters():
            yield parameter

    def __tree_leaves__(self) -> dict[str, Tensor]:
        """Name -> Parameter: what a module is when it is an argument of a function."""
        return dict(self.named_parameters())

    def __tree_swap__(self, values: Mapping[str, Tensor]) -> None:
        """Put tensors in place of parameters, wherever these stand; the structure stays the same."""
        places = list(self._all_places())
        by_identity = {id(place.value): values[place.name] for place in reversed(places) if place.name in values}
        for place in places:
            old = place.value
            new = by_identity.get(id(old))
            if new is None or new is old:
                continue
            if not isinstance(new, Parameter):
                _stand_ins[id(new)] = new
            place.holder[place.key] = new  # no change: who calls a module reads them by their places
        for identity, new in by_identity.items():
            if id(new) != identity:  # what was replaced stands in for nothing any more
                _stand_ins.pop(identity, None)

    # ------------------------------------------------------------------ values

    def state_dict(self) -> dict[str, np.ndarray]:
        """A copy of every parameter by name (a shared one under each of its names, as in PyTorch)."""
        return {place.name: place.value._read().copy() for place in self._all_places()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> LoadResult:
        """Set parameters from a mapping of names to arrays, tensors or torch tensors.

        Parameters
        ----------
        state : mapping
            Values are cast to the dtype of the parameter they replace (from half or bfloat16, too).
        strict : bool
            Refuse names that are missing or unexpected; with False they are returned.

        Raises
        ------
        ArgumentError, ShapeError
            All names that are missing, unexpected or of another shape; nothing was changed then.
        """
        if not isinstance(state, Mapping):
            raise DTypeError(
                f"{type(self).__name__}.load_state_dict takes a dict of names to arrays, found a {type(state).__name__}"
            )
        places = {place.name: place.value for place in self._all_places()}
        arrays = {name: array_of(name, value, "load_state_dict") for name, value in state.items()}
        missing = [name for name in places if name not in arrays]
        unexpected = [name for name in arrays if name not in places]
        misfits = [
            f"{name}: shape {arrays[name].shape}, expected {p.shape}"
            for name, p in places.items()
            if name in arrays and arrays[name].shape != p.shape
        ]
        problems = [f"mis-shaped: {'; '.join(misfits)}"] if misfits else []
        if strict:
            problems += [f"missing: {', '.join(missing)}"] if missing else []
            problems += [f"unexpected: {', '.join(unexpected)}"] if unexpected else []
        if problems:
            kind = ShapeError if misfits and len(problems) == 1 else ArgumentError
            hint = suffix_hint(missing, unexpected)
            raise kind(f"{type(self).__name__}.load_state_dict: {'. '.join(problems)}{hint}")
        for name, parameter in places.items():
            if name in arrays:
                parameter._replace(on_lines(np.asarray(arrays[name], order="C"), parameter.dtype))
        return LoadResult(missing, unexpected)

    def astype(self: M, dtype: Any) -> M:
        """Convert every parameter in place to a floating dtype; gradients are dropped.  Returns the module."""
        dtype = check_dtype(f"{type(self).__name__}.astype", dtype)
        for parameter in self.parameters():
            parameter._replace(on_lines(parameter._data, dtype))
            parameter.grad = None
        _changes[0] = next(_versions)
        return self

    def zero_grad(self) -> None:
        """Set the gradient of every parameter to None."""
        if _STATE.get().trace is not None:
            raise no_gradients("zero_grad()")
        kind = type(self)
        if kind.parameters is Module.parameters and kind.named_parameters is Module.named_parameters:
            _forget_gradients(list(self.__dict__.values()), {id(self)})  # once a step: without names
            return
        for parameter in self.parameters():
            parameter.grad = None

    def train(self: M, mode: bool = True) -> M:
        """Switch this module and all below it to training behaviour (dropout on).  Returns the module."""
        self._set_mode(bool(mode), set())
        return self

    def eval(self: M) -> M:
        """Switch to evaluation behaviour: ``train(False)``."""
        return self.train(False)

    def _set_mode(self, mode: bool, seen: set[int]) -> None:
        seen.add(id(self))
        self.__dict__["training"] = mode  # no new version: the mode is no part of the structure
        _changes[0] = next(_versions)
        for _, part in _contents(self.__dict__):
            if isinstance(part, Module) and id(part) not in seen:
                part._set_mode(mode, seen)

    # ------------------------------------------------------------------ text

    def extra_repr(self) -> str:
        """The arguments to show in ``repr``; subclasses write it."""
        return ""

    def count(self) -> int:
        """The number of trainable numbers."""
        return sum(parameter.size for parameter in self.parameters())

    def __repr__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """The tree as text, with shapes, dtypes and counts."""
        return "\n".join(self._lines("", 0, set()))

    def _lines(self, name: str, depth: int, seen: set[int]) -> Iterator[str]:
        indent = "  " * depth
        shown = f"{name}: " if name else ""
        if id(self) in seen:
            yield f"{indent}{shown}{type(self).__name__} (shared, see above)"
            return
        seen.add(id(self))
        yield f"{indent}{shown}{type(self).__name__}({self.extra_repr()})  {self.count():,} parameters"
        for place in self._places():
            p = place.value
            frozen = "" if p.requires_grad else " frozen"
            yield f"{indent}  {place.name}: {p.shape} {p.dtype}{frozen}"
        for child_name, child in self.named_children():
            yield from child._lines(child_name, depth + 1, seen)


explain_missing(Module, "Module")
