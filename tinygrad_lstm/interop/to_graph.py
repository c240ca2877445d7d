"""A recorded module as an ONNX model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tinygrad_lstm import serialization
from tinygrad_lstm._version import __version__
from tinygrad_lstm.compiler.report import place_of
from tinygrad_lstm.errors import ArgumentError, DTypeError, UnsupportedError
from tinygrad_lstm.interop.graph import Builder, Value
from tinygrad_lstm.interop.recorded import Forward, record_forward
from tinygrad_lstm.interop.rules import RULES, Applied, rule
from tinygrad_lstm.interop.scalars import elementwise
from tinygrad_lstm.interop.sizes import Varying
from tinygrad_lstm.nn.module import Module
from tinygrad_lstm.primitive import Aval
from tinygrad_lstm.program import Equation, Program

__all__ = ["OPSET", "PARAMETERS", "to_onnx"]

OPSET = 18
_IR_VERSION = 8  # of the same age as the operator set
PARAMETERS = "tinygrad_lstm.parameters"  # the entry of a model's metadata: initializer -> names of the parameter
_LARGEST = 2**31 - 1  # of a protobuf message


def to_onnx(
    module: Module,
    path: serialization.PathLike,
    example_inputs: Any,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a module as an ONNX model (operator set 18), atomically.

    The forward is recorded in evaluation mode (dropout off; the module's mode is put back) and every primitive of the
    recorded Program becomes nodes; ``ops.scan`` and every recurrent layer, whatever its cell, become ``Scan`` nodes.
    Needs the extra ``onnx``.

    Parameters
    ----------
    module : Module
    path : str or path-like
    example_inputs : one array, or a tuple of arguments of ``forward``
        Only shapes and dtypes count.  Arguments may be trees: ``(x, (h, c))`` gives the inputs ``x``, ``state_0`` and
        ``state_1`` (named after forward's arguments).  Every array (or list of numbers) is an input of the model; other
        values (None, flags, strings) are fixed.  A state that is not among them starts as the module's own (zeros,
        a learned state), which then is computed in the model for any batch size.
    input_names, output_names : sequences of str, optional
        In place of the names from forward's arguments, and of ``output``, ``next_state_0``, ...  (the leaves of the
        result from left to right).
    metadata : dict of str to str, optional
        Notes that are stored in the model.

    Notes
    -----
    Axes may have any length where the forward allows it (``x_axis0`` in the model's shapes): it is recorded at several
    lengths, and what changes must be a polynomial in them.  An axis keeps the length of the example where the forward
    refuses another one (features), or unrolls a Python loop over it.  Lengths are at least 1, as Scan needs a step.

    Raises
    ------
    DependencyError
        onnx is not installed.
    UnsupportedError
        A primitive has no ONNX form; the message names it and the line that ran it.
    TraceError
        The forward needs the values of its inputs, with the line.
    FileError
        The file could not be written; an old one is still there.
    ArgumentError, ShapeError, DTypeError
        ``example_inputs`` do not fit the module, or names do not fit its inputs and outputs.

    Examples
    --------
    >>> import os, tempfile
    >>> import numpy as np
    >>> from tinygrad_lstm import interop, nn
    >>> path = os.path.join(tempfile.mkdtemp(), "lstm.onnx")
    >>> interop.to_onnx(nn.LSTM(3, 5), path, np.ones((7, 2, 3), np.float32))    # doctest: +SKIP
    >>> onnxruntime.InferenceSession(path).run(None, {"x": x})                  # doctest: +SKIP
    """
    if not isinstance(module, Module):
        raise DTypeError(f"to_onnx: found {type(module).__name__}, expected a Module")
    builder = Builder()
    forward = record_forward(module, example_inputs)
    forward = forward._replace(
        inputs=_chosen(input_names, forward.inputs, "input"), outputs=_chosen(output_names, forward.outputs, "output")
    )
    model = _model(builder, type(module).__name__, forward, metadata or {})
    if model.ByteSize() > _LARGEST:
        raise ArgumentError(f"to_onnx: the model takes {model.ByteSize():,} bytes, an ONNX file holds at most 2 GiB")
    content = model.SerializeToString()
    with serialization.replacing(path) as file:
        file.write(content)


def _chosen(given: Sequence[str] | None, found: list[str], what: str) -> list[str]:
    if given is None:
        return found
    names = [given] if isinstance(given, str) else list(given)
    if len(names) != len(found) or len(set(names)) != len(names) or not all(isinstance(n, str) and n for n in names):
        raise ArgumentError(
            f"to_onnx: {what}_names are {len(found)} different names, one each for {', '.join(found)}; found {names}"
        )
    return names


def _model(b: Builder, name: str, forward: Forward, metadata: Mapping[str, str]) -> Any:
    program = forward.program
    helper = b.onnx.helper
    for reserved in (*forward.inputs, *forward.outputs):
        b.fresh(reserved)
    avals = [program.avals[slot] for slot in program.inputs]
    inputs = [Value(n, np.dtype(a.dtype), 0) for n, a in zip(forward.inputs, avals, strict=True)]
    declared = [b.declared(v.name, v.dtype, a.shape) for v, a in zip(inputs, avals, strict=True)]
    for symbol, (which, axis) in forward.symbols.items():
        b.symbol(symbol, inputs[which], axis)
    parameters = {name: b.parameter(name, array) for name, array in forward.parameters.items()}
    captures = [
        parameters[c] if isinstance(c, str) else b.varying(c) if isinstance(c, Varying) else b.constant(c)
        for c in forward.captures
    ]
    trained = {parameters[name].name: names for name, names in forward.names.items()}
    results = _run(b, program, [*inputs, *captures])
    outs = []
    for result, wanted, aval in zip(results, forward.outputs, program.output_avals(), strict=True):
        b.graphs[0].append(helper.make_node("Identity", [result.name], [wanted], name=b.fresh(f"to_{wanted}")))
        outs.append(b.declared(wanted, aval.dtype, aval.shape))
    graph = helper.make_graph(b.graphs[0], name, declared, outs, b.initializers)
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        producer_name="tinygrad_lstm",
        producer_version=__version__,
    )
    model.ir_version = _IR_VERSION
    helper.set_model_props(model, {**metadata, PARAMETERS: json.dumps(trained)})
    return model


