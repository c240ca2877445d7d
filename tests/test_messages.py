"""What wrong arguments are told: by which error, and in which words; never in NumPy's or Python's own."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import pickle
from typing import Any

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import data, nn, ops, optim, training

X = np.ones((2, 3))
RAGGED = [[1], [1, 2]]


def t() -> tg.Tensor:
    return tg.tensor(X, requires_grad=True)


def assigned(name: str, value: Any) -> Any:
    return lambda: setattr(t(), name, value)


def trainer() -> training.Trainer:
    model = nn.Linear(3, 1)
    return training.Trainer(model, optim.SGD(model, lr=0.1), nn.mse_loss)


def step(c: Any, x: Any) -> Any:
    return c, c


class Foreign:
    """A dtype of another library."""

    def __repr__(self) -> str:
        return "torch.float32"


WRONG: dict[str, tuple[Any, Any, str]] = {
    "data_ragged": (assigned("data", RAGGED), tg.ShapeError, "unequal lengths"),
    "data_text": (assigned("data", [["a"] * 3] * 2), tg.DTypeError, "<U1"),
    "grad_text": (assigned("grad", "a"), tg.DTypeError, "real numbers"),
    "grad_ragged": (assigned("grad", RAGGED), tg.ShapeError, "unequal lengths"),
    "lengths": (lambda: ops.scan(step, X, np.ones((3, 2, 3)), lengths=RAGGED), tg.ShapeError, "unequal lengths"),
    "repeat": (lambda: ops.repeat(t(), 1.5), tg.DTypeError, "repeat: counts are integers, found 1.5"),
    "repeat_text": (lambda: ops.repeat(t(), "a"), tg.DTypeError, "found"),
    "split": (lambda: ops.split(t(), 1.5), tg.DTypeError, "split: the number of parts is an integer, found 1.5"),
    "split_index": (lambda: ops.split(t(), [1, "a"], 1), tg.DTypeError, "split: an index is an integer, found 'a'"),
    "chunk": (lambda: ops.chunk(t(), 1.5), tg.DTypeError, "chunk: the number of parts is an integer, found 1.5"),
    "chunk_0": (lambda: ops.chunk(t(), 0), tg.ArgumentError, "at least 1, found 0"),
    "roll": (lambda: ops.roll(t(), "a"), tg.DTypeError, "roll: shift is an integer, found 'a'"),
    "tril": (lambda: ops.tril(t(), None), tg.DTypeError, "tril: k is an integer, found None"),
    "triu": (lambda: ops.triu(t(), None), tg.DTypeError, "triu: k is an integer"),
    "diag": (lambda: ops.diag(t(), None), tg.DTypeError, "diag: k is an integer"),
    "tensordot": (lambda: ops.tensordot(t(), t(), axes=1.5), tg.DTypeError, "axes is an int or a pair .* found 1.5"),
    "concatenate": (lambda: ops.concatenate(3), tg.DTypeError, "expected a list of arrays, found 3"),
    "concatenate_shapes": (
        lambda: ops.concatenate([np.ones((2, 2)), np.ones((2, 2)), np.ones((3, 3))], axis=0),
        tg.ShapeError,
        r"along axis 0: array 2 has shape \(3, 3\), array 0 has \(2, 2\); .* every length but that of axis 0",
    ),
    "concatenate_axes": (lambda: ops.concatenate([X, X[0]], -1), tg.ShapeError, "axis -1: array 1 .*number of axes"),
    "dim": (lambda: ops.sum(t(), dim=1), tg.DTypeError, r"ops\.sum takes .*, got dim=; here it is axis= \(keepdim="),
    "dim_of_a_method": (lambda: t().mean(dim=1), tg.DTypeError, r"got dim=; here it is axis="),
    "keepdim": (lambda: t().max(1, keepdim=True), tg.DTypeError, r"got keepdim=; here .*keepdim= is keepdims="),
    "dim_keepdim": (lambda: ops.argmax(t(), dim=0, keepdim=True), tg.DTypeError, "got dim=, keepdim=; here"),
    "dim_of_softmax": (lambda: ops.softmax(t(), dim=-1), tg.DTypeError, "got dim=; here it is axis="),
    "dim_of_concatenate": (lambda: ops.concatenate([X, X], dim=0), tg.DTypeError, "got dim=; here it is axis="),
    "no_such_keyword": (lambda: ops.sum(t(), axs=1), tg.DTypeError, r"ops\.sum takes \(a, axis=.*mean 'axis'"),
    "dtype_of_a_layer": (
        lambda: nn.LSTM(2, 3, dtype=Foreign()),
        tg.DTypeError,
        r"LSTM: torch\.float32 is no dtype .*np\.float32, np\.fl",
    ),
    "dtype_of_a_cell": (lambda: nn.GRUCell(2, 3, dtype="x"), tg.DTypeError, "GRUCell: 'x' is no dtype .*np.float32"),
    "dtype_of_a_linear": (lambda: nn.Linear(2, 3, dtype=np.int32), tg.DTypeError, "Linear: .*int32.* np.float32"),
    "dtype_of_ids": (lambda: nn.Embedding(2, 3, dtype="x"), tg.DTypeError, "Embedding: 'x' is no dtype"),
    "dtype_of_a_norm": (lambda: nn.LayerNorm(2, dtype="x"), tg.DTypeError, "LayerNorm: 'x' is no dtype"),
    "layer_into_cell": (
        lambda: nn.LSTMCell(2, 3).load_state_dict(nn.LSTM(2, 3).state_dict()),
        tg.ArgumentError,
        "take off '_l0'$",
    ),
    "cell_into_layer": (
        lambda: nn.LSTM(2, 3).load_state_dict(nn.LSTMCell(2, 3).state_dict()),
        tg.ArgumentError,
        "add '_l0'$",
    ),
    "transpose_two": (
        lambda: t().reshape(1, 2, 3).transpose(0, 1),
        tg.ShapeError,
        r"3 axes of \(1, 2, 3\); swapaxes\(0, 1\)",
    ),
    "transpose": (lambda: ops.transpose(t(), 3.5), tg.DTypeError, "transpose: .* found 3.5"),
    "order": (lambda: ops.reshape(t(), (3, 2), order="F"), tg.ArgumentError, "order is 'C'.*found 'F'"),
    "take_mode": (lambda: ops.take(t(), [0], mode="x"), tg.ArgumentError, "mode is 'raise', 'wrap' or 'clip'"),
    "pad": (lambda: ops.pad(t(), 1.5), tg.DTypeError, "pad_width is made of integers, found 1.5"),
    "pad_mode": (lambda: ops.pad(t(), 1, "mean"), tg.ArgumentError, "'mean'.*expected one of constant, edge, reflect"),
    "pad_empty": (lambda: ops.pad(np.ones((0, 2)), 1, "edge"), tg.ShapeError, "is empty"),
    "sum_where": (lambda: ops.sum(t(), where=[1, 0, 1]), tg.DTypeError, "where= is made of booleans, found int64"),
    "max_where": (lambda: ops.max(t(), where=X > 0), tg.ArgumentError, "where= needs initial="),
    "one_hot_dtype": (lambda: ops.one_hot([1], 3, dtype="zz"), tg.DTypeError, "'zz' is no dtype"),
    "one_hot_n": (lambda: ops.one_hot([0], -1), tg.ArgumentError, "not negative, found -1"),
    "asarray": (lambda: tg.asarray(t(), 1.5), tg.DTypeError, "1.5 is no dtype"),
    "complex": (lambda: tg.tensor([1.0], dtype=complex), tg.DTypeError, "complex128"),
    "str": (lambda: tg.tensor([1.0], dtype=str), tg.DTypeError, "real numbers"),
    "object": (lambda: tg.tensor([1.0], dtype=object), tg.DTypeError, "object"),
    "argnums": (lambda: tg.grad(ops.sum, argnums=None), tg.DTypeError, "int or a tuple of ints, found None"),
    "argnums_twice": (
        lambda: tg.grad(ops.sum, argnums=(0, -1))(X),
        tg.ArgumentError,
        r"\(0, -1\) names an argument twice",
    ),
    "grad": (lambda: tg.grad(3), tg.DTypeError, "grad: expected a function, found int"),
    "vjp": (lambda: tg.vjp(3, X), tg.DTypeError, "vjp: expected a function"),
    "jvp": (lambda: tg.jvp(3, (X,), (X,)), tg.DTypeError, "jvp: expected a function"),
    "hvp, another shape": (
        lambda: tg.hvp(lambda a: (a * a).sum(), (np.ones(3),), (np.ones(2),)),
        tg.ShapeError,
        r"hvp: vector of shape \(2,\) for a primal of shape \(3,\)",
    ),
    "hvp": (lambda: tg.hvp(3, (X,), (X,)), tg.DTypeError, "hvp: expected a function"),
    "jacobian": (lambda: tg.jacobian(3), tg.DTypeError, "jacobian: expected a function"),
    "hessian": (lambda: tg.hessian(3), tg.DTypeError, "hessian: expected a function"),
    "a checkpoint of no function": (lambda: tg.checkpoint(3), tg.DTypeError, "checkpoint: expected a function"),
    "initial values of a name": (lambda: nn.init.zeros("w"), tg.DTypeError, "zeros: a Parameter or a shape .* 'w'"),
    "initial values of nothing": (lambda: nn.init.orthogonal(None), tg.DTypeError, "orthogonal: a Parameter or a sh"),
    "a negative length": (lambda: nn.init.zeros((-1, 2)), tg.ArgumentError, "zeros: every length .* at least 0"),
    "a broken length": (lambda: nn.init.normal((1.5, 2)), tg.DTypeError, "normal: every length .* an int, found 1.5"),
    "bounds the wrong way round": (lambda: nn.init.uniform((2,), 1, 0), tg.ArgumentError, "low=1, high=0"),
    "a negative deviation": (lambda: nn.init.normal((2,), std=-1), tg.ArgumentError, "std is not negative, found -1"),
    "a constant in words": (lambda: nn.init.constant((2,), "a"), tg.DTypeError, "value is a number, found 'a'"),
    "values that do not fit": (
        lambda: nn.init.copy(nn.init.zeros((3, 2)), np.ones(3)),
        tg.ShapeError,
        r"shape \(3,\) for a parameter of shape \(3, 2\)",
    ),
    "weights of no module": (lambda: nn.init.lstm_default(3), tg.DTypeError, "lstm_default: a Module is needed"),
    "weights of nothing": (lambda: nn.init.torch_default(None), tg.DTypeError, "torch_default: a Module is needed"),
    "dropout on no module": (lambda: nn.WeightDrop(3), tg.DTypeError, "WeightDrop: the layer is a Module, found 3"),
    "a rate's factor in words": (
        lambda: optim.ExponentialLR(optim.SGD([nn.Parameter([1.0])], lr=1.0), "a"),
        tg.DTypeError,
        "gamma is a number",
    ),
    "a period in words": (
        lambda: optim.CosineAnnealingLR(optim.SGD([nn.Parameter([1.0])], lr=1.0), "a"),
        tg.DTypeError,
        "T_max is a n",
    ),
    "a fraction in words": (lambda: data.TextCorpus("abcdef", "a"), tg.DTypeError, "held_out is a number, found 'a'"),
    "text that is none": (lambda: data.TextCorpus("abcdef" * 9).encode(3), tg.DTypeError, "are str, found int"),
    "a size in words": (lambda: training.CharLM("a", 8), tg.DTypeError, "vocabulary_size is an int, found 'a'"),
    "a sample of no model": (lambda: training.sample(3, "abc", "a"), tg.DTypeError, "sample: the model is a Module"),
    "a warmup in words": (lambda: training.WarmupCosine("a"), tg.DTypeError, "warmup is an int, found 'a'"),
    "an evaluation of nothing": (
        lambda: trainer().evaluate(None),
        tg.DTypeError,
        "batches are an iterable of batches, found a NoneType",
    ),
    "a prediction of nothing": (
        lambda: trainer().predict(3),
        tg.DTypeError,
        "batches are an iterable of batches, found a int",
    ),
    "a gradient with respect to nothing": (lambda: tg.grad(lambda x: x)(None), tg.DTypeError, "argument 0 is None"),
    "gradcheck": (lambda: tg.gradcheck(3, X), tg.DTypeError, "gradcheck: expected a function"),
    "scan": (lambda: ops.scan(3, X, X), tg.DTypeError, "the body is a function"),
    "scan_pair": (lambda: ops.scan(lambda c, x: c, X, X), tg.DTypeError, "pair .carry, y., found one Tensor of shape"),
    "scan_three": (lambda: ops.scan(lambda c, x: (c, c, c), X, X), tg.DTypeError, "pair .carry, y., found 3 values"),
    "scan_body": (lambda: ops.scan(lambda c: (c, c), X, X), tg.DTypeError, r"body\(carry, x\); this one takes \(c\)"),
    "scan_carry": (
        lambda: ops.scan(lambda c, x: ({"h": c["h"], "m": c["m"].sum()}, None), {"h": 0.0, "m": X}, X),
        tg.ShapeError,
        r"scan: carry\['m'\] went in as float64\[2, 3\] and came back as float64\[\]",
    ),
    "scan_counter": (  # of steps: one for all rows, which end at different ones
        lambda: ops.scan(step, {"h": X, "n": 0}, np.ones((3, 2, 3)), lengths=[1, 2]),
        tg.ShapeError,
        r"carry\['n'\] has shape \(\), expected a number per row",
    ),
    "scan_times": (
        lambda: ops.scan(step, X, (np.ones((3, 2)), np.ones(3)), lengths=[1, 2]),
        tg.ShapeError,
        r"xs\[1\] has shape \(3,\), expected a number per row",
    ),
    "scan_batch": (
        lambda: ops.scan(step, X, np.ones((3, 4, 3)), lengths=[1, 2]),
        tg.ShapeError,
        r"xs has shape \(3, 4, 3\), expected a batch of 2",
    ),
    "an initial value of a part": (
        lambda: nn.init.constant(nn.Parameter(np.zeros(8))[2:4], 1.0),
        tg.ArgumentError,
        r"constant: .*p\.data\[2:4\] =",
    ),
    "a copy to a part": (lambda: nn.init.copy(t()[0], np.ones(3)), tg.ArgumentError, "copy: .* was computed"),
    "a pair without has_aux": (lambda: tg.grad(lambda x: (x.sum(), 1))(X), tg.DTypeError, "has_aux=True for a pair"),
    "linalg": (lambda: np.linalg.solve(t(), X), tg.ArgumentError, r"^numpy\.linalg\.solve has no counterpart"),
    "one_hot": (
        lambda: nn.cross_entropy(t(), np.eye(3)[:2]),
        tg.DTypeError,
        r"input's shape \(2, 3\); .* target\.argmax\(-1\)",
    ),
    "ctc_ragged": (
        lambda: nn.ctc_loss(np.zeros((3, 2, 4)), RAGGED, [3, 3], [1, 2]),
        tg.ShapeError,
        "unequal lengths.* fill them up",
    ),
    "copy_ragged": (lambda: nn.init.copy(nn.Parameter(X), RAGGED), tg.ShapeError, "unequal lengths"),
    "a single batch": (lambda: trainer().fit((X, X), epochs=1), tg.ArgumentError, r"found ndarray; .*\[\(inputs, targ"),
    "no_grad": (lambda: tg.no_grad()(3), tg.DTypeError, "decorates a function, found int"),
    "dropout": (
        lambda: ops.dropout(t(), 0.5, np.random.default_rng(0)),
        tg.DTypeError,
        "tg.Generator, found one of numpy",
    ),
    "dropout_p": (lambda: ops.dropout(t(), "a"), tg.DTypeError, "p is a number, found 'a'"),
    "dropout_int": (lambda: ops.dropout(tg.tensor([1, 2]), 0.5), tg.DTypeError, "floating dtype, found int64"),
    "sources": (lambda: tg.Tape().gradient(t().sum(), X), tg.DTypeError, "sources are Tensors, found ndarray"),
    "max_empty": (lambda: ops.max(X[:, :0], 1), tg.ShapeError, r"max of no elements: axis 1 of shape \(2, 0\)"),
    "argmax_empty": (lambda: ops.argmax(X[:0]), tg.ShapeError, r"argmax of no elements: .*\(0, 3\)"),
    "broadcast": (lambda: t() + np.ones((3, 1, 2)), tg.ShapeError, "do not broadcast: axis -1 has lengths 2 and 3"),
    "slice_step": (lambda: t()[::0], tg.ArgumentError, "step of a slice is not 0"),
    "slice_bound": (lambda: t()[1.5:], tg.DTypeError, "a bound of a slice is an integer, found 1.5"),
    "ellipses": (lambda: t()[..., ...], tg.OutOfRangeError, "one ellipsis"),
    "aux": (
        lambda: tg.grad(ops.sum, has_aux=True)(X),
        tg.DTypeError,
        "has_aux the function returns a pair.*found Tensor",
    ),
    "aux_three": (lambda: tg.grad(lambda x: (x.sum(), 1, 2), has_aux=True)(X), tg.DTypeError, "found 3 values"),
    "which": (
        lambda: tg.grad(lambda x, y: y, 1)(X, {"a": 1}),
        tg.DTypeError,
        r"argument 1\['a'\]: requires_grad needs",
    ),
    "backward": (lambda: (t() * 2).backward(), tg.ShapeError, "pass grad="),
    "pickle": (lambda: pickle.dumps(t() * 2), tg.GraphError, "detach"),
    "deepcopy": (lambda: copy.deepcopy(t() * 2), tg.GraphError, "detach"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    call, error, text = WRONG[name]
    with pytest.raises(error, match=text):
        call()


def test_copies_of_values_without_a_graph():
    x = t()
    for value in (x, tg.tensor(X) * 2, (x * 2).detach()):
        for twin in (copy.deepcopy(value), pickle.loads(pickle.dumps(value)), copy.copy(value)):
            np.testing.assert_array_equal(twin.numpy(), value.numpy())
            assert twin.requires_grad is value.requires_grad and twin.is_leaf
    with tg.Tape():
        recorded = tg.tensor(X) * 2
    assert copy.deepcopy(recorded).is_leaf
    copy.copy(x * 2).sum().backward()  # a shallow copy is the same place in the graph
    assert x.grad.tolist() == [[2.0] * 3] * 2


def test_hooks_are_removed_as_in_torch_or_by_a_call():
    for take_off in (lambda handle: handle.remove(), lambda handle: handle()):
        x, seen = t(), []
        handle = (x * 2).register_hook(seen.append)
        kept = x.register_hook(seen.append)
        take_off(handle)
        take_off(handle)
        (x * 2).sum().backward()
        assert len(seen) == 1
        take_off(kept)
        (x * 2).sum().backward()
        assert len(seen) == 1


def test_jacobians_take_keywords():
    f = lambda x, *, scale: x * x * scale
    assert tg.jacobian(f)(np.array([1.0, 2.0]), scale=3.0).tolist() == [[6.0, 0.0], [0.0, 12.0]]
    g = lambda x, *, scale=1.0: (x * x * x).sum() * scale
    assert tg.hessian(g)(np.array([1.0, 2.0]), scale=2.0).tolist() == [[12.0, 0.0], [0.0, 24.0]]


def test_an_inner_tape_is_as_if_it_were_alone():
    x = tg.tensor(np.array([2.0]))
    with tg.Tape() as outer:
        y = x * x
        with tg.Tape() as inner:
            z = (y * x).sum()
    assert inner.gradient(z, x).tolist() == [4.0]
    assert [g.tolist() for g in inner.gradient(z, [x, y])] == [[4.0], [2.0]]
    assert outer.gradient(z, x).tolist() == [12.0]
    assert inner.gradient(y.sum(), x) is None
    x = tg.tensor(np.array([2.0]), requires_grad=True)  # recorded whether there is a tape or not
    for tapes in (1, 2):
        with contextlib.ExitStack() as stack:
            if tapes == 2:
                stack.enter_context(tg.Tape())
            y = x * x
            with tg.Tape() as inner:
                z = (y * x).sum()
        assert inner.gradient(z, x).tolist() == [12.0]


def test_results_of_compiled_functions_are_nobody_elses():
    array, closed = np.zeros(2), tg.tensor(np.ones(2))
    f = tg.compile(lambda x: (x * 2.0, tg.tensor(np.ones(2)), array, closed, x))
    x = tg.tensor(np.ones(2))
    for _ in range(3):
        _, made, given, same, passed = f(x)
        assert made.tolist() == [1.0, 1.0] and given.tolist() == [0.0, 0.0]
        assert same is closed and passed is x
        made.data[:] = 5.0
        given[:] = 7.0
    assert array.tolist() == [0.0, 0.0]


def test_no_grad_on_generators_and_coroutines():
    x = t()

    @tg.no_grad()
    def rows(n):
        """Documented."""
        got = []
        try:
            for k in range(n):
                got.append((yield x * k))
        except KeyError:
            yield x * 10
        return got

    steps = rows(2)
    assert rows.__doc__ == "Documented."
    assert not next(steps).requires_grad and (x * 1).requires_grad  # the caller is not silenced
    assert not steps.send("a").requires_grad
    with pytest.raises(StopIteration) as stopped:
        steps.send("b")
    assert stopped.value.value == ["a", "b"]
    steps = rows(2)
    next(steps)
    assert not steps.throw(KeyError()).requires_grad
    steps.close()
    with pytest.raises(StopIteration):
        next(steps)

    @tg.no_grad()
    async def later():
        await asyncio.sleep(0)
        return x * 2

    assert not asyncio.run(later()).requires_grad

    async def endless():
        yield x

    with pytest.raises(tg.DTypeError, match="async generator"):
        tg.no_grad()(endless)


def test_dropout_of_integers_that_changes_nothing():
    assert ops.dropout(tg.tensor([1, 2]), 0.5, training=False).tolist() == [1, 2]


def test_backward_names_what_pytorch_calls_otherwise():
    x = tg.tensor([1.0], requires_grad=True)
    with pytest.raises(tg.DTypeError, match="found create_graph; gradients that are to be differentiated again"):
        (x * x).sum().backward(create_graph=True)
