"""A module's forward as one Program, and which axes of its inputs may have any length."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from tinygrad_lstm.compiler.simplify import common, dead_code
from tinygrad_lstm.errors import ArgumentError, Error, GraphError, TraceError
from tinygrad_lstm.interop.sizes import Differs, Varying, samples_of, unified, varying
from tinygrad_lstm.nn.module import Module
from tinygrad_lstm.primitive import Aval
from tinygrad_lstm.program import Program
from tinygrad_lstm.tape import recording
from tinygrad_lstm.tensor import Tensor, asarray
from tinygrad_lstm.trace import Traced, trace
from tinygrad_lstm.tree import TreeDef, flatten, unflatten

__all__ = ["Forward", "record_forward"]

Axis = tuple[int, int]  # (which input, which of its axes)
_MOST_TIES = 256  # combinations of axes that are tried together


class Forward(NamedTuple):
    """The recorded forward of a module.  Lengths in the program are ints, or Sizes over ``symbols``."""

    program: Program
    symbols: dict[str, Axis]  # where the value of each symbol is found
    inputs: list[str]
    outputs: list[str]
    captures: list[np.ndarray | Varying | str]  # constants, and (first) names of parameters
    parameters: dict[str, np.ndarray]  # those that are captured, in the module's order
    names: dict[str, list[str]]  # all names of each of them: a shared one has several


def record_forward(module: Module, example_inputs: Any) -> Forward:
    """Record ``module(*example_inputs)`` in evaluation mode, with as many axes of free length as it allows.

    Raises
    ------
    TraceError
        The forward needs values of its inputs (``if``, ``float``); the message has the line.
    GraphError
        Two recordings of the same call differ: something random goes into it.
    """
    call = _Call(module, example_inputs)
    with _evaluating(module):
        try:
            call.at({})  # errors of the example itself, before anything else is tried
        except TraceError as error:
            raise TraceError(f"to_onnx: {type(module).__name__} cannot be recorded: {error}") from None
        ties = _free_axes(call)
        return _forward_of(call, ties)


class _Call:
    """The call to record: its arrays, as leaves, among arguments that stay as they are."""

    def __init__(self, module: Module, example_inputs: Any) -> None:
        self.module = module
        arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        self.leaves, self.treedef = flatten(tuple(_arrays(a) for a in arguments), open_modules=False)
        self.avals = [Aval(leaf.shape, leaf.dtype) for leaf in self.leaves if isinstance(leaf, Tensor)]
        if not self.avals:
            raise ArgumentError("to_onnx: there is no array among example_inputs; give one array or a tuple of arrays")
        try:
            inspect.signature(module.forward).bind(*arguments)
        except TypeError as error:
            raise ArgumentError(
                f"to_onnx: {len(arguments)} arguments in example_inputs do not fit {type(module).__name__}.forward"
                f"{inspect.signature(module.forward)}: {error}"
            ) from None
        names = _argument_names(module, len(arguments))
        paths = _paths(self.treedef, names)
        self.names = [path for path, leaf in zip(paths, self.leaves, strict=True) if isinstance(leaf, Tensor)]

    def at(self, lengths: Mapping[Axis, int]) -> Traced:
        """Record with other lengths of some axes."""
        avals = []
        for k, aval in enumerate(self.avals):
            shape = [lengths.get((k, axis), length) for axis, length in enumerate(aval.shape)]
            avals.append(Aval(tuple(shape), aval.dtype))

        def body(*tensors: Tensor) -> Any:
            rest = iter(tensors)
            leaves = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
            return self.module(*unflatten(self.treedef, leaves))

        with recording(eager=False, step=None, names=None, where=""):
            return trace(body, avals, flat=True)


def _arrays(value: Any) -> Any:
    """The tree of an argument with its arrays, and its lists of numbers, as Tensors."""
    if isinstance(value, (Tensor, np.ndarray)) or hasattr(value, "__array__"):
        return asarray(value)
    if isinstance(value, (list, tuple)) and value:
        if _numbers(value):
            return asarray(value)
        return type(value)([_arrays(item) for item in value])
    if isinstance(value, dict):
        return {key: _arrays(item) for key, item in value.items()}
    return value


def _numbers(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(_numbers(item) for item in value)
    return isinstance(value, (int, float, np.generic))


def _argument_names(module: Module, count: int) -> list[str]:
    """The names of the first arguments of forward."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds]
    return (found + [f"input_{k}" for k in range(len(found), count)])[:count]


def _paths(treedef: TreeDef, names: Sequence[str]) -> list[str]:
    """A name for every leaf of a tree whose children have names: ``state_0``, ``state_1``."""

    def inside(tree: TreeDef, name: str) -> Iterator[str]:
        if tree.kind == "leaf":
            yield name
        keys = tree.keys or range(len(tree.children))
        for key, child in zip(keys, tree.children, strict=True):
            yield from inside(child, f"{name}_{key}")

    return [path for name, child in zip(names, treedef.children, strict=True) for path in inside(child, name)]


