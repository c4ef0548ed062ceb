# ACCELERATOR=cpu|cuda picks the pinned list. TORCH_INDEX is a package index to take torch from where the
# default one has no build for this machine. DATA is a local copy of the demo's archive, instead of a download.
ACCELERATOR ?= cpu
PYTHON ?= python3.11
TORCH_INDEX ?=
DATA ?=

TORCH := torch==2.13.0
LISTS := requirements/$(ACCELERATOR).txt requirements/dev.txt
STAMP := .venv/ready-$(ACCELERATOR)
PY := .venv/bin/python

# A stranger's `models` or `trainer` in site-packages must never win over ours.
export PYTHONPATH := $(CURDIR)

.PHONY: setup demo test lint types unit clean

setup: $(STAMP)

# The stamp comes last, so an interrupted set-up starts over. torch brings its own CUDA libraries; --no-deps
# keeps torchrec from putting the CUDA fbgemm over the CPU one.
$(STAMP): Makefile $(LISTS)
	$(PYTHON) -m venv --clear .venv
	$(PY) -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PY) -m pip install --quiet --no-deps $(LISTS:%=-r %)
	$(PY) -c "import torch, torchrec, deepspeed, transformers, peft"
	touch $@

demo: setup
	$(PY) -m launch demo $(if $(DATA),--data "$(DATA)")

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: setup
	.venv/bin/basedpyright

unit: setup
	$(PY) -m pytest -m "not dist and not gpu"

# A file of tests stays in one process, with what it has set up; a thread each, for ranks are processes too.
test: lint types
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
