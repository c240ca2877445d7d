"""Every primitive of the package, and the functions made of them.  NumPy's names, arguments and defaults."""

from typing import TYPE_CHECKING

from tinygrad_lstm.hints import MissingNameError
from tinygrad_lstm.ops import control, elementwise, indexing, linalg, moving, norms, random, reduction, shape
from tinygrad_lstm.ops import loop as loop  # the primitives of scan, declared with the others
from tinygrad_lstm.ops import within as within
from tinygrad_lstm.ops.control import *  # noqa: F403
from tinygrad_lstm.ops.elementwise import *  # noqa: F403
from tinygrad_lstm.ops.indexing import *  # noqa: F403
from tinygrad_lstm.ops.linalg import *  # noqa: F403
from tinygrad_lstm.ops.moving import *  # noqa: F403
from tinygrad_lstm.ops.norms import *  # noqa: F403
from tinygrad_lstm.ops.random import *  # noqa: F403
from tinygrad_lstm.ops.reduction import *  # noqa: F403
from tinygrad_lstm.ops.shape import *  # noqa: F403

__all__ = [
    *elementwise.__all__, *indexing.__all__, *linalg.__all__, *random.__all__, *reduction.__all__,
    *control.__all__, *moving.__all__, *norms.__all__, *shape.__all__,
]  # fmt: skip

from tinygrad_lstm.ops import methods

methods.install()


if not TYPE_CHECKING:  # a type checker is to find names that do not exist

    def __getattr__(name: str) -> None:
        raise MissingNameError(__name__, name)
