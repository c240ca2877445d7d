"""The errors of the package.

Every error derives from :class:`Error` and from the built-in exception of its kind, so that both
``except tg.Error`` and ``except ValueError`` catch it.  A message says what was found, what was
expected and what to do.
"""

from __future__ import annotations


class Error(Exception):
    """Base class of every error that this package raises on purpose."""


class ShapeError(Error, ValueError):
    """Shapes, axes or lengths that do not fit together."""


class DTypeError(Error, TypeError):
    """A value of a dtype (or Python type) that the operation does not take."""


class ArgumentError(Error, ValueError):
    """An argument whose value is outside of what the function takes."""


class OutOfRangeError(Error, IndexError):
    """An index, class label or token id outside of its range."""


class GraphError(Error, RuntimeError):
    """The tape cannot do what was asked: a freed graph, a changed value, an in-place write."""


class TraceError(GraphError):
    """A data-free tensor was asked for its values while a program was being recorded."""


class GradcheckError(Error, AssertionError):
    """An analytic gradient that differs from central differences."""


class CheckpointError(Error, ValueError):
    """A file that is damaged, or no checkpoint of this package."""


class FileError(Error, OSError):
    """A file that could not be written.  What was on disk before is still there."""


class MissingExtraError(Error, ImportError):
    """Something needs a library that is not installed; the message says which extra brings it."""
