# Two commands need nothing but Python (3.10 or newer) and make: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTHON_OLDEST ?= python3.10
OLDEST := .venv-oldest
# What runs notebooks, examples, benchmarks and the commands of the pages needs no old packages.
OLDEST_LEAVES_OUT := notebooks examples benchmarks contracts/test_docs.py \
	contracts/test_docs_live.py contracts/test_pictures.py contracts/test_readme.py
# A process of the tests for each core; one that has nothing left takes over from its neighbour.
PARALLEL := --numprocesses auto --dist worksteal
# Quiet, offline and without a terminal's width in the output.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test test-fast test-oldest check format docs figures pictures notebooks benchmarks
.PHONY: pool clean

help:
	@echo "make demo        decompose a small pool of adapters and measure the parts"
	@echo "make test        run the tests, notebooks included"
	@echo "make test-fast   run the quick tests"
	@echo "make test-oldest run the tests of the library with the oldest Python and packages"
	@echo "make check       format, lint, types, import directions, schemas, the built wheel"
	@echo "make format      format and fix what can be fixed"
	@echo "make docs        build the pages into docs/_build/html"
	@echo "make figures     fill in what the pages quote: results, notebooks, commands"
	@echo "make pictures    draw the pictures of the pages"
	@echo "make notebooks   execute the notebooks in place"
	@echo "make benchmarks  run the benchmarks (an hour, 40 GB of disk)"
	@echo "make pool        train the demo pool again (minutes)"

demo: $(VENV)/.installed
	$(BIN)/devec demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PARALLEL)

test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest $(PARALLEL) $(OLDEST_LEAVES_OUT:%=--ignore=tests/%)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	PATH=$(BIN):$$PATH sh .ci/schemas
	PYTHON=$(BIN)/python sh tests/check_wheel.sh

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -n -W --keep-going -q -b html docs docs/_build/html
	@echo "built: docs/_build/html/index.html"

figures: $(VENV)/.installed-dev
	$(BIN)/python docs/generate.py

pictures: $(VENV)/.installed-dev
	$(BIN)/python docs/pictures/packages.py
	$(BIN)/python docs/pictures/parts.py

notebooks: $(VENV)/.installed-dev
	$(BIN)/jupyter-execute --inplace notebooks/*.ipynb

benchmarks: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.toy
	$(BIN)/python -m benchmarks.dora_demo --json benchmarks/dora_demo.json

pool: $(VENV)/.installed-dev
	$(BIN)/python -m experiments.train_demo_pool

clean:
	rm -rf $(VENV) $(OLDEST) dist build docs/_build docs/notebooks
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "devec needs Python 3.10 or newer; name one with: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing devec with torch and peft into $(VENV), which takes minutes the first time"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON_OLDEST) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[test]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "the pages need Python 3.11 or newer; remove $(VENV) and run: make docs PYTHON=python3.12"; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@
