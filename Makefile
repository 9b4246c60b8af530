# Two commands for a new user: `make demo` and `make test`. Both set up .venv first, once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test test-slow test-gpu lint setup clean

demo: setup
	@"$(BIN)/endprompt" demo

test: setup lint
	@"$(BIN)/python" -m pytest -n 2 --dist loadfile

test-slow: setup
	@"$(BIN)/python" -m pytest -m slow

test-gpu: setup
	@"$(BIN)/python" -m pytest -m gpu

lint: setup
	@"$(BIN)/ruff" check .
	@"$(BIN)/ruff" format --check .
	@"$(BIN)/mypy"

setup: $(STAMP)

# The CPU build of torch is installed first and pinned, so no later step pulls a CUDA build over it.
$(STAMP): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (once, a few minutes)"
	@test -x "$(BIN)/python" || $(PYTHON) -m venv "$(VENV)"
	@"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,exact]"
	@touch "$(STAMP)"

clean:
	rm -rf "$(VENV)" runs
