# Two commands do all the set-up: `make demo` runs the main job, `make test` the tests.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One process for each core, one thread in each.
PYTEST := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

demo: $(VENV)/ready
	$(BIN)/python examples/demo.py

test: $(VENV)/ready
	$(PYTEST)

# A quarter of the slow tests, another one each day; CODA_SWEEP_SHARES=1 makes it all of them.
sweep: $(VENV)/ready
	$(PYTEST) -m slow

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Errors and times on the Hopper or Blackwell GPU of this machine, in build/bench-gpu.json.
bench-gpu: $(VENV)/ready
	$(BIN)/python benchmarks/gpu.py

# The site, with the reference of the API from the docstrings, in build/site. A warning is an error.
docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# A wheel and an sdist, in dist/.
dist: $(VENV)/ready
	rm -rf dist
	$(BIN)/pyproject-build

# The wheel in a clean environment of each Python that is here: the README's block, `coda doctor`.
dist-check: dist
	$(BIN)/python .ci/check_wheel.py dist/*.whl

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,sass]'
	touch $@

.PHONY: demo test sweep bench-gpu lint docs dist dist-check
