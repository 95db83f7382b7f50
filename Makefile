# make demo: set up and train the demo policy end to end. make test: set up and prove that it works.
# make test-all: every test, going on where it was stopped (FROM=chaos-2 goes on there). See docs/testing.md.

PYTHON ?= python3
EXTRA ?= cpu
VENV ?= .venv
BIN = $(VENV)/bin
RUN ?= runs/demo

.PHONY: setup demo test test-slow test-all lint clean

setup:
	@$(PYTHON) scripts/setup.py --extra $(EXTRA) --environment $(VENV)

demo: setup
	@$(BIN)/python scripts/demo.py --folder $(RUN)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

test: setup
	@$(BIN)/python scripts/run_tests.py quick

test-slow: setup
	@$(BIN)/python scripts/run_tests.py slow

test-all: setup
	@$(BIN)/python scripts/run_tests.py all $(if $(FROM),--from $(FROM))

clean:
	rm -rf runs build .mypy_cache .ruff_cache .pytest_cache .hypothesis
