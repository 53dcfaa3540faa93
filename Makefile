# Every target creates .venv itself; all it needs is Python 3.11 or newer.
#   PYTHON=python3.12 make demo    another interpreter
#   TORCH="torch" make demo        another build of torch

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
BENCHMARKS := $(filter-out benchmarks/figures.py benchmarks/baselines.py benchmarks/models.py benchmarks/shots.py, $(wildcard benchmarks/*.py))
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint bench clean

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is older than Python 3.11; set PYTHON to a newer one"; exit 2; }
	@echo "installing into .venv (a minute or two)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -qq "$(TORCH)"
	$(BIN)/pip install -qq --editable ".[dev]"
	@touch $@

demo: .venv/ready
	$(BIN)/moe-evo search experiments/embedded/demo.yaml
	$(BIN)/moe-evo export runs/demo --to runs/demo/checkpoint --overwrite
	$(BIN)/python experiments/embedded/generate.py runs/demo/checkpoint

test: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/ready
	@for file in $(BENCHMARKS); do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean:
	rm -rf .venv runs build *.egg-info
