"""Messages for names that do not exist: what was meant, or what stands here for a name of PyTorch."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from tinygrad_lstm.errors import Error

__all__ = ["MissingNameError", "did_you_mean"]

_PACKAGE = __name__.partition(".")[0]
_PLACES = ("", "ops", "nn", "nn.init", "optim", "data", "training", "inspect", "interop")

_OF_NUMPY = "an array of NumPy in tg.tensor, such as tg.tensor(np.{0}({1}).astype(np.float32))"
_FUNCTION = "{0}, a function, which nn.Sequential takes as well"
# Names of PyTorch that another spelling does not lead to.
_TORCH = {
    "": {
        **{name: _OF_NUMPY.format(name, "shape") for name in ("empty", "ones", "zeros")},
        **{name: _OF_NUMPY.format(name, "...") for name in ("arange", "eye", "full", "linspace")},
        "rand": _OF_NUMPY.format("random.default_rng().random", "shape"),
        "randn": _OF_NUMPY.format("random.default_rng().normal", "size=shape"),
        "as_tensor": "tg.asarray", "from_numpy": "tg.asarray (which aliases the array), or tg.tensor (which copies it)",
        "Variable": "tg.tensor(a, requires_grad=True)", "manual_seed": "tg.seed",
        "cuda": "nothing: all runs on the CPU", "device": "nothing: all runs on the CPU",
        "autograd": "tg.grad, tg.vjp, tg.jvp and tensor.backward()",
        "jit": "tg.compile", "utils": "tg.data", "func": "tg.grad, tg.vjp, tg.jvp, tg.jacobian, tg.hessian",
        "inference_mode": "tg.no_grad", "float32": "np.float32", "float64": "np.float64", "int64": "np.int64",
    },
    "nn": {
        **{name: _FUNCTION.format(f"ops.{function}") for name, function in {
            "ELU": "elu", "GELU": "gelu", "Hardsigmoid": "hard_sigmoid", "Hardtanh": "hard_tanh",
            "LeakyReLU": "leaky_relu", "LogSoftmax": "log_softmax", "ReLU": "relu", "SiLU": "silu",
            "Sigmoid": "sigmoid", "Softmax": "softmax", "Softplus": "softplus", "Tanh": "tanh",
        }.items()},
        "Flatten": _FUNCTION.format("lambda x: x.reshape(len(x), -1)"), "Identity": _FUNCTION.format("lambda x: x"),
        "ModuleList": "a plain list of modules as an attribute: self.layers = [...]",
        "ModuleDict": "a plain dict of modules as an attribute: self.parts = {...}",
        "ParameterList": "a plain list of Parameters as an attribute",
        "ParameterDict": "a plain dict of Parameters as an attribute",
        "functional": "ops (relu, softmax, dropout, ...) and the losses in nn (cross_entropy, ...)",
        "BCELoss": "nn.bce_loss, a function", "BCEWithLogitsLoss": "nn.bce_with_logits, a function",
        "CTCLoss": "nn.ctc_loss, a function", "CrossEntropyLoss": "nn.cross_entropy, a function",
        "HuberLoss": "nn.huber_loss, a function", "L1Loss": "nn.l1_loss, a function",
        "MSELoss": "nn.mse_loss, a function", "NLLLoss": "nn.nll_loss, a function",
        "SmoothL1Loss": "nn.huber_loss, a function", "binary_cross_entropy": "nn.bce_loss",
        "binary_cross_entropy_with_logits": "nn.bce_with_logits", "smooth_l1_loss": "nn.huber_loss",
        "utils": "optim.clip_grad_norm, optim.clip_grad_value and lengths=, which layers take in place of packing",
    },
    "optim": {"lr_scheduler": "the schedules in optim itself: optim.StepLR, optim.CosineAnnealingLR, ..."},
    "ops": {
        "absolute": "ops.abs", "amax": "ops.max", "amin": "ops.min", "bmm": "ops.matmul", "cat": "ops.concatenate",
        "clamp": "ops.clip", "div": "ops.divide", "eq": "ops.equal", "gather": "ops.take_along_axis",
        "ge": "ops.greater_equal", "gt": "ops.greater", "index_select": "ops.take", "le": "ops.less_equal",
        "linear": "x @ weight.T + bias", "lt": "ops.less", "masked_fill": "ops.where", "mm": "ops.matmul",
        "mul": "ops.multiply", "ne": "ops.not_equal", "neg": "ops.negative", "permute": "ops.transpose(x, axes)",
        "pow": "ops.power", "rsqrt": "1 / ops.sqrt(x)", "softmax_cross_entropy": "nn.cross_entropy",
        "sub": "ops.subtract", "unsqueeze": "ops.expand_dims", "view": "ops.reshape",
    },
}  # fmt: skip


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` with the known name that is most like this one, "" where none is.

    >>> did_you_mean("hiden", ["hidden", "input"]), did_you_mean("zzz", ["hidden"])
    ("; did you mean 'hidden'?", '')
    """
    found = _closest(name, known)
    return f"; did you mean {found!r}?" if found else ""


def _closest(name: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches

    known = list(known)
    folded = {other.lower(): other for other in known}
    found = get_close_matches(name, known, 1) or [folded[f] for f in get_close_matches(name.lower(), folded, 1)]
    return found[0] if found else ""


class MissingNameError(Error, AttributeError):
    """A public name that a module does not have.  The hint is looked for when it is shown: ``hasattr`` stays quick."""

    def __init__(self, module: str, name: str) -> None:
        super().__init__(module, name)
        self.module = module

    def __str__(self) -> str:
        module, name = self.args
        return f"module {module!r} has no attribute {name!r}{_hint(module, name)}"


def _hint(module: str, name: str) -> str:
    if name.startswith("_"):
        return ""
    place = module.partition(".")[2]
    of_torch = {**(_TORCH["ops"] if place in ("", "nn") else {}), **_TORCH.get(place, {})}  # torch.cat is in ops
    for where in _PLACES:
        if name not in of_torch and where != place and name in _names(where):
            return f"; it is {_called(where)}.{name}"
    for found, instead in of_torch.items():
        if found.lower() == name.lower():
            return f"; use {instead}"
    found = _closest(name, _names(place))
    return f"; did you mean {_called(place)}.{found}?" if found else ""


def _called(place: str) -> str:
    return place or "tg"


def _names(place: str) -> list[str]:
    module = importlib.import_module(f"{_PACKAGE}.{place}" if place else _PACKAGE)
    return list(module.__all__)
