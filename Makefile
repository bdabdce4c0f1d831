# `make test` and `make demo` are the two commands of the README; everything else is a convenience.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install test test-slow demo clean

# The stamp is renewed when the requirements change.
install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

test: install
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -m "not slow" -n 2

test-slow: install
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf runs
