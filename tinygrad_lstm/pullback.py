"""The derivatives of a primitive: what its VJP rules name, and how a cotangent is pulled back through them.

Un-broadcasting, dtypes and absent cotangents are handled in :meth:`Differentiable.pull`, once, so that a rule
states only mathematics.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_lstm.arrayrules import ArrayRule, KnownRule, Rule
from tinygrad_lstm.errors import ArgumentError, DTypeError, GraphError, ShapeError
from tinygrad_lstm.kernels import expression as _expressions
from tinygrad_lstm.kernels.table import LEAVES
from tinygrad_lstm.record import _STATE, Output
from tinygrad_lstm.replays import Offer
from tinygrad_lstm.tensor import Tensor, asarray

if TYPE_CHECKING:
    from tinygrad_lstm.primitive import Primitive

__all__ = ["REGISTRY", "Differentiable", "Rule", "described", "signature_of", "sum_to", "zeros"]

REGISTRY: dict[str, Primitive] = {}


_OUT_NAMES = ("out", "ans", "output", "y_out")


class Differentiable:
    """What a primitive knows of its derivatives."""

    generation = 0  # grows whenever any rule changes: what was derived from rules before is stale

    name: str
    forward: Callable[..., Any]
    is_elementwise: bool
    declared: bool
    explains: bool
    joint: bool
    may_skip: bool
    always_tuple: bool
    accumulate: Any
    argument_names: list[str]
    parameter_names: list[str]
    variadic: bool
    _saved_inputs: set[int]
    _saves_given: tuple[str, ...] | None

    # ------------------------------------------------------------------ declaration

    def set_rules(self, rules: Sequence[Rule | None] | Rule | None) -> None:
        """Declare (or replace) the VJP rules; everything that runs later follows them."""
        if rules is None:
            listed: tuple[Rule | None, ...] = ()
            self.differentiable = False
        elif callable(rules):
            listed = (rules,)
        else:
            listed = tuple(rules)
        count = len(self.argument_names)
        if listed and not self.variadic and not self.joint and len(listed) != count:
            raise ArgumentError(f"{self.name}: {len(listed)} VJP rules for {count} arguments {self.argument_names}")
        self._saved_inputs, self.saves_out, self._needs_shapes = set(), False, False
        self._saved_from = sys.maxsize  # all inputs from this position on are saved
        self.rules = listed
        fetch = []
        # What each rule alone needs: where one input has no gradient, its rule's values are not kept.
        self.kept_for: list[tuple[set[int], bool]] = []
        kept_by_all, out_by_any = self._saved_inputs, False
        self._on_arrays: list[ArrayRule | None] = []
        for rule in listed:
            self._saved_inputs, self.saves_out = set(), False
            fetch.append(None if rule is None else self._compile_rule(rule))
            self._on_arrays.append(None if rule is None else self._array_rule(rule))
            self.kept_for.append((self._saved_inputs, self.saves_out))
            kept_by_all = kept_by_all | self._saved_inputs
            out_by_any = out_by_any or self.saves_out
        self._saved_inputs, self.saves_out, self._fetch = kept_by_all, out_by_any, tuple(fetch)
        if self.declared:
            self.accumulate = None  # it belonged to the rules that are replaced
        self.declared = True
        self.quick = isinstance(self.forward, np.ufunc) and self.is_elementwise
        self.saves_nothing = not self._saved_inputs and self._saved_from == sys.maxsize and not self.saves_out
        self.simple = not self.joint and not self.variadic  # one rule per argument
        self.plain = self._saved_from == sys.maxsize
        self.version = getattr(self, "version", -1) + 1
        Differentiable.generation += 1

    def _compile_rule(self, rule: Rule) -> Callable[..., Any]:
        """A function (values, position, cotangent) that looks up what the rule names and calls it."""
        names = list(inspect.signature(rule).parameters)[1:]
        fetch: list[str] = []
        for slot, asked in enumerate(names):
            if self.variadic and asked == self.argument_names[-1]:
                self._saved_from = len(self.argument_names) - 1
                fetch.append(f"v.saved[{self._saved_from}:-1]")
            elif asked in self.argument_names:
                index = self.argument_names.index(asked)
                self._saved_inputs.add(index)
                fetch.append(f"v.saved[{index}]")
            elif asked in _OUT_NAMES:
                self.saves_out = True
                fetch.append("out(v)")
            elif asked == "inputs":
                self._saved_from = 0
                fetch.append("v.saved[:-1]")
            elif asked in self.parameter_names:
                fetch.append(f"v.params[{asked!r}]")
            elif asked == "shapes":
                self._needs_shapes = True
                fetch.append("[s[0] for s in v.shapes]")
            elif asked == "dtypes":
                self._needs_shapes = True
                fetch.append("[s[1] for s in v.shapes]")
            elif asked in ("position", "wanted"):
                fetch.append("position")
            elif asked == "record":
                fetch.append("v")
            elif self._saves_given is not None and slot < len(self._saves_given):
                # A rule with names of its own: what `saves` lists is passed in that order.
                saved = self._saves_given[slot]
                if saved in _OUT_NAMES:
                    self.saves_out = True
                    fetch.append("out(v)")
                elif saved in self.argument_names:
                    index = self.argument_names.index(saved)
                    self._saved_inputs.add(index)
                    fetch.append(f"v.saved[{index}]")
                else:
                    raise ArgumentError(f"{self.name}: saves names {saved!r}, expected {self.argument_names} or 'out'")
            else:
                raise ArgumentError(
                    f"{self.name}: a VJP rule asks for {asked!r}; it may name {self.argument_names}, 'out', "
                    f"the parameters {self.parameter_names}, 'shapes', 'dtypes' or 'position'"
                )
        source = f"lambda v, position, g: rule({', '.join(['g', *fetch])})"
        return eval(source, {"rule": rule, "out": _saved_output})

    # ------------------------------------------------------------------ derivatives

    def pull(self, record: Any, cotangent: Any, wanted: Sequence[bool] | None = None) -> list[Any]:
        """Cotangents of the wanted inputs (of all that have a node): un-broadcast and in the input's dtype."""
        parents = record.parents
        if wanted is None:
            if self.simple and cotangent.__class__ is not list:
                # A plain backward records nothing: where possible the rule runs on bare arrays.
                shares: list[Any] = []
                for rule, on_arrays, parent in zip(self._fetch, self._on_arrays, parents, strict=True):
                    if parent is None or rule is None:
                        shares.append(None)
                        continue
                    share = None if on_arrays is None else on_arrays.share(record, cotangent)
                    shares.append(rule(record, 0, cotangent) if share is None else share)
                return self._fitted(shares, record, cotangent)
            wanted = [parent is not None for parent in parents]
        if self.joint:
            if cotangent.__class__ is list and not self.always_tuple:  # scan and checkpoint look at what is absent
                cotangent = self._complete(record, cotangent)
            shares = self._fetch[0](record, wanted, cotangent)  # type: ignore[misc]
            if not isinstance(shares, (list, tuple)) or len(shares) != len(parents):
                raise GraphError(
                    f"the VJP of {self.name} returned {described(shares)}, expected a tuple of {len(parents)} "
                    f"cotangents, one per argument ({', '.join(map(self._argument, range(len(parents))))}); None for "
                    "an argument without a gradient"
                )
            shares = [share if want else None for share, want in zip(shares, wanted, strict=True)]
        elif cotangent is None:
            return [None] * len(parents)
        else:
            if cotangent.__class__ is list:
                cotangent = self._complete(record, cotangent)
            fetch = self._fetch
            if self.variadic:
                shares = [fetch[0](record, i, cotangent) if want else None for i, want in enumerate(wanted)]  # type: ignore[misc]
            else:
                shares = [
                    rule(record, 0, cotangent) if want and rule is not None else None
                    for rule, want in zip(fetch, wanted, strict=True)
                ]
        return self._fitted(shares, record, cotangent)

    def prepared(self, record: Any, given: Sequence[bool], asked: Sequence[bool]) -> Offer | None:
        """How a known replay pulls cotangents through records like this one on arrays; None: by :meth:`pull`.

        ``given`` says which outputs have a cotangent, ``asked`` which inputs are linked.
        """
        if not self.simple or record.output_avals is not None:
            return None
        conditions: list[tuple[str, dict[str, Any]]] = []
        lines: list[tuple[tuple[int, ...], str]] = []
        constants: dict[str, Any] = {}
        rules: dict[int, KnownRule] = {}
        same: dict[int, tuple[int, list[tuple[str, dict[str, Any]]]]] = {}
        for j, (on_arrays, yes) in enumerate(zip(self._on_arrays, asked, strict=True)):
            if not yes:
                continue
            found = None if on_arrays is None else on_arrays.known(record)
            parent = record.parents[j]
            if found is None or (found.aval.shape, found.aval.dtype) != (parent.shape, parent.dtype):
                return None  # to be un-broadcast or converted
            constants[f"f{j}"] = found.function
            line = f"{{f{j}}}({', '.join(['{g}', *found.reads])})"
            if found.aval.shape == ():  # NumPy gives numbers there
                constants["asarray"], line = np.asarray, f"({{asarray}}({line}[0]),)"
            lines.append(((j,), line))
            conditions += found.conditions
            for k, other in rules.items():
                pairs = list(zip(found.places, other.places, strict=False))
                if found.content == other.content and all(record.saved[a] is record.saved[b] for a, b in pairs):
                    same[j] = k, [(f"{{r}}.saved[{a}] is {{r}}.saved[{b}]", {}) for a, b in pairs if a != b]
                    break
            rules[j] = found
        return Offer(conditions, lines, constants, same)

    def _array_rule(self, rule: Rule) -> ArrayRule | None:
        """The rule as a function on arrays, where it reads values (and static properties) alone."""
        if self.joint or self.variadic:
            return None
        asked: list[tuple[str, Any]] = []
        for name in list(inspect.signature(rule).parameters)[1:]:
            if name in self.argument_names:
                asked.append(("saved", self.argument_names.index(name)))
            elif name in _OUT_NAMES:
                asked.append(("saved", -1))
            elif name in self.parameter_names:
                asked.append(("param", name))
            elif name in ("shapes", "dtypes"):
                asked.append((name, None))
            else:
                return None
        return ArrayRule(self, rule, asked)

    def _fitted(self, shares: list[Any], record: Any, cotangent: Any) -> list[Any]:
        """Shares summed to the shapes, and converted to the dtypes, of the inputs."""
        for i, share in enumerate(shares):
            if share is None:
                continue
            parent = record.parents[i]
            if share.__class__ is Tensor:
                data = share._data
                if data.dtype is parent.dtype and data.shape == parent.shape:
                    continue
            elif not isinstance(share, Tensor):
                share = shares[i] = self._from_array(share, record, cotangent, i)
            if share.shape != parent.shape:
                if not _extends(share.shape, parent.shape):
                    raise ShapeError(
                        f"the VJP of {self.name} returned a cotangent of shape {share.shape} for {self._argument(i)}, "
                        f"expected {parent.shape} as that argument (or what it was broadcast to)"
                    )
                shares[i] = share = sum_to(share, parent.shape)
            if share.dtype != parent.dtype:
                shares[i] = share.astype(parent.dtype)
        return shares

    def _argument(self, position: int) -> str:
        """What the argument at a position is called."""
        names = self.argument_names
        if self.variadic and position >= len(names) - 1:
            return f"{names[-1]}[{position - len(names) + 1}]"
        return names[position]

    def _from_array(self, share: Any, record: Any, cotangent: Any, position: int) -> Tensor:
        """What a rule that left the tape returned: a value whose own derivative is unknown, not zero."""
        try:
            if isinstance(share, (list, tuple)) and any(isinstance(part, (Tensor, np.ndarray)) for part in share):
                raise DTypeError
            value = asarray(share)
        except DTypeError:
            raise DTypeError(
                f"the VJP of {self.name} returned {described(share)} for {self._argument(position)}, expected one "
                f"Tensor of shape {record.parents[position].shape}"
            ) from None
        if not isinstance(share, np.ndarray) or not _STATE.get().enabled:
            return value
        candidates = [*(cotangent if cotangent.__class__ is list else [cotangent]), *record.saved[:-1]]
        candidates += [_saved_output(record)] if self.saves_out else []
        origins = [t for t in candidates if isinstance(t, Tensor) and t.dtype.kind == "f"]
        return REGISTRY["opaque"].bind((value, *origins), {"who": self.name})

    def _complete(self, record: Any, cotangents: list[Any]) -> list[Any]:
        """Zeros in place of the absent cotangents of a record with several outputs."""
        return [
            zeros(aval) if cotangent is None else cotangent
            for cotangent, aval in zip(cotangents, record.output_avals, strict=True)
        ]


