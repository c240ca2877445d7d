"""Where boxes stand: layers along the arrows, few crossings, straight lines (Sugiyama, Tagawa & Toda 1981).

Everything is decided by the graph alone, ties by the order of the boxes: equal graphs are drawn alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Layout", "layout"]

GAP, LAYER_GAP = 18.0, 34.0  # between boxes of a layer, and between layers
THREAD = 10.0  # the width that a passing arrow takes
SWEEPS = 24
PATIENCE = 4  # layers that a value may stand above its first use


class Layout(NamedTuple):
    """Centres of the boxes, the points of each arrow from box to box, and the size of the whole."""

    centres: list[tuple[float, float]]
    routes: list[list[tuple[float, float]]]
    width: float
    height: float


def layout(sizes: Sequence[tuple[float, float]], arrows: Sequence[tuple[int, int]]) -> Layout:
    """Place boxes of these sizes; arrows go from a smaller to a larger number."""
    layer_of = _layers(len(sizes), arrows)
    # An arrow over several layers passes each of them at a place of its own.
    widths = [size[0] for size in sizes]
    levels = list(layer_of)
    chains: list[list[int]] = []
    for start, end in arrows:
        chain = [start]
        for level in range(layer_of[start] + 1, layer_of[end]):
            chain.append(len(widths))
            widths.append(THREAD)
            levels.append(level)
        chains.append([*chain, end])
    count = len(widths)
    up: list[list[int]] = [[] for _ in range(count)]
    down: list[list[int]] = [[] for _ in range(count)]
    for chain in chains:
        for a, b in itertools.pairwise(chain):
            down[a].append(b)
            up[b].append(a)
    layers: list[list[int]] = [[] for _ in range(max(levels, default=-1) + 1)]
    for node in range(count):
        layers[levels[node]].append(node)
    layers = _ordered(layers, up, down)
    xs = _columns(layers, widths, up, down)
    heights = [max((sizes[node][1] for node in layer if node < len(sizes)), default=0.0) for layer in layers]
    middles, top = [], 0.0
    for height in heights:
        middles.append(top + height / 2)
        top += height + LAYER_GAP
    left = min((xs[n] - widths[n] / 2 for n in range(count)), default=0.0)
    right = max((xs[n] + widths[n] / 2 for n in range(count)), default=0.0)
    at = [(xs[node] - left, middles[levels[node]]) for node in range(count)]
    routes = []
    for chain in chains:
        start, end = chain[0], chain[-1]
        points = [(at[start][0], at[start][1] + sizes[start][1] / 2)]
        for node in chain[1:-1]:
            # Straight down past the boxes of the layer, whatever their height.
            half = heights[levels[node]] / 2
            points += [(at[node][0], at[node][1] - half), (at[node][0], at[node][1] + half)]
        routes.append([*points, (at[end][0], at[end][1] - sizes[end][1] / 2)])
    return Layout(at[: len(sizes)], routes, right - left, max(0.0, top - LAYER_GAP))


def _layers(count: int, arrows: Sequence[tuple[int, int]]) -> list[int]:
    """Longest paths; what nothing leads to, and what is needed much later, stands right above what first needs it."""
    level = [0] * count
    for start, end in sorted(arrows, key=lambda arrow: arrow[1]):
        level[end] = max(level[end], level[start] + 1)
    has_past = {end for _, end in arrows}
    users: list[list[int]] = [[] for _ in range(count)]
    for start, end in arrows:
        users[start].append(end)
    for node in range(count - 1, -1, -1):
        latest = min((level[end] - 1 for end in users[node]), default=level[node])
        if node not in has_past or latest - level[node] > PATIENCE:
            level[node] = latest
    top = min(level, default=0)
    return [at - top for at in level]


def _crossings(upper: list[int], lower: list[int], down: list[list[int]]) -> int:
    """Pairs of arrows between two layers that cross, counted as inversions."""
    place = {node: k for k, node in enumerate(lower)}
    ends = [end for node in upper for end in sorted(place[b] for b in down[node])]
    tree, total = [0] * (len(lower) + 1), 0
    for seen, end in enumerate(ends):
        k, below = end + 1, 0
        while k:
            below += tree[k]
            k -= k & -k
        total += seen - below
        k = end + 1
        while k <= len(lower):
            tree[k] += 1
            k += k & -k
    return total


def _ordered(layers: list[list[int]], up: list[list[int]], down: list[list[int]]) -> list[list[int]]:
    """Each layer by the mean place of its neighbours, down and up again; the best order that came by."""
    best, fewest = layers, None
    for sweep in range(SWEEPS):
        crossings = sum(_crossings(a, b, down) for a, b in itertools.pairwise(layers))
        if fewest is None or crossings < fewest:
            best, fewest = [list(layer) for layer in layers], crossings
        if not crossings:
            break
        near = up if sweep % 2 == 0 else down
        for k in range(len(layers)) if sweep % 2 == 0 else range(len(layers) - 1, -1, -1):
            fixed = k - 1 if sweep % 2 == 0 else k + 1
            if not 0 <= fixed < len(layers):
                continue
            place = {node: i for i, node in enumerate(layers[fixed])}
            own = {node: i for i, node in enumerate(layers[k])}
            means = {}
            for node in layers[k]:
                around = [place[n] for n in near[node]]
                means[node] = (sum(around) / len(around) if around else float(own[node]), own[node])
            order = sorted(layers[k], key=means.__getitem__)
            layers = [*layers[:k], order, *layers[k + 1 :]]
    return best


def _columns(layers: list[list[int]], widths: list[float], up: list[list[int]], down: list[list[int]]) -> list[float]:
    """Horizontal places: each node near the mean of its neighbours, none closer than a gap."""
    xs = [0.0] * len(widths)
    for layer in layers:
        _spaced(layer, dict.fromkeys(layer, 0.0), widths, xs)
    for sweep in range(SWEEPS):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            wanted = {}
            for node in layer:
                around = (up if sweep % 2 == 0 else down)[node] if sweep < SWEEPS - 2 else up[node] + down[node]
                wanted[node] = sum(xs[n] for n in around) / len(around) if around else xs[node]
            _spaced(layer, wanted, widths, xs)
    return xs


def _spaced(layer: list[int], wanted: dict[int, float], widths: list[float], xs: list[float]) -> None:
    """The places that are nearest to the wanted ones (least squares) with room for every box."""
    offsets, offset = [], 0.0
    for k, node in enumerate(layer):
        if k:
            offset += (widths[layer[k - 1]] + widths[node]) / 2 + GAP
        offsets.append(offset)
    # Places less offsets must not fall: pool adjacent ones that would.
    blocks: list[list[float]] = []  # (mean, how many)
    for node, shift in zip(layer, offsets, strict=True):
        blocks.append([wanted[node] - shift, 1.0])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, size = blocks.pop()
            before, more = blocks[-1]
            blocks[-1] = [(before * more + mean * size) / (more + size), more + size]
    values = [mean for mean, size in blocks for _ in range(int(size))]
    for node, value, shift in zip(layer, values, offsets, strict=True):
        xs[node] = value + shift
