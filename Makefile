# Veil. `make help` lists what there is.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin
# Nothing is looked up, reported or installed behind your back while anything here runs.
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export FLWR_TELEMETRY_ENABLED = 0
export HF_HUB_OFFLINE = 1

.PHONY: help install install-dev demo federation test test-long check bench accuracy clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## set up .venv with exactly requirements.lock

install-dev: $(VENV)/.installed-dev ## … and what tests and checks need

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "Veil needs Python 3.11; say make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@$(BIN)/python -c 'import torch' || (echo 'This torch is not a CPU build. Run: make clean && make install PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu' >&2; exit 1)
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.lock
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-dev.lock
	touch $@

demo: install ## four hospitals tune one model together, at ε = 3 each; writes runs/demo
	rm -rf runs/demo
	$(BIN)/veil simulate --output runs/demo

federation: install ## a coordinator and three agents as processes over TLS; writes runs/federation
	rm -rf runs/federation
	$(BIN)/veil rehearse --output runs/federation

test: install-dev ## everything that decides whether a change is good
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-long: install-dev ## what that samples or leaves out for time: every death at every moment, the runbook, Ray
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -m long -n 2 --dist loadfile

check: install-dev ## formatting, lint, types, arrows
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install-dev ## speed beside other simulators, each in an environment of its own (half an hour on two cores)
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/many_sites.py
	$(BIN)/python benchmarks/gap.py
	$(BIN)/python benchmarks/speed/run.py

accuracy: install-dev ## the accuracy study of benchmarks/RESULTS.md (twenty minutes; DATASETS=folder for more than the demo; METHODS=a,b again)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/accuracy.py $(if $(DATASETS),--datasets $(DATASETS)) $(if $(METHODS),--methods $(METHODS) --again)

clean: ## remove .venv and runs
	rm -rf $(VENV) runs
