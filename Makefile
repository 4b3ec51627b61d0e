# make demo | test | test-slow | test-openmmlab: each sets up what it needs first.
PYTHON ?= python3
VENV ?= .venv
STACK ?= onedl
export OMP_NUM_THREADS ?= 1

BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: setup demo test test-slow test-openmmlab lint

setup:
	@tools/setup_env.sh $(STACK) $(VENV) $(PYTHON)

demo: setup
	@$(BIN)/python tools/demo.py

lint: setup
	@$(BIN)/ruff check .

test: lint
	@$(PYTEST) -m 'not slow and not gpu'

test-slow: setup
	@$(PYTEST) -m 'slow and not gpu'

# The same tests on upstream MMDetection, in an environment of its own.
test-openmmlab:
	@$(MAKE) --no-print-directory test STACK=openmmlab VENV=.venv-openmmlab
