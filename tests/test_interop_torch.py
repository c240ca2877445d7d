"""Parameters to and from torch: the torch module of the same architecture computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import interop, nn

torch = pytest.importorskip("torch")
torch.set_num_threads(1)
pytestmark = pytest.mark.conformance

PAIRS: dict[str, Any] = {
    "lstm": (
        lambda: nn.LSTM(3, 5, 2, bidirectional=True, proj_size=2),
        lambda: torch.nn.LSTM(3, 5, 2, bidirectional=True, proj_size=2),
    ),
    "gru": (lambda: nn.GRU(3, 5), lambda: torch.nn.GRU(3, 5)),
    "cell": (lambda: nn.LSTMCell(3, 5), lambda: torch.nn.LSTMCell(3, 5)),
    "others": (
        lambda: nn.Sequential(nn.LayerNorm(3), nn.Dropout(0.5), nn.Linear(3, 4), nn.Linear(4, 1, bias=False)),
        lambda: torch.nn.Sequential(
            torch.nn.LayerNorm(3), torch.nn.Dropout(0.5), torch.nn.Linear(3, 4), torch.nn.Linear(4, 1, bias=False)
        ),
    ),
}  # fmt: skip


def first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_there_and_back(name: str, dtype: str, rng: np.random.Generator) -> None:
    ours, theirs = (make() for make in PAIRS[name])
    ours, theirs = ours.astype(dtype).eval(), theirs.to(getattr(torch, dtype)).eval()
    state = interop.to_torch(ours)
    assert all(str(t.dtype) == f"torch.{dtype}" and not t.requires_grad for t in state.values())
    theirs.load_state_dict(state, strict=True)
    x = rng.standard_normal((4, 3) if name == "cell" else (6, 4, 3)).astype(dtype)
    near = 1e-5 if dtype == "float32" else 1e-12
    expected = first(theirs(torch.from_numpy(x))).detach().numpy()
    np.testing.assert_allclose(first(ours(x)).numpy(), expected, rtol=near, atol=near)
    fresh = PAIRS[name][0]().astype(dtype).eval()
    for arrays in (interop.from_torch(theirs.state_dict()), interop.from_torch(theirs)):
        assert fresh.load_state_dict(arrays) == ([], [])
    np.testing.assert_allclose(first(fresh(x)).numpy(), expected, rtol=near, atol=near)


def test_both_ways_are_copies() -> None:
    ours = nn.Linear(2, 1)
    theirs = interop.to_torch(ours)
    theirs["weight"].zero_()
    assert np.abs(ours.weight.numpy()).sum() > 0
    arrays = interop.from_torch(theirs)
    arrays["weight"][:] = 7
    assert theirs["weight"].abs().sum() == 0


def test_half_is_kept_and_bfloat16_becomes_float32() -> None:
    values = [1.0, -0.333251953125, 65504.0]
    half = torch.tensor(values, dtype=torch.float16)
    brain = torch.tensor([1.0, -0.333984375, 3e38], dtype=torch.bfloat16)
    found = interop.from_torch({"half": half, "brain": brain, "ids": torch.arange(3), "mask": torch.tensor([True])})
    assert [a.dtype.name for a in found.values()] == ["float16", "float32", "int64", "bool"]
    assert found["half"].tolist() == values
    assert found["brain"].tolist() == brain.to(torch.float32).tolist()
    assert interop.to_torch({"w": found["half"]})["w"].dtype == torch.float16


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_load_state_dict_takes_any_float_tensor(dtype: str) -> None:
    theirs = torch.nn.LSTM(3, 5).to(getattr(torch, dtype))
    ours = nn.LSTM(3, 5)
    ours.load_state_dict(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        found = ours.state_dict()[name]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, tensor.to(torch.float32).numpy())


def test_what_is_no_dense_tensor_of_real_numbers() -> None:
    for tensor, message in [
        (torch.zeros(2, dtype=torch.complex64), "w has dtype complex64"),
        (torch.eye(2).to_sparse(), "w is a torch.float32 tensor, expected a dense tensor"),
        (torch.empty(2, device="meta"), "w is a torch.float32 tensor, expected a dense tensor"),
    ]:
        with pytest.raises(tg.DTypeError, match=message):
            interop.from_torch({"w": tensor})
        with pytest.raises(tg.DTypeError, match=message):
            nn.Linear(2, 1).load_state_dict({"w": tensor})
    with pytest.raises(tg.DTypeError, match=r"w is .*, which torch has not"):
        interop.to_torch({"w": np.zeros(2, np.longdouble)})


def test_safetensors_files_are_torchs_too(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    ours, theirs = nn.LSTM(3, 5), torch.nn.LSTM(3, 5)
    interop.save_safetensors(tmp_path / "ours", ours)
    theirs.load_state_dict(load_file(tmp_path / "ours"), strict=True)
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), ours.state_dict()[name])
    brain = {name: tensor.to(torch.bfloat16) for name, tensor in torch.nn.LSTM(3, 5).state_dict().items()}
    save_file(brain, tmp_path / "theirs")
    interop.load_safetensors(tmp_path / "theirs", ours)
    for name, tensor in brain.items():
        np.testing.assert_array_equal(ours.state_dict()[name], tensor.to(torch.float32).numpy())
