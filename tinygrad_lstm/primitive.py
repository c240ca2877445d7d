"""How a primitive is declared, bound to operands, and differentiated; the registry of all of them.

A primitive is one function on arrays plus the rules of its derivatives.  A rule is written in ops, takes
the cotangent first and *names* what else it needs::

    multiply = elementwise("multiply", lambda x, y: x * y, (lambda g, y: g * y, lambda g, x: g * x))

The names are those of the forward function's arguments (the values are then saved), ``out`` (the output is
saved), its keyword parameters, ``shapes`` and ``dtypes`` (of all inputs) and ``position`` (which input is
asked for, in primitives with any number of them).  So what a primitive keeps for its backward can be read
off its rules.  Un-broadcasting, dtypes and absent cotangents are handled here, once.

The idea of a table of rules, one per argument, is HIPS autograd's (Maclaurin, Duvenaud & Adams, 2015).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tinygrad_lstm import storage as _storage
from tinygrad_lstm.binding import record_application, record_plain
from tinygrad_lstm.errors import ArgumentError, DTypeError, Error, GraphError, OutOfRangeError, ShapeError
from tinygrad_lstm.kernels import expression as _expressions
from tinygrad_lstm.kernels.table import LEAVES
from tinygrad_lstm.record import _STATE, Aval, Output
from tinygrad_lstm.tensor import Tensor, as_operand, asarray

__all__ = ["REGISTRY", "Aval", "Primitive", "Rule", "signature_of", "sum_to", "zeros"]

REGISTRY: dict[str, Primitive] = {}

Rule = Callable[..., Any]
_ndarray = np.ndarray


class Primitive:
    """A function on arrays with hand-written derivatives.  Calling it runs and, where needed, records it.

    Attributes
    ----------
    name : str
    forward : callable
        Arrays and Python numbers in, an array (or a tuple of them) out; parameters are keyword-only.
    expression : callable or None
        For elementwise primitives: the same function on symbolic scalars
        (:mod:`tinygrad_lstm.kernels.expression`), from which fused kernels are generated.
    rules : tuple of callables
        VJP per argument.  For an elementwise primitive the same rule is the JVP: the Jacobian is diagonal.
    linear : "each", "jointly" or None
        Linear in every argument taken alone (matmul), or in all of them together (concatenate).
    """

    generation = 0  # grows whenever any rule changes: what was derived from rules before is stale

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        rules: Sequence[Rule | None] | Rule | None,
        *,
        jvp: Rule | None = None,
        joint: bool = False,
        linear: str | None = None,
        shape: Callable[..., Any] | None = None,
        expression: Callable[..., Any] | None = None,
        is_elementwise: bool = False,
        differentiable: bool = True,
        accumulate: Callable[[np.ndarray, np.ndarray, Any], None] | None = None,
        batch: str | None = None,
        saves: Sequence[str] | None = None,
        always_tuple: bool = False,
        register: bool = True,
        view: bool = False,
        doc: str | None = None,
    ) -> None:
        if register and name in REGISTRY:
            raise ArgumentError(f"a primitive named {name!r} exists already; choose another name")
        self.name = name
        self.forward = forward
        self.expression = expression
        self.is_elementwise = is_elementwise
        self.differentiable = differentiable
        self.linear = linear
        self.shape_rule = shape
        self.accumulate = accumulate
        self.declared = False
        self.batch = batch  # "same": right with the same parameters when operands have one more leading axis
        self.explains = True  # say errors of the forward in terms of the operands; not those of a user's own function
        self.view = view  # the outputs share memory with the first operand
        self.always_tuple = always_tuple  # the forward returns a tuple even for one output
        self._jvp = jvp
        self.joint = joint
        self.__doc__ = doc
        self.__name__ = name
        self.argument_names, self.variadic, self.parameter_names = signature_of(expression or forward)
        self._needs_shapes = False
        self._saved_inputs: set[int] = set()
        self.saves_out = False
        self.rules: tuple[Rule | None, ...] = ()
        self._rules_given = rules
        self._fetch: tuple[Callable[..., Any] | None, ...] = ()
        self._saves_given = tuple(saves) if saves is not None else None
        self.set_rules(rules)
        if register:
            REGISTRY[name] = self

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
        self._places: list[list[int] | None] = []
        self._on_arrays: dict[Any, Any] = {}
        for rule in listed:
            self._saved_inputs, self.saves_out = set(), False
            if rule is None:
                self._places.append(None)
            fetch.append(None if rule is None else self._compile_rule(rule))
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
        self.plain = not self._needs_shapes and self._saved_from == sys.maxsize
        self.version = getattr(self, "version", -1) + 1
        Primitive.generation += 1

    def _compile_rule(self, rule: Rule) -> Callable[..., Any]:
        """A function (values, position, cotangent) that looks up what the rule names and calls it."""
        names = list(inspect.signature(rule).parameters)[1:]
        fetch: list[str] = []
        # Where the values that the rule reads stand in `saved`; None if it reads anything else.
        places = [-1 if n in _OUT_NAMES else self.argument_names.index(n) for n in names if n in self._readable()]
        self._places.append(places if len(places) == len(names) and self.is_elementwise and not self.variadic else None)
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

    # ------------------------------------------------------------------ running

    def __call__(self, *args: Any, **params: Any) -> Any:
        return self.bind(args, params)

    def __repr__(self) -> str:
        return f"<Primitive {self.name}>"

    def bind(self, args: tuple[Any, ...], params: dict[str, Any]) -> Any:
        """Run the primitive on operands and record it where somebody may want its gradient."""
        current = _STATE.get()
        if current.trace is not None:
            return current.trace.bind(self, args, params)
        if self.quick and len(args) == 2:
            # Two plain tensors, one plain ufunc: nothing that is not needed for them.
            x, y = args
            if x.__class__ is Tensor and y.__class__ is Tensor:
                try:
                    out = self.forward(x._data, y._data)
                except (ValueError, TypeError, OverflowError) as error:
                    raise self._explained(error, args, params) from None
                result = Tensor(out if out.__class__ is _ndarray else np.asarray(out))
                if current.enabled:
                    if current.tapes:
                        record_application(self, args, params, (result,), x._rg or y._rg, current, False)
                    elif self.differentiable and (x._rg or y._rg):
                        record_plain(self, args, params, result, result._data, current)
                return result
        needs = found = False
        for arg in args:
            if isinstance(arg, Tensor):
                found = True
                if arg._rg:
                    needs = True
            elif arg.__class__ is not float and arg.__class__ is not int:
                return self.bind(_operands(args), params)
        if not found and (args or self.argument_names):
            return self.bind(tuple(asarray(arg) for arg in args), params) if args else self._no_operands()
        values = [arg._data if isinstance(arg, Tensor) else arg for arg in args]
        try:
            out = self.forward(*values, **params) if params else self.forward(*values)
        except (ValueError, TypeError, IndexError, AttributeError, OverflowError) as error:
            raise self._explained(error, args, params) from None
        if out.__class__ is tuple:
            outputs = tuple([Tensor(o if o.__class__ is np.ndarray else np.asarray(o)) for o in out])
            if self.view:
                _storage.share(args[0], outputs)
            if current.enabled and (current.tapes or (needs and self.differentiable)):
                record_application(self, args, params, outputs, needs, current, True)
            return outputs
        result = Tensor(out if out.__class__ is np.ndarray else np.asarray(out))
        if self.view and len(args) == 1:
            _storage.share(args[0], (result,))
        if current.enabled:
            if current.tapes or (needs and not self.plain and self.differentiable):
                record_application(self, args, params, (result,), needs, current, False)
            elif needs and self.differentiable:
                record_plain(self, args, params, result, result._data, current)
        return result

    def several(self, count: int) -> bool:
        """Whether the forward returns a tuple (``count`` outputs were recorded)."""
        return count != 1 or self.always_tuple

    def _no_operands(self) -> Any:
        raise ArgumentError(f"{self.name}() needs at least one operand")

    def _explained(self, error: Exception, args: Sequence[Any], params: Mapping[str, Any]) -> Exception:
        """The error of the forward function, said in terms of the operands."""
        if isinstance(error, Error) or not self.explains:
            return error
        found = ", ".join(f"{a.dtype}{list(a.shape)}" if isinstance(a, Tensor) else repr(a) for a in args)
        given = "".join(f", {key}={value!r}" for key, value in params.items())
        if isinstance(error, OverflowError):
            return OutOfRangeError(f"{self.name}({found}{given}): a Python number does not fit the dtype of the array")
        if isinstance(error, IndexError):
            return OutOfRangeError(f"{self.name}({found}{given}): index out of range for these shapes")
        if isinstance(error, (TypeError, AttributeError)):
            return DTypeError(f"{self.name}({found}{given}): these dtypes or argument types do not fit the operation")
        return ShapeError(f"{self.name}({found}{given}): these shapes, axes or sizes do not fit together")

    def abstract(self, operands: Sequence[Any], params: Mapping[str, Any]) -> Any:
        """Shape and dtype of the result (an Aval, or a tuple of them) from Avals and Python numbers."""
        try:
            if self.is_elementwise:
                return self._elementwise_aval(operands, params)
            if self.shape_rule is not None:
                return self.shape_rule(*operands, **params)
            # Ones, but indices of 0: those are inside of an axis of length 1 too.
            arrays = [
                (np.zeros if np.dtype(o.dtype).kind in "iu" else np.ones)(o.shape, o.dtype)
                if isinstance(o, Aval)
                else o
                for o in operands
            ]
            with np.errstate(all="ignore"):
                out = self.forward(*arrays, **params)
        except (ValueError, TypeError, IndexError, OverflowError) as error:
            shown = [Tensor(np.empty(o.shape, o.dtype)) if isinstance(o, Aval) else o for o in operands]
            raise self._explained(error, shown, params) from None
        if isinstance(out, tuple):
            return tuple(Aval(np.shape(o), np.asarray(o).dtype) for o in out)
        return Aval(np.shape(out), np.asarray(out).dtype)

    def _elementwise_aval(self, operands: Sequence[Any], params: Mapping[str, Any]) -> Aval:
        key = tuple(o.dtype if isinstance(o, Aval) else type(o) for o in operands)
        cache = self.__dict__.setdefault("_dtypes", {})
        if key not in cache:
            ones = [np.ones(1, o.dtype) if isinstance(o, Aval) else type(o)(1) for o in operands]
            with np.errstate(all="ignore"):
                cache[key] = self.forward(*ones, **params).dtype
        return Aval(np.broadcast_shapes(*[o.shape for o in operands if isinstance(o, Aval)]), cache[key])

    # ------------------------------------------------------------------ derivatives

    def pull(self, record: Any, cotangent: Any, wanted: Sequence[bool] | None = None) -> Sequence[Any]:
        """Cotangents of the wanted inputs (of all that have a node): un-broadcast and in the input's dtype."""
        parents = record.parents
        if wanted is None:
            if self.simple and cotangent.__class__ is not list:
                # A plain backward records nothing: where possible the rule runs on bare arrays.
                shares: list[Any] = []
                for position, (rule, parent) in enumerate(zip(self._fetch, parents, strict=True)):
                    if parent is None or rule is None:
                        shares.append(None)
                        continue
                    share = self._share_of_arrays(position, record, cotangent)
                    shares.append(rule(record, 0, cotangent) if share is None else share)
                return self._fitted(shares, record, cotangent)
            wanted = [parent is not None for parent in parents]
        if self.joint:
            if cotangent.__class__ is list and not self.always_tuple:  # scan and checkpoint look at what is absent
                cotangent = self._complete(record, cotangent)
            shares = list(self._fetch[0](record, wanted, cotangent))  # type: ignore[misc]
            if len(shares) != len(parents):
                raise GraphError(f"the VJP of {self.name} returned {len(shares)} cotangents for {len(parents)} inputs")
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

    def _readable(self) -> tuple[str, ...]:
        return (*self.argument_names, *_OUT_NAMES)

    def _share_of_arrays(self, position: int, record: Any, cotangent: Tensor) -> Tensor | None:
        """The share of one input from the rule's own program, run on arrays; None where the rule itself must run.

        The program is the rule, recorded once: there is no second definition.
        """
        places = self._places[position]
        if places is None or cotangent.__class__ is not Tensor:
            return None
        arrays = [cotangent._data]
        saved = record.saved
        for place in places:
            value = saved[place]
            if value.__class__ is not _ndarray:
                if not isinstance(value, Tensor):
                    return None  # a number: rules may branch on it
                value = value._data
            arrays.append(value)
        key = (position, *[array.dtype for array in arrays])
        function = self._on_arrays.get(key)
        if function is None:
            function = self._on_arrays[key] = _array_function(self.rules[position], arrays)
        if function is False:
            self._places[position] = None  # do not look again
            return None
        (out,) = function(*arrays)
        return Tensor(out if out.__class__ is _ndarray else np.asarray(out))

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
                share = shares[i] = self._from_array(share, record, cotangent)
            if share.shape != parent.shape:
                shares[i] = share = sum_to(share, parent.shape)
            if share.dtype != parent.dtype:
                shares[i] = share.astype(parent.dtype)
        return shares

    def _from_array(self, share: Any, record: Any, cotangent: Any) -> Tensor:
        """What a rule that left the tape returned: a value whose own derivative is unknown, not zero."""
        value = asarray(share)
        if not isinstance(share, np.ndarray) or not _STATE.get().enabled:
            return value
        candidates = [*(cotangent if cotangent.__class__ is list else [cotangent]), *record.saved[:-1]]
        candidates += [_saved_output(record)] if self.saves_out else []
        origins = [t for t in candidates if isinstance(t, Tensor) and t.dtype.kind == "f"]
        return opaque.bind((value, *origins), {"who": self.name})

    def _complete(self, record: Any, cotangents: list[Any]) -> list[Any]:
        """Zeros in place of the absent cotangents of a record with several outputs."""
        return [
            zeros(aval) if cotangent is None else cotangent
            for cotangent, aval in zip(cotangents, record.output_avals, strict=True)
        ]


