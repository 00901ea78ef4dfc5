# `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help install demo test quick lint type lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/installed  ## make the environment in .venv

$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r requirements.lock
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

lock: install  ## resolve the dependencies of pyproject.toml anew into requirements.lock
	$(VENV)/bin/uv pip compile pyproject.toml --extra dev --universal --python-version 3.10 --no-annotate \
		--custom-compile-command "make lock" --upgrade --quiet --output-file requirements.lock

clean:  ## remove the environment and the demo's results
	rm -rf $(VENV) .demo
