"""Schedules: against torch step by step, and states that go on where they stopped."""

import numpy as np
import pytest

import tinygrad_lstm as tg
from tinygrad_lstm import nn, optim


def sgd(**options):
    return optim.SGD(
        [{"params": [nn.Parameter([1.0])]}, {"params": [nn.Parameter([1.0])], "lr": 0.3}], lr=0.1, **options
    )


CASES = [
    ("StepLR", {"step_size": 3, "gamma": 0.5}),
    ("ExponentialLR", {"gamma": 0.9}),
    ("CosineAnnealingLR", {"T_max": 7, "eta_min": 0.01}),
    ("OneCycleLR", {"max_lr": 1.0, "total_steps": 20}),
    ("OneCycleLR", {"max_lr": [1.0, 2.0], "total_steps": 20, "anneal_strategy": "linear", "pct_start": 0.5}),
    ("OneCycleLR", {"max_lr": 1.0, "epochs": 4, "steps_per_epoch": 5, "three_phase": True, "cycle_momentum": False}),
]
IDS = [f"{name}-{k}" for k, (name, _) in enumerate(CASES)]


@pytest.mark.conformance
@pytest.mark.parametrize("name, options", CASES, ids=IDS)
def test_rates_follow_torch(name, options):
    torch = pytest.importorskip("torch")
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    reference = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:], "lr": 0.3}], lr=0.1, momentum=0.9)
    optimizer = sgd(momentum=0.9)
    ours = getattr(optim, name)(optimizer, **options)
    theirs = getattr(torch.optim.lr_scheduler, name)(reference, **options)
    for step in range(19):
        for mine, other in zip(optimizer.param_groups, reference.param_groups, strict=True):
            assert mine["lr"] == pytest.approx(other["lr"], rel=1e-12, abs=1e-15), step
            assert mine["momentum"] == pytest.approx(other["momentum"], rel=1e-12), step
        assert ours.get_last_lr() == pytest.approx(theirs.get_last_lr(), rel=1e-12)
        reference.step()
        ours.step()
        theirs.step()


@pytest.mark.conformance
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"patience": 0, "factor": 0.5, "min_lr": 0.02},
        {"patience": 1, "mode": "max", "threshold": 0.1, "threshold_mode": "abs"},
        {"patience": 1, "cooldown": 3, "threshold": 0.05},
        {"patience": 1, "mode": "max"},
    ],
)
def test_plateau_follows_torch(options, rng):
    torch = pytest.importorskip("torch")
    reference = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    optimizer = optim.SGD([nn.Parameter([1.0])], lr=0.1)
    ours = optim.ReduceLROnPlateau(optimizer, **options)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(reference, **options)
    for metric in [*(1 + rng.uniform(-0.1, 0.1, 20)), *np.linspace(-1, 1, 10), np.nan, *np.full(15, 0.5)]:
        ours.step(metric)
        theirs.step(metric)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(reference.param_groups[0]["lr"], rel=1e-12)


# ---------------------------------------------------------------------------- several together, and rates set by hand

# (ours, its options, torch's where it has another name, its options)
TOGETHER = {
    "StepLR": ({"step_size": 3, "gamma": 0.5}, None),
    "ExponentialLR": ({"gamma": 0.9}, None),
    "CosineAnnealingLR": ({"T_max": 4, "eta_min": 0.01}, None),
    "LinearWarmup": ({"warmup_steps": 5}, ("LinearLR", {"start_factor": 0.2, "total_iters": 4})),
    "OneCycleLR": ({"max_lr": 1.0, "total_steps": 30}, None),
    "ReduceLROnPlateau": ({"patience": 1, "factor": 0.5}, None),
}


def advance(schedule, name, step):
    if name == "ReduceLROnPlateau":
        schedule.step(1.0 if step > 3 else 2.0 - step)
    else:
        schedule.step()


