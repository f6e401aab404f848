# Only Python >= 3.11 and make are needed: every target sets up its own virtual environment first.
PYTHON ?= python3
VENV ?= $(if $(filter python3,$(notdir $(PYTHON))),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
PYTEST_ARGS ?=

.PHONY: setup demo test test-long bench docs lint clean
.DELETE_ON_ERROR:

$(VENV)/.core: setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"structmat needs Python >= 3.11, but $(PYTHON) is {v[0]}.{v[1]}; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

$(VENV)/.docs: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

$(VENV)/.long: $(VENV)/.test $(VENV)/.docs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,tpu,docs,reference]'
	@touch $@

setup: $(VENV)/.core

demo: $(VENV)/.core  ## train dense and six structures on real text and compare them; under 12 minutes on 2 cores
	$(BIN)/python -m experiments.compare --config=configs/demo.py --workdir=runs/demo

test: $(VENV)/.test  ## the default suite, under 10 minutes on 2 cores
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

test test-long: export JAX_PLATFORMS = cpu
test-long: $(VENV)/.long  ## ahead-of-time TPU compiles, several processes, end-to-end runs, notebooks, the documentation
	$(BIN)/python -m pytest -n 2 -m 'tpu_aot or long' $(PYTEST_ARGS)
	XLA_FLAGS=--xla_backend_optimization_level=3 $(BIN)/python -m pytest -n 1 -m 'multiprocess or notebooks or torture or optimised' $(PYTEST_ARGS)

docs: $(VENV)/.docs  ## the documentation site, into site/
	$(BIN)/python -m mkdocs build --strict

bench: $(VENV)/.core
	$(BIN)/python -m experiments.bench --suite=cpu

lint: $(VENV)/.test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf .venv .venv-* runs .pytest_cache .ruff_cache .jax_cache
