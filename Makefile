# make run    a federated run through Flower, from nothing but Python >= 3.11
# make test   the tests
#
# PYTHON=...  another interpreter to make the virtual environment with
# ARGS=...    further arguments for pytest, e.g. make test ARGS="-m 'slow or not slow'" for all tests

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test develop

run: $(VENV)/.installed
	$(BIN)/fedsim flower experiments/digits.toml

test: $(VENV)/.developed
	$(BIN)/python -m pytest $(ARGS)

develop: $(VENV)/.developed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("fedsim needs Python 3.11 or newer and this is %d.%d; say for instance: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)

# The stamps are made anew when pyproject.toml changes; otherwise a second call installs nothing.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.developed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]'
	@touch $(VENV)/.installed $@
