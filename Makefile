# make help lists the targets. Everything runs in .venv, which is made on first use.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# Two processes with one thread each are faster than one with two: the tests' models are tiny.
PYTEST_ARGS ?= -n 2 --dist loadfile
export OMP_NUM_THREADS ?= $(if $(findstring -n,$(PYTEST_ARGS)),1,2)

.PHONY: help setup demo test test-all check docs pictures format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## install into .venv, with the pinned versions

# Done once, and again when what is installed changes. DeepSpeed's kernels are built when they are used, not here.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP) ## train, condense, recover, measure and export a small model: five to nine minutes on two cores
	env -u OMP_NUM_THREADS $(BIN)/python train.py experiment=demo

check: $(STAMP) ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## build the site into build/site; every warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet -f docs/site/mkdocs.yml

pictures: $(STAMP) ## draw the pictures of README and docs
	$(BIN)/python docs/pictures/draw.py

test: $(STAMP) ## checks, site and tests: some minutes on two cores
	$(MAKE) --no-print-directory --output-sync -j 2 check docs
	$(BIN)/python -m pytest $(PYTEST_ARGS) --durations=30 -m "not slow"

test-all: $(STAMP) ## every test, the slow ones included
	$(MAKE) --no-print-directory --output-sync -j 2 check docs
	$(BIN)/python -m pytest $(PYTEST_ARGS)

clean: ## remove caches, not outputs
	rm -rf .mypy_cache .pytest_cache .ruff_cache build src/*.egg-info *.egg-info
	find src callbacks tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
