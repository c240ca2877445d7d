"""torch: its own layers (fused), any cell in a Python loop, the character model; in float64 it is the reference."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .work import (
    LAYERS,
    ZONEOUT,
    Case,
    Work,
    inputs,
    model_weights,
    shape_of,
    tokens,
    weights,
    zeros,
    zoneout_masks,
)  # fmt: skip

torch: Any = importlib.import_module("torch")
LIBRARIES = ("torch",)


def build(work: Work, options: dict[str, Any]) -> Case:
    """``options['form']``: "fused" (nn.LSTM, nn.GRU, nn.RNN) or "loop"."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if work.kind == "training":
        return training(work)
    masks = Masks(work)
    run, parameters = fused(work) if options["form"] == "fused" else loop(work, masks)
    x = torch.from_numpy(inputs(work)).requires_grad_(work.kind == "step")
    leaves = [x, *parameters.values()]

    def forward() -> Any:
        with torch.inference_mode():
            return run(x)

    def step() -> Any:
        for leaf in leaves:
            leaf.grad = None
        y = run(x)
        loss = (y * y).sum()
        loss.backward()
        return loss

    def result() -> dict[str, np.ndarray]:
        masks.fixed = [torch.from_numpy(mask) for mask in zoneout_masks(work)]
        try:
            if work.kind == "forward":
                return {"y": forward().numpy()}
            loss = step()
        finally:
            masks.fixed = None
        found = {name: value.grad.numpy() for name, value in parameters.items()}
        return found | {"x": x.grad.numpy(), "loss": loss.detach().numpy()}

    return Case(forward if work.kind == "forward" else step, result)


class Masks:
    """Of zoneout, for all steps at once: drawn anew at each call, but ``fixed`` while a result is compared."""

    def __init__(self, work: Work) -> None:
        self.shape, self.fixed = (shape_of(work)[0], shape_of(work)[1], shape_of(work)[3]), None

    def __call__(self) -> Any:
        """Where h and c stay."""
        return self.fixed or [torch.rand(self.shape) < rate for rate in ZONEOUT]


