# `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
COVERAGE ?=  # options for `make test`, such as --cov=stas
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help install demo test quick chaos fuzz bench lint type lock clean
.PHONY: image image-v100 image-cpu run-preprocess run-train run-infer run-vote run-evaluate run-local

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(VENV)/installed  ## create the environment in .venv

$(VENV)/installed: requirements-dev.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --require-hashes --only-binary :all: --requirement requirements-dev.lock
	$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: install  ## train, vote and score on a generated sample, or on DATA=DIR with Train_Images and Train_Annotations
	scripts/demo .demo/$(if $(DATA),data,sample) $(DATA)

test: install  ## run all tests in random order; cluster tests run even if the others fail
	$(VENV)/bin/pytest -n auto -m "not cluster and not chaos" $(COVERAGE); first=$$?; \
	$(VENV)/bin/pytest -m cluster -rs && exit $$first

quick: install  ## run the tests that take seconds
	$(VENV)/bin/pytest -m "not slow and not cluster and not chaos"

chaos: install  ## kill every stage, or fail its disk or memory, at every call; takes half an hour
	$(VENV)/bin/pytest -n auto -m chaos -rsP

fuzz: install  ## test every reader with 10,000 hostile files each (EXAMPLES=...); takes half an hour
	FUZZ_EXAMPLES=$(or $(EXAMPLES),10000) $(VENV)/bin/pytest -n auto -rP tests/test_hostile.py

bench: install  ## measure speed and memory against targets and rivals; results in .bench, or in OUT=DIR
	$(VENV)/bin/python -m scripts.bench --out $(or $(OUT),.bench)

lint: install  ## check style and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/shellcheck .ci/run docker/run docker/entrypoint.sh docker/stas scripts/demo scripts/submit_* slurm/*
	$(VENV)/bin/hadolint docker/Dockerfile

type: install  ## check types
	$(VENV)/bin/pyright

COMPILE := $(VENV)/bin/uv pip compile pyproject.toml --quiet --generate-hashes --no-annotate --no-python-downloads \
	--custom-compile-command "make lock"

# requirements-dev.lock must use the versions of requirements.lock. The V100 base has one Python on one platform, and
# --no-config ignores the torch that pyproject.toml asks uv for.
lock: install  ## update the lock files from the dependencies in pyproject.toml
	$(COMPILE) --universal --python-version 3.10 --upgrade --output-file requirements.lock
	$(COMPILE) --universal --python-version 3.10 --upgrade --output-file requirements-dev.lock \
		--extra dev --constraints requirements.lock
	$(COMPILE) --no-config --python-version 3.12 --python-platform linux --upgrade --output-file docker/v100.lock \
		--constraints docker/v100.constraints

# Containers, with docker or podman, whichever is installed.
ENGINE ?= $(notdir $(or $(shell command -v docker),$(shell command -v podman),docker))
IMAGE ?= stas
BUILD = $(ENGINE) build --file docker/Dockerfile $(BUILD_FLAGS) \
	--build-arg VERSION=$(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) \
	--build-arg REVISION=$(or $(shell git rev-parse HEAD),unknown) \
	--build-arg SOURCE=$(or $(shell git config --get remote.origin.url),unknown)

image:  ## build the image `stas` for A100, H100 and newer, or from BASE_IMAGE=...
	$(BUILD) --tag $(IMAGE) $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) $(if $(LOCK),--build-arg LOCK=$(LOCK)) .

image-v100:  ## build `stas:v100`, from the base whose PyTorch still supports V100
	$(BUILD) --tag $(IMAGE):v100 --build-arg LOCK=docker/v100.lock \
		--build-arg BASE_IMAGE=$(or $(BASE_IMAGE),nvcr.io/nvidia/pytorch:24.12-py3) .

image-cpu:  ## build `stas:cpu`, which needs no GPU
	$(BUILD) --tag $(IMAGE):cpu --build-arg BASE_IMAGE=$(or $(BASE_IMAGE),docker.io/library/python:3.12-slim-bookworm) \
		$(if $(TORCH_INDEX),--build-arg TORCH_INDEX=$(TORCH_INDEX)) .

# The stages in containers on this machine, with all its GPUs; see docker/run for more settings.
WORKSPACE ?= workspace
ENSEMBLE ?= reference
MEMBER ?= 0
PREDICT ?= Private_Image
STAGE = DATA="$(DATA)" WORKSPACE="$(WORKSPACE)" IMAGE="$(IMAGE)" ENGINE="$(ENGINE)" ENGINE_FLAGS="$(ENGINE_FLAGS)" docker/run
TRAINING = /data/Train_Images
TRUTH = /data/Train_Annotations

run-preprocess:  ## build a store in WORKSPACE=DIR from DATA=DIR with Train_Images and Train_Annotations
	$(STAGE) preprocess --ensemble $(ENSEMBLE) --images $(TRAINING) --annotations $(TRUTH)

run-train:  ## train MEMBER=0, 1, ... of ENSEMBLE=reference
	$(STAGE) train --ensemble $(ENSEMBLE) --member $(MEMBER)

run-infer:  ## outline the images of PREDICT=Private_Image in DATA, and the held-out images, with one member
	$(STAGE) infer --ensemble $(ENSEMBLE) --member $(MEMBER) --images /data/$(PREDICT)
	$(STAGE) infer --ensemble $(ENSEMBLE) --member $(MEMBER) --images $(TRAINING) --held-out --checkpoint last

run-vote:  ## vote on the masks of all members
	$(STAGE) vote --ensemble $(ENSEMBLE)
	$(STAGE) vote --ensemble $(ENSEMBLE) --held-out

run-evaluate:  ## score the members and their vote on the held-out images
	$(STAGE) evaluate --ensemble $(ENSEMBLE) --held-out --truth $(TRUTH) --images $(TRAINING) --out /workspace/evaluation

run-local:  ## run all stages in sequence; run the same command again to resume
	$(MAKE) run-preprocess
	members=$$($(STAGE) members $(ENSEMBLE)) && for member in $$members; do \
		$(MAKE) run-train run-infer MEMBER=$$member || exit; \
	done
	$(MAKE) run-vote
	$(MAKE) run-evaluate

clean:  ## remove the environment and the demo's results
	rm -rf $(VENV) .demo
