"""How a primitive is declared, bound to operands, and differentiated; the registry of all of them.

A primitive is one function on arrays plus the rules of its derivatives.  A rule is written in ops, takes
the cotangent first and *names* what else it needs::

    multiply = elementwise("multiply", lambda x, y: x * y, (lambda g, y: g * y, lambda g, x: g * x))

The names are those of the forward function's arguments (the values are then saved), ``out`` (the output is
saved), its keyword parameters, ``shapes`` and ``dtypes`` (of all inputs) and ``position`` (which input is
asked for, in primitives with any number of them).  So what a primitive keeps for its backward can be read
off its rules.  How a cotangent is pulled back through them stands in :mod:`tinygrad_lstm.pullback`.

The idea of a table of rules, one per argument, is HIPS autograd's (Maclaurin, Duvenaud & Adams, 2015).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tinygrad_lstm import storage as _storage
from tinygrad_lstm.binding import record_application, record_plain
from tinygrad_lstm.calls import Takes
from tinygrad_lstm.errors import ArgumentError, DTypeError, Error, GraphError, OutOfRangeError, ShapeError
from tinygrad_lstm.kernels.expression import Expr
from tinygrad_lstm.kernels.pool import SMALLEST, applied
from tinygrad_lstm.operands import as_operands
from tinygrad_lstm.pullback import REGISTRY, Differentiable, Rule, signature_of, sum_to, zeros
from tinygrad_lstm.record import _STATE, Aval
from tinygrad_lstm.tensor import Tensor, asarray

__all__ = ["EXPLAINED", "REGISTRY", "Aval", "OpaqueError", "Primitive", "Rule", "signature_of", "sum_to", "zeros"]

_ndarray = np.ndarray
EXPLAINED = ValueError, TypeError, IndexError, AttributeError, OverflowError  # of a forward: said in terms of operands


class Primitive(Differentiable):
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
        self.only_checks = False  # gives its first operand as it is: who prints or exports may look past it
        self.refuses_dtypes = ""  # what dtypes it takes, where that needs to be said
        self.refuses = ""  # of an elementwise primitive: what values it does not take, and what to do
        self.always_tuple = always_tuple  # the forward returns a tuple even for one output
        self._jvp = jvp
        self.joint = joint
        # Whether its rule may give no cotangent to a linked input, which shows only when it runs: a known replay cannot
        # foresee that.
        self.may_skip = joint
        self.__doc__ = doc
        self.__name__ = name
        self.argument_names, self.variadic, self.parameter_names = signature_of(expression or forward)
        self.takes = Takes(
            name, self.argument_names, self.variadic, self.parameter_names, expression or forward
        )  # fmt: skip
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

    # ------------------------------------------------------------------ running

    def __call__(self, *args: Any, **params: Any) -> Any:
        takes = self.takes
        if (len(args) != takes.count and not takes.variadic) or params.keys() != takes.parameters:
            args, params = takes.matched(args, params)
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
                a, b = x._data, y._data
                try:
                    out = self.forward(a, b) if a.nbytes < SMALLEST else applied(self.forward, a, b)  # type: ignore[arg-type]
                except (ValueError, TypeError, OverflowError) as error:
                    raise self._explained(error, args, params) from None
                result = Tensor(out if out.__class__ is _ndarray else np.asarray(out))
                if current.enabled:
                    if current.tapes:
                        record_application(self, args, params, (result,), x._rg or y._rg, current, False)
                    elif self.differentiable and (x._rg or y._rg):
                        record_plain(self, args, params, result, result._data, current)
                return result
        if len(args) == 1 and args[0].__class__ is Tensor:
            needs, values = args[0]._rg, [args[0]._data]
        else:
            needs = found = False
            for arg in args:
                if isinstance(arg, Tensor):
                    found = True
                    if arg._rg:
                        needs = True
                elif arg.__class__ is not float and arg.__class__ is not int:
                    if any(isinstance(symbol, Expr) for symbol in args):
                        return self._symbolic(args, params)
                    return self.bind(as_operands(args), params)
            if not found and (args or self.argument_names):
                return self.bind(tuple(asarray(arg) for arg in args), params) if args else self._no_operands()
            values = [arg._data if isinstance(arg, Tensor) else arg for arg in args]
        try:
            out = self.forward(*values, **params) if params else self.forward(*values)
        except EXPLAINED as error:
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

    def _symbolic(self, args: tuple[Any, ...], params: dict[str, Any]) -> Any:
        """The primitive on symbolic scalars: an op inside of the expression of another one."""
        if self.expression is None:
            raise DTypeError(f"{self.name} is no elementwise op, so it cannot stand in an expression")
        return self.expression(*args, **params)

    def several(self, count: int) -> bool:
        """Whether the forward returns a tuple (``count`` outputs were recorded)."""
        return count != 1 or self.always_tuple

    def _no_operands(self) -> Any:
        raise ArgumentError(f"{self.name}() needs at least one operand")

    def _explained(self, error: Exception, args: Sequence[Any], params: Mapping[str, Any]) -> Exception:
        """The error of the forward function, said in terms of the operands."""
        if isinstance(error, Error) or not self.explains or _is_users(error):
            return error
        found = ", ".join(f"{a.dtype}{list(a.shape)}" if isinstance(a, Tensor) else repr(a) for a in args)
        given = "".join(f", {key}={value!r}" for key, value in params.items())
        if isinstance(error, OverflowError):
            return OutOfRangeError(f"{self.name}({found}{given}): a Python number does not fit the dtype of the array")
        if isinstance(error, IndexError):
            return OutOfRangeError(f"{self.name}({found}{given}): index out of range for these shapes")
        if isinstance(error, (TypeError, AttributeError)):
            why = self.refuses_dtypes or "these dtypes or argument types do not fit the operation"
            return DTypeError(f"{self.name}({found}{given}): {why}")
        if self.is_elementwise and _broadcast([a.shape for a in args if isinstance(a, Tensor)]):
            return ArgumentError(
                f"{self.name}({found}{given}): {self.refuses or 'these values do not fit the operation'}"
            )
        why = "these shapes, axes or sizes do not fit together"
        if self.is_elementwise:
            why = _unequal([a.shape for a in args if isinstance(a, Tensor)])
        return ShapeError(f"{self.name}({found}{given}): {why}")

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


def _is_users(error: Exception) -> bool:
    """Whether it comes from a function of a user's: a primitive of theirs in a loop or in a compiled function."""
    from tinygrad_lstm.compiler.blame import is_ours  # stands above this module

    return not all(is_ours(frame) for frame, _ in traceback.walk_tb(error.__traceback__))


def _broadcast(shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether shapes fit together."""
    try:
        np.broadcast_shapes(*shapes)
    except ValueError:
        return False
    return True


def _unequal(shapes: Sequence[tuple[int, ...]]) -> str:
    """Which axis keeps shapes from broadcasting."""
    for axis in range(-1, -max(map(len, shapes)) - 1, -1):
        lengths = sorted({shape[axis] for shape in shapes if -axis <= len(shape)} - {1})
        if len(lengths) > 1:
            break
    return (
        f"shapes do not broadcast: axis {axis} has lengths {' and '.join(map(str, lengths))}; lengths are equal or 1, "
        "counted from the last axis"
    )


def aval_of(value: Any) -> Aval:
    return Aval(value.shape, value.dtype) if isinstance(value, Tensor) else Aval((), np.asarray(value).dtype)


class OpaqueError(GraphError):
    """A derivative is asked for that nobody wrote."""


def _unknown(*_: Any, who: str = "", **params: Any) -> Any:
    raise OpaqueError(
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
