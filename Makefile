# make demo | test | test-slow | test-openmmlab | docs: each sets up what it needs first.
PYTHON ?= python3
VENV ?= .venv
DOCS_VENV ?= .venv-docs
STACK ?= onedl
export OMP_NUM_THREADS ?= 1

BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: setup demo test test-slow test-openmmlab lint docs

setup:
	@tools/setup_env.sh $(STACK) $(VENV) $(PYTHON)

demo: setup
	@$(BIN)/python tools/demo.py

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || { echo 'make lint: run $(BIN)/ruff format .'; exit 1; }
	@$(BIN)/mypy

test: lint
	@$(PYTEST) -m 'not slow and not gpu'

# An hour for each: some compile the package twice or train in many processes, and share their cores.
test-slow: setup
	@$(PYTEST) -m 'slow and not gpu' --timeout 3600

# The same tests on upstream MMDetection, in an environment of its own.
test-openmmlab:
	@$(MAKE) --no-print-directory test STACK=openmmlab VENV=.venv-openmmlab

# The site of docs/, in a small environment of its own: it is read from the source, without torch.
docs: $(DOCS_VENV)/.ready
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet
	@echo "The site is in build/site; open build/site/index.html"

$(DOCS_VENV)/.ready: requirements/docs.txt
	@$(PYTHON) -m venv $(DOCS_VENV)
	@$(DOCS_VENV)/bin/pip install -q --disable-pip-version-check -r requirements/docs.txt
	@touch $@
