"""Known replays: the reverse replay of a tape of a form that was met before, as one straight function.

A training step makes the same tape every time: other values, but the same primitives on the same shapes, wired in the
same way.  The general replay (:mod:`.tape`) asks of every record what it is and what becomes of its cotangents.  The
third time that a backward starts from one place in the user's program, the answers are written out: a function that
first looks whether the tape at hand has this form, and then runs the rules, in the order of the general replay, on
bare arrays.  There is no second definition of anything: what it calls are the rules' own programs
(:class:`.arrayrules.ArrayRule`), what a primitive offers as ``prepared``, or ``pull`` itself; the bits are the same.

Whatever is out of the ordinary (hooks, retained gradients, tapes, values that may have been changed, rules that may
skip inputs) is left to the general replay.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType
from typing import Any, NamedTuple

import numpy as np

from tinygrad_lstm.errors import GraphError
from tinygrad_lstm.ownership import is_array_alone
from tinygrad_lstm.record import Extra, Output, Record
from tinygrad_lstm.storage import last_change, verify

__all__ = ["Known", "Offer", "known_replay"]

MOST_RECORDS, MOST_INPUTS = 64, 256  # of a form; longer tapes spend their time in the rules
MOST_FORMS = 8  # kept for one place
MOST_PLACES = 256
FEW_LEAVES = 6  # that are compared two by two
PATIENCE = 3  # by then the rules that the general replay runs on arrays are recorded
MOST_BUILT = 32  # at one place: where every tape is another one, there is nothing to know

Known = Callable[[Any, np.ndarray, bool, Callable[[Any, np.ndarray], None]], bool]


class Offer(NamedTuple):
    """How a primitive pulls cotangents through a record on arrays; pieces of text with ``{r}`` for the record, ``{g}``
    for the cotangents of its outputs, and names of constants."""

    conditions: list[tuple[str, dict[str, Any]]]  # what else must hold of a record for it to be pulled in this way
    lines: list[tuple[tuple[int, ...], str]]  # inputs, and what gives their shares (a tuple or list of arrays)
    constants: dict[str, Any]  # for the lines
    # Inputs whose shares are the same values as those of an earlier input, that one, and where that is so.
    same: dict[int, tuple[int, list[tuple[str, dict[str, Any]]]]] = {}  # noqa: RUF012 - never changed


class _Place:
    """A place in a program from which backwards start."""

    __slots__ = ("code", "forms", "generation", "left", "met")

    def __init__(self, code: CodeType, generation: int) -> None:
        self.code = code  # kept, so that its id stays its own
        self.generation = generation
        self.forms: list[Known] = []
        self.met, self.left = 0, MOST_BUILT


_places: dict[tuple[int, int], _Place] = {}


def known_replay(record: Record, seed: np.ndarray, free: bool, into: Callable[[Any, np.ndarray], None]) -> bool:
    """Replay the tape behind ``record`` if its form is known, and hand the leaves' cotangents to ``into``.

    False where nothing was done; the general replay is then called for.
    """
    code = record.code
    if code is None:
        return False
    generation = type(record.primitive).generation
    place = _places.get((id(code), record.lasti))
    if place is None or place.generation != generation:
        if len(_places) >= MOST_PLACES:
            _places.clear()
        place = _places[id(code), record.lasti] = _Place(code, generation)
    for form in place.forms:
        if form(record, seed, free, into):
            return True
    place.met += 1
    if place.met < PATIENCE or not place.left:
        return False
    place.left -= 1
    built = _Builder(record).build()
    if built is None:
        return False
    del place.forms[MOST_FORMS - 1 :]
    place.forms.insert(0, built)
    return built(record, seed, free, into)


def _is_plain(extra: Extra) -> bool:
    """Whether nobody watches this record."""
    return extra.hooks is None and extra.retained is None and not extra.tapes


def _data(share: Any, who: str) -> np.ndarray:
    if share is None:
        raise GraphError(f"the VJP of {who} gave no cotangent to an input that is linked")
    data: np.ndarray = share._data
    return data


def _summed(present: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The sum of two cotangents, in place where the first is nobody else's."""
    if is_array_alone(present):
        present += share
        return present
    total = present + share
    return total if total.__class__ is np.ndarray else np.asarray(total)  # NumPy gives numbers for 0-d arrays


