"""Drawings: everything is in them, nothing overlaps, equal graphs give equal files."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_lstm as tg
from tinygrad_lstm import inspect, nn, ops
from tinygrad_lstm.inspect.layout import layout

SVG = "{http://www.w3.org/2000/svg}"


def titles(path: Path) -> Counter[str]:
    """The first text of every box of an SVG."""
    root = ET.parse(path).getroot()
    return Counter(group.findall(f"{SVG}text")[0].text for group in root.iter(f"{SVG}g"))


def arrows(path: Path) -> int:
    return sum("marker-end" in p.attrib for p in ET.parse(path).getroot().iter(f"{SVG}path"))


@pytest.fixture
def svg(tmp_path: Path) -> Path:
    return tmp_path / "graph.svg"


def test_a_cell_has_all_its_operations(svg: Path) -> None:
    inspect.draw(nn.LSTMCell(2, 3), svg)
    assert titles(svg) == Counter(
        ["x_t", "h_{t-1}", "c_{t-1}", "weight_ih", "weight_hh", "bias_ih", "bias_hh"]
        + ["transpose"] * 2 + ["matmul"] * 2 + ["add"] * 3 + ["split axis=-1", "i", "f", "g", "o"]
        + ["multiply"] * 2 + ["c", "tanh", "h", "h_t", "c_t"]
    )  # fmt: skip
    # Two each: 2 matmul, 4 add (c is one), 3 multiply (h is one); one each: 2 transpose, split, 4 gates, tanh, 2 ends.
    assert arrows(svg) == 2 * 9 + 10


def test_a_tape_a_tensor_and_a_program(svg: Path) -> None:
    layer = nn.RNN(2, 3)
    with tg.Tape() as tape, tg.eager():
        loss = (layer(np.ones((3, 1, 2), np.float32))[0] ** 2.0).sum()
    inspect.draw(tape, svg, module=layer)
    found = titles(svg)
    assert found["h"] == found["getitem"] == 3 and found["weight_ih_l0"] == found["bias_hh_l0"] == 1
    assert "t=2" in svg.read_text() and "cells.py:" in svg.read_text()
    inspect.draw(loss, svg, module=layer)
    assert titles(svg)["h"] == 3 and titles(svg)["weight_ih_l0"] == 1
    inspect.draw(tape.to_program(), svg)
    assert titles(svg)["h"] == 3
    inspect.draw(tape, svg)
    assert titles(svg)["parameter"] == 4


def test_a_module_and_its_literals(svg: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(2, 3)

        def forward(self, x: Any) -> Any:
            return 1.5 - self.layer(x["in"])[0].sum(axis=0) * x["scale"]

    inspect.draw(Model(), svg, x={"in": np.ones((4, 1, 2), np.float32), "scale": np.float32(2)})
    found = titles(svg)
    assert found["in"] == found["scale"] == found["subtract(1.5, ·)"] == found["layer.weight_ih_l0"] == 1
    assert any(title.startswith("scan") for title in found)


def test_which_of_several_outputs(svg: Path) -> None:
    with tg.Tape() as tape:
        a, _, c = ops.split(tg.asarray(np.ones(6)), 3)
        tg.name(a * c, "product")
    inspect.draw(tape, svg)
    labels = [t.text for t in ET.parse(svg).getroot().findall(f"{SVG}text")]
    assert labels.count("0") == 1 and "2" in labels
    assert titles(svg)["output 0"] == 1  # what nothing uses is a result


def test_dot(tmp_path: Path) -> None:
    path = tmp_path / "graph.dot"
    inspect.draw(nn.GRUCell(2, 3), path)
    text = path.read_text()
    assert text.startswith("digraph tape {") and text.endswith("}\n")
    nodes = re.findall(r'^  (n\d+) \[label="((?:[^"\\]|\\.)*)", fillcolor="#\w{6}", tooltip="[^"]*"\];$', text, re.M)
    edges = re.findall(r"^  (n\d+) -> (n\d+)(?: \[[^]]*\])?;$", text, re.M)
    assert len(nodes) + len(edges) + 3 == len(text.splitlines())
    assert {name for edge in edges for name in edge} == {name for name, _ in nodes}
    assert any(label.startswith("z\\nsigmoid\\n") for _, label in nodes)


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG\r\n"), ("pdf", b"%PDF-")])
def test_through_matplotlib(tmp_path: Path, ending: str, start: bytes) -> None:
    pytest.importorskip("matplotlib")
    files = [tmp_path / f"{k}.{ending}" for k in range(2)]
    for path in files:
        inspect.draw(nn.LSTMCell(2, 3), path)
    assert files[0].read_bytes().startswith(start) and files[0].read_bytes() == files[1].read_bytes()


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m == "matplotlib" or m.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(tg.Error, match=r"matplotlib; pip install .*\[plots\]") as caught:
        inspect.draw(nn.RNNCell(2, 3), tmp_path / "a.png")
    assert isinstance(caught.value, ImportError) and not list(tmp_path.iterdir())
    inspect.draw(nn.RNNCell(2, 3), tmp_path / "a.svg")


def test_equal_in_other_processes(tmp_path: Path) -> None:
    code = "import sys; from tinygrad_lstm import inspect, nn; inspect.draw(nn.LayerNormLSTMCell(2, 3), sys.argv[1])"
    texts = []
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.svg"
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(tg.__file__).parents[1])}
        subprocess.run([sys.executable, "-c", code, str(path)], env=environment, check=True)
        texts.append(path.read_text())
    assert texts[0] == texts[1] and str(Path(tg.__file__).parent) not in texts[0]


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: nn.Linear(2, 3), tg.ArgumentError, r"Linear needs an example of its input, x="),
        (lambda: 5, tg.DTypeError, "found int, expected a Tape"),
        (lambda: tg.asarray(np.ones(2)), tg.GraphError, "not made by recorded operations"),
        (lambda: tg.Tape(), tg.ArgumentError, "nothing is on this tape"),
    ],
)
def test_what_cannot_be_drawn(svg: Path, make: Any, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        inspect.draw(make(), svg)
    assert not svg.exists()


def test_a_freed_graph_and_a_large_one(svg: Path) -> None:
    x = tg.tensor(np.ones(3), requires_grad=True)
    y = (x * 2.0).sum()
    y.backward()
    with pytest.raises(tg.GraphError, match=r"freed by a backward.*retain_graph"):
        inspect.draw(y, svg)
    with tg.Tape() as tape:
        for _ in range(700):
            x = x * 1.01
    with pytest.raises(tg.ArgumentError, match=r"70\d boxes, at most 600.*\.dot"):
        inspect.draw(tape, svg)
    inspect.draw(tape, svg.with_suffix(".dot"))
    assert svg.with_suffix(".dot").read_text().count("multiply") == 700


def test_what_importing_costs() -> None:
    """The engine alone imports none of this, and none of this imports matplotlib."""
    code = (
        "import sys, tinygrad_lstm as tg; assert 'tinygrad_lstm.inspect' not in sys.modules; "
        "import inspect as theirs; assert tg.inspect is not theirs and tg.inspect.equations; "
        "from tinygrad_lstm import inspect; assert inspect is tg.inspect; import tinygrad_lstm.cli; "
        "assert not any(name.split('.')[0] == 'matplotlib' for name in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(tg.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_paths(tmp_path: Path) -> None:
    for wrong in ("a.jpg", "a", "a.svgz"):
        with pytest.raises(tg.ArgumentError, match=r"drawings end in \.svg, \.dot"):
            inspect.draw(nn.RNNCell(2, 3), tmp_path / wrong)
    with pytest.raises(tg.DTypeError, match="found int"):
        inspect.draw(nn.RNNCell(2, 3), 3)  # type: ignore[arg-type]
    with pytest.raises(tg.FileError, match="cannot write"):
        inspect.draw(nn.RNNCell(2, 3), tmp_path / "no" / "a.svg")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- the layout


@st.composite
def graphs(draw: Any) -> tuple[list[tuple[float, float]], list[tuple[int, int]]]:
    n = draw(st.integers(1, 25))
    sizes = draw(st.lists(st.tuples(st.floats(10, 200), st.floats(10, 60)), min_size=n, max_size=n))
    pairs = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda p: p[0] < p[1])
    return sizes, draw(st.lists(pairs, max_size=40, unique=True)) if n > 1 else []


@given(graphs())
def test_boxes_stand_apart_and_arrows_point_down(case: Any) -> None:
    sizes, edges = case
    plan = layout(sizes, edges)
    boxes = [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for (x, y), (w, h) in zip(plan.centres, sizes, strict=True)]
    tiny = 1e-6
    for k, (left, top, right, bottom) in enumerate(boxes):
        assert left >= -tiny and top >= -tiny and right <= plan.width + tiny and bottom <= plan.height + tiny
        for a, b, c, d in boxes[:k]:
            apart = max(a - right, left - c, b - bottom, top - d)
            assert apart > 17.9, f"boxes {apart} apart"
    for (start, end), route in zip(edges, plan.routes, strict=True):
        assert route[0] == pytest.approx((plan.centres[start][0], boxes[start][3]))
        assert route[-1] == pytest.approx((plan.centres[end][0], boxes[end][1]))
        assert all(a[1] < b[1] + 1e-6 for a, b in itertools.pairwise(route))
        for (ax, ay), (_, by) in zip(route[1::2], route[2::2], strict=False):  # straight down, between the boxes
            for left, top, right, bottom in boxes:
                assert not (left < ax < right and ay < bottom - tiny and by > top + tiny)


def test_few_crossings() -> None:
    """Two chains side by side, given crosswise, are drawn without a crossing."""
    edges = [(0, 3), (1, 2), (2, 5), (3, 4)]
    plan = layout([(20.0, 10.0)] * 6, edges)
    xs = [x for x, _ in plan.centres]
    assert (xs[0] - xs[1]) * (xs[3] - xs[2]) > 0 and (xs[2] - xs[3]) * (xs[5] - xs[4]) > 0
