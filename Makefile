# `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help install demo test quick lint type lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/installed  ## make the environment in .venv

$(VENV)/installed: requirements-dev.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r requirements-dev.lock
	$(VENV)/bin/pip install --quiet --no-deps --editable .
	touch $@

demo: install  ## train, vote and score on a made sample, or on DATA=DIR with Train_Images and Train_Annotations
	scripts/demo .demo/$(if $(DATA),data,sample) $(DATA)

test: install  ## run all tests
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n auto -m "not cluster"
	$(VENV)/bin/pytest -m cluster -rs

quick: install  ## run the tests that take seconds
	$(VENV)/bin/pytest -m "not slow and not cluster"

lint: install  ## check style and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

type: install  ## check types
	$(VENV)/bin/pyright

COMPILE := $(VENV)/bin/uv pip compile pyproject.toml --quiet --no-annotate --no-python-downloads \
	--custom-compile-command "make lock"

# requirements-dev.lock last, with the versions of requirements.lock. The V100 base is one Python on one platform, and
# --no-config keeps pyproject.toml's own torch out.
lock: install  ## resolve the dependencies of pyproject.toml anew into the lock files
	$(COMPILE) --universal --python-version 3.10 --upgrade --output-file requirements.lock
	$(COMPILE) --universal --python-version 3.10 --upgrade --output-file requirements-dev.lock \
		--extra dev --constraints requirements.lock
	$(COMPILE) --no-config --python-version 3.12 --python-platform linux --upgrade --output-file docker/v100.lock \
		--constraints docker/v100.constraints

clean:  ## remove the environment and the demo's results
	rm -rf $(VENV) .demo
