"""Folding a recorded step into lines: one for each named value, everything else written where it is used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from tinygrad_lstm.inspect.expression import Node, expression_of, number, size, walk
from tinygrad_lstm.inspect.recorded import Recorded
from tinygrad_lstm.program import Equation, Program

__all__ = ["Line", "System", "system_of"]

LONGEST = 40  # operations and names that are folded into one expression
REPEATED = 6  # what is longer than this and used more than once gets a line of its own
LEAST_FUNCTION = 6  # equations of a submodule that make it a function of its own
ARGUMENTS = ("u", "v", "w")


class Line(NamedTuple):
    """``left = right``; a helper is a value without a name of its own."""

    left: Node
    right: Node
    is_helper: bool = False


class System(NamedTuple):
    """The equations of one step: lines, the functions that they use (as lines), and the parameters' short names."""

    lines: list[Line]
    functions: list[Line]
    symbols: dict[str, str]
    constants: dict[str, str]


def system_of(recorded: Recorded) -> System:
    """Fold the equations of a recorded step."""
    program = recorded.program
    names = _names(recorded)
    env: dict[Any, Node] = {}
    constants: dict[str, str] = {}
    for slot, name in recorded.inputs.items():
        env[slot] = Node("value", (), program.avals[slot].shape, (name, 0))
    for slot, _, name in recorded.states:
        env[slot] = Node("value", (), program.avals[slot].shape, (name, -1))
    for slot, (name, is_parameter, tensor) in recorded.captures.items():
        shape = program.avals[slot].shape
        if is_parameter:
            env[slot] = Node("parameter", (), shape, name)
        elif tensor.size == 1 and not shape:
            env[slot] = number(tensor._data)
        else:
            env[slot] = Node("value", (), shape, (name, None))
            constants[name] = str(program.avals[slot])
    fold = _Fold(recorded, names, env)
    fold.run()
    for operand, name in _left(recorded, names):
        node = fold.read(operand)
        if node != (left := Node("value", (), node.shape, (name, 0))):
            fold.lines.append(Line(left, node))
    return System(fold.lines, fold.functions, _symbols(recorded), constants)


def _names(recorded: Recorded) -> dict[int, str]:
    """A name for every slot that gets a line: the state first, then what has a label, then the outputs."""
    program = recorded.program
    taken = set(recorded.inputs.values())
    names: dict[int, str] = {}

    def give(slot: Any, wanted: str) -> None:
        if slot.__class__ is int and slot not in names and slot not in program.inputs:
            free, count = wanted, 0
            while free in taken:
                count += 1
                free = f"{wanted}.{count}"
            names[slot] = free
            taken.add(free)

    made = program.definitions()
    for _, new, name in recorded.states:
        if new in made:
            give(new, name)
        taken.add(name)
    for slot, label in sorted(program.labels.items()):
        if slot in made:
            give(slot, label)
    for slot, name in recorded.outputs:
        if slot in made:
            give(slot, name)
    return names


def _left(recorded: Recorded, names: dict[int, str]) -> Iterable[tuple[Any, str]]:
    """States and outputs that no equation makes: handed through."""
    shown = set(names.values())
    for old, new, name in recorded.states:
        if names.get(new) != name and new != old:
            yield new, name
        elif new == old:
            yield old, name
    for operand, name in recorded.outputs:
        if operand not in names and name not in shown:
            yield operand, name