@contextmanager
def _evaluating(module: Module) -> Iterator[None]:
    """Evaluation mode for a block; every module is as it was afterwards."""
    modules = list(module.modules())
    modes = [part.training for part in modules]
    if True not in modes:
        yield
        return
    module.eval()
    try:
        yield
    finally:
        everything = {id(part) for part in modules}
        for part, mode in zip(modules, modes, strict=True):
            part._set_mode(mode, set(everything))  # itself alone: all others count as seen


# ---------------------------------------------------------------------------- which axes are free


def _free_axes(call: _Call) -> list[tuple[Axis, ...]]:
    """Axes that may have any length; those that have to be equal are together."""
    found: list[tuple[Axis, ...]] = []
    taken: set[Axis] = set()
    for k, aval in enumerate(call.avals):
        for axis in range(len(aval.shape)):
            if (k, axis) in taken:
                continue
            for tie in _ties(call, (k, axis), taken):
                if _works(call, [*found, tie]):
                    found.append(tie)
                    taken.update(tie)
                    break
    return found


def _ties(call: _Call, first: Axis, taken: set[Axis]) -> Iterator[tuple[Axis, ...]]:
    """The axis alone, then with axes of the same length of other inputs, at most one of each."""
    length = call.avals[first[0]].shape[first[1]]
    options: list[list[tuple[Axis, ...]]] = []
    for k in range(first[0] + 1, len(call.avals)):
        shape = call.avals[k].shape
        options.append([(), *(((k, a),) for a, n in enumerate(shape) if n == length and (k, a) not in taken)])
    for combination in itertools.islice(itertools.product(*options), _MOST_TIES):
        yield (first, *(axis for part in combination for axis in part))


def _works(call: _Call, ties: Sequence[tuple[Axis, ...]]) -> bool:
    try:
        _unified(call, ties)
    except (Error, Differs):
        return False
    return True


def _unified(call: _Call, ties: Sequence[tuple[Axis, ...]]) -> tuple[Traced, Program, list[Any]]:
    """One program for all lengths of these axes, and what it captures."""
    symbols = [_symbol(call, tie) for tie in ties]
    samples = samples_of(symbols)
    if symbols:
        # The example itself counts: a forward may decide by lengths.  An axis of length 1 may be broadcast: 2 stands
        # for it.
        given = [max(call.avals[k].shape[axis], 2) for (k, axis), *_ in ties]
        samples.append(dict(zip(symbols, given, strict=True)))
    traced = [
        call.at({axis: sample[s] for s, tie in zip(symbols, ties, strict=True) for axis in tie}) for sample in samples
    ]
    program = unified([t.program for t in traced], samples)
    if any(t.out_tree != traced[0].out_tree for t in traced):
        raise Differs("the structure of the result")
    captures: list[Any] = []
    for group in zip(*(t.captures for t in traced), strict=True):
        same = all(tensor is group[0] for tensor in group)
        captures.append(group[0] if same else varying([t._data for t in group], samples))
    return traced[0], program, captures


def _symbol(call: _Call, tie: Sequence[Axis]) -> str:
    k, axis = tie[0]
    return f"{call.names[k]}_axis{axis}"


def _forward_of(call: _Call, ties: Sequence[tuple[Axis, ...]]) -> Forward:
    try:
        traced, program, captures = _unified(call, ties)
    except Differs as difference:
        raise GraphError(
            f"to_onnx: {type(call.module).__name__} computes something else at every call ({difference} differ), so "
            "something random or counted goes into it; pass it as an input"
        ) from None
    named: dict[int, list[str]] = {}
    for place in call.module._all_places():
        named.setdefault(id(place.value), []).append(place.name)
    sources: list[Any] = []
    used: dict[str, np.ndarray] = {}
    for capture in captures:
        if isinstance(capture, Tensor):
            names = named.get(id(capture))
            sources.append(capture._data if names is None else names[0])
            if names is not None:
                used[names[0]] = capture._data
        else:
            sources.append(capture)
    return Forward(
        dead_code(common(program)),
        {_symbol(call, tie): tie[0] for tie in ties},
        call.names,
        _output_names(call.module, traced.out_tree),
        sources,
        {names[0]: used[names[0]] for names in named.values() if names[0] in used},
        {names[0]: names for names in named.values() if names[0] in used},
    )


def _output_names(module: Module, tree: TreeDef) -> list[str]:
    """``output`` for the first leaf; the state of a recurrent layer as ``state_0``, ..."""
    if tree.kind == "leaf":
        return ["output"]
    roots = [f"output_{key}" for key in (tree.keys or range(len(tree.children)))]
    if getattr(module, "returns_state", False) and len(roots) > 1:
        roots[1] = "next_state"
    names = _paths(tree, roots)
    return ["output", *names[1:]] if names else names