def fused(work: Work) -> tuple[Callable[[Any], Any], dict[str, Any]]:
    """The layer as everybody calls it."""
    if work.cell not in LAYERS:
        raise ValueError(f"torch has no layer for {work.cell}")
    _, _, width, hidden, layers = shape_of(work)
    kind = {"gru": torch.nn.GRU, "rnn": torch.nn.RNN}.get(work.cell, torch.nn.LSTM)
    more = {"proj_size": hidden // 2} if work.cell == "projection" else {}
    layer = kind(width, hidden, layers, dtype=getattr(torch, work.dtype), **more)
    layer.load_state_dict({name: torch.from_numpy(value) for name, value in weights(work).items()})
    return (lambda x: layer(x)[0]), dict(layer.named_parameters())


def loop(work: Work, masks: Masks) -> tuple[Callable[[Any], Any], dict[str, Any]]:
    """The cell in a Python loop; what depends on x alone is computed for all steps before it."""
    w = {name: torch.from_numpy(value).requires_grad_(True) for name, value in weights(work).items()}
    h0 = torch.from_numpy(zeros(work))
    if work.cell == "lstm":

        def run(x: Any) -> Any:
            for k in range(shape_of(work)[4]):
                x = lstm_layer(w, k, x, h0)
            return x

    elif work.cell == "zoneout":

        def run(x: Any) -> Any:
            return zoneout(w, x, h0, masks())

    else:
        cell = CELLS[work.cell]

        def run(x: Any) -> Any:
            return cell(w, x, h0)

    return run, w


def memory_update(gates: Iterable[Any], c: Any) -> tuple[Any, Any]:
    """The LSTM's new (h, c) from the gates before their nonlinearity."""
    i, f, g, o = gates
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def lstm_layer(w: dict[str, Any], k: int, x: Any, h0: Any) -> Any:
    """One layer."""
    z = torch.nn.functional.linear(x, w[f"weight_ih_l{k}"], w[f"bias_ih_l{k}"] + w[f"bias_hh_l{k}"])
    u, h, c, out = w[f"weight_hh_l{k}"].T, h0, h0, []
    for z_t in z.unbind(0):
        h, c = memory_update(torch.addmm(z_t, h, u).chunk(4, 1), c)
        out.append(h)
    return torch.stack(out)


def peephole_norm(w: dict[str, Any], x: Any, h0: Any) -> Any:
    """LSTM with peepholes, each gate layer-normalised."""
    h, c, out = h0, h0, []

    def norm(v: Any, gate: str) -> Any:
        return torch.nn.functional.layer_norm(v, v.shape[-1:], w[f"gain_{gate}"], w[f"shift_{gate}"])

    for z_t in (x @ w["W"]).unbind(0):
        i, f, g, o = torch.addmm(z_t, h, w["U"]).chunk(4, 1)
        i = torch.sigmoid(norm(torch.addcmul(i, w["p_i"], c), "i"))
        f = torch.sigmoid(norm(torch.addcmul(f, w["p_f"], c), "f"))
        c = f * c + i * torch.tanh(norm(g, "g"))
        h = torch.sigmoid(norm(torch.addcmul(o, w["p_o"], c), "o")) * torch.tanh(c)
        out.append(h)
    return torch.stack(out)


def peephole(w: dict[str, Any], x: Any, h0: Any) -> Any:
    """LSTM whose gates see the cell state (Gers et al. 2002)."""
    h, c, u, out = h0, h0, w["weight_hh"].T, []
    for z_t in torch.nn.functional.linear(x, w["weight_ih"], w["bias_ih"] + w["bias_hh"]).unbind(0):
        i, f, g, o = torch.addmm(z_t, h, u).chunk(4, 1)
        i = torch.sigmoid(torch.addcmul(i, w["weight_ci"], c))
        f = torch.sigmoid(torch.addcmul(f, w["weight_cf"], c))
        c = f * c + i * torch.tanh(g)
        h = torch.sigmoid(torch.addcmul(o, w["weight_co"], c)) * torch.tanh(c)
        out.append(h)
    return torch.stack(out)


def layer_norm(w: dict[str, Any], x: Any, h0: Any) -> Any:
    """LSTM with layer normalisation (Ba et al. 2016, equations 20 to 22)."""
    h, c, u, out = h0, h0, w["weight_hh"].T, []

    def norm(v: Any, which: str) -> Any:
        return torch.nn.functional.layer_norm(v, v.shape[-1:], w[f"norm_{which}.weight"], w[f"norm_{which}.bias"])

    for z_t in norm(x @ w["weight_ih"].T, "x").unbind(0):
        i, f, g, o = (z_t + norm(h @ u, "h")).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(norm(c, "c"))
        out.append(h)
    return torch.stack(out)


def zoneout(w: dict[str, Any], x: Any, h0: Any, stays: Any) -> Any:
    """LSTM that keeps, at random, elements of h and c as they were (Krueger et al. 2017)."""
    h, c, u, out = h0, h0, w["weight_hh"].T, []
    z = torch.nn.functional.linear(x, w["weight_ih"], w["bias_ih"] + w["bias_hh"])
    for z_t, h_stays, c_stays in zip(z.unbind(0), *(mask.unbind(0) for mask in stays), strict=True):
        new_h, new_c = memory_update(torch.addmm(z_t, h, u).chunk(4, 1), c)
        h, c = torch.where(h_stays, h, new_h), torch.where(c_stays, c, new_c)
        out.append(h)
    return torch.stack(out)


def minimal_gated(w: dict[str, Any], x: Any, h0: Any) -> Any:
    """Minimal gated unit (Zhou et al. 2016)."""
    h, out = h0, []
    z_f, z_g = (x @ w["W"] + w["b"]).chunk(2, -1)
    for f_t, g_t in zip(z_f.unbind(0), z_g.unbind(0), strict=True):
        f = torch.sigmoid(torch.addmm(f_t, h, w["U_f"]))
        h = torch.lerp(h, torch.tanh(torch.addmm(g_t, f * h, w["U_g"])), f)
        out.append(h)
    return torch.stack(out)


def multiplicative(w: dict[str, Any], x: Any, h0: Any) -> Any:
    """Multiplicative LSTM (Krause et al. 2016)."""
    h, c, out = h0, h0, []
    for m_t, z_t in zip((x @ w["W_m"]).unbind(0), (x @ w["W"] + w["b"]).unbind(0), strict=True):
        h, c = memory_update(torch.addmm(z_t, m_t * (h @ w["U_m"]), w["V"]).chunk(4, 1), c)
        out.append(h)
    return torch.stack(out)


def eight_matmuls(w: dict[str, Any], x: Any, h0: Any) -> Any:
    """An LSTM as it stands in a textbook: a product per gate and operand."""
    h, c, out = h0, h0, []
    for x_t in x.unbind(0):
        h, c = memory_update((x_t @ w[f"W_{k}"] + h @ w[f"U_{k}"] + w[f"b_{k}"] for k in "ifgo"), c)
        out.append(h)
    return torch.stack(out)


CELLS: dict[str, Callable[[dict[str, Any], Any, Any], Any]] = {
    "peephole-norm": peephole_norm,
    "peephole": peephole,
    "layer-norm": layer_norm,
    "minimal-gated": minimal_gated,
    "multiplicative": multiplicative,
    "eight-matmuls": eight_matmuls,
}


class Model(torch.nn.Module):
    """The character model."""

    def __init__(self, vocabulary: int, width: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, width)
        self.recurrent = torch.nn.LSTM(width, hidden, layers)
        self.output = torch.nn.Linear(hidden, vocabulary)

    def forward(self, ids: Any, state: Any) -> Any:
        y, state = self.recurrent(self.embedding(ids), state)
        return self.output(y), state


def training(work: Work) -> Case:
    """Truncated BPTT with carried state, cross-entropy, clipping by norm, Adam."""
    data = tokens(work)
    xs, ys = torch.from_numpy(data.x), torch.from_numpy(data.y)
    _, _, width, hidden, layers = shape_of(work)

    def start() -> Callable[[], float]:
        model = Model(data.vocabulary, width, hidden, layers).to(getattr(torch, work.dtype))
        model.load_state_dict({name: torch.from_numpy(value) for name, value in model_weights(work).items()})
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        state, k = None, 0

        def step() -> float:
            nonlocal state, k
            optimizer.zero_grad()
            logits, state = model(xs[k], state)
            state = tuple(part.detach() for part in state)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ys[k].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            k = (k + 1) % len(xs)
            return float(loss.item())

        return step

    def result() -> dict[str, np.ndarray]:
        step = start()
        return {"losses": np.array([step() for _ in range(5)])}

    return Case(start(), result)
