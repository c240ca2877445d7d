"""The rules of primitives as functions on arrays, for replays that are not themselves recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinygrad_lstm.errors import TraceError
from tinygrad_lstm.kernels.pool import SMALLEST
from tinygrad_lstm.record import Aval
from tinygrad_lstm.tensor import Tensor

__all__ = ["ArrayRule", "KnownRule", "Rule"]

Rule = Callable[..., Any]
_ndarray = np.ndarray


class KnownRule(NamedTuple):
    """The function for one kind of operands: what it gives, what it reads of a record, and when it is the right one."""

    function: Callable[..., Any]
    aval: Aval
    reads: list[str]
    conditions: list[tuple[str, dict[str, Any]]]
    content: str  # of the rule's program: rules of one content are the same function
    places: list[int]  # of what it reads of ``saved``


class ArrayRule:
    """One rule as functions on arrays: the rule's own program, recorded once for each kind of operands.

    A plain backward records nothing, so it need not run ops.  There is no second definition: what runs is what
    the rule recorded.
    """

    MOST = 64  # kinds of operands
    PATIENCE = 3  # a kind is recorded when it is met so often: recording costs as much as running the rule ten times

    def __init__(self, prim: Any, rule: Rule, asked: list[tuple[str, Any]]) -> None:
        self.prim, self.rule, self.asked = prim, rule, asked
        self.places = [what for kind, what in asked if kind == "saved"]
        self.params = [what for kind, what in asked if kind == "param"]
        self.shapes = any(kind in ("shapes", "dtypes") for kind, _ in asked)
        # The shapes of an elementwise rule do not matter: un-broadcasting comes after it.
        self.any_shape = prim.is_elementwise and not self.params and not self.shapes
        self.functions: dict[Any, Any] = {}  # by kind of the operands: a function, or how often the kind was met
        self.avals: dict[Any, Aval] = {}  # of what the functions give
        self.contents: dict[Any, str] = {}  # of their programs

    def share(self, record: Any, cotangent: Any) -> Tensor | None:
        """The share of the rule's input; None where the rule itself must run."""
        if cotangent.__class__ is not Tensor:
            return None
        arrays = self._arrays(record, cotangent._data)
        if arrays is None:
            return None
        key = self._key(record, arrays)
        try:
            function = self.functions.get(key, 0)
        except TypeError:  # a parameter without a hash
            self._give_up()
            return None
        if function.__class__ is int:
            function = self._met(key, function, record, arrays)
            if function is None:
                return None
        (out,) = function(*arrays)
        return Tensor(out if out.__class__ is _ndarray else np.asarray(out))

    def _arrays(self, record: Any, cotangent: np.ndarray) -> list[np.ndarray] | None:
        """What the function is called with."""
        arrays = [cotangent]
        saved = record.saved
        for place in self.places:
            value = saved[place]
            if value.__class__ is not _ndarray:
                if not isinstance(value, Tensor):
                    return None  # a number: rules may branch on it
                value = value._data
            arrays.append(value)
        return arrays

    def _key(self, record: Any, arrays: list[np.ndarray]) -> Any:
        """The kind of operands."""
        dtype = arrays[0].dtype
        if self.any_shape:
            small = arrays[0].nbytes < SMALLEST
            for array in arrays:
                if array.dtype is not dtype:
                    return (*[array.dtype for array in arrays], small)
            return dtype.num if small else (dtype.num,)  # the usual case: one dtype
        params = record.params
        return (
            record.shapes if self.shapes else None,
            *[params[name] for name in self.params],
            *[(array.shape, array.dtype.num) for array in arrays],
        )

    def known(self, record: Any) -> KnownRule | None:
        """The function that :meth:`share` would run for the record's cotangent now; None where there is none yet."""
        arrays = self._arrays(record, np.broadcast_to(np.empty((), record.dtype), record.shape))
        if arrays is None:
            return None
        key = self._key(record, arrays)
        try:
            function = self.functions.get(key, 0)
        except TypeError:
            return None
        if function.__class__ is int:
            function = self._met(key, function, record, arrays)
            if function is None:
                return None
        conditions: list[tuple[str, dict[str, Any]]] = []
        if self.shapes:
            conditions.append(("{r}.shapes == {a}", {"a": record.shapes}))
        for name in self.params:
            conditions.append((f"{{r}}.params[{name!r}] == {{a}}", {"a": record.params[name]}))
        reads = []
        for place, array in zip(self.places, arrays[1:], strict=True):
            value = record.saved[place]
            read = f"{{r}}.saved[{place}]" if value.__class__ is _ndarray else f"{{r}}.saved[{place}]._data"
            reads.append(read)
            conditions.append((f"{{r}}.saved[{place}].__class__ is {{a}}", {"a": value.__class__}))
            conditions.append((f"{read}.dtype is {{a}}", {"a": array.dtype}))
            if not self.any_shape:
                conditions.append((f"{read}.shape == {{a}}", {"a": array.shape}))
        aval = self.avals[key]
        if self.any_shape:
            aval = Aval(np.broadcast_shapes(*[array.shape for array in arrays]), aval.dtype)
            if aval.shape != record.shape:
                return None
        return KnownRule(function, aval, reads, conditions, self.contents[key], self.places)

    def _met(self, key: Any, times: int, record: Any, arrays: list[np.ndarray]) -> Any:
        """The function for a kind of operands, or None as long as (or where) there is none."""
        if not self.any_shape and times + 1 < self.PATIENCE:
            if times or len(self.functions) < self.MOST:
                self.functions[key] = times + 1
            return None
        # Of those for any shape there are two: large results get memory of another kind (see short_form).
        size = 2 if arrays[0].nbytes < SMALLEST else SMALLEST
        avals = [Aval((size,) if self.any_shape else a.shape, a.dtype) for a in arrays]
        found = self._recorded(record, avals)
        if found is None:
            self._give_up()
            return None
        function, self.avals[key], self.contents[key] = found
        self.functions[key] = function
        return function

    def _give_up(self) -> None:
        """Do not look again."""
        rules = self.prim._on_arrays
        for k, on_arrays in enumerate(rules):
            if on_arrays is self:
                rules[k] = None

    def _recorded(self, record: Any, avals: Sequence[Aval]) -> Any:
        """The rule's program as a function, or None where it is more than arithmetic on what it reads."""
        from tinygrad_lstm.trace import trace

        prim, params = self.prim, record.params
        if (self.params or self.shapes) and not (prim.explains and all(_is_static(params[n]) for n in self.params)):
            return None

        def flat(cotangent: Any, *values: Any) -> list[Any]:
            rest = iter(values)
            static = {"shapes": record.shapes and [s[0] for s in record.shapes]}
            static["dtypes"] = record.shapes and [s[1] for s in record.shapes]
            arguments = [
                next(rest) if kind == "saved" else params[what] if kind == "param" else static[kind]
                for kind, what in self.asked
            ]
            return [self.rule(cotangent, *arguments)]

        try:
            traced = trace(flat, avals, flat=True)
        except TraceError:  # it looks at values
            return None
        program = traced.program
        arithmetic = all(
            e.primitive.explains and (e.primitive.is_elementwise or (not self.any_shape and e.primitive.linear))
            for e in program.equations
        )
        if not program.equations or not arithmetic or traced.captures:
            return None
        return program.function(), program.aval(program.outputs[0]), program.key


def _is_static(value: Any) -> bool:
    """Whether a parameter may be part of a key: equal ones are the same (0.0 and -0.0 are equal, and are not)."""
    if value.__class__ is tuple:
        return all(map(_is_static, value))
    return value is None or value.__class__ in (bool, int, str)
