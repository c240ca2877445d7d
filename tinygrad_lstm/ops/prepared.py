"""What a scan needs at every call and does not depend on values: found once, by the content of its program."""

from __future__ import annotations

import functools
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from tinygrad_lstm.kernels.locks import Lock
from tinygrad_lstm.primitive import EXPLAINED, REGISTRY, Aval, Primitive
from tinygrad_lstm.program import Program
from tinygrad_lstm.tensor import Tensor

__all__ = ["Backward", "Site", "apart", "canonical", "compile_mode", "twins"]

# Programs by content, so that what was derived from one (adjoint, plan, native code) is found again when the
# same body is recorded anew.
_known: OrderedDict[str, Program] = OrderedDict()
_MOST_PROGRAMS = 256
_MOST_DERIVED = 256
_lock = Lock()
_runner: Any = None


def _loops() -> Any:
    """The module that runs loops; it stands above this one, and an import at every call would cost a microsecond."""
    global _runner
    if _runner is None:
        from tinygrad_lstm.compiler import runner

        _runner = runner
    return _runner


def canonical(program: Program) -> Program:
    """The first program that was seen with this content."""
    key = program.key
    with _lock:
        known = _known.setdefault(key, program)
        _known.move_to_end(key)
        if len(_known) > _MOST_PROGRAMS:
            _known.popitem(last=False)
    return known


