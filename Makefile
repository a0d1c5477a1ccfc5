# Two commands do all the set-up: `make demo` runs the main job, `make test` the tests.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

demo: $(VENV)/ready
	$(BIN)/python examples/demo.py

test: $(VENV)/ready
	$(BIN)/python -m pytest

sweep: $(VENV)/ready
	$(BIN)/python -m pytest -m slow --ignore=tests/sim

# The simulator on kernels of other libraries at every schedule, and mutants of them: long.
simulator: $(VENV)/ready
	$(BIN)/python -m pytest -m slow tests/sim

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,sass]'
	touch $@

.PHONY: demo test sweep simulator lint
