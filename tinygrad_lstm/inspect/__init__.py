"""Looking inside: equations of a cell, drawings, gradients over time, a player of BPTT, tables of a tape.

Everything here reads a tape or a Program; nothing knows any particular cell.  Names of gates come from ``tg.name``.
"""

from tinygrad_lstm.inspect.drawing import draw
from tinygrad_lstm.inspect.flow import GradientFlow, gradient_flow
from tinygrad_lstm.inspect.page import player
from tinygrad_lstm.inspect.table import Table
from tinygrad_lstm.inspect.writing import equations

__all__ = ["GradientFlow", "Table", "draw", "equations", "gradient_flow", "player"]