class _Fold:
    """Goes through the equations once; lines and functions are what comes out."""

    def __init__(self, recorded: Recorded, names: dict[int, str], env: dict[Any, Node]) -> None:
        self.program, self.root = recorded.program, recorded.root
        self.names, self.env = names, env
        self.users = recorded.program.users()
        self.lines: list[Line] = []
        self.functions: list[Line] = []
        self.helpers = 0
        self.needed = _needed(recorded.program, names)

    def read(self, operand: Any) -> Node:
        """The expression of an operand."""
        return self.env[operand] if operand.__class__ is int else number(operand.value)

    def run(self) -> None:
        """Fold all equations."""
        equations = [e for e in self.program.equations if any(slot in self.needed for slot in e.outputs)]
        for run in _runs(equations, 0, self.root):
            if len(run) == 1 or not self.as_function(run):
                for equation in run:
                    nodes = expression_of(equation, self.program, self.read)
                    for slot, node in zip(equation.outputs, nodes, strict=True):
                        self.settle(slot, node)

    def settle(self, slot: int, node: Node) -> None:
        """Give a value its line, or leave it to be folded into what uses it."""
        name, uses = self.names.get(slot), len(self.users.get(slot, ()))
        length = size(node)
        if name is None and (length > LONGEST or (uses > 1 and length > REPEATED)):
            self.helpers += 1
            name = f"u{self.helpers}"
            while name in self.names.values():
                name += "'"
        if name is None:
            self.env[slot] = node
            return
        moves = slot in self.names or any(part.op == "value" and part.data[1] is not None for part in walk(node))
        left = Node("value", (), node.shape, (name, 0 if moves else None))
        self.lines.append(Line(left, node, slot not in self.names))
        self.env[slot] = left

    def as_function(self, run: list[Equation]) -> bool:
        """Make the equations of a submodule a function of its inputs; False where that says less than they do."""
        inside = {slot for e in run for slot in e.outputs}
        results = [s for s in inside if any(user is None or user not in run for user in self.users.get(s, ()))]
        named = [slot for slot in inside if slot in self.names and slot not in results]
        path = _path(run[0], self.root)
        read = dict.fromkeys(slot for e in run for slot in e.reads() if slot not in inside)
        given = [slot for slot in read if self.env[slot].op != "parameter"]
        if len(run) < LEAST_FUNCTION or len(results) != 1 or named or not 0 < len(given) <= len(ARGUMENTS):
            return False
        local = {**self.env}
        for slot, argument in zip(given, ARGUMENTS, strict=False):
            local[slot] = Node("value", (), self.env[slot].shape, (argument, None))
        for equation in run:
            nodes = expression_of(equation, self.program, lambda o: local[o] if o.__class__ is int else number(o.value))
            local.update(zip(equation.outputs, nodes, strict=True))
        body = local[results[0]]
        name = ".".join(path)
        known = {line.left.data[0]: line.right for line in self.functions}
        if size(body) > LONGEST or known.get(name, body) != body:
            return False
        arguments = tuple(local[slot] for slot in given)
        if name not in known:
            self.functions.append(Line(Node("call", arguments, body.shape, (name, ())), body))
        args = tuple(self.env[slot] for slot in given)
        self.settle(results[0], Node("call", args, body.shape, (name, ())))
        return True


def _path(equation: Equation, root: str) -> list[str]:
    """The path of an equation below the module itself, in components."""
    where = equation.source.where if equation.source else ""
    if root and (where == root or where.startswith(f"{root}.")):
        where = where[len(root) + 1 :]
    return where.split(".") if where else []


def _runs(equations: list[Equation], depth: int, root: str) -> Iterable[list[Equation]]:
    """Consecutive equations of one submodule together, the others one by one; wrappers are looked into."""
    start = 0
    while start < len(equations):
        path = _path(equations[start], root)[: depth + 1]
        end = start + 1
        while end < len(equations) and len(path) > depth and _path(equations[end], root)[: depth + 1] == path:
            end += 1
        run = equations[start:end]
        if len(run) > 1 and any(len(_path(e, root)) > depth + 1 for e in run):
            yield from _runs(run, depth + 1, root)
        else:
            yield run
        start = end


def _needed(program: Program, names: dict[int, str]) -> set[int]:
    """The slots that something with a name, or an output, is made of."""
    needed = {*names, *(output for output in program.outputs if output.__class__ is int)}
    for equation in reversed(program.equations):
        if any(slot in needed for slot in equation.outputs):
            needed.update(equation.reads())
    return needed


def _symbols(recorded: Recorded) -> dict[str, str]:
    """Short names of parameters: ``weight_ih`` is W_ih; where two would be called alike, with their paths."""
    short, long = {}, {}
    for slot, (name, is_parameter, _) in recorded.captures.items():
        if is_parameter:
            path, _, last = name.rpartition(".")
            head, rest = next(
                (
                    (letter, last[len(word) :])
                    for word, letter in (("weight", "W"), ("bias", "b"))
                    if last.startswith(word)
                ),
                (last, ""),
            )
            if head == "W" and len(recorded.program.avals[slot].shape) < 2:
                head = "w"
            short[name] = head + rest
            long[name] = f"{head}_{path.replace('.', '_')}{rest}" if path else head + rest
    counts = list(short.values())
    chosen = {name: short[name] if counts.count(short[name]) == 1 else long[name] for name in short}
    return {name: symbol if list(chosen.values()).count(symbol) == 1 else name for name, symbol in chosen.items()}
