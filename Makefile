# Two commands for a new user: `make demo` and `make test`. Both set up .venv first, once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test test-fast test-slow test-gpu docs mutants coverage audit-packages lint style types setup clean

demo: setup
	@"$(BIN)/endprompt" demo

# mypy takes one core while the first tests begin.
test: style
	@$(MAKE) --no-print-directory --jobs 2 test-fast types

test-fast: setup
	@"$(BIN)/python" -m pytest -n 2 --dist loadfile

test-slow: setup
	@"$(BIN)/python" -m pytest -m slow

test-gpu: setup
	@"$(BIN)/python" -m pytest -m gpu

# The pages and the API reference, into site/ (open site/index.html).
docs: setup
	@"$(BIN)/python" .ci/site_pages.py build/site
	@"$(BIN)/zensical" build --strict --clean --config-file build/site/mkdocs.yml
	@rm -rf site && mv build/site/site site

# Faults put into positions, loss, bounds and metrics on purpose: each must make a test fail.
mutants: setup
	@"$(BIN)/python" tests/mutants.py

coverage: setup
	@"$(BIN)/python" -m coverage erase
	@OMP_NUM_THREADS=1 "$(BIN)/python" -m coverage run -m pytest -q
	@"$(BIN)/python" -m coverage combine --quiet
	@"$(BIN)/python" -m coverage report

# Known vulnerabilities of the installed packages; asks the advisory service of PyPI, and fails if it knows none of them.
audit-packages: setup
	@"$(BIN)/python" -m pip install --quiet --disable-pip-version-check pip-audit
	@"$(BIN)/python" .ci/audit_packages.py "$(BIN)/pip-audit"

lint: style types

style: setup
	@"$(BIN)/ruff" check .
	@"$(BIN)/ruff" format --check .

types: setup
	@"$(BIN)/mypy"

setup: $(STAMP)

# The CPU build of torch is installed first and pinned, so no later step pulls a CUDA build over it. Python compiles what
# is used when it is first imported: pip need not compile all.
$(STAMP): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (once, a few minutes)"
	@test -x "$(BIN)/python" || $(PYTHON) -m venv "$(VENV)"
	@"$(BIN)/python" -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt torch
	@"$(BIN)/python" -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable ".[dev,docs,exact]"
	@touch "$(STAMP)"

clean:
	rm -rf "$(VENV)" runs site