def _run(b: Builder, program: Program, values: Sequence[Value]) -> list[Value]:
    """The nodes of a program, on values for its inputs and captures; its outputs."""
    environment: dict[int, Value] = dict(zip((*program.inputs, *program.captures), values, strict=True))

    def strong(operand: Any, like: Any) -> Value:
        return environment[operand] if operand.__class__ is int else b.constant(np.asarray(operand.value, like))

    outer = b.where
    for equation in program.equations:
        b.where = equation.source.where if equation.source is not None else outer
        outs = [program.avals[slot] for slot in equation.outputs]
        try:
            environment.update(zip(equation.outputs, _applied(b, program, equation, environment, outs), strict=True))
        except UnsupportedError as error:
            if "to_onnx" in str(error):
                raise
            raise UnsupportedError(f"to_onnx: {error} ({place_of(equation)})") from None
    b.where = outer
    return [strong(output, program.aval(output).dtype) for output in program.outputs]


def _applied(
    b: Builder, program: Program, equation: Equation, environment: Mapping[int, Value], outs: list[Aval]
) -> list[Value]:
    primitive = equation.primitive
    shapes = [program.avals[o].shape if o.__class__ is int else () for o in equation.operands]
    if primitive.only_checks:  # a model says nothing where values are out of range
        return [environment[equation.operands[0]]]
    if primitive.is_elementwise and primitive.name not in RULES:
        weak = [environment[o] if o.__class__ is int else o for o in equation.operands]
        return [elementwise(b, primitive.name, primitive.expression, weak, equation.params, outs[0])]
    if primitive.name not in RULES:
        raise UnsupportedError(f"'{primitive.name}' has no ONNX form")
    args = [
        environment[o] if o.__class__ is int else b.constant(np.asarray(o.value, outs[0].dtype))
        for o in equation.operands
    ]
    return RULES[primitive.name](Applied(b, args, shapes, equation.params, outs))


@rule("compiled")
def _compiled(a: Applied) -> list[Value]:
    """A function given to ``tg.compile``: its program in place."""
    program: Program = a.params["program"]
    return _run(a.b, program, a.args)


@rule("scan")
def _scan(a: Applied) -> list[Value]:
    """A loop, as Scan; its body by the same table."""
    b, body = a.b, a.params["body"]
    n_carry, n_ys, n_inputs = a.params["n_carry"], a.params["n_ys"], len(body.inputs)
    carry, xs, captures = a.args[:n_carry], list(a.args[n_carry:n_inputs]), a.args[n_inputs:]
    results_of = body.output_avals()
    sums = results_of[n_carry + n_ys :]  # of a derivative: added up over the steps, so they are carried
    starts = [b.expand(np.zeros((), aval.dtype), aval.shape) for aval in sums]
    avals = [body.avals[slot] for slot in body.inputs]
    if not xs:  # Scan takes the number of steps from what it reads
        xs = [b.expand(np.zeros((), np.bool_), (a.params["length"],))]
        avals = [*avals, Aval((), np.dtype(bool))]
    reads = max(v.level for v in (*carry, *starts, *xs, *captures))
    depth = b.enter()
    fresh = [Value(b.fresh("step_in"), np.dtype(aval.dtype), depth) for aval in (*avals, *sums)]
    inside, totals = fresh[: len(avals)], fresh[len(avals) :]
    results = _run(b, body, [*inside[:n_inputs], *captures])
    for k, total in enumerate(totals, n_carry + n_ys):
        results[k] = b.one("Add", [total, results[k]], total.dtype)
    order = [*range(n_carry), *range(n_carry + n_ys, len(results)), *range(n_carry, n_carry + n_ys)]
    outs, declared = [], []
    for k in order:
        # A name of its own: an output may be an input, a value from outside, or stand twice.
        (out,) = b.node("Identity", [results[k]], [results_of[k].dtype], level=depth)
        outs.append(out)
        declared.append(b.declared(out.name, results_of[k].dtype, results_of[k].shape))
    places = [*zip(inside[:n_carry], avals, strict=False), *zip(totals, sums, strict=True)]
    places += zip(inside[n_carry:], avals[n_carry:], strict=True)
    graph = b.leave("body", [b.declared(v.name, v.dtype, aval.shape) for v, aval in places], declared)
    back = int(a.params["reverse"])
    directions = {"scan_input_directions": [back] * len(xs), "scan_output_directions": [back] * n_ys}
    made = b.node(
        "Scan", [*carry, *starts, *xs], [out.dtype for out in outs], level=reads, body=graph, num_scan_inputs=len(xs),
        **{name: values for name, values in directions.items() if values},
    )  # fmt: skip
    return [made[order.index(k)] for k in range(len(order))]
