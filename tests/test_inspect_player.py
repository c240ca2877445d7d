"""The time player: one file that holds what was seen, needs nothing else, and whose script is sound."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import inspect, nn, ops
from tinygrad_lstm.inspect.watch import watch

T, B = 7, 3


class Page(HTMLParser):
    """The scripts of a page by their id, ids, and every attribute that could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: dict[str, str] = {}
        self.ids: set[str] = set()
        self.loads: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        self.ids |= {given["id"]} if "id" in given else set()
        self.loads += [given[key] for key in ("src", "href", "action") if key in given]
        self.inside = given.get("id", "code") if tag == "script" else ""

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[self.inside] = self.scripts.get(self.inside, "") + data

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


class Model(nn.Module):
    def __init__(self, units: int = 5) -> None:
        super().__init__()
        self.layer, self.out = nn.LSTM(2, units), nn.Linear(units, 1)

    def forward(self, x: Any) -> Any:
        return self.out(self.layer(x)[0][-1])


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((T, B, 2)).astype(np.float32)


def loss_of(output: Any) -> Any:
    return ops.square(output).sum()


def play(path: Path, model: Any, x: Any, **options: Any) -> tuple[Page, dict[str, Any]]:
    inspect.player(model, x, loss_of, path, **options)
    page = Page(path.read_text(encoding="utf-8"))
    return page, json.loads(page.scripts["data"], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_the_page_holds_what_was_seen(tmp_path: Path, x: np.ndarray) -> None:
    model = Model()
    _, data = play(tmp_path / "p.html", model, x, row=1, title="A <b>title</b> </script>")
    seen = watch("test", model, x, loss_of)
    assert data["steps"] == T and data["loss"] == pytest.approx(seen.loss, rel=1e-3)
    assert data["title"] == "A <b>title</b> </script>" and "row 1" in data["note"]
    assert (
        [one["name"] for one in data["series"]] == [one.name for one in seen.series] == ["c", "h", "i", "f", "o", "g"]
    )
    for one, series in zip(data["series"], seen.series, strict=True):
        assert one["kind"] == series.kind and one["units"] == list(range(5)) and one["size"] == 5
        np.testing.assert_allclose(one["values"], series.values[:, 1], rtol=1e-3)
        np.testing.assert_allclose(one["gradients"], series.gradients[:, 1], rtol=1e-3)
        np.testing.assert_allclose(one["gradient_norms"], [np.linalg.norm(g) for g in series.gradients], rtol=1e-3)
    by_name = {one["name"]: one for one in data["parameters"]}
    assert set(by_name) == {name for name, _ in model.named_parameters()}
    loss_of(model(x)).backward()
    for name, parameter in model.named_parameters():
        assert by_name[name]["total"] == pytest.approx(float(np.linalg.norm(parameter.grad)), rel=1e-3)
    hh = by_name["layer.weight_hh_l0"]
    assert hh["accumulated"][0] == pytest.approx(hh["total"], rel=1e-3) and len(hh["added"]) == T
    assert "added" not in by_name["out.weight"]


def test_one_file_and_no_network(tmp_path: Path, x: np.ndarray) -> None:
    page, _ = play(tmp_path / "p.html", Model(), x)
    text = (tmp_path / "p.html").read_text()
    assert not page.loads and not re.search(r"https?:|//\w|@import|url\(|fetch\(|import\(", text.replace("// ", ""))
    assert set(page.scripts) == {"data", "code"}
    assert [p.name for p in tmp_path.iterdir()] == ["p.html"]


def test_the_script_finds_its_elements(tmp_path: Path, x: np.ndarray) -> None:
    page, data = play(tmp_path / "p.html", Model(), x)
    asked = set(re.findall(r'(?:\$|getElementById)\("(\w+)"\)', page.scripts["code"]))
    assert asked <= page.ids and len(asked) > 10
    style = (tmp_path / "p.html").read_text()
    assert re.search(r"\.strip \{[^}]*flex-wrap: wrap", style)  # 32 units are wider than a column
    fields = set(re.findall(r"\bdata\.(\w+)", page.scripts["code"]))
    assert fields <= set(data)
    used = set(re.findall(r"\b(?:r\.)?s\.(\w+)", page.scripts["code"])) - {"push"}
    assert used <= set(data["series"][0]), used


@pytest.mark.skipif(shutil.which("node") is None, reason="no JavaScript here")
def test_the_script_runs(tmp_path: Path, x: np.ndarray) -> None:
    """In node, on a document that only takes what is set: every position is rendered, keys move it."""
    page, _ = play(tmp_path / "p.html", Model(), x)
    script = f"""
    const made = {{}}, listeners = {{}};
    const pen = new Proxy({{}}, {{ get: () => () => 0, set: () => true }});
    const fresh = () => ({{ style: {{}}, children: [], appendChild(c) {{ this.children.push(c); }}, prepend() {{}},
      addEventListener() {{}}, getContext: () => pen, checked: true, textContent: "" }});
    const at = id => made[id] ??= fresh();
    globalThis.document = {{ getElementById: at, createElement: fresh, addEventListener: (n, f) => listeners[n] = f }};
    globalThis.location = {{ hash: "#3" }};
    at("data").textContent = {json.dumps(page.scripts["data"])};
    {page.scripts["code"].replace('"use strict";', "")}
    const seen = [at("phase").textContent];
    const press = key => listeners.keydown({{ key, preventDefault() {{}} }});
    press("Home");
    for (let k = 0; k <= 2 * T + 3; k++) {{ seen.push(at("phase").textContent); press("ArrowRight"); }}
    press("ArrowLeft"); seen.push(at("phase").textContent);
    press("End"); seen.push(at("phase").textContent);
    console.log(JSON.stringify(seen));
    """
    done = subprocess.run(["node", "-e", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    forward = [f"forward, t = {t} (of 0 .. 6)" for t in range(T)]
    backward = [f"backward, t = {t} (of 0 .. 6)" for t in range(T - 1, -1, -1)]
    assert found[0] == forward[3]
    assert found[1 : 1 + T] == forward and found[1 + T].startswith("loss = ")
    assert found[2 + T : 2 + 2 * T] == backward and found[2 + 2 * T : -2] == [backward[-1]] * 3
    assert found[-2:] == [backward[-2], backward[-1]]


def test_of_many_units_some_are_shown(tmp_path: Path, x: np.ndarray) -> None:
    _, data = play(tmp_path / "p.html", Model(100), x, units=4)
    assert all(one["units"] == [0, 33, 66, 99] and one["size"] == 100 for one in data["series"])
    assert all(len(step) == 4 for one in data["series"] for step in one["values"])


def test_numbers_that_json_has_not(tmp_path: Path, x: np.ndarray) -> None:
    model = Model()
    model.layer.weight_ih_l0.data = np.full(model.layer.weight_ih_l0.shape, np.nan, np.float32)
    _, data = play(tmp_path / "p.html", model, x)
    assert data["loss"] == "nan" and data["series"][0]["values"][0][0] == "nan"


def test_target_and_lengths(tmp_path: Path, x: np.ndarray) -> None:
    layer = nn.GRU(2, 3)
    target = np.ones((B, 3), np.float32)
    distance = lambda out, y: nn.mse_loss(out[0][-1], y)
    inspect.player(layer, x, distance, tmp_path / "p.html", target, lengths=[T, 2, 0], row=2)
    data = json.loads(Page((tmp_path / "p.html").read_text()).scripts["data"])
    state = next(one for one in data["series"] if one["kind"] == "state")
    assert np.asarray(state["values"]).max() == 0  # a row of length 0 keeps its state


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"row": 3}, tg.ArgumentError, r"row 3 of 'c', which has 3 rows \(0 to 2\)"),
        ({"row": -1}, tg.ArgumentError, "row is at least 0, found -1"),
        ({"row": 1.0}, tg.DTypeError, "row is an int"),
        ({"units": 0}, tg.ArgumentError, "units is at least 1"),
    ],
)
def test_what_is_refused(tmp_path: Path, x: np.ndarray, options: Any, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        inspect.player(Model(), x, loss_of, tmp_path / "p.html", **options)
    assert not list(tmp_path.iterdir())


def test_paths_and_sizes(tmp_path: Path, x: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(tg.ArgumentError, match=r"the page is a \.html file"):
        inspect.player(Model(), x, loss_of, tmp_path / "p.txt")
    with pytest.raises(tg.DTypeError, match="found int"):
        inspect.player(Model(), x, loss_of, 3)  # type: ignore[arg-type]
    with pytest.raises(tg.FileError, match="cannot write"):
        inspect.player(Model(), x, loss_of, tmp_path / "no" / "p.html")
    (tmp_path / "p.html").write_text("old")
    monkeypatch.setattr("tinygrad_lstm.inspect.page.MOST_NUMBERS", 100)
    with pytest.raises(tg.ArgumentError, match=r"420 numbers \(7 steps, 6 values of up to 32 units\), at most 100"):
        inspect.player(Model(), x, loss_of, tmp_path / "p.html")
    assert (tmp_path / "p.html").read_text() == "old"