_OUT_NAMES = ("out", "ans", "output", "y_out")


def signature_of(function: Callable[..., Any]) -> tuple[list[str], bool, list[str]]:
    """(names of the array arguments, any number of them?, names of the keyword-only parameters)."""
    leaf = LEAVES.get(getattr(function, "__name__", ""))
    if leaf is not None and getattr(_expressions, leaf.name) is function:
        return list("xyz"[: leaf.arity]), False, []  # a bare leaf: its arguments are x, y, z
    arguments, variadic, parameters = [], False, []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            arguments.append(parameter.name)
            variadic = True
        elif parameter.kind is parameter.KEYWORD_ONLY:
            parameters.append(parameter.name)
        else:
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
            tensor._node = Output(values, index, tensor.shape, tensor.dtype)
        return tensors
    return out


def aval_of(value: Any) -> Aval:
    return Aval(value.shape, value.dtype) if isinstance(value, Tensor) else Aval((), np.asarray(value).dtype)


def _array_function(rule: Rule | None, arrays: Sequence[np.ndarray]) -> Any:
    """The rule as a function on arrays, or False where it is more than elementwise arithmetic of what it reads."""
    from tinygrad_lstm.trace import trace

    traced = trace(lambda *values: [rule(*values)], [Aval((2,), a.dtype) for a in arrays], flat=True)  # type: ignore[misc]
    program = traced.program
    plain = all(e.primitive.is_elementwise and e.primitive.explains for e in program.equations)
    if not program.equations or not plain or traced.captures:
        return False
    return program.function()