def _derived(program: Program, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """A thing derived from a program, made once (until some rule is declared anew)."""
    key = (*key, Primitive.generation)
    found = program.derived.get(key)
    if found is not None and len(program.derived) <= _MOST_DERIVED // 2:
        return found  # nothing is about to be given up, so the order does not matter
    with _lock:
        found = program.derived.pop(key, None)
        if found is not None:
            program.derived[key] = found  # the one used last is the last to go
            return found
    made = make()  # outside of the lock: two threads may both make it, and one of the two stays
    with _lock:
        found = program.derived.setdefault(key, made)
        while len(program.derived) > _MOST_DERIVED:
            del program.derived[next(iter(program.derived))]
    return found


def plan_of(body: Program, n_carry: int, n_ys: int, steps: int, whole: int | None = None) -> Any:
    """The plan of a loop; of a piece of a loop of ``whole`` steps, which is native where that one is."""

    def make() -> Any:
        from tinygrad_lstm.compiler.loop import plan_loop
        from tinygrad_lstm.compiler.simplify import unguarded

        return plan_loop(unguarded(body), n_carry, n_ys, steps, whole)

    return _derived(body, ("plan", n_carry, n_ys, steps, whole, compile_mode()), make)


def _adjoint(body: Program, n_carry: int, n_ys: int, present: tuple[bool, ...], wanted: tuple[bool, ...]) -> Any:
    from tinygrad_lstm.compiler.adjoint import adjoint

    return _derived(
        body, ("adjoint", n_carry, n_ys, present, wanted), lambda: adjoint(body, n_carry, n_ys, present, wanted)
    )


def _thrifty(
    body: Program, n_carry: int, n_ys: int, pair: Any, steps: int, kept: Collection[int] | None = None,
    lean: bool = False,
) -> Any:  # fmt: skip
    """The adjoint pair that keeps what costs least where the loops are native; as it is on NumPy.

    ``kept``: what a forward has stored already.  ``lean``: within a memory budget, where bytes cost more.
    """
    from tinygrad_lstm.compiler.native import wanted, work_of
    from tinygrad_lstm.compiler.recompute import FLOPS_PER_BYTE, SCARCE, save_or_recompute

    if not wanted(steps * work_of(body)):
        return pair
    try:
        price = FLOPS_PER_BYTE * SCARCE if lean else FLOPS_PER_BYTE
        return save_or_recompute(pair, n_carry, n_ys, kept=kept, flops_per_byte=price)
    except ValueError:  # not to be had from what was stored: the forward runs again
        return pair


class Site:
    """What the calls of one scan (a program, its number of steps, a direction) need and would look up each time.

    It holds no values, and is valid until some rule is declared anew.
    """

    def __init__(
        self, body: Program, n_carry: int, n_ys: int, length: int, reverse: bool, wanted: tuple[bool, ...],
        lean: bool = False,
    ) -> None:  # fmt: skip
        self.lean = lean  # within a memory budget
        self.body, self.n_carry, self.n_ys, self.length, self.reverse = body, n_carry, n_ys, length, reverse
        self.wanted = wanted  # the xs and captures that are differentiated
        self.present = _float_outputs(body, n_carry)
        self.generation = Primitive.generation
        self.params = {"body": body, "n_carry": n_carry, "n_ys": n_ys, "length": length, "reverse": reverse}
        outputs = body.output_avals()
        stacked = range(n_carry, n_carry + n_ys)
        self.avals = tuple(
            Aval((length, *a.shape) if k in stacked else a.shape, np.dtype(a.dtype)) for k, a in enumerate(outputs)
        )
        self.led_params = {**self.params, "lead": True}
        self.led_avals = tuple(Aval((1, *a.shape), a.dtype) if k < n_carry else a for k, a in enumerate(self.avals))
        self.shared: frozenset[int] | None = None  # outputs that lie where residuals do; seen at the first call
        self.linked: dict[bool, Callable[..., Any]] = {}  # calls as one function, by whether the state is led
        self._forward: Any = None
        self._pair: Any = None
        self._pairs: dict[Any, Any] = {}  # for other cotangents and inputs than those that were foreseen
        self._backward: dict[Any, Backward] = {}

    def anew(self) -> Site:
        """The same site by the rules that are in force now."""
        return site_of(self.body, self.n_carry, self.n_ys, self.length, self.reverse, self.wanted, self.lean)

    def within_budget(self) -> Site:
        """The same scan where bytes cost more."""
        return site_of(self.body, self.n_carry, self.n_ys, self.length, self.reverse, self.wanted, True)

    @property
    def pair(self) -> Any:
        """The adjoint pair that says what a forward keeps."""
        if self._pair is None:
            pair = _adjoint(self.body, self.n_carry, self.n_ys, self.present, self.wanted)
            self._pair = _thrifty(self.body, self.n_carry, self.n_ys, pair, self.length, lean=self.lean)
        return self._pair

    def pair_of(self, present: tuple[bool, ...], asked: tuple[bool, ...]) -> Any:
        """The pair for these cotangents and inputs, which reads what :attr:`pair` keeps."""
        if (present, asked) == (self.present, self.wanted):
            return self.pair
        found = self._pairs.get((present, asked))
        if found is None:
            pair = _adjoint(self.body, self.n_carry, self.n_ys, present, asked)
            found = _thrifty(self.body, self.n_carry, self.n_ys, pair, self.length, self.pair.residuals, self.lean)
            self._pairs[present, asked] = found
        return found

    def forward(self) -> tuple[Any, Any]:
        """The adjoint pair, and the plan of its forward loop."""
        if self._forward is None:
            pair = self.pair
            plan = plan_of(pair.forward, self.n_carry, self.n_ys + len(pair.residuals), self.length)
            self._forward = pair, plan
        return self._forward

    @functools.cached_property
    def twins(self) -> list[int]:
        """Which ys and sums may share memory with another one."""
        pair, plan = self.forward()
        return twins([*plan.roots[: self.n_ys], *plan.roots[self.n_ys + len(pair.residuals) :]])

    def run(self, operands: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Outputs that share memory neither with the operands nor with one another, and residuals."""
        pair, plan = self._forward or self.forward()
        final, outs = _loops().run_loop(plan, operands, self.reverse)
        head, tail = self.n_ys, self.n_ys + len(pair.residuals)
        residuals = outs[head:tail]
        del outs[head:tail]
        if self.twins:
            apart(outs, self.twins)
        return final + outs, residuals

    def backward(self, present: tuple[bool, ...], asked: tuple[bool, ...]) -> Backward | None:
        """The adjoint loop for these cotangents and inputs; None where rules changed after the forward ran."""
        if self.generation != Primitive.generation:
            return None
        found = self._backward.get((present, asked))
        if found is None:
            found = self._backward[present, asked] = Backward(self, present, asked)
        return found


class Backward:
    """The adjoint loop on arrays: what a backward runs that is not itself recorded."""

    def __init__(self, site: Site, present: tuple[bool, ...], asked: tuple[bool, ...]) -> None:
        body, n_carry = site.body, site.n_carry
        pair = site.pair_of(present, asked)
        self.n_inputs, self.length, self.reverse = len(body.inputs), site.length, not site.reverse
        self.floats = _float_carries(body, n_carry)
        # The loop only reads what it starts from.
        self.zeros = [np.zeros(body.avals[slot].shape, body.avals[slot].dtype) for slot in body.inputs[:n_carry]]
        # Where what it reads stands among the residuals that the forward kept; None where something is missing.
        known = {slot: k for k, slot in enumerate(site.pair.residuals)}
        self.picks = [known[slot] for slot in pair.residuals] if known.keys() >= set(pair.residuals) else None
        self.reads = [n_carry + k for k in pair.reads]
        given = [n_carry + k for k, yes in enumerate(present) if yes]
        self.y_seeds = [k for k in given if k < n_carry + site.n_ys]
        self.s_seeds = [k for k in given if k >= n_carry + site.n_ys]
        self.positions = [*self.floats, *(n_carry + k for k, yes in enumerate(asked) if yes)]
        n_ys = sum(asked[: len(body.inputs) - n_carry])
        self.body, self.n_ys = pair.backward, n_ys
        self.plan = plan_of(pair.backward, len(self.floats), n_ys, site.length)
        self._called: Any = None

    def run(self, g: Sequence[Any], inputs: Sequence[Tensor], kept: Sequence[np.ndarray]) -> list[Any]:
        """Cotangents of the operands, None where they are not asked for."""
        shares: list[Any] = [None] * len(inputs)
        found = self.called(len(inputs))([None if c is None else c._data for c in g], inputs, kept)
        for position, array in zip(self.positions, found, strict=True):
            shares[position] = Tensor(array)
        return shares

    def called(self, count: int) -> Callable[..., list[np.ndarray]]:
        """``call(g, inputs, kept)`` for so many inputs: cotangents (arrays) of the operands at :attr:`positions`, given
        those of the outputs (arrays or None), the operands (tensors) and what the forward kept."""
        if self._called is None:
            operands = self._operands(count)
            names = {"zeros": self.zeros, "loop": _loops().loop_in_one(self.plan, self.reverse)}
            names.update(explained=self._explained, EXPLAINED=EXPLAINED)
            text = (
                "def call(g, inputs, kept):\n"
                f"    try: return loop({operands})\n"
                f"    except EXPLAINED as error: raise explained(error, ({operands})) from None"
            )
            exec(compile(text, "<adjoint loop>", "exec"), names)
            self._called = names.pop("call")
        return self._called

    def _operands(self, count: int) -> str:
        """The operands of the adjoint loop, as text on what :meth:`called` takes."""
        items = [f"zeros[{k}] if g[{k}] is None else g[{k}]" for k in self.floats]
        items += [f"kept[{k}]" for k in self.picks or ()]
        items += [f"inputs[{k}]._data" for k in self.reads]
        items += [f"g[{k}]" for k in self.y_seeds]
        items += [f"inputs[{k}]._data" for k in range(self.n_inputs, count)]
        items += [f"g[{k}]" for k in self.s_seeds]
        return "".join(f"{item}, " for item in items)

    def _explained(self, error: Exception, operands: Sequence[np.ndarray]) -> Exception:
        params = {
            "body": self.body, "n_carry": len(self.floats), "n_ys": self.n_ys, "length": self.length,
            "reverse": self.reverse,
        }  # fmt: skip
        return REGISTRY["scan"]._explained(error, [Tensor(array) for array in operands], params)


def site_of(
    body: Program, n_carry: int, n_ys: int, length: int, reverse: bool, wanted: tuple[bool, ...], lean: bool = False
) -> Site:
    """The site of a scan whose gradients with respect to the ``wanted`` xs and captures may be asked for."""
    key = ("site", n_carry, n_ys, length, reverse, wanted, lean, compile_mode())
    return _derived(body, key, lambda: Site(body, n_carry, n_ys, length, reverse, wanted, lean))


def _every_site(body: Program, n_carry: int, n_ys: int, length: int, reverse: bool) -> Site:
    """The site of a scan of which every gradient may be asked for."""
    linked = tuple(np.dtype(body.avals[s].dtype).kind == "f" for s in (*body.inputs[n_carry:], *body.captures))
    return site_of(body, n_carry, n_ys, length, reverse, linked)


def compile_mode() -> Any:
    """``TINYGRAD_LSTM_COMPILE`` as the environment has it now (bytes, a string, or None): a part of keys."""
    return _VARIABLES.get(_COMPILE)


# os.environ encodes and decodes at every look, which takes a microsecond; its own dictionary does not.
_VARIABLES: Any = getattr(os.environ, "_data", os.environ)
_COMPILE = os.environ.encodekey("TINYGRAD_LSTM_COMPILE") if _VARIABLES is not os.environ else "TINYGRAD_LSTM_COMPILE"


def _owner(array: np.ndarray) -> Any:
    """The object that holds the memory of an array."""
    return array if array.base is None else array.base


def twins(roots: Sequence[Any]) -> list[int]:
    """Which results of a loop may share memory with another one (see :attr:`.LoopPlan.roots`).

    Whether they do depends on the operands too: a reshape is a view of some, and a copy of others.
    """
    return [k for k, root in enumerate(roots) if roots.count(root) > 1]


def apart(arrays: list[np.ndarray], among: Sequence[int] | None = None) -> list[np.ndarray]:
    """The arrays, with copies in place of those that share their memory with an earlier one (``among``: of these)."""
    owners: set[int] = set()
    for k in range(len(arrays)) if among is None else among:
        owner = id(_owner(arrays[k]))
        if owner in owners:
            arrays[k] = arrays[k].copy()
        owners.add(owner)
    return arrays


def _float_carries(body: Program, n_carry: int) -> list[int]:
    return [k for k in range(n_carry) if np.dtype(body.avals[body.inputs[k]].dtype).kind == "f"]


def _float_outputs(body: Program, n_carry: int) -> tuple[bool, ...]:
    return tuple(np.dtype(body.aval(o).dtype).kind == "f" for o in body.outputs[n_carry:])