@pytest.mark.conformance
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("second", [*TOGETHER, None])
@pytest.mark.parametrize("first", TOGETHER)
def test_schedules_go_together_as_in_torch(first, second, by_hand):
    torch = pytest.importorskip("torch")
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    reference = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:], "lr": 0.3}], lr=0.1, momentum=0.9)
    optimizer = sgd(momentum=0.9)
    names = [name for name in (first, second) if name]
    ours = [getattr(optim, name)(optimizer, **TOGETHER[name][0]) for name in names]
    theirs = []
    for name in names:
        other, options = TOGETHER[name][1] or (name, TOGETHER[name][0])
        theirs.append(getattr(torch.optim.lr_scheduler, other)(reference, **options))
    for step in range(25):
        for mine, other in zip(optimizer.param_groups, reference.param_groups, strict=True):
            assert mine["lr"] == pytest.approx(other["lr"], rel=1e-11, abs=1e-15), step
        reference.step()
        if by_hand and step in (4, 11):
            optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 0.7
        for mine, other, name in zip(ours, theirs, names, strict=True):
            advance(mine, name, step)
            advance(other, name, step)


@pytest.mark.parametrize("order", ["schedules last", "schedules first", "schedules alone"])
def test_schedules_that_go_together_resume_bit_for_bit(order):
    names = ["LinearWarmup", "CosineAnnealingLR", "StepLR"]

    def made():
        optimizer = sgd(momentum=0.9)
        return optimizer, [getattr(optim, name)(optimizer, **TOGETHER[name][0]) for name in names]

    (optimizer, schedules), (other, resumed) = made(), made()
    for step in range(6):
        for name, schedule in zip(names, schedules, strict=True):
            advance(schedule, name, step)
    optimizer.param_groups[1]["lr"] = 0.123  # by hand, and not through a schedule
    state, states = optimizer.state_dict(), [schedule.state_dict() for schedule in schedules]
    if order == "schedules last":
        other.load_state_dict(state)
    for schedule, its in zip(resumed, states, strict=True):
        schedule.load_state_dict(its)
    if order == "schedules first":
        other.load_state_dict(state)
    for step in range(6, 20):
        rates = [group["lr"] for group in optimizer.param_groups]
        assert [group["lr"] for group in other.param_groups] == rates
        for name, one, two in zip(names, schedules, resumed, strict=True):
            advance(one, name, step)
            advance(two, name, step)


def test_a_schedule_of_ones_own():
    class Halved(optim.Schedule):
        def rate(self, base, step):
            return base / (step + 1)

    optimizer = optim.SGD([nn.Parameter([1.0])], lr=0.5)
    schedule = Halved(optimizer)
    schedule.step()
    assert schedule.get_last_lr() == [0.25]
    with pytest.raises(tg.ArgumentError, match="next_rate"):
        optim.Schedule(optimizer)


def test_a_state_of_an_earlier_version_leaves_the_optimizers_rates():
    optimizer = optim.SGD([nn.Parameter([1.0])], lr=0.5)
    schedule = optim.ExponentialLR(optimizer, 0.5)
    optimizer.lr = 0.125
    schedule.load_state_dict({"last_epoch": 2, "base_lrs": [0.5]})
    schedule.step()
    assert optimizer.lr == 0.0625
    with pytest.raises(tg.ArgumentError, match="no state"):
        schedule.load_state_dict({"last_epoch": 2, "base_lrs": [0.5], "last_lrs": [1.0, 2.0]})
    with pytest.raises(tg.ArgumentError, match="no state"):
        schedule.load_state_dict({"last_epoch": 2, "base_lrs": 3})
    with pytest.raises(tg.DTypeError, match=r"step_size is an int, found 1\.5"):
        optim.StepLR(optimizer, 1.5)
    with pytest.raises(tg.DTypeError, match="NoneType"):
        schedule.load_state_dict(None)


def test_warmup():
    optimizer = optim.SGD([nn.Parameter([1.0])], lr=0.5)
    schedule = optim.LinearWarmup(optimizer, 4)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step()
    assert rates == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]


def test_one_cycle_with_betas():
    optimizer = optim.Adam([nn.Parameter([1.0])])
    schedule = optim.OneCycleLR(optimizer, 0.1, total_steps=10)
    for _ in range(10):
        assert optimizer.param_groups[0]["betas"][1] == 0.999
        schedule.step()
    with pytest.raises(tg.ArgumentError, match="step 11 of a cycle of 10"):
        schedule.step()


