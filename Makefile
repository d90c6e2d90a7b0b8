# `make train` and `make test` set everything up on a fresh machine with Python >= 3.11.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SEED   ?= 0

.PHONY: help install train test test-slow test-executors oracle-rliable lint types check format clean

help:            ## list the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("rlctl needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,plots,bench,export,tune,video,warp]'
	touch $@

install: $(VENV)/.installed ## create the environment

train: install   ## train PPO on Hopper for 1M steps
	$(BIN)/rlctl train --algo ppo --env Hopper --seed $(SEED)

test: install    ## run the tests
	$(BIN)/python -m pytest -n 2

test-slow: install ## run the tests that take minutes (those on Ray and Slurm skip: test-executors)
	$(BIN)/python -m pytest -m slow

$(VENV)/.executors: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray,slurm]'
	touch $@

test-executors: $(VENV)/.executors ## install Ray and submitit too (some 25 packages), and run the grids and searches on them
	$(BIN)/python -m pytest -m slow tests/bench tests/tune

$(VENV)-rliable/.installed: tests/oracles/rliable-requirements.txt
	$(PYTHON) -m venv $(VENV)-rliable
	$(VENV)-rliable/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

oracle-rliable: $(VENV)-rliable/.installed ## compute the fixture of the statistics' tests with rliable, in its own environment
	$(VENV)-rliable/bin/python tests/oracles/rliable_oracle.py tests/fixtures/rliable/oracle.json

lint: install    ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install   ## check types
	$(BIN)/mypy

check: lint types test ## everything CI runs

format: install  ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:           ## remove the environment and caches
	rm -rf $(VENV) $(VENV)-rliable .pytest_cache .mypy_cache .ruff_cache .hypothesis
