# `make demo` and `make test` set up everything that they need, in .venv, and are safe to run again.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo play test test-slow tiny evaluate paper gallery clean

demo: .venv/demo
	$(BIN)/python sample.py --task extend
	@echo 'for the other commands of the README: source .venv/bin/activate'

# A page in the browser, on this machine only.
play: .venv/play
	$(BIN)/python -m play --browser

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

# Trainings that are killed, shared out over processes, or start from nothing; experiments; what memory decoding takes.
test-slow: .venv/dev
	$(BIN)/python -m pytest -n auto --dist loadfile -m slow

# Grow the embedded model from nothing; stop it at any moment and run it again to go on.
tiny: .venv/demo
	$(BIN)/python -m toy.grow --compile

evaluate: .venv/demo
	$(BIN)/python -m toy.judge

# Rerun the paper's claims; stop it at any moment and run it again to go on.
paper: .venv/demo
	$(BIN)/python -m paper

# Make the README's pictures anew by the commands that it shows under "The tasks"; three of them with the LoRA off, too.
gallery: .venv/demo
	PATH="$(CURDIR)/$(BIN):$$PATH" sh -ec "$$(sed -n '/^## The tasks/,/^```$$/ \
	  s/^python sample.py --task \([a-z0-9-]*\).*/& --mark --overwrite --out assets\/\1.gif/p' README.md)"
	for task in i2v extend complete; do $(BIN)/python sample.py --from-json assets/$$task.json --no-lora --overwrite \
	  --out assets/$$task-base.gif || exit 1; done
	$(BIN)/python tasks.py --out assets/tau

.venv/demo: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/play: requirements-play.txt .venv/demo
	$(BIN)/python -m pip install --quiet -r requirements-play.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/demo
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache
