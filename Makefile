# `make demo` and `make test` do all their own set-up; PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint wheel clean
.DELETE_ON_ERROR:

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed; $(PYTHON) is {v.major}.{v.minor}. Name another: make PYTHON=python3.12 ...")'
	@$(PYTHON) -c 'import venv, ensurepip' || { echo 'Python has no venv module here. On Debian or Ubuntu: apt install python3-venv'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=24'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,video]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/bpt-rl demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(INSTALLED)
	rm -rf dist build
	$(BIN)/python -m build --quiet .

clean:
	rm -rf $(VENV) build dist *.egg-info
