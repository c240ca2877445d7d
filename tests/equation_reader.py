"""A small reader of printed equations: evaluates them with NumPy, so that what is printed can be compared."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

TOKEN = re.compile(
    r"\s*(\d+(?:\.\d+)?(?:e[+-]?\d+)?|[A-Za-z][\w.]*(?:~\w*)?(?:\{t-1\})?|\^T|\^|\[|\]|\(|\)|,|:|\+|-|\*|/|=)"
)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def of_row(f: Callable[..., Any]) -> Callable[[Any], Any]:
    return lambda x: f(x, axis=-1, keepdims=True)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sigmoid": sigmoid, "tanh": np.tanh, "sqrt": np.sqrt, "exp": np.exp, "relu": lambda x: np.maximum(x, 0),
    "mean": of_row(np.mean), "var": of_row(np.var), "sum": of_row(np.sum), "cos": np.cos, "sin": np.sin,
    "where": np.where, "max": of_row(np.max), "norm": of_row(np.linalg.norm),
}  # fmt: skip


class Reader:
    """Evaluates expressions by recursive descent: sums, then * and /, then products side by side, then what follows."""

    def __init__(self, values: dict[str, Any], functions: dict[str, tuple[str, str]], parts: dict[Any, Any]) -> None:
        self.values, self.functions, self.parts = values, functions, parts

    def __call__(self, text: str) -> Any:
        self.tokens = TOKEN.findall(text)
        assert "".join(self.tokens) == text.replace(" ", ""), f"cannot be read: {text}"
        self.at = 0
        value = self.sum()
        assert self.at == len(self.tokens), f"left over in {text}: {self.tokens[self.at :]}"
        return value

    @property
    def next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.next
        assert not expected or token == expected, (token, expected, self.tokens)
        self.at += 1
        return token

    def sum(self) -> Any:
        value = self.term()
        while self.next in ("+", "-"):
            value = value + self.term() if self.take() == "+" else value - self.term()
        return value

    def term(self) -> Any:
        if self.next == "-":
            self.take()
            return -self.term()
        value = self.product()
        while self.next in ("*", "/"):
            value = value * self.product() if self.take() == "*" else value / self.product()
        return value

    def product(self) -> Any:
        value = self.postfix()[0]
        while self.next and (self.next[0].isalnum() or self.next in ("(", "[")):
            value = value @ self.postfix()[0]
        return value

    def postfix(self) -> tuple[Any, str]:
        value, name = self.atom()
        while self.next in ("[", "^T", "^"):
            token = self.take()
            if token == "^T":
                value = value.T
            elif token == "^":
                value = value ** self.atom()[0]
            else:
                value = self.bracket(value, name)
                name = ""
        return value, name

    def bracket(self, value: Any, name: str) -> Any:
        inside = ""
        while self.next != "]":
            inside += self.take()
        self.take("]")
        if re.fullmatch(r"\d+", inside):
            return value[int(inside)]
        first, _, second = inside.partition(",")
        which = second if first == ":" else first
        rows = first != ":" and (second == ":" or self.next == "^T")
        if ":" in which:
            low, high = map(int, which.split(":"))
        else:
            what, (low, high) = self.parts.get((which, name)) or self.parts[which, "othervalues"]
            assert (what == "rows") == rows, f"{what}, but [{inside}]"
        return value[low:high] if rows else value[..., low:high]

    def atom(self) -> tuple[Any, str]:
        token, start = self.take(), self.at
        if token == "(":
            value = self.sum()
            name = "".join(self.tokens[start : self.at])
            self.take(")")
            return value, name
        if token == "[":
            return np.concatenate(self.list_until("]"), axis=-1), ""
        if token[0].isdigit():
            return float(token), ""
        if self.next == "(" and token not in self.values:  # else a product with what stands in parentheses
            self.take()
            arguments = self.list_until(")")
            if token in FUNCTIONS:
                return FUNCTIONS[token](*arguments), ""
            argument, body = self.functions[token]
            inner = Reader({**self.values, argument: arguments[0]}, self.functions, self.parts)
            return inner(body), ""
        return self.values[token], token

    def list_until(self, end: str) -> list[Any]:
        values = [self.sum()]
        while self.next == ",":
            self.take()
            values.append(self.sum())
        self.take(end)
        return values


def evaluate(text: str, values: dict[str, Any]) -> dict[str, Any]:
    """All values of a printed system of equations."""
    head, _, notes = text.partition("\nwhere\n")
    parts: dict[Any, Any] = {}
    for note in notes.splitlines():
        names, what, bounds, bases = re.fullmatch(
            r"  (.*) are (rows|columns|elements) ([\d:, ]+) of (.*)", note
        ).groups()  # type: ignore[union-attr]
        for name, bound in zip(names.split(", "), bounds.split(", "), strict=True):
            for base in bases.replace(" ", "").split(","):
                parts[name[1:-1], base] = (what, tuple(map(int, bound.split(":"))))
    lines = [line.split(" = ", 1) for line in head.splitlines()]
    functions = {m[1]: (m[2], right) for left, right in lines if (m := re.fullmatch(r"([\w.]+)\((\w)\)", left))}
    values = dict(values)
    for left, right in lines:
        if "(" not in left:
            values[left] = Reader(values, functions, parts)(right)
    return values
