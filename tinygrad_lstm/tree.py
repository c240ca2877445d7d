"""Trees: nested lists, tuples, named tuples and dicts whose leaves are arrays, tensors or anything else.

``None`` is a leaf-less node, as in JAX: an absent state or an absent output costs nothing.
A :class:`~tinygrad_lstm.nn.Module` takes part through the attribute ``__tree_leaves__`` (a method that
returns a dict name -> Parameter); this file does not know the class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from tinygrad_lstm.errors import ShapeError

__all__ = ["TreeDef", "flatten", "leaf_paths", "leaves_at", "tree_map", "unflatten"]


class TreeDef(NamedTuple):
    """The structure of a tree without its leaves: hashable, comparable."""

    kind: Any  # "leaf", "none", or the container's class
    keys: tuple[Any, ...]  # dict keys or named tuple fields
    children: tuple[TreeDef, ...]

    @property
    def n_leaves(self) -> int:
        """How many leaves a tree of this structure has."""
        return 1 if self.kind == "leaf" else sum(child.n_leaves for child in self.children)


LEAF = TreeDef("leaf", (), ())
NONE = TreeDef("none", (), ())


def _is_namedtuple(tree: Any) -> bool:
    return isinstance(tree, tuple) and hasattr(type(tree), "_fields")


def flatten(tree: Any, open_modules: bool = True) -> tuple[list[Any], TreeDef]:
    """The leaves from left to right, and the structure.  A Module is a dict of parameters, or else a leaf.

    >>> leaves, treedef = flatten({"a": 1, "b": [2, None, (3,)]})
    >>> leaves
    [1, 2, 3]
    >>> unflatten(treedef, [10, 20, 30])
    {'a': 10, 'b': [20, None, (30,)]}
    """
    leaves: list[Any] = []
    return leaves, _flatten(tree, leaves, open_modules)


def _flatten(tree: Any, leaves: list[Any], open_modules: bool) -> TreeDef:
    if tree is None:
        return NONE
    if isinstance(tree, (list, tuple)):
        kind = type(tree)
        keys = kind._fields if _is_namedtuple(tree) else ()  # type: ignore[union-attr]
        return TreeDef(kind, keys, tuple(_flatten(child, leaves, open_modules) for child in tree))
    if isinstance(tree, dict):
        # Insertion order is kept: it is what the user wrote, and what print shows.
        children = tuple(_flatten(child, leaves, open_modules) for child in tree.values())
        return TreeDef(type(tree), tuple(tree), children)
    if open_modules and hasattr(type(tree), "__tree_leaves__"):
        named = tree.__tree_leaves__()
        leaves.extend(named.values())
        return TreeDef(dict, tuple(named), (LEAF,) * len(named))
    leaves.append(tree)
    return LEAF


def unflatten(treedef: TreeDef, leaves: Iterable[Any]) -> Any:
    """The inverse of :func:`flatten`.  A Module comes back as a dict by parameter name."""
    rest = iter(leaves)
    tree = _unflatten(treedef, rest)
    return tree


def _unflatten(treedef: TreeDef, leaves: Any) -> Any:
    if treedef.kind == "leaf":
        return next(leaves)
    if treedef.kind == "none":
        return None
    children = [_unflatten(child, leaves) for child in treedef.children]
    if issubclass(treedef.kind, dict):
        return dict(zip(treedef.keys, children, strict=True))
    if treedef.keys:
        return treedef.kind(*children)
    return treedef.kind(children)


def leaves_at(treedef: TreeDef, tree: Any) -> list[Any]:
    """What stands in a tree at the leaves of a structure that it begins with.

    >>> _, treedef = flatten([0, (1,)])
    >>> leaves_at(treedef, [{"a": 1}, ([2, 3],)])
    [{'a': 1}, [2, 3]]
    """
    if treedef.kind == "leaf":
        return [tree]
    if treedef.kind == "none":
        return []
    children = [tree[key] for key in treedef.keys] if isinstance(tree, dict) else tree
    return [leaf for child, part in zip(treedef.children, children, strict=True) for leaf in leaves_at(child, part)]


def leaf_paths(tree: Any, root: str = "") -> list[str]:
    """A readable path for every leaf, in the order of :func:`flatten`: ``"['a'][0]"``."""
    if tree is None:
        return []
    if isinstance(tree, (list, tuple)):
        return [path for k, child in enumerate(tree) for path in leaf_paths(child, f"{root}[{k}]")]
    if isinstance(tree, dict):
        return [path for key, child in tree.items() for path in leaf_paths(child, f"{root}[{key!r}]")]
    if hasattr(type(tree), "__tree_leaves__"):
        return [f"{root}.{name}" for name in tree.__tree_leaves__()]
    return [root]


def tree_map(f: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Apply ``f`` leaf by leaf to trees of one structure.

    Raises :class:`~tinygrad_lstm.ShapeError` where the structures differ.
    """
    leaves, treedef = flatten(tree)
    columns: list[Sequence[Any]] = [leaves]
    for other in others:
        more, other_def = flatten(other)
        if other_def != treedef:
            raise ShapeError(f"trees of different structure: {describe(treedef)} and {describe(other_def)}")
        columns.append(more)
    return unflatten(treedef, (f(*row) for row in zip(*columns, strict=True)))


def describe(treedef: TreeDef) -> str:
    """The structure as text, for messages: ``({'h': *, 'c': *}, *)``."""
    if treedef.kind == "leaf":
        return "*"
    if treedef.kind == "none":
        return "None"
    inner = [describe(child) for child in treedef.children]
    if issubclass(treedef.kind, dict):
        return "{" + ", ".join(f"{k!r}: {v}" for k, v in zip(treedef.keys, inner, strict=True)) + "}"
    if issubclass(treedef.kind, list):
        return "[" + ", ".join(inner) + "]"
    return "(" + ", ".join(inner) + ("," if len(inner) == 1 else "") + ")"
