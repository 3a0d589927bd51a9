# Each target sets up the environment it needs: a fresh machine runs `make quickstart` or `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PACKAGES := base data tokenizer generator evaluation report engine launch quickstart

.PHONY: install quickstart quickstart-class ablation test test-slow check format bench gpu clean

install: $(INSTALLED)

$(INSTALLED): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: install
	$(BIN)/python quickstart/chain.py $(ARGS)

quickstart-class: install
	$(BIN)/python quickstart/class_chain.py $(ARGS)

ablation: install
	$(BIN)/python quickstart/ablation.py $(ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/python -m pytest -n 2 --dist loadscope -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -n 2 --dist loadscope -m slow

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.adaptive
	$(BIN)/python -m benchmarks.mot
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.checkpoint
	$(BIN)/python -m benchmarks.evaluation
	$(BIN)/python -m benchmarks.class_conditional

# `make gpu PYTHON=python3` takes an interpreter that has the packages as it is: nothing is installed, no network.
ifeq ($(origin PYTHON), file)
gpu: GPU_PYTHON := $(BIN)/python
gpu: install
else
gpu: GPU_PYTHON := $(PYTHON)
endif
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
