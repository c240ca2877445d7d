"""How expressions are written: as text that can be read back, and as LaTeX."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from tinygrad_lstm.inspect.expression import Cut, Node

__all__ = ["Latex", "Text", "Writer"]

SUM, SIGN, TERM, PRODUCT, POSTFIX, ATOM = 1, 2, 3, 4, 5, 6  # what binds more tightly is larger
Written = tuple[str, int]
GREEK = frozenset({
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu", "xi",
    "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega",
})  # fmt: skip

FUNCTIONS = {  # in LaTeX
    "sigmoid": r"\sigma", "tanh": r"\tanh", "exp": r"\exp", "log": r"\log", "sin": r"\sin", "cos": r"\cos",
    "tan": r"\tan", "sinh": r"\sinh", "cosh": r"\cosh", "max": r"\max", "min": r"\min", "maximum": r"\max",
    "minimum": r"\min", "arctan": r"\arctan", "arcsin": r"\arcsin", "arccos": r"\arccos",
}  # fmt: skip


class Writer:
    """Writes nodes with no more parentheses than are needed.

    ``parts`` names cuts; ``symbols`` gives parameters their short names.
    """

    minus, comma = "-", ", "

    def __init__(self, symbols: Mapping[str, str], parts: Mapping[Cut, str]) -> None:
        self.symbols, self.parts = symbols, parts

    def __call__(self, node: Node) -> str:
        return self.write(node)[0]

    def at(self, node: Node, least: int) -> str:
        """The node as an operand that has to bind at least so tightly."""
        text, strength = self.write(node)
        return text if strength >= least else self.bracketed(text)

    def write(self, node: Node) -> Written:
        """The text and how tightly it binds."""
        special: Callable[[Node], Written] | None = getattr(self, f"write_{node.op}", None)
        if special is None:
            raise NotImplementedError(f"no way to write {node.op}")
        return special(node)

    # ------------------------------------------------------------------ arithmetic

    def write_add(self, node: Node) -> Written:
        """A sum: ``a + (b + c)`` needs no parentheses."""
        a, b = node.args
        return f"{self.at(a, SUM)} + {self.at(b, SUM)}", SUM

    def write_subtract(self, node: Node) -> Written:
        """A difference."""
        a, b = node.args
        return f"{self.at(a, SUM)} - {self.at(b, SIGN + 1)}", SUM

    def write_negative(self, node: Node) -> Written:
        """The sign."""
        return f"-{self.at(node.args[0], TERM)}", SIGN

    def write_number(self, node: Node) -> Written:
        """A number, as short as it can be without losing a digit."""
        text = self.digits(node.data)
        return text, SIGN if text.startswith("-") else ATOM

    def digits(self, value: Any) -> str:
        """The figures of a number."""
        return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)

    # ------------------------------------------------------------------ leaves

    def write_value(self, node: Node) -> Written:
        """A named value at a time."""
        return self.value(*node.data), ATOM

    def write_parameter(self, node: Node) -> Written:
        """A parameter by its short name."""
        return self.parameter(self.symbols[node.data]), ATOM

    def write_row(self, node: Node) -> Written:
        """A concatenation."""
        return f"[{self.comma.join(self(arg) for arg in node.args)}]", ATOM

    def write_lookup(self, node: Node) -> Written:
        """Rows of a table by their numbers."""
        table, rows = node.args
        return f"{self.at(table, ATOM)}[{self(rows)}]", ATOM

    # what the notations differ in
    def bracketed(self, text: str) -> str:
        """Parentheses around."""
        raise NotImplementedError

    def value(self, name: str, time: int | None) -> str:
        """A named value: at t (0), at t - 1 (-1), or the same at all times (None)."""
        raise NotImplementedError

    def parameter(self, symbol: str) -> str:
        """A short name."""
        raise NotImplementedError

    def call(self, name: str, args: list[str]) -> str:
        """A function."""
        raise NotImplementedError

    def write_call(self, node: Node) -> Written:
        """A function with its parameters behind the arguments."""
        name, params = node.data
        args = [self(arg) for arg in node.args]
        return self.call(name, [*args, *(f"{key}={_brief(value)}" for key, value in params)]), ATOM


def _brief(value: Any) -> str:
    if type(value).__name__ == "Program":
        return f"<{len(value)} equations>"
    return str(value) if hasattr(value, "itemsize") else repr(value)


class Text(Writer):
    """Plain text.

    ``a * b`` is elementwise, ``x W`` (a space) the matrix product, which binds more tightly; ``^T`` transposes,
    ``^2`` is elementwise, ``[a, b]`` joins two rows, ``u[i]`` is the part of the last axis called i, ``W[i, :]`` and
    (as in textbooks) ``W[i]^T`` are rows of a matrix.
    """

    def bracketed(self, text: str) -> str:
        """Parentheses around."""
        return f"({text})"

    def value(self, name: str, time: int | None) -> str:
        """``h_t``, ``h_{t-1}``, ``u``."""
        return name if time is None else f"{name}_t" if time == 0 else f"{name}_{{t-1}}"

    def parameter(self, symbol: str) -> str:
        """As it is."""
        return symbol

    def call(self, name: str, args: list[str]) -> str:
        """``tanh(u)``."""
        return f"{name}({', '.join(args)})"

    def write_multiply(self, node: Node) -> Written:
        """Elementwise."""
        a, b = node.args
        return f"{self.at(a, TERM)} * {self.at(b, TERM)}", TERM

    def write_divide(self, node: Node) -> Written:
        """Elementwise."""
        a, b = node.args
        return f"{self.at(a, TERM)} / {self.at(b, POSTFIX)}", TERM

    def write_matmul(self, node: Node) -> Written:
        """Side by side; a number in front would be read as a factor."""
        return " ".join(self.at(arg, PRODUCT) for arg in node.args), PRODUCT

    def write_power(self, node: Node) -> Written:
        """``u^2``."""
        a, b = node.args
        return f"{self.at(a, ATOM)}^{self.at(b, ATOM)}", POSTFIX

    def write_transpose(self, node: Node) -> Written:
        """``W^T``; ``W[i]^T`` has the rows called i."""
        inner = node.args[0]
        if inner.op == "part":
            which = self.part(inner.data) if inner.data.axis == 0 else f":, {self.part(inner.data)}"
            return f"{self.at(inner.args[0], ATOM)}[{which}]^T", POSTFIX
        return f"{self.at(inner, ATOM)}^T", POSTFIX

    def part(self, cut: Cut) -> str:
        """The name of a part; without one, its bounds."""
        return self.parts.get(cut, f"{cut.low}:{cut.high}")

    def write_part(self, node: Node) -> Written:
        """``u[i]`` of the last axis, ``W[i, :]`` rows."""
        which = self.part(node.data) if node.data.axis == -1 else f"{self.part(node.data)}, :"
        return f"{self.at(node.args[0], ATOM)}[{which}]", ATOM

    def write_index(self, node: Node) -> Written:
        """``U[0]``."""
        return f"{self.at(node.args[0], ATOM)}[{node.data}]", ATOM


class Latex(Writer):
    """LaTeX for the environment ``aligned``: elementwise products by ``\\odot``, parts as superscripts."""

    comma = r",\; "

    def bracketed(self, text: str) -> str:
        """Parentheses that grow."""
        return rf"\left({text}\right)"

    def value(self, name: str, time: int | None) -> str:
        """``h_{t}``."""
        symbol = self.symbol(name)
        return symbol if time is None else f"{symbol}_{{t}}" if time == 0 else f"{symbol}_{{t-1}}"

    def symbol(self, name: str) -> str:
        """One letter as it is, Greek by its command, ``c~`` with a tilde, words upright."""
        if name.endswith("~"):
            return rf"\tilde{{{self.symbol(name[:-1])}}}"
        if len(name) == 1:
            return name
        return f"\\{name}" if name in GREEK else rf"\mathrm{{{escaped(name)}}}"

    def parameter(self, symbol: str) -> str:
        """``W_{ih}``: what stands behind the first underscore is a subscript."""
        head, _, index = symbol.partition("_")
        if not head or not index:
            return self.symbol(symbol)
        shown = index if re.fullmatch(r"[a-zA-Z0-9]{1,2}", index) else rf"\mathrm{{{escaped(index)}}}"
        return f"{self.symbol(head)}_{{{shown}}}"

    def call(self, name: str, args: list[str]) -> str:
        """``\\tanh(u)``, roots and absolute values in their own form."""
        if name in ("sqrt", "abs") and len(args) == 1:
            return rf"\sqrt{{{args[0]}}}" if name == "sqrt" else rf"\left|{args[0]}\right|"
        known = FUNCTIONS.get(name) or rf"\operatorname{{{escaped(name)}}}"
        shown = [arg.replace("_", r"\_") if re.match(r"[a-z]\w*=", arg) else arg for arg in args]
        return rf"{known}\left({self.comma.join(shown)}\right)"

    def digits(self, value: Any) -> str:
        """With powers of ten."""
        text = super().digits(value)
        mantissa, found, exponent = text.partition("e")
        if not found:
            return text
        power = f"10^{{{int(exponent)}}}"
        return power if mantissa == "1" else rf"{mantissa} \cdot {power}"

    def write_multiply(self, node: Node) -> Written:
        """Numbers stand in front of what they scale."""
        a, b = node.args if node.args[1].op != "number" else reversed(node.args)
        sign = r"\," if "number" in (a.op, b.op) else r"\odot"
        return rf"{self.at(a, TERM)} {sign} {self.at(b, TERM)}", TERM

    def write_divide(self, node: Node) -> Written:
        """A fraction."""
        a, b = node.args
        return rf"\frac{{{self(a)}}}{{{self(b)}}}", PRODUCT

    def write_matmul(self, node: Node) -> Written:
        """Side by side."""
        return r" \, ".join(self.at(arg, POSTFIX if arg.op == "divide" else PRODUCT) for arg in node.args), PRODUCT

    def write_power(self, node: Node) -> Written:
        """An exponent."""
        a, b = node.args
        return f"{{{self.at(a, ATOM)}}}^{{{self(b)}}}", POSTFIX

    def write_transpose(self, node: Node) -> Written:
        """``W^\\top``."""
        return rf"{{{self.at(node.args[0], ATOM)}}}^{{\top}}", POSTFIX

    def write_part(self, node: Node) -> Written:
        """A superscript in parentheses, as layers and gates are marked."""
        cut: Cut = node.data
        name = self.parts.get(cut)
        shown = f"{cut.low}:{cut.high}" if name is None else self.symbol(name)
        return f"{self.at(node.args[0], ATOM)}^{{({shown})}}", ATOM

    def write_index(self, node: Node) -> Written:
        """``U[0]``."""
        return f"{self.at(node.args[0], ATOM)}[{node.data}]", ATOM


def escaped(name: str) -> str:
    """A name for use in text."""
    return name.replace("_", r"\_")
