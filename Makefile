# Two commands for a newcomer: `make demo` and `make test`. `make check` is what runs before a commit.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: env demo test test-extras check lint format

env: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/colfolio demo

test: $(READY)
	$(BIN)/python -m pytest -n auto -m "not gpu and not web" tests

# torchao, once installed, talks at each import of transformers, so it comes last
test-extras: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[torchao]"
	$(BIN)/python -m pytest tests/unit/training/test_optim.py
	$(BIN)/python -m pip uninstall --quiet --yes torchao

check: lint
	$(BIN)/python -m pytest -n auto -m "not slow and not gpu and not web" tests

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --level error
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
