# `make demo` and `make test` set up everything that they need, in .venv, and are safe to run again.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test tiny evaluate clean

demo: .venv/demo
	$(BIN)/python sample.py --task extend

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

# Grow the embedded model from nothing; stop it at any moment and run it again to go on.
tiny: .venv/demo
	$(BIN)/python tiny.py --compile

evaluate: .venv/demo
	$(BIN)/python tiny.py --evaluate

.venv/demo: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/demo
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache outputs runs
