# Each target sets up the environment it needs: a fresh machine runs `make quickstart` or `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install quickstart quickstart-class ablation test test-slow check format bench gpu clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

install: $(INSTALLED) ## .venv with the versions of constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: install ## the whole chain in miniature, with a report; ARGS=--fresh starts over
	$(BIN)/python quickstart/chain.py $(ARGS)

quickstart-class: install ## class-conditional generation in miniature
	$(BIN)/python quickstart/class_chain.py $(ARGS)

ablation: install ## the paper's Tables 2 and 5 in miniature
	$(BIN)/python quickstart/ablation.py $(ARGS)

check: install ## lint, format, types, direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check ## check, then the tests of seconds
	$(BIN)/python -m pytest -n 2 --dist loadscope -m "not slow"

test-slow: install ## the tests of minutes
	$(BIN)/python -m pytest -n 2 --dist loadscope -m slow

format: install ## repair what lint and format can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## every measurement that needs no GPU
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.adaptive_weights
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
gpu: ## tests/gpu and every rate beside its goal, on one GPU; PYTHON=python3 installs nothing
	$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

clean: ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