def _operands(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Operands of other kinds as tensors, and as Python numbers where a tensor is beside them."""
    converted = tuple(as_operand(a) if a.__class__ is not bool else asarray(a) for a in args)
    return converted if any(isinstance(c, Tensor) for c in converted) else tuple(asarray(a) for a in args)


def sum_to(t: Any, shape: tuple[int, ...]) -> Any:
    """Sum over the axes along which ``shape`` was broadcast to ``t.shape``."""
    return REGISTRY["sum_to"].bind((t,), {"shape": tuple(shape)})


def zeros(aval: Any) -> Any:
    """A tensor of zeros of an aval's shape and dtype."""
    if _STATE.get().trace is not None:
        return REGISTRY["full"].bind((), {"shape": tuple(aval.shape), "dtype": np.dtype(aval.dtype), "value": 0})
    return Tensor(np.zeros(aval.shape, aval.dtype))


def _unknown(*_: Any, who: str = "", **params: Any) -> Any:
    raise GraphError(
        f"the VJP of {who!r} returned a NumPy array, so it cannot be differentiated itself (second derivatives, jvp); "
        "write the rule in ops"
    )


opaque = Primitive(
    "opaque",
    lambda value, *origins, who: value,
    (lambda g, who: _unknown(who=who),),
    jvp=_unknown,
    shape=lambda value, *origins, who: value,
    doc="A value computed outside of the tape from `origins`: differentiating it is an error.",
)
