# Every target sets up what it needs: a fresh machine with Python 3.10-3.13 runs `make demo` or `make test` as it is.

PYTHON ?= $(shell for v in 3.11 3.12 3.13 3.10; do python$$v -V >/dev/null 2>&1 && command -v python$$v && exit; done; command -v python3)
VENV := .venv
BIN := $(VENV)/bin
RUN := python
READY := $(VENV)/.ready

.PHONY: help demo test coverage kernels check format clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(READY)  ## distil, export, quantise, build and measure on a generated data set
	$(BIN)/edgestill demo

test: $(READY)  ## every test, on all cores; with RUN="coverage run" it notes the lines that they run
	@$(BIN)/coverage erase
	$(BIN)/$(RUN) -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

coverage: $(READY)  ## the percentage of lines that `make test RUN="coverage run"` noted, in all and of each package
	@$(BIN)/coverage combine --quiet --keep
	@for package in runtime benchmarks compress; do \
	  echo "coverage of $$package: $$($(BIN)/coverage report --format=total --include="$$package/*") %"; \
	done
	@echo "coverage in all: $$($(BIN)/coverage report --format=total) %; file by file: coverage report -m"

kernels: $(READY)  ## the CUDA kernels: registers on every architecture, every test on the CPU, every planted fault
	$(BIN)/python -m compress.kernels.toolchain
	$(BIN)/python -m pytest -q -m 'mutation or not mutation' tests/compress/kernels

check: $(READY)  ## style, types and import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)  ## repair the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what the targets made, the virtual environment included
	rm -rf $(VENV) build dist *.egg-info .coverage .coverage.*

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "Python 3.10 to 3.13 is needed; found: $$($(PYTHON) --version 2>&1). Name another with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) \
	  || { echo "venv is missing; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev,rtx]'
	@touch $@
