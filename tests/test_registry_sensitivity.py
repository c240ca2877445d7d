"""The samples can tell: whatever rule of whatever primitive is off by a thousandth, gradcheck on its samples fails."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from samples import SAMPLES

import tinygrad_lstm as tg

ZERO_DERIVATIVE = {"sign", "floor_divide"}
FUNCTIONS_OF_FUNCTIONS = {
    "scan",
    "checkpoint",
    "compiled",
    "opaque",
}  # another function's gradient, or an error


def rules() -> list[Any]:
    return [
        pytest.param(name, k, id=f"{name}-{k}")
        for name, prim in sorted(tg.REGISTRY.items())
        if prim.differentiable and name not in ZERO_DERIVATIVE | FUNCTIONS_OF_FUNCTIONS
        for k, rule in enumerate(prim.rules)
        if rule is not None
    ]


def scaled(rule: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        return rule(*args, **kwargs) * 1.001

    wrong.__signature__ = inspect.signature(rule)  # type: ignore[attr-defined]
    return wrong


@pytest.mark.parametrize(("name", "k"), rules())
def test_a_rule_that_is_off_by_a_thousandth_is_noticed(name, k):
    prim = tg.REGISTRY[name]
    right, accumulate = prim.rules, prim.accumulate
    prim.set_rules(tuple(scaled(rule) if i == k else rule for i, rule in enumerate(right)))
    try:
        with pytest.raises(tg.GradcheckError):
            for s in SAMPLES[name]:
                tg.gradcheck(s.squared(name), *s.args)
    finally:
        prim.set_rules(right)
        prim.accumulate = accumulate  # new rules drop it
    for s in SAMPLES[name][:1]:
        assert tg.gradcheck(s.function(name), *s.args)


@pytest.mark.parametrize("name", sorted(n for n, p in tg.REGISTRY.items() if p.accumulate is not None))
def test_an_accumulation_that_is_off_by_a_thousandth_is_noticed(name, monkeypatch):
    prim = tg.REGISTRY[name]
    right = prim.accumulate
    monkeypatch.setattr(prim, "accumulate", lambda buffer, g, record: right(buffer, g * 1.001, record))
    with pytest.raises(tg.GradcheckError):
        for s in SAMPLES[name]:
            tg.gradcheck(s.function(name), *s.args)