def described(result: Any) -> str:
    """What a rule returned, for messages."""
    if isinstance(result, (Tensor, np.ndarray)):
        return f"one {type(result).__name__} of shape {result.shape}"
    if isinstance(result, (list, tuple)):
        return f"a {type(result).__name__} of {len(result)}"
    return "None" if result is None else f"a {type(result).__name__}"


def _extends(shape: tuple[int, ...], of: tuple[int, ...]) -> bool:
    """Whether an array of the shape ``of`` broadcasts to ``shape``."""
    behind = shape[len(shape) - len(of) :] if len(of) <= len(shape) else None
    return behind is not None and all(n in (m, 1) for m, n in zip(behind, of, strict=True))


def signature_of(function: Callable[..., Any]) -> tuple[list[str], bool, list[str]]:
    """(names of the array arguments, any number of them?, names of the keyword-only parameters)."""
    leaf = LEAVES.get(getattr(function, "__name__", ""))
    if leaf is not None and getattr(_expressions, leaf.name) is function:
        return list("xyz"[: leaf.arity]), False, []  # a bare leaf: its arguments are x, y, z
    if isinstance(function, np.ufunc):  # before 2.3, NumPy's own functions had no signature
        return ["x"] if function.nin == 1 else [f"x{k + 1}" for k in range(function.nin)], False, []
    arguments, variadic, parameters = [], False, []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            arguments.append(parameter.name)
            variadic = True
        elif parameter.kind is parameter.KEYWORD_ONLY:
            parameters.append(parameter.name)
        elif parameter.kind is not parameter.VAR_KEYWORD:
            arguments.append(parameter.name)
    return arguments, variadic, parameters


def _saved_output(values: Any) -> Any:
    """The output (a tuple of several) as a tensor that is linked to its record, for second derivatives."""
    out = values.saved[-1]
    if out.__class__ is np.ndarray:
        tensor = Tensor(out, True)
        tensor._node = values
        return tensor
    if out.__class__ is tuple and out and out[0].__class__ is np.ndarray:
        tensors = tuple(Tensor(array, True) for array in out)
        for index, tensor in enumerate(tensors):
            tensor._node = Output(values, index)
        return tensors
    return out


def sum_to(t: Any, shape: tuple[int, ...]) -> Any:
    """Sum over the axes along which ``shape`` was broadcast to ``t.shape``."""
    return REGISTRY["sum_to"].bind((t,), {"shape": tuple(shape)})


def zeros(aval: Any) -> Any:
    """A tensor of zeros of an aval's shape and dtype."""
    if _STATE.get().trace is not None:
        return REGISTRY["full"].bind((), {"shape": tuple(aval.shape), "dtype": np.dtype(aval.dtype), "value": 0})
    return Tensor(np.zeros(aval.shape, aval.dtype))
