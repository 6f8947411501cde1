# `make demo` and `make test` set everything up from nothing, in .venv, and then run.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint wheel families clean

demo: $(STAMP)
	$(BIN)/gptq-ao demo

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Builds a wheel as a zip archive of the repository would (symlinks lost), and imports it in a clean environment.
wheel: $(STAMP)
	bash tests/check_wheel.sh $(BIN)/python

# torch comes first and alone: its CPU build is then already there when the other packages ask for it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

# Tries every model in tests/families and writes docs/supported-models.md. Half an hour on two cores.
families: $(STAMP)
	$(BIN)/python -m tests.families

clean:
	rm -rf $(VENV) build dist *.egg-info
