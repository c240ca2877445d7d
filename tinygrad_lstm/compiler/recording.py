"""One recording of a function for tg.compile: its program, its captures and their places, and its purity."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.compiler import report as _report
from tinygrad_lstm.compiler.blame import explained, line_where, within
from tinygrad_lstm.compiler.draws import CompileWarning, drawn_once
from tinygrad_lstm.compiler.reach import Reach, checked
from tinygrad_lstm.compiler.reads import is_scalar
from tinygrad_lstm.compiler.whole import bind_program, executable, optimised
from tinygrad_lstm.errors import Error, TraceError
from tinygrad_lstm.primitive import Aval, Primitive
from tinygrad_lstm.program import Program, lower
from tinygrad_lstm.tape import recording
from tinygrad_lstm.tensor import Tensor, asarray
from tinygrad_lstm.trace import Trace, TracedTensor, same_values
from tinygrad_lstm.tree import TreeDef, flatten, unflatten

__all__ = ["CompileWarning", "Entry", "FunctionTrace", "Recording"]

# A loop over time was probably unrolled where so much was recorded, and one place in the code ran so often.
MANY_RECORDS, MANY_TURNS = 2_000, 20

_DERIVING = frozenset({"tinygrad_lstm.autodiff.matrices", "tinygrad_lstm.pushforward", "tinygrad_lstm.tape"})


class FunctionTrace(Trace):
    """A recording of a whole function: also knows what was made, and what is to be drawn anew at each call."""

    runs = True

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Any] = []  # weak: what is alive when the recording is over has escaped
        self.draws: list[tuple[Callable[[], Any], TracedTensor]] = []
        self.turns: Counter[Any] = Counter()  # how often each place in the code made a record

    def new(self, aval: Aval, requires_grad: bool = False) -> TracedTensor:
        """A fresh input of the program."""
        tensor = super().new(aval, requires_grad)
        self.made.append(weakref.ref(tensor))
        return tensor

    def bind(self, prim: Primitive, args: tuple[Any, ...], params: dict[str, Any]) -> Any:
        """Record an application without running it."""
        outs = super().bind(prim, args, params)
        self.made.extend(weakref.ref(out) for out in (outs if isinstance(outs, tuple) else (outs,)))
        if not within(_DERIVING):  # derivatives are recorded op by op, all of them from the line that asks for them
            record = self.entries[-1][0]
            self.turns[record.code, record.lasti] += 1
        return outs

    def draw(self, aval: Aval, make: Callable[[], Any]) -> TracedTensor:
        """An input that ``make()`` (an array of the aval's shape and dtype) gives anew at every call, in this order."""
        tensor = self.new(aval)
        self.draws.append((make, tensor))
        return tensor


def _contents(reaches: Sequence[Reach]) -> list[Any]:
    """What can be changed in place in tensors and arrays; whoever writes through an array leaves no other trace."""
    tensors = [holder[place] for reach in reaches for holder, place in reach.tensors]
    made: list[Any] = [(t.version, t._rg) for t in tensors]
    arrays = [a for r in reaches for a in r.arrays()] + [t._data for t in tensors if not isinstance(t, TracedTensor)]
    made += [number for _, number in checked(arrays)]
    return made


class Entry:
    """One recorded signature."""

    def __init__(
        self, name: str, program: Program, n_recorded: int, draws: Sequence[Callable[[], Any]], captures: Sequence[Any],
        outs: Sequence[tuple[str, Any]], out_tree: TreeDef, read: list[tuple[int, int, np.ndarray]],
    ) -> None:  # fmt: skip
        self.name = name
        self.read = read  # (which reach, which of its tensors, values) of tensors that Python code took values of
        self.again = 0  # how often the same program was made since these values had changed
        self.program = program  # inputs: arguments, draws, captures
        self.n_recorded = n_recorded
        self.draws = tuple(draws)
        self.captures = tuple(captures)  # a Tensor, or (which reach, which of its tensors)
        self.capture_avals = [program.avals[s] for s in program.inputs[len(program.inputs) - len(captures) :]]
        self.outs = tuple(outs)  # ("value", which result), ("same" or "constant", which operand), ("static", _)
        self.out_tree = out_tree
        self.pieces = any(e.primitive.name == "scan_within" for e in program.equations)
        self.parts: list[Any] | None = None  # what the scans inside published at the first call

    def captured(self, reaches: Sequence[Reach]) -> list[Tensor] | None:
        """The captured tensors as they are now; None where one is not what was recorded."""
        found = []
        for which, number, values in self.read:
            holder, place = reaches[which].tensors[number]
            if isinstance(holder[place], TracedTensor) or not same_values(holder[place]._data, values):
                return None
        for source, aval in zip(self.captures, self.capture_avals, strict=True):
            if source.__class__ is tuple:
                holder, place = reaches[source[0]].tensors[source[1]]
                source = holder[place]
                if source.__class__ is TracedTensor:
                    return None  # another thread is recording with this module
                data = source._data
                if data.shape != aval.shape or data.dtype != aval.dtype:
                    return None
            found.append(source)
        return found

    def same_as(self, other: Entry) -> bool:
        """Whether both were recorded as the same program, with the same constants."""
        ours, theirs = ([c for c in e.captures if c.__class__ is not tuple] for e in (self, other))
        return (
            self.program.key == other.program.key
            and len(ours) == len(theirs)
            and all(a is b or same_values(a._data, b._data) for a, b in zip(ours, theirs, strict=True))
            and not any(kind == "static" and what is not None for kind, what in self.outs)
        )

    def run(self, tensors: list[Tensor], captured: list[Tensor]) -> Any:
        operands = [*tensors, *(asarray(make()) for make in self.draws), *captured]
        results: Sequence[Tensor] = ()
        if not self.program.outputs:  # all that it returns was given to it, or is no tensor
            self.parts = []
        elif self.parts is None:
            with _report.collected() as parts:
                results = bind_program(self.program, operands)
            # A loop within a memory budget runs in many pieces of few kinds.
            self.parts = list(dict.fromkeys(parts)) if self.pieces else parts
        else:
            results = bind_program(self.program, operands)
        _report.publish(self.report)
        leaves = []
        for kind, what in self.outs:
            if kind == "constant":  # the caller may write to it
                leaves.append(Tensor(operands[what]._data.copy()))
            else:
                leaves.append(results[what] if kind == "value" else operands[what] if kind == "same" else what)
                if leaves[-1].__class__ is np.ndarray:
                    leaves[-1] = what.copy()
        return unflatten(self.out_tree, leaves)

    def report(self) -> _report.Report:
        made = executable(self.program)
        return _report.program_report(self.name, self.n_recorded, self.program, made.program, self.parts or [])


class Recording:
    """One recording of a function, and the checks that it was pure."""

    def __init__(self, name: str, f: Any, leaves: list[Any], treedef: TreeDef | int, reaches: list[Reach]) -> None:
        self.name = name
        self.f = f
        self.leaves = leaves
        self.treedef = treedef  # of (args, kwargs), or how many positional arguments that are leaves
        self.reaches = reaches

    def _call(self, recorder: FunctionTrace) -> tuple[list[TracedTensor], Any]:
        inputs: list[TracedTensor] = []

        def stand_in(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            inputs.append(recorder.new(Aval(leaf.shape, leaf.dtype)))
            return inputs[-1]

        stand_ins = [stand_in(leaf) for leaf in self.leaves]
        args, kwargs = (stand_ins, {}) if isinstance(self.treedef, int) else unflatten(self.treedef, stand_ins)
        with recording(enabled=True, tapes=(), names=None, trace=recorder):
            return inputs, self.f(*args, **kwargs)

    def entry(self) -> Entry:
        """Record the function; raises TraceError where it is not pure."""
        recorder = FunctionTrace()
        before = _contents(self.reaches)
        try:
            instead = "pass them as arguments, or use ops.dropout"
            with drawn_once([self.f, self.leaves], self.name, "every later call", instead):
                made = self._lowered(recorder)
            made.read = [
                (*source, tensor._data.copy())
                for tensor in recorder.read
                if not isinstance(tensor, TracedTensor) and (source := self._source(tensor)).__class__ is tuple
            ]
        except Error as error:
            raise explained(error, self.name) from None
        finally:
            recorder.close()
            recorder.draws = []
        if not all(reach.unchanged() for reach in self.reaches):
            raise TraceError(
                f"{self.name} changes something outside of itself ({self._culprit()}): an attribute, a list, a dict or "
                "a global; a compiled function runs only once as Python, so return the value instead"
            )
        if _contents(self.reaches) != before:
            raise TraceError(
                f"{self.name} changes a parameter, or a tensor or array that it closes over ({self._culprit()}), or "
                "another thread does; update parameters outside of a compiled function, which runs only once as Python"
            )
        self._check_escapes(recorder)
        if made.n_recorded > MANY_RECORDS and max(recorder.turns.values(), default=0) >= MANY_TURNS:
            warnings.warn(
                f"{self.name}: {made.n_recorded} operations were recorded; a Python loop over time is unrolled, so "
                "write it with ops.scan (or a recurrent layer), which records one step",
                CompileWarning,
                stacklevel=3,
            )
        return made

    def _lowered(self, recorder: FunctionTrace) -> Entry:
        inputs, result = self._call(recorder)
        recorder.settle()
        draws = [tensor for _, tensor in recorder.draws]
        leaves, out_tree = flatten(result, open_modules=False)
        values = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        program, captures = lower(recorder.entries, [*inputs, *draws], values)
        n_recorded = len(program)
        operands = (*program.inputs, *program.captures)
        results: list[Any] = []
        outs: list[tuple[str, Any]] = []
        slots = iter(program.outputs)
        # Tensors that the function made without an operand: each of its calls would make them anew.
        made = {s for s, t in zip(program.captures, captures, strict=True) if not t._rg and self._source(t) is t}
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                outs.append(("static", leaf))
                continue
            slot = next(slots)
            if slot in operands:  # as in a plain call: the very tensor that was given
                outs.append(("constant" if slot in made else "same", operands.index(slot)))
            else:
                outs.append(("value", len(results)))
                results.append(slot)
        program = program.replaced(inputs=operands, captures=(), outputs=tuple(results))
        return Entry(
            self.name, optimised(program), n_recorded, [make for make, _ in recorder.draws],
            [self._source(t) for t in captures], outs, out_tree, [],
        )  # fmt: skip

    def _source(self, tensor: Tensor) -> Any:
        """Where a captured tensor is found again; the tensor itself where no place of it is known."""
        for which, reach in enumerate(self.reaches):
            number = reach.number_of.get(id(tensor))
            if number is not None:
                return which, number
        return tensor

    # ------------------------------------------------------------------ purity

    def _check_escapes(self, recorder: FunctionTrace) -> None:
        if not any(reference() is not None for reference in recorder.made):
            return
        gc.collect()  # a cycle in the function's own objects is no escape
        for reference in recorder.made:
            tensor = reference()
            if tensor is not None:
                raise TraceError(
                    f"a tensor of shape {tensor.shape} that {self.name} computes was stored outside of it "
                    f"({self._culprit()}); a compiled function runs only once as Python, so return the tensor instead"
                )

    def _culprit(self) -> str:
        """``file:line`` of the statement that changes something: found by running the function once more."""
        before = [Reach(root) for root in self._roots()]
        contents = _contents(before)

        def happened() -> bool:
            return not all(r.unchanged() for r in before) or _contents(before) != contents

        recorder = FunctionTrace()
        where = line_where(lambda: self._call(recorder), happened)
        recorder.close()
        return where

    def _roots(self) -> list[Any]:
        return [self.f, *(leaf for leaf in self.leaves if not isinstance(leaf, Tensor) and not is_scalar(leaf))]
