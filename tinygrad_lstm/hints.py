"""Messages for names that do not exist: what was meant, or what stands here for a name of PyTorch."""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from tinygrad_lstm.errors import Error

__all__ = [
    "MissingAttributeError",
    "MissingNameError",
    "did_you_mean",
    "explain_missing",
    "how_to_install",
    "missing_attribute",
    "suffix_hint",
]

_PACKAGE = __name__.partition(".")[0]
_PLACES = ("", "ops", "nn", "nn.init", "optim", "data", "training", "inspect", "interop")

_OF_NUMPY = "an array of NumPy in tg.tensor, such as tg.tensor(np.{0}({1}).astype(np.float32))"
_FUNCTION = "{0}, a function, which nn.Sequential takes as well"
_MADE = {
    **{name: _OF_NUMPY.format(name, "shape") for name in ("empty", "ones", "zeros")},
    **{name: _OF_NUMPY.format(name, "...") for name in ("arange", "eye", "full", "linspace")},
    "rand": _OF_NUMPY.format("random.default_rng().random", "shape"),
    "randn": _OF_NUMPY.format("random.default_rng().normal", "size=shape"),
}
# Names of PyTorch and JAX that another spelling does not lead to.
_TORCH = {
    "": {
        **_MADE, **dict.fromkeys(("enable_grad", "set_grad_enabled"), "tg.no_grad() around what is not to be recorded"),
        "as_tensor": "tg.asarray", "from_numpy": "tg.asarray (which aliases the array), or tg.tensor (which copies it)",
        "Variable": "tg.tensor(a, requires_grad=True)", "manual_seed": "tg.seed",
        "cuda": "nothing: all runs on the CPU", "device": "nothing: all runs on the CPU",
        "autograd": "tg.grad, tg.vjp, tg.jvp and tensor.backward()",
        "jit": "tg.compile", "utils": "tg.data", "func": "tg.grad, tg.vjp, tg.jvp, tg.jacobian, tg.hessian",
        "vmap": "ops on one more axis in front: they broadcast, and layers take batches",
        "jacrev": "tg.jacobian", "jacfwd": "tg.jacobian", "lax": "ops.scan, and ops.where in place of cond",
        "functional_call": "tg.grad, tg.vjp and tg.jvp, which take functions of a Module",
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
    "optim": {
        "lr_scheduler": "the schedules in optim itself: optim.StepLR, optim.CosineAnnealingLR, ...",
        "LambdaLR": "a subclass of optim.Schedule with next_rate(current, base, step)",
    },
    "ops": {
        **_MADE,
        "cond": "ops.where", "fori_loop": "ops.scan with xs=None and length=",
        "while_loop": "ops.scan over the most steps there may be, with ops.where for those that are over",
        "log_sigmoid": "-ops.softplus(-x)", "logsigmoid": "-ops.softplus(-x)",
        "absolute": "ops.abs", "amax": "ops.max", "amin": "ops.min", "bmm": "ops.matmul", "cat": "ops.concatenate",
        "clamp": "ops.clip", "div": "ops.divide", "eq": "ops.equal", "gather": "ops.take_along_axis",
        "ge": "ops.greater_equal", "gt": "ops.greater", "index_select": "ops.take", "le": "ops.less_equal",
        "linear": "x @ weight.T + bias", "lt": "ops.less", "masked_fill": "ops.where", "mm": "ops.matmul",
        "mul": "ops.multiply", "ne": "ops.not_equal", "neg": "ops.negative", "permute": "ops.transpose(x, axes)",
        "pow": "ops.power", "rsqrt": "1 / ops.sqrt(x)", "softmax_cross_entropy": "nn.cross_entropy",
        "sub": "ops.subtract", "unsqueeze": "ops.expand_dims", "view": "ops.reshape",
    },
}  # fmt: skip
_CPU = "nothing: all runs on the CPU"
_IN_PLACE = "t.data = ... (no operation changes a tensor in place)"
# Attributes of PyTorch's objects, by the name of the class here.
_ATTRIBUTES = {
    "Tensor": {
        **{name: f"t.astype(np.{dtype})" for name, dtype in {
            "bool": "bool_", "double": "float64", "float": "float32", "half": "float16", "int": "int32",
            "long": "int64",
        }.items()},
        **dict.fromkeys(("cpu", "cuda", "device"), _CPU), "to": "t.astype(dtype); all runs on the CPU",
        "type": "t.astype(dtype)", "bmm": "t @ other", "matmul": "t @ other", "mm": "t @ other", "t": "t.T",
        "clone": "t itself, which no operation writes to, t.copy(), or tg.tensor(t), a copy outside of the graph",
        "contiguous": "t itself: operations take every layout", "dim": "t.ndim", "expand": "t.broadcast_to(shape)",
        "gather": "ops.take_along_axis(t, index, axis)", "index_select": "t.take(index, axis)",
        "masked_fill": "ops.where(mask, value, t)", "numel": "t.size", "permute": "t.transpose(axes)",
        "pow": "t ** exponent", "requires_grad_": "t.requires_grad = True", "detach_": "t.detach()",
        **dict.fromkeys(("add_", "clamp_", "copy_", "div_", "fill_", "mul_", "sub_", "zero_"), _IN_PLACE),
        "at": "ops.scatter_add(t, index, value), or ops.where(mask, value, t)",
        "grad_fn": "tg.Tape, which lists the records", "is_cuda": _CPU,
        "unbind": "list(t)", "unsqueeze": "t.expand_dims(axis)", "view": "t.reshape(shape)",
    },
    "Module": {
        **{name: f"module.astype(np.{dtype})" for name, dtype in {
            "double": "float64", "float": "float32", "half": "float16",
        }.items()},
        **dict.fromkeys(("cpu", "cuda", "device"), _CPU), "to": "module.astype(dtype); all runs on the CPU",
        "type": "module.astype(dtype)", "add_module": "an attribute: self.name = module",
        "apply": "a loop: for part in module.modules(): f(part)",
        **dict.fromkeys(("buffers", "named_buffers", "register_buffer"),
                        "an attribute: self.name = tg.tensor(array), which state_dict leaves out"),
        "flatten_parameters": "nothing: it is never needed", "compile": "tg.compile",
        "register_forward_hook": "tg.Tape, which keeps every value",
        "register_parameter": "an attribute: self.name = nn.Parameter(array)",
        "requires_grad_": "a loop: for p in module.parameters(): p.requires_grad = False",
    },
}  # fmt: skip


def how_to_install(extra: str) -> str:
    """The command that adds an optional extra to this package, as it was installed."""
    import json
    from importlib import metadata

    try:
        origin = metadata.distribution("tinygrad-lstm").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        origin = None
    return _install_command(extra, Path(__file__).parents[1], json.loads(origin) if origin else {})


def _install_command(extra: str, home: Path, origin: Mapping[str, Any]) -> str:
    """``home`` is the folder that the package lies in, ``origin`` what pip wrote down (direct_url.json, PEP 610)."""
    if (home / "pyproject.toml").exists():
        return f"pip install -e '.[{extra}]' in {home}"
    url = origin.get("url", "")
    if "dir_info" in origin:
        from urllib.parse import urlsplit
        from urllib.request import url2pathname

        return f"pip install '.[{extra}]' in {url2pathname(urlsplit(url).path)}"
    vcs = origin.get("vcs_info", {}).get("vcs")
    source = f" @ {vcs}+{url}" if vcs else f" @ {url}" if url else ""
    return f"pip install 'tinygrad-lstm[{extra}]{source}'"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` with the known name that is most like this one, "" where none is.

    >>> did_you_mean("hiden", ["hidden", "input"]), did_you_mean("zzz", ["hidden"])
    ("; did you mean 'hidden'?", '')
    >>> did_you_mean("hx", ["x", "state"])
    "; did you mean 'state'?"
    """
    found = _closest(name, known)
    return f"; did you mean {found!r}?" if found else ""


# Arguments and options that are called otherwise elsewhere.
_SYNONYMS = {
    **dict.fromkeys(("hx", "h0", "h_0", "hidden", "initial_state"), "state"), "learning_rate": "lr", "dim": "axis",
    "keepdim": "keepdims", **dict.fromkeys(("seq_lengths", "sequence_length", "seq_len"), "lengths"),
    **dict.fromkeys(("minutes", "max-time", "timeout"), "time-limit"),
}  # fmt: skip


def _closest(name: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches

    known = list(known)
    synonym = _SYNONYMS.get(name.lstrip("-"))
    for other in known:
        if other.lstrip("-") == synonym:
            return other
    folded = {other.lower(): other for other in known}
    if name.lower() in folded:
        return folded[name.lower()]
    found = get_close_matches(name, known, 1) or [folded[f] for f in get_close_matches(name.lower(), folded, 1)]
    return found[0] if found else ""


def suffix_hint(missing: Collection[str], unexpected: Collection[str]) -> str:
    """What to do where parameters of a layer are loaded into a cell, or the other way round; "" elsewhere.

    >>> suffix_hint(["bias_hh"], ["bias_hh_l0"])
    "; names of a layer end in _l0, _l0_reverse, _l1, ..., those of a cell do not: take off '_l0'"
    """
    for layers, cells, change in ((unexpected, missing, "take off"), (missing, unexpected, "add")):
        ends = [end for name in layers for end in _LAYER_END.findall(name) if name.removesuffix(end) in cells]
        if ends:
            return f"; names of a layer end in _l0, _l0_reverse, _l1, ..., those of a cell do not: {change} {ends[0]!r}"
    return ""


_LAYER_END = re.compile(r"_l\d+(?:_reverse)?$")


class MissingNameError(Error, AttributeError):
    """A public name that a module does not have.  The hint is looked for when it is shown: ``hasattr`` stays quick."""

    def __init__(self, module: str, name: str) -> None:
        super().__init__(module, name)
        self.module = module

    def __str__(self) -> str:
        module, name = self.args
        return f"module {module!r} has no attribute {name!r}{_hint(module, name)}"


class MissingAttributeError(Error, AttributeError):
    """An attribute that an object does not have.  As for modules, the hint is looked for when it is shown."""

    def __init__(self, owner: type, name: str, own: Mapping[str, Any] | None = None) -> None:
        super().__init__(owner, name)
        self.own = own or {}

    def __str__(self) -> str:
        owner, name = self.args
        return f"{owner.__name__!r} object has no attribute {name!r}{_attribute_hint(owner, name, self.own)}"


def missing_attribute(value: Any, name: str, own: Mapping[str, Any] | None = None) -> AttributeError:
    """What ``__getattr__`` raises: that there is no such attribute, or what a property of that name raised itself.

    ``own`` are the attributes of the object, beside those of its class.
    """
    owner = type(value)
    if not name.startswith("__") and any(name in cls.__dict__ for cls in owner.__mro__):
        try:
            object.__getattribute__(value, name)
        except AttributeError as error:
            return error
    return MissingAttributeError(owner, name, own)


class _Missing:
    """Stands in a class where PyTorch has an attribute, and is none: what an object has itself comes first.

    A ``__getattr__`` would explain every name, but with one, CPython looks up every attribute that there is more
    slowly: 7 % of a step of a small layer.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, value: Any, owner: type) -> Any:
        raise MissingAttributeError(owner, self.name)


def explain_missing(cls: type, kind: str, more: Iterable[str] = ()) -> None:
    """Have the attributes of PyTorch's class of this kind, and ``more``, explained where the class has none."""
    names = {*_ATTRIBUTES[kind], *more, *(_TORCH["ops"] if kind == "Tensor" else ())}
    for name in sorted(names):
        if not hasattr(cls, name):
            setattr(cls, name, _Missing(name))


def _attribute_hint(owner: type, name: str, own: Mapping[str, Any]) -> str:
    if name.startswith("_"):
        return ""
    for cls in owner.__mro__:
        if found := _ATTRIBUTES.get(cls.__name__, {}).get(name):
            return f"; use {found}"
    of_tensor = any(cls.__name__ == "Tensor" for cls in owner.__mro__)
    if of_tensor and name in _names("ops"):
        return f"; use ops.{name}"
    if of_tensor and name in _TORCH["ops"]:
        return f"; use {_TORCH['ops'][name]}"
    if of_tensor and name.endswith("_"):
        return f"; use {_IN_PLACE}"
    return did_you_mean(name, [known for known in (*dir(owner), *own) if not known.startswith("_")])


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
