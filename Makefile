# Everything a person or CI does here. `make help` lists it.
SHELL := /bin/sh
PYTHON ?= python3
VENV ?= .venv
# Another build of torch, for instance a CUDA one from its own index:
#   make setup TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130'
TORCH ?= torch==2.13.0
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
RUN = $(VENV)/bin/teams-hpc

.DEFAULT_GOAL := help
.PHONY: help setup quickstart pocket-model test test-slurm test-chaos test-containers lint types check \
  image sif bundle benchmark clean

help: ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

# The marker files say what a virtual environment has; they are newer than what they were made from.
$(VENV)/.has-compute: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (the first time a few minutes) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -c constraints.txt -e '.[compute]'
	@touch $@

$(VENV)/.has-dev: $(VENV)/.has-compute
	@echo "Adding what the tests need ..."
	$(PIP) -c constraints.txt -e '.[compute,eval,dev]'
	@touch $@

setup: $(VENV)/.has-compute ## make .venv with all a run needs

quickstart: $(VENV)/.has-compute ## the whole pipeline, small, with real parts
	$(RUN) run configs/quickstart.yaml

pocket-model: $(VENV)/.has-compute ## make the small Llama that the package ships again (an hour; resumes)
	$(VENV)/bin/python -m pocket.make

test: $(VENV)/.has-dev ## pass the tests
	$(VENV)/bin/python -m pytest -q tests

test-slurm: $(VENV)/.has-dev ## all tests on a real Slurm, the long ones too (Debian packages: README)
	TEAMS_HPC_REQUIRE_SLURM=1 TEAMS_HPC_SLURM_ALL=1 \
	  $(VENV)/bin/python -m pytest -q $(PYTEST_OPTIONS) tests/slurm

test-chaos: $(VENV)/.has-dev ## the soak: many kills in a row, under MPI and without
	TEAMS_HPC_REQUIRE_MPI=1 TEAMS_HPC_CHAOS=1 $(VENV)/bin/python -m pytest -q -m chaos tests

test-containers: $(VENV)/.has-dev ## build both recipes and run in them (Debian packages: README)
	TEAMS_HPC_CONTAINERS=1 \
	  $(VENV)/bin/python -m pytest -q $(PYTEST_OPTIONS) tests/containers

lint: $(VENV)/.has-dev ## style and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.has-dev ## static types
	$(VENV)/bin/mypy

check: lint types test ## all that CI checks

# What an image says of itself. Its arguments: IMAGE_ARGS='--build-arg WITH_FLASH_ATTN=0 ...'
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' teams_hpc/__init__.py)
REVISION = $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
LABELS = --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION)
DOCKER ?= docker
APPTAINER ?= apptainer
SIF ?= teams-hpc-$(VERSION).sif

image: ## the Docker image (DOCKER='buildah' or podman work too)
	$(DOCKER) build $(BUILD_OPTIONS) $(LABELS) $(IMAGE_ARGS) --tag teams-hpc:$(VERSION) .

sif: ## the Apptainer image, from a base directly; docs/operations.md: from the Docker image
	$(APPTAINER) build $(BUILD_OPTIONS) $(LABELS) $(IMAGE_ARGS) $(SIF) apptainer.def

# A cluster without internet: make bundle CONFIG=FILE OUT=FOLDER [IMAGE=SIF] [SETTINGS='KEY=VALUE ...'].
# The login node always needs the package itself; without an image the compute nodes need all of it.
WHEELS = dist/wheels
WHEEL = $(VENV)/bin/python -m pip wheel --quiet --find-links $(WHEELS) --wheel-dir $(WHEELS)
bundle: $(VENV)/.has-compute ## what a cluster without internet needs for a run: CONFIG=, OUT=, IMAGE=
	@test -n "$(CONFIG)" && test -n "$(OUT)" || { echo "make bundle CONFIG=FILE OUT=FOLDER"; exit 2; }
	rm -rf build $(WHEELS)
	mkdir -p $(WHEELS)
	$(if $(IMAGE),,$(WHEEL) $(TORCH))
	$(WHEEL) -c constraints.txt '.$(if $(IMAGE),,[compute,eval,mpi])'
	cp constraints.txt $(WHEELS)
	$(RUN) bundle $(CONFIG) $(SETTINGS) --output $(OUT) --wheels $(WHEELS) $(if $(IMAGE),--image $(IMAGE))

benchmark: $(VENV)/.has-compute ## measure the policy environment on this machine
	$(VENV)/bin/python benchmarks/policy_environment.py

clean: ## remove the virtual environment and caches, never runs/
	rm -rf $(VENV) build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
