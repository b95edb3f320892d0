# Two commands for a newcomer: `make quickstart` and `make test`.
# They need Python >= 3.11, make and a package index; everything else lands in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Tests run in as many processes as there are cores (8 at most), each on one thread: threads that share cores only wait.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

.PHONY: help install quickstart test test-slow test-gpu check format tables clean

help:
	@echo "make quickstart  set up, train a small XCiT on handwritten digits, write a report"
	@echo "make test        set up, run the tests (CPU, offline)"
	@echo "make test-slow   the acceptance proofs that take minutes"
	@echo "make check       lint, format, types, import layers"
	@echo "make tables      write the README's tables from benchmarks/results"

install: $(STAMP)

# uv installs torch's wheels in seconds where pip needs minutes; the stamp makes a second call free.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("xcit needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.5'
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[all]' --group dev
	@touch $@

quickstart: install
	$(BIN)/xcit quickstart

test: install
	$(PYTEST) --dist worksteal

test-slow: install
	$(PYTEST) --dist loadfile -m "slow and not gpu"  # a model that a file's tests share is trained once

test-gpu: install
	$(BIN)/python -m pytest -m gpu

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tables: install
	$(BIN)/python -m xcit.bench tables

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
