# What a developer runs; CONTRIBUTING.md has the rest.

PYTHON ?= .venv/bin/python
ARGS ?=

.PHONY: help test slow-test cluster-test lint

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16
	@echo "PYTHON=$(PYTHON), ARGS='-k name' for pytest; CXR_REAL_DATA=DIR for real X-rays"

test:  ## everything but what is slow, as CI does
	$(PYTHON) -m pytest $(ARGS)

slow-test:  ## the slow part
	$(PYTHON) -m pytest -m slow $(ARGS)

cluster-test:  ## clusters of several hosts on this machine: as root, with iproute2, util-linux, PostgreSQL; half an hour
	CXR_CLUSTER_REQUIRED=1 $(PYTHON) -m pytest -m "" tests/cluster $(ARGS)

lint:  ## ruff and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
