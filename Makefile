# Everything sets itself up: `make demo` and `make test` need Python 3.11 or newer and make, nothing else.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-engines test-models test-cluster test-all lint bench setup clean

VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.installed-core
DEV := $(VENV)/.installed-dev
WITH_PEERS := $(VENV)/.installed-bench
INPUTS := pyproject.toml constraints.txt
SAMPLE := "not engines and not models and not all_kills and not all_cases and not cluster"
# Tests of one process each, which two processes share; the others start ranks and servers, and get the machine for themselves.
IN_ONE_PROCESS := tests/benchmarks tests/data_shards tests/launch tests/trainer
# The interpreter for .venv: `make setup PYTHON=/path/to/python3.12` chooses another.
PYTHON ?=
# Of make bench: names of benchmarks, all if empty; short ones; those that are kept, too; peers that are checkouts.
BENCH ?=
QUICK ?=
AGAIN ?=
HRAMCHENKO ?=
DIFFUSERS ?=
# Where torch's small CPU build lies; used on Linux machines without an NVIDIA GPU, if it can be reached.
CPU_INDEX := https://download.pytorch.org/whl/cpu

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(CORE) ## faces, shards, teacher, halvings, samples, report: 10 to 20 minutes on 2 cores
	$(BIN)/halfstep demo

test: $(DEV) ## the tests, with a sample of the engines, of the moments to kill at and of the clusters
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m $(SAMPLE) -n 2 --dist loadfile $(IN_ONE_PROCESS)
	$(BIN)/python -m pytest -m $(SAMPLE) $(addprefix --ignore=,$(IN_ONE_PROCESS))

test-engines: $(DEV) ## every objective, engine and number of ranks; goes on where it was interrupted
	$(BIN)/python -m pytest -p tests.resumable -m "engines or engines_sample"

test-models: $(DEV) ## every recipe of a latent model by its tiny twin, on every engine; goes on where it was interrupted
	$(BIN)/python -m pytest -p tests.resumable -m "models or models_sample" tests/models

test-cluster: $(DEV) ## everything on a real Slurm and a real Ray; goes on where it was interrupted
	$(BIN)/python -m pytest -p tests.resumable tests/cluster

test-all: test ## all of it, every engine, kill and cluster; what follows make test goes on where it was interrupted
	$(BIN)/python -m pytest -p tests.resumable -m "engines or engines_sample or models or models_sample or all_kills or all_cases or cluster"

lint: $(DEV) ## ruff format, ruff, pyright and the import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(WITH_PEERS) ## every benchmark in one table; BENCH="reader pack" QUICK=1 AGAIN=1 HRAMCHENKO=DIR DIFFUSERS=DIR
	$(BIN)/python benchmarks/bench.py $(BENCH) $(if $(QUICK),--quick) $(if $(AGAIN),--again) \
	  $(if $(HRAMCHENKO),--hramchenko '$(HRAMCHENKO)') $(if $(DIFFUSERS),--diffusers '$(DIFFUSERS)')

setup: $(DEV) ## .venv with everything that development needs

clean: ## remove .venv and build leftovers; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@python=""; \
	for candidate in $(or $(PYTHON),python3.11 python3 python3.14 python3.13 python3.12); do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then python="$$candidate"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "error: no Python 3.11 or newer found; install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 2; \
	fi; \
	if ! "$$python" -c 'import ensurepip, venv' 2> /dev/null; then \
	  echo "error: $$python cannot make virtual environments (its ensurepip module is missing)." >&2; \
	  echo "On Debian and Ubuntu: apt-get install python3-venv; elsewhere name another one: make setup PYTHON=/path/to/python3.11" >&2; \
	  exit 2; \
	fi; \
	echo "making $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv $(VENV)

# One pip command, so that the constraints hold torch while the rest is resolved.
define INSTALL
	@extra=""; \
	if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi > /dev/null \
	  && $(BIN)/python -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=5)' $(CPU_INDEX) 2> /dev/null; \
	then extra="--extra-index-url $(CPU_INDEX)"; fi; \
	set -x; $(BIN)/python -m pip install --quiet --disable-pip-version-check $$extra -c constraints.txt -e '$(1)'
	@touch $@
endef

$(CORE): $(INPUTS) | $(BIN)/python
	$(call INSTALL,.)

$(DEV): $(INPUTS) | $(BIN)/python
	$(call INSTALL,.[dev])
	@touch $(CORE)

$(WITH_PEERS): $(INPUTS) | $(BIN)/python
	$(call INSTALL,.[dev,bench])
	@touch $(CORE) $(DEV)
