# Each target makes .venv and installs what it needs, once: a stamp in .venv is renewed
# when pyproject.toml or constraints.txt change, and only then is anything installed again.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Two test processes of one thread each; more threads only fight for the cores.
TEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: help demo test check format clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

demo: .venv/run.installed  ## train on a data set that needs no download, and evaluate
	$(BIN)/mvmr demo

test: .venv/test.installed  ## run the tests
	$(TEST)

check: .venv/check.installed  ## formatting, lint, types, spelling, tests, docs: what must pass before a change goes in
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(TEST)
	$(BIN)/zensical build --strict --clean

format: .venv/check.installed  ## format the code and mend what ruff can mend
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean:  ## remove caches and what was built; .venv and runs/ stay
	rm -rf build dist site .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing that venv puts in place, so its presence means that .venv is whole.
# The first of these that is there and new enough makes it.
$(BIN)/pip:
	@for python in $(PYTHON) python3.12 python3.11 python3.13 python3.14; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "making .venv with $$("$$python" --version)" && exec "$$python" -m venv .venv; \
	  fi; \
	done; \
	echo "mvmr needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1 || true)." >&2; \
	echo "Install one, or name it: make PYTHON=/path/to/python3.12" >&2; \
	exit 1

# A larger set includes the smaller ones, so it stamps them too.
.venv/run.installed: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing mvmr"
	@$(INSTALL) --editable .
	@touch $@

.venv/test.installed: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing mvmr and what its tests need"
	@$(INSTALL) --editable '.[test]'
	@touch .venv/run.installed $@

.venv/check.installed: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing mvmr and what its checks and docs need"
	@$(INSTALL) --editable '.[dev,docs]'
	@touch .venv/run.installed .venv/test.installed $@
