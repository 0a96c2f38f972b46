# make demo   makes the environment and runs the quickstart
# make check  the fast gate: lint, types, unit and contract tests
# make test   everything

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete

.PHONY: help environment demo check lint types test-quick test format stage-versions clean

help:
	@sed -n 's/^# make/make/p' Makefile

environment: $(STAMP)

# torch first and alone: some source distributions look for it while they are built.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 environment" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -q pipeline stages launch trackers
	@touch $(STAMP)

demo: environment
	$(BIN)/slipway run pipeline/recipes/quickstart.yaml

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: environment
	$(BIN)/mypy

test-quick: environment
	$(BIN)/pytest -q -n $(WORKERS) -m "not slow" tests/unit tests/contracts

check: lint types test-quick

# In one go, because each worker loads torch and its like before its first test. tests/conftest.py puts first what fails fast.
test: lint types
	$(BIN)/pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 15

format: environment
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# For a stage file that changed without a change of meaning; otherwise raise the stage's version.
stage-versions: environment
	$(BIN)/python -m tests.contracts.stage_versions

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
