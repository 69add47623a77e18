# `make check` does everything from a bare clone; `make help` lists the rest.
.DEFAULT_GOAL := check
# In the order given, also under make -j: the last words of a check are pytest's.
.NOTPARALLEL:

BASE_PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.samft-dev
DOCS_INSTALLED := $(VENV)/.samft-docs
TYPED := samft $(wildcard benchmarks)
# More for pytest, as in: make test ARGS="-k losses -x"
ARGS ?=
# Tests at a time; each takes a core, or two of them for moments.
JOBS ?= 2
# Real data sets, for `make bench`.
DATA ?= ../shared/data

.PHONY: help install check check-full format-check lint types test test-fast test-slow fmt docs smoke soak bench bench-step bench-scale gpu

help:
	@echo "make check    format check, lint, types, unit tests and one run of each command (6 minutes);"
	@echo "              installs into $(VENV) first"
	@echo "make check-full   that, and all other tests: whole runs, processes, faults (25 minutes)"
	@echo "make fmt      formats, sorts imports and mends what ruff can mend"
	@echo "make test     all tests, only them; ARGS=... goes to pytest, JOBS=2 is how many at a time"
	@echo "make docs     writes docs/configuration.md from the help texts of samft/config.py, and builds the pages into site/"
	@echo "make smoke    writes the demo dataset and tunes on it for 20 steps, in a temporary folder"
	@echo "make soak     half an hour of faults, or more, beside an undisturbed run, which must end equal"
	@echo "make bench    measures the index at COCO's size (12 GB of memory) and the loader; DATA=... has hbn_flakes and coco_open104"
	@echo "make bench-step   measures the training step beside the baseline (15 minutes, 16 GB)"
	@echo "make gpu      measures and checks in 12 minutes what only a GPU can show, into runs/gpu; without one it"
	@echo "              runs the same, small, on pretended GPUs (15 minutes)"
	@echo "make bench-scale  measures the constants of docs/memory_and_speed.md and prints its tables"

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@echo "installing into $(VENV), which takes a minute or more"
	test -x $(BIN)/python || $(BASE_PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install: $(INSTALLED)

check: format-check lint types test-fast

check-full: check test-slow

format-check: $(INSTALLED)
	$(BIN)/ruff format --check $(TYPED) tests

lint: $(INSTALLED)
	$(BIN)/ruff check $(TYPED) tests

types: $(INSTALLED)
	$(BIN)/mypy $(TYPED)

PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
FAST := unit or smoke

test: $(INSTALLED)
	$(PYTEST) $(ARGS)

test-fast: $(INSTALLED)
	$(PYTEST) -m "$(FAST)" $(ARGS)

# With what builds the documentation, for the test of that.
test-slow: $(DOCS_INSTALLED)
	$(PYTEST) -m "not ($(FAST))" $(ARGS)

fmt: $(INSTALLED)
	$(BIN)/ruff check --fix-only --quiet $(TYPED) tests
	$(BIN)/ruff format $(TYPED) tests

$(DOCS_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

# A warning, such as a link that leads nowhere, is an error.
docs: $(DOCS_INSTALLED)
	$(BIN)/python docs/generate_configuration.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

smoke: $(INSTALLED)
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	$(BIN)/python -m samft.demo --output_dir "$$folder/data" && \
	$(BIN)/python -m samft.train --config configs/demo.yaml --data_root "$$folder/data" \
	    --output_dir "$$folder/run" --steps 20 --metrics_interval 10 && \
	cat "$$folder/run/summary.json"

soak: $(INSTALLED)
	SAMFT_SLOW=1 $(BIN)/python -m pytest tests/faults/test_faults.py -k all_killed_at_once
	$(BIN)/python tests/faults/soak.py --minutes 30

bench: $(INSTALLED)
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	$(BIN)/python -m benchmarks.coco_like --output_dir "$$folder" && \
	$(BIN)/python -m benchmarks.index --data_root "$$folder"
	$(BIN)/python -m benchmarks.loader --data_root $(DATA)/hbn_flakes --image_size 1024 256
	$(BIN)/python -m benchmarks.loader --data_root $(DATA)/coco_open104 --split train2017 --image_size 1024 256

# vit_b at 1024 px. Few rounds where a step takes minutes; peak memory is measured in processes of its own.
STEP := $(BIN)/python -m benchmarks.train_step
bench-step: $(INSTALLED)
	$(STEP) --benchmarks step --modes frozen cached --rounds 2 --warm_up 0
	$(STEP) --benchmarks step --modes full --rounds 1 --warm_up 0
	$(STEP) --benchmarks step --modes full --rounds 3 --image_size 256
	$(STEP) --benchmarks decoder encoder --rounds 2
	$(STEP) --benchmarks boxes end-to-end --modes frozen --rounds 2 --image_size 256

bench-scale: $(INSTALLED)
	$(BIN)/python -m benchmarks.scale

gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu --output_dir runs/gpu
