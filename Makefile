# make demo   the main job: MiniLM with quantised attention, compared layer by layer
# make test   the tests
# make test-doors  those of the doors to diffusers and transformers, with many of their models: some five minutes more
# make kernels  compile every kernel (no GPU needed) and check its machine code
# make kernels-same REF=commit  which kernels have other machine code than at that commit
# make lint / make types / make check   style, types, everything CI runs
# make tables regenerate the generated tables and pictures in docs/
# make dist   build the sdist and the wheel, and check both
# make matrix install the wheel beside the oldest and the newest versions of everything, and use it; writes docs/versions.md
# make matrix-ci  the oldest and the newest alone, as CI does; writes nothing

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-doors kernels kernels-all kernels-same lint types check tables dist matrix matrix-ci setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt studies/pyproject.toml
	@echo "Setting up $(VENV) (once; a few minutes) ..."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]" --editable "./studies[training]"
	touch $@

demo: $(STAMP)
	$(BIN)/lowbit demo

DOORS := $(addprefix tests/cpu/integrations/,with_diffusers test_transformers.py test_transformers_smollm2.py)

test: $(STAMP)
	$(BIN)/python -m pytest -n auto $(DOORS:%=--ignore=%)

test-doors: $(STAMP)
	$(BIN)/python -m pytest -n auto $(DOORS)

kernels: $(STAMP)
	$(BIN)/python tools/check_kernels.py

kernels-all: $(STAMP)
	$(BIN)/python tools/check_kernels.py --every

kernels-same: $(STAMP)
	$(BIN)/python tools/kernels_same.py $(or $(REF),main)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy
	$(BIN)/basedpyright --pythonpath $(BIN)/python

check: lint types kernels test test-doors dist

tables: $(STAMP)
	$(BIN)/python tools/make_tables.py

dist: $(STAMP)
	$(BIN)/python tools/dist.py

matrix: $(STAMP)  # (some 30 GB of downloads from PyPI, 9 GB of disk at a time)
	$(BIN)/python tools/matrix.py --pypi

matrix-ci: $(STAMP)  # (the two ends of it at once: some 6 GB of downloads, four minutes on two cores; nothing is written)
	$(BIN)/python tools/matrix.py --rows lowest,newest --jobs 2 --no-table --no-resolve

clean:
	rm -rf $(VENV) build dist out .pytest_cache .mypy_cache .ruff_cache
