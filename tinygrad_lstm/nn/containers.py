"""What may stand in a module's attributes beside modules: containers, and their keys as names."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_lstm.errors import ArgumentError

__all__ = ["CONTAINERS", "further", "name_part", "plain_values"]

CONTAINERS = (list, dict, tuple, set, frozenset)


def plain_values(value: Any, above: tuple[int, ...] = ()) -> Any:
    """The numbers, strings and Nones in a container, with their places; () where there are none."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    above = further(value, above)
    found = []
    for key, item in items:
        if item is None or isinstance(item, (bool, int, float, str, np.generic)):
            found.append((key, type(item).__name__, item))
        elif isinstance(item, CONTAINERS) and (inside := plain_values(item, above)):
            found.append((key, "of", inside))
    return frozenset(part[1:] for part in found) if isinstance(value, (set, frozenset)) else tuple(found)


def further(container: Any, above: tuple[int, ...]) -> tuple[int, ...]:
    """The containers that one stands in, and itself; raises where it is among them."""
    if id(container) in above:
        raise ArgumentError(
            f"a {type(container).__name__} in a module's attributes contains itself; keep it out of the module, or in "
            "an object of another class"
        )
    return (*above, id(container))


def name_part(key: Any) -> Any:
    """A key as part of a dotted name."""
    if key.__class__ is str and "." in key:
        raise ArgumentError(
            f"the key {key!r} of a parameter or module has a '.', which separates the parts of a name; choose another"
        )
    return key
