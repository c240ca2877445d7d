"""Looking inside: equations of a cell, drawings, gradients over time, a player of BPTT, tables of a tape.

Everything here reads a tape or a Program; nothing knows any particular cell.  Names of gates come from ``tg.name``.
"""

from typing import TYPE_CHECKING

from tinygrad_lstm.hints import MissingNameError
from tinygrad_lstm.inspect.drawing import draw
from tinygrad_lstm.inspect.flow import GradientFlow, gradient_flow
from tinygrad_lstm.inspect.page import player
from tinygrad_lstm.inspect.table import Table
from tinygrad_lstm.inspect.writing import equations

__all__ = ["GradientFlow", "Table", "draw", "equations", "gradient_flow", "player"]


if not TYPE_CHECKING:  # a type checker is to find names that do not exist

    def __getattr__(name: str) -> None:
        raise MissingNameError(__name__, name)
