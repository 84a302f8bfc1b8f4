# `make demo` and `make test` do all their own set-up; PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test lint wheel clean
.DELETE_ON_ERROR:

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo 'There is no $(PYTHON) here. Install Python 3.11 or newer, or name yours: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit("Python 3.11 or newer is needed; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12 ..." % v[:2] if v < (3, 11) else 0)'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo '$(PYTHON) lacks its venv module. On Debian or Ubuntu: apt install python3-venv' >&2; exit 1; }
	@echo 'Installing into $(VENV): about a minute, 1.4 GB.'
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install --upgrade 'pip>=24'
	@PYTHONWARNINGS=ignore $(PIP) install --constraint constraints.txt --editable '.[dev,video,minari,ray]'
	@# Python 3.13 and newer only, a no-op before: pyproject.toml says why.
	@$(PIP) install --constraint constraints.txt --no-deps dm_control
	@touch $@

demo: $(INSTALLED)
	$(BIN)/bpt-rl demo

test: $(INSTALLED)
	@# A process a core; the tests of a file stay together, for they share what is slow to make.
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The wheel is built from the sdist in a folder of its own, so nothing stale in build/ can get in.
wheel: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build .

clean:
	rm -rf $(VENV) build dist *.egg-info
