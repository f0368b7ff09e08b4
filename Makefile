# make quickstart: environment, data, training, evaluation, a page to look at.   make test: environment, the test suite.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

LOWEST := .venv-lowest
WORKERS := $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)  # one more than cores: some tests wait for a server or a clock
TESTS := -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist worksteal

.PHONY: help env data quickstart test test-slow test-slow-pool test-slurm test-gpu test-lowest docs check clean

help:
	@echo "make quickstart   train, evaluate and look at a model of pictures, captions and speech (7 to 10 minutes on 2 cores)"
	@echo "make data         build its corpus, data/glyphs"
	@echo "make test         the test suite;  make test-slow: the longer part of it"
	@echo "make test-gpu     what needs a GPU, which the others leave alone"
	@echo "make test-lowest  the test suite with the lowest versions that pyproject.toml allows, in an environment of its own"
	@echo "make docs         the documentation as a website, build/docs/index.html, with the reference of the Python API"
	@echo "make check        ruff and mypy"
	@echo "make clean        remove the environments (data/ and runs/ stay)"

env: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mmcontrast needs Python 3.11 or later; try make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[all]'
	touch $@

data: env
	$(BIN)/mmcontrast data build data_pipelines/glyphs/glyphs.yaml

quickstart: data
	$(BIN)/mmcontrast train configs/quickstart.yaml --overwrite

test: env
	$(BIN)/python $(TESTS) -m "not slow"

test-slow: test-slow-pool test-slurm  # make -j2 test-slow: both at once, as a queue is mostly waited for

test-slow-pool: env
	$(BIN)/python $(TESTS) --dist load --maxschedchunk 1 -m slow --ignore tests/slurm

test-slurm: env
	$(BIN)/python -m pytest -m slow tests/slurm

test-gpu: env
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 16 tests/gpu

$(LOWEST)/installed: pyproject.toml
	rm -rf $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --upgrade pip uv
	$(LOWEST)/bin/python -m uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --editable '.[all]'
	touch $@

test-lowest: $(LOWEST)/installed
	$(LOWEST)/bin/python $(TESTS) -m "not slow"

docs: env
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "build/docs/index.html"

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(LOWEST)