@pytest.mark.parametrize("name, options", [*CASES, ("LinearWarmup", {"warmup_steps": 9})], ids=[*IDS, "LinearWarmup"])
def test_a_loaded_schedule_goes_on(name, options, tmp_path):
    optimizer, other = sgd(momentum=0.9), sgd(momentum=0.9)
    schedule = getattr(optim, name)(optimizer, **options)
    for _ in range(5):
        schedule.step()
    tg.save(tmp_path / "s.safetensors", {"schedule": schedule.state_dict(), "optimizer": optimizer.state_dict()})
    loaded = tg.load(tmp_path / "s.safetensors")
    resumed = getattr(optim, name)(other, **options)
    other.load_state_dict(loaded["optimizer"])
    resumed.load_state_dict(loaded["schedule"])
    for _ in range(5):
        assert resumed.get_last_lr() == schedule.get_last_lr()
        assert other.param_groups[0]["momentum"] == optimizer.param_groups[0]["momentum"]
        schedule.step()
        resumed.step()


def test_a_loaded_plateau_goes_on():
    optimizer = optim.SGD([nn.Parameter([1.0])], lr=0.1)
    schedule = optim.ReduceLROnPlateau(optimizer, patience=2)
    for metric in (1.0, 2.0, 2.0):
        schedule.step(tg.tensor(metric))
    other = optim.SGD([nn.Parameter([1.0])], lr=7.0)
    resumed = optim.ReduceLROnPlateau(other, patience=2)
    resumed.load_state_dict(schedule.state_dict())
    assert other.param_groups[0]["lr"] == 0.1
    resumed.step(2.0)
    assert other.param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.conformance
def test_a_lowest_rate_for_each_group():
    torch = pytest.importorskip("torch")
    ours = optim.SGD([{"params": [nn.Parameter([1.0])]}, {"params": [nn.Parameter([1.0])], "lr": 0.2}], lr=0.1)
    ones = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    theirs = torch.optim.SGD([{"params": [ones[0]]}, {"params": [ones[1]], "lr": 0.2}], lr=0.1)
    options = {"patience": 0, "factor": 0.5, "min_lr": [0.01, 0.05]}
    schedule = optim.ReduceLROnPlateau(ours, **options)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, **options)
    for _ in range(8):
        schedule.step(1.0)
        reference.step(1.0)
        found = [group["lr"] for group in ours.param_groups]
        assert found == pytest.approx([group["lr"] for group in theirs.param_groups])


def test_refusals():
    optimizer = optim.RMSprop([nn.Parameter([1.0])])
    for make, pattern in (
        (lambda: optim.StepLR(optimizer, 0), "step_size"),
        (lambda: optim.StepLR(nn.Linear(1, 1), 1), "found Linear"),
        (lambda: optim.OneCycleLR(optimizer, 0.1), "total_steps"),
        (lambda: optim.OneCycleLR(optimizer, 0.1, 2.5), r"total_steps is an int, found 2\.5"),
        (lambda: optim.OneCycleLR(optimizer, 0.1, 5, div_factor=0), "div_factor is positive, found 0"),
        (lambda: optim.StepLR(optimizer, 1, gamma="a"), "gamma is a number, found 'a'"),
        (lambda: optim.ReduceLROnPlateau(optimizer, patience=-1), "patience is at least 0, found -1"),
        (lambda: optim.ReduceLROnPlateau(optimizer, factor="a"), "factor is a number, found 'a'"),
        (lambda: optim.ReduceLROnPlateau(optimizer).step("a"), "the metric is a number .* found 'a'"),
        (lambda: optim.ReduceLROnPlateau(optimizer).step(np.ones(3)), "the metric is a number .* found array"),
        (lambda: optim.ReduceLROnPlateau(optimizer, min_lr=[0.1, 0.2]), "min_lr has 2 values for 1 groups"),
        (lambda: optim.OneCycleLR(optim.Adagrad([nn.Parameter([1.0])]), 0.1, 10), "no momentum to cycle"),
        (lambda: optim.ReduceLROnPlateau(optimizer, mode="up"), "'up'"),
        (lambda: optim.ReduceLROnPlateau(optimizer).step(), "metric"),
        (lambda: optim.StepLR(optimizer, 1).load_state_dict({}), "no state"),
    ):
        with pytest.raises((tg.ArgumentError, tg.DTypeError), match=pattern):
            make()
