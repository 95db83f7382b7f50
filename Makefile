# make demo: set up and train the demo policy end to end. make test: set up and prove that it works.

PYTHON ?= python3
EXTRA ?= cpu
VENV ?= .venv
BIN = $(VENV)/bin
RUN ?= runs/demo

.PHONY: setup demo test test-slow lint clean

setup:
	@$(PYTHON) scripts/setup.py --extra $(EXTRA) --environment $(VENV)

demo: setup
	@$(BIN)/python scripts/demo.py --folder $(RUN)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

test: lint
	@$(BIN)/python -m pytest -m "not slow"

test-slow: setup
	@$(BIN)/python -m pytest -m slow --timeout 2400

clean:
	rm -rf runs build .mypy_cache .ruff_cache .pytest_cache .hypothesis