def _doubled(share: np.ndarray) -> np.ndarray:
    """The sum of a share and the same once more, in place where it is nobody else's."""
    if is_array_alone(share):
        share += share
        return share
    total = share + share
    return total if total.__class__ is np.ndarray else np.asarray(total)


def _node(parent: Any) -> Any:
    """What cotangents are kept by."""
    return (parent.record, parent.index) if parent.__class__ is Output else parent


def _is_same(a: Any, b: Any) -> bool:
    """Whether two inputs of a record are one node."""
    return a is b or (a.__class__ is b.__class__ is Output and a.record is b.record and a.index == b.index)


class _Unknown(Exception):
    """This tape is left to the general replay."""


class _Builder:
    """Writes the function for the form of one tape."""

    def __init__(self, root: Record) -> None:
        self.root = root
        self.names: dict[str, Any] = {
            "Record": Record, "Output": Output, "is_plain": _is_plain, "summed": _summed, "doubled": _doubled,
            "data": _data,
            "last": last_change, "verify": verify, "zeros": np.zeros, "copy": np.array,
        }  # fmt: skip
        self.checks: list[str] = []
        self.lines: list[str] = []
        self.number: dict[Record, int] = {}
        self.leaf_of: dict[Any, int] = {}
        # Names of the cotangents so far, by node; those of several outputs by (record, index).
        self.cotangent: dict[Any, str] = {}
        self.owned: set[Any] = set()

    def build(self) -> Known | None:
        """The function, or None where the general replay had better do it."""
        try:
            order = self._order()
            self._look(order)
            for record in order:
                self._replay(record)
        except _Unknown:
            return None
        for leaf, k in self.leaf_of.items():
            if leaf in self.cotangent:
                self.lines.append(f"into(l{k}, {self.cotangent[leaf]})")
        # What does not have so many parents, or none left, cannot be unpacked.
        looking = ["try:", *("    " + line for line in self.checks), "except (TypeError, ValueError): return False"]
        text = "\n    ".join(["def known(r0, seed, free, into):", *looking, *self.lines, "return True"])
        exec(compile(text, "<known replay>", "exec"), self.names)
        function: Known = self.names.pop("known")  # no cycle: what is given up is freed at once
        return function

    def _constant(self, value: Any) -> str:
        name = f"k{len(self.names)}"
        self.names[name] = value
        return name

    # ------------------------------------------------------------------ the form

    def _order(self) -> list[Record]:
        """The records in the order of the replay."""
        seen: set[Record] = set()
        inputs = 0
        pending = [self.root]
        while pending:
            record = pending.pop()
            if record in seen:
                continue
            seen.add(record)
            primitive, parents = record.primitive, record.parents
            if len(seen) > MOST_RECORDS or parents is None or not primitive.explains or primitive.may_skip:
                raise _Unknown
            inputs += len(parents)
            if inputs > MOST_INPUTS:
                raise _Unknown
            for parent in parents:
                if parent.__class__ is Output:
                    pending.append(parent.record)
                elif parent.__class__ is Record:
                    pending.append(parent)
        order = sorted(seen, key=lambda record: -record.serial)
        if order[0] is not self.root:
            raise _Unknown
        self.number = {record: k for k, record in enumerate(order)}
        return order

    def _look(self, order: list[Record]) -> None:
        """What a tape must look like; every name is bound before it is used."""
        require = self._require
        found = {self.root}
        for record in order:
            k = self.number[record]
            parents = record.parents or ()
            require(f"r{k}.primitive is not {self._constant(record.primitive)}")
            require(f"r{k}.shape != {self._constant(record.shape)} or r{k}.dtype is not {self._constant(record.dtype)}")
            if record.output_avals is not None:
                avals = self._constant(record.output_avals)
                require(f"r{k}.output_avals is not {avals} and r{k}.output_avals != {avals}")
            require(f"r{k}.extra is not None and not is_plain(r{k}.extra)")
            if record.extra is not None and not _is_plain(record.extra):
                raise _Unknown
            self.checks.append(f"{''.join(f'p{k}_{j}, ' for j in range(len(parents))) or '()'} = r{k}.parents")
            for j, parent in enumerate(parents):
                self._look_at(parent, f"p{k}_{j}", found)
        serials = " > ".join([*(f"r{k}.serial" for k in range(len(order))), "last[0]"])
        require(f"not ({serials})")
        leaves = [f"l{k}" for k in range(len(self.leaf_of))]
        if 1 < len(leaves) <= FEW_LEAVES:
            require(" or ".join(f"{a} is {b}" for k, a in enumerate(leaves) for b in leaves[:k]))
        elif leaves:
            require(f"len({{{', '.join(f'id({name})' for name in leaves)}}}) != {len(leaves)}")

    def _require(self, unlike: str) -> None:
        self.checks.append(f"if {unlike}: return False")

    def _look_at(self, parent: Any, text: str, found: set[Record]) -> None:
        """One input of a record: no node, a record, an output of one, or a leaf."""
        kind = parent.__class__
        if parent is None:
            self._require(f"{text} is not None")
            return
        if kind is Output:
            self._require(f"{text}.__class__ is not Output or {text}.index != {parent.index}")
            text, parent = f"{text}.record", parent.record
        if parent.__class__ is Record:
            name = f"r{self.number[parent]}"
            if parent in found:
                self._require(f"{text} is not {name}")
                return
            found.add(parent)
            self.checks.append(f"{name} = {text}")
            if kind is not Output:
                self._require(f"{name}.__class__ is not Record")
            return
        known = self.leaf_of.get(parent)
        if known is not None:
            self._require(f"{text} is not l{known}")
            return
        k = self.leaf_of[parent] = len(self.leaf_of)
        if parent._meta is not None and parent._meta.hooks:
            raise _Unknown
        shape, dtype = self._constant(parent._data.shape), self._constant(parent._data.dtype)
        unlike = [f"(l{k} := {text}).__class__ is not {self._constant(kind)}"]
        unlike += [f"(d := l{k}._data).dtype is not {dtype}", f"d.shape != {shape}"]
        self._require(" or ".join([*unlike, f"((m := l{k}._meta) is not None and m.hooks)"]))

    # ------------------------------------------------------------------ the replay

    def _replay(self, record: Record) -> None:
        k, primitive = self.number[record], record.primitive
        parents = record.parents or ()
        several = record.output_avals is not None
        if record is self.root:
            if several:
                raise _Unknown
            self.cotangent[record] = "seed"
        given: list[str | None]
        if several:
            given = [self.cotangent.get((record, index)) for index in range(len(record.output_avals))]
        else:
            given = [self.cotangent.get(record)]
        if not parents or not any(given):
            return  # a constant, or behind an input without a rule (the condition of a choice): never replayed
        if not primitive.saves_nothing:
            self.lines.append(f"if r{k}.marked: verify(r{k})")
        if primitive.accumulate is not None and parents[0] is not None:
            if several or parents[0].__class__ is Output or any(p is not None for p in parents[1:]):
                raise _Unknown
            self._add_part(record, given[0])
        else:
            asked = [parent is not None for parent in parents]
            shares = self._prepared(record, k, given, asked) or self._pulled(record, k, given, several)
            for parent, share in zip(parents, shares, strict=True):
                if parent is not None and share is not None:
                    self._add(parent, share)
        dead = [name for name in given if name is not None and name != "seed"]
        if dead:
            self.lines.append(f"del {', '.join(dict.fromkeys(dead))}")
        self.lines.append(f"if free: r{k}.release()")

    def _prepared(self, record: Record, k: int, given: list[str | None], asked: list[bool]) -> list[str | None] | None:
        """Shares by functions on arrays."""
        offer = record.primitive.prepared(record, [name is not None for name in given], asked)
        if offer is None:
            return None
        twice = self._twice(record, offer)
        conditions = [*offer.conditions, *(c for j in twice for c in offer.same[j][1])]
        for condition, constants in conditions:
            names = {key: self._constant(value) for key, value in constants.items()}
            self.checks.append(f"if not ({condition.format(r=f'r{k}', **names)}): return False")
        names = {key: self._constant(value) for key, value in offer.constants.items()}
        cotangents = [name if name is not None else "None" for name in given]
        shares: list[str | None] = [None] * len(asked)
        for inputs, line in offer.lines:
            if inputs[0] in twice:
                first = shares[twice[inputs[0]]]
                self.lines.append(f"{first} = doubled({first})")
                continue
            targets = ", ".join(f"s{k}_{j}" for j in inputs)
            for j in inputs:
                shares[j] = f"s{k}_{j}"
            self.lines.append(f"({targets},) = {line.format(r=f'r{k}', g=', '.join(cotangents), **names)}")
        return shares

    def _twice(self, record: Record, offer: Offer) -> dict[int, int]:
        """The inputs that need no share of their own, since it is the share of another one with the same node (x * x).

        Only where these two are the first cotangents of the node: the general replay adds one after the other.
        """
        parents = record.parents or ()
        found: dict[int, int] = {}
        for j, (first, _) in offer.same.items():
            here = [k for k, parent in enumerate(parents) if _is_same(parent, parents[j])]
            if here == [first, j] and _node(parents[j]) not in self.cotangent:
                found[j] = first
        return found

    def _pulled(self, record: Record, k: int, given: list[str | None], several: bool) -> list[str | None]:
        """Shares by ``pull``, the general way."""
        from tinygrad_lstm.tensor import Tensor  # stands above this module

        self.names["Tensor"] = Tensor
        wrapped = ["None" if name is None else f"Tensor({name})" for name in given]
        cotangent = f"[{', '.join(wrapped)}]" if several else wrapped[0]
        pull, who = self._constant(record.primitive.pull), self._constant(record.primitive.name)
        self.lines.append(f"s = {pull}(r{k}, {cotangent}, None)")
        rules = record.primitive.rules
        shares: list[str | None] = [
            None if parent is None or (record.primitive.simple and rules[j] is None) else f"s{k}_{j}"
            for j, parent in enumerate(record.parents or ())
        ]
        for j, name in enumerate(shares):
            if name is not None:
                self.lines.append(f"{name} = data(s[{j}], {who})")
        self.lines.append("del s")
        return shares

    def _add(self, parent: Any, share: str) -> None:
        """Add a share to the cotangent of a node."""
        node = _node(parent)
        present = self.cotangent.get(node)
        if present is None:
            self.cotangent[node] = share
            return
        # Cotangents of one output of several are never added in place by the general replay: the same bits.
        self.lines.append(f"{present} = summed({present}, {share}); del {share}")
        self.owned.add(node)

    def _add_part(self, record: Record, cotangent: str | None) -> None:
        """Into a part of the parent's cotangent (see ``accumulate`` of a primitive)."""
        parent = record.parents[0]  # type: ignore[index]
        present = self.cotangent.get(parent)
        name = present or f"b{self.number[record]}"
        if present is None:
            shape, dtype = parent.shape, parent.dtype
            self.lines.append(f"{name} = zeros({self._constant(shape)}, {self._constant(dtype)})")
        elif parent not in self.owned:
            self.lines.append(f"{name} = copy({name})")
        self.cotangent[parent] = name
        self.owned.add(parent)
        accumulate = self._constant(record.primitive.accumulate)
        self.lines.append(f"{accumulate}({name}, {cotangent}, r{self.number[record]})")
