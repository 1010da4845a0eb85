# `make` checks everything, as CI does. The first call makes .venv and installs what is pinned.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# Two test processes share the cores; torch's own threads would only get in their way.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest

.PHONY: check fix test test-slow studio studio-test docs demo bench clean

check: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(PYTEST) -m "not slow"

fix: $(READY)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

test: $(READY)
	$(PYTEST) -m "not slow"

test-slow: $(READY)
	$(PYTEST) -m slow

studio: $(READY)
	$(BIN)/python -m studio $(STUDIO)

studio-test: $(READY)
	$(PYTEST) -m "not slow" tests/studio

docs: $(READY)
	$(BIN)/python tests/docs.py

demo: $(READY)
	$(BIN)/python train_lora.py --config example_config.json
	$(BIN)/python examples/measure.py output/zkb

bench: $(READY)
	$(BIN)/python benchmarks/bench.py $(BENCH)

$(READY): requirements.txt requirements-dev.txt tools/requirements.txt studio/requirements.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Needs Python 3.11: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $(READY)

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
