# Every target sets up what it needs: a fresh machine with Python 3.10-3.13 runs `make demo` or `make test` as it is.

PYTHON ?= $(shell for v in 3.11 3.12 3.13 3.10; do command -v python$$v && exit; done; command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test kernels check format clean

demo: $(READY)  ## distil, export, quantise, build and measure on a generated data set
	$(BIN)/edgestill demo

test: $(READY)  ## every test
	$(BIN)/python -m pytest -q

kernels: $(READY)  ## the CUDA kernels: registers on every architecture, every test on the CPU, every planted fault
	$(BIN)/python -m compress.kernels.toolchain
	$(BIN)/python -m pytest -q -m 'mutation or not mutation' tests/compress/kernels

check: $(READY)  ## style, types and floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "Python 3.10 to 3.13 is needed; found: $$($(PYTHON) --version 2>&1). Name another with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) \
	  || { echo "venv is missing; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev,rtx]'
	@touch $@
