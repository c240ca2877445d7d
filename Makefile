# Two commands do everything: `make train` runs the main job, `make test` passes the tests.
# Both make their own virtual environment in .venv first; they need make, git and Python 3.10+ with venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
ARGS ?=

# Test processes run side by side, one per core: a BLAS with threads of its own would only fight over them.
test test-slow test-oldest nightly conformance: export OPENBLAS_NUM_THREADS = 1

.PHONY: train test test-slow test-oldest nightly conformance lint doctest examples bench-smoke ci clean

$(BIN)/.train: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[plots]"
	touch $@

$(BIN)/.test: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[plots,examples,test,dev]"
	touch $@

$(BIN)/.conformance: $(BIN)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[conformance,benchmarks]"
	touch $@

# As pyproject.toml allows them; neither has wheels for Python 3.13 and later.
$(OLDEST)/bin/.test: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[examples,test]" \
		numpy==2.0.2 numba==0.61.0
	touch $@

train: $(BIN)/.train  ## a character language model by BPTT on real text, about three minutes
	$(BIN)/python -m tinygrad_lstm train $(ARGS)

test: $(BIN)/.test  ## the fast tests
	$(BIN)/python -m pytest -m "not slow and not conformance and not nightly" -n auto --dist loadfile $(ARGS)

test-slow: $(BIN)/.conformance
	$(BIN)/python -m pytest -m "slow and not conformance and not nightly" -n auto --dist loadfile $(ARGS)

test-oldest: $(OLDEST)/bin/.test  ## the fast tests with the oldest NumPy and Numba
	$(OLDEST)/bin/python -m pytest -m "not slow and not conformance and not nightly" -n auto --dist loadfile $(ARGS)

# One file, many cells: shared out test by test.  The tests themselves ask for native code.
nightly: $(BIN)/.test  ## all random cells in native code, tens of minutes; not a part of ci
	$(BIN)/python -m pytest -m nightly -n auto --dist load $(ARGS)

conformance: $(BIN)/.conformance  ## comparisons with torch, jax and autograd; a skip is a failure
	TINYGRAD_LSTM_REQUIRE_REFERENCES=1 $(BIN)/python -m pytest -m conformance -n auto --dist loadfile $(ARGS)

lint: $(BIN)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

doctest: $(BIN)/.test
	$(BIN)/python -m pytest --doctest-modules tinygrad_lstm -p no:cacheprovider

examples: $(BIN)/.test
	for f in examples/*.py; do echo "== $$f --quick"; $(BIN)/python -W error $$f --quick || exit 1; done

bench-smoke: $(BIN)/.conformance
	$(BIN)/python benchmarks/compare.py --short
	for f in $(filter-out benchmarks/compare.py,$(wildcard benchmarks/*.py)); do \
		echo "== $$f --smoke"; $(BIN)/python $$f --smoke || exit 1; done

ci: test lint doctest examples test-slow conformance bench-smoke

clean:
	rm -rf $(VENV) $(OLDEST) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
