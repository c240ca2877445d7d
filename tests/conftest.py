"""Shared fixtures: no test may leak state into the next one.  (Warnings are errors: see pyproject.toml.)"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import tinygrad_lstm as tg
from tinygrad_lstm.random import default_generator
from tinygrad_lstm.tape import state

# Compiling takes a second a program: only the tests of compiled code ask for it (they set "always").
os.environ.setdefault("TINYGRAD_LSTM_COMPILE", "never")

settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def leaked_state() -> list[str]:
    """What differs from a fresh interpreter: names of the fields of the recording state."""
    now = state()
    fresh = type(now)()
    fields = [field for field in type(now).__slots__ if not field.startswith("_")]  # the others are derived
    return [field for field in fields if getattr(now, field) != getattr(fresh, field)]


@pytest.fixture(autouse=True)
def no_leaks():
    """Fail a test that leaves recording or NumPy's error state changed; seed and restore the default generator."""
    generator = default_generator().get_state()
    errors = np.geterr()
    tg.seed(0)
    yield
    default_generator().set_state(generator)
    now = np.geterr()
    np.seterr(**errors)
    assert now == errors, f"the test left numpy.errstate as {now}"
    assert not leaked_state(), f"the test left the recording state changed: {leaked_state()}"


@pytest.fixture
def rng() -> np.random.Generator:
    """A seeded NumPy generator."""
    return np.random.default_rng(20240607)


# ---------------------------------------------------------------------------- references must be there

_REQUIRED = os.environ.get("TINYGRAD_LSTM_REQUIRE_REFERENCES") == "1"


def _no_skip(report: Any) -> Any:
    """Where references are required (CI), a comparison that is skipped is a failure."""
    if _REQUIRED and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped although references are required: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    return _no_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: Any) -> Any:
    return _no_skip((yield))
