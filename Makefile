# Every target creates the environment that it needs; what must be there is Python 3.11 to 3.14.
#   PYTHON=python3.12 make demo       another interpreter
#   TORCH="torch==2.12.0" make demo   another torch than the locked one; TORCH="torch" takes the newest

PYTHON ?=
TORCH ?=
INTERPRETER = $(or $(PYTHON),python3)
BIN := .venv/bin
BENCHMARKS := $(filter-out benchmarks/figures.py benchmarks/baselines.py benchmarks/models.py benchmarks/shots.py, $(wildcard benchmarks/*.py))
# two tests at a time, those of a file one after another (see tests/conftest.py)
WORKERS := --numprocesses 2 --dist loadgroup
# the suites that would notice a change in a library
CONTRACTS := tests/models tests/evaluation tests/tasks tests/tracking tests/recovery
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test fuzz lint bench lock test-oldest test-newest clean FORCE

# torch as TORCH asks for it, in place of the locked one (in sed, & is what stands there)
WITH_TORCH = sed 's|^torch==.*|$(or $(TORCH),&)|'

# What a search needs, in the versions of constraints.txt. Python compiles what it imports: pip would compile all of it,
# more than half of its work. Another PYTHON or TORCH than before makes the environment anew; none takes what is there.
.venv/ready: pyproject.toml constraints.txt $(if $(PYTHON)$(TORCH),.venv-asked)
	@$(INTERPRETER) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || \
	  { echo "make: $(INTERPRETER) is not Python 3.11 to 3.14; set PYTHON to one that is"; exit 2; }
	@echo "installing into .venv (a minute or two)"
	$(INTERPRETER) -m venv --clear .venv
	$(WITH_TORCH) constraints.txt > .venv/constraints.txt
	$(BIN)/pip install -qq --no-compile --constraint .venv/constraints.txt --editable .
	@touch $@

.venv-asked: FORCE
	@echo '$(PYTHON) $(TORCH)' | cmp -s - $@ || echo '$(PYTHON) $(TORCH)' > $@

# The same environment with DeepSpeed and the tools of tests and linters.
.venv/dev: .venv/ready
	$(BIN)/pip install -qq --no-compile --constraint .venv/constraints.txt --editable ".[dev]"
	@touch $@

demo: .venv/ready
	$(BIN)/moe-evo search experiments/embedded/demo.yaml
	$(BIN)/moe-evo recover runs/demo --to runs/demo/checkpoint --overwrite
	$(BIN)/python experiments/embedded/generate.py runs/demo/checkpoint

test: .venv/dev
	$(BIN)/python -m pytest $(WORKERS)

# Twenty times as many wrong inputs and kills as in `make test`, and other ones each time.
fuzz: .venv/dev
	FUZZ=20 $(BIN)/python -m pytest --timeout 0 tests/fuzz tests/kills

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/bench: .venv/dev
	$(BIN)/pip install -qq --no-compile --constraint .venv/constraints.txt --editable ".[dev,lm_eval]"
	@touch $@

bench: .venv/bench
	@for file in $(BENCHMARKS); do echo "== $$file"; $(BIN)/python $$file || exit 1; done

# --- versions: uv only resolves, pip installs ---

UV_VERSION := 0.13.9
# one set of versions for every platform and every Python from 3.11 on
RESOLVE = .venv-lock/bin/uv pip compile pyproject.toml --quiet --upgrade --universal --python-version 3.11 \
  --fork-strategy fewest --no-annotate --custom-compile-command "make lock"
# only torch asks for these, and each of its releases and builds for others
LEFT_TO_TORCH := sed -E '/^(nvidia-|cuda-|triton==|setuptools==)/d'

.venv-lock/ready: Makefile
	$(INTERPRETER) -m venv .venv-lock
	.venv-lock/bin/pip install -qq uv==$(UV_VERSION) packaging
	@touch $@

# The newest of everything but torch, which [tool.uv] in pyproject.toml holds.
.PHONY: .venv-lock/newest.txt
.venv-lock/newest.txt: .venv-lock/ready
	$(RESOLVE) --all-extras --output-file .venv-lock/resolved.txt
	$(LEFT_TO_TORCH) .venv-lock/resolved.txt > $@

lock: .venv-lock/newest.txt
	cp $< constraints.txt
	.venv-lock/bin/python tests/lock.py

# With the lower bounds of pyproject.toml. Their torch is a CUDA build on Linux, 3 GB; TORCH chooses another one. torch
# 2.12 warns of itself when DeepSpeed compiles.
test-oldest: .venv-lock/ready
	$(RESOLVE) --no-config --extra dev --resolution lowest-direct --output-file .venv-lock/resolved.txt
	$(LEFT_TO_TORCH) .venv-lock/resolved.txt | $(WITH_TORCH) > .venv-lock/oldest.txt
	$(INTERPRETER) -m venv .venv-oldest
	.venv-oldest/bin/pip install -qq --no-compile --constraint .venv-lock/oldest.txt --editable ".[dev]"
	.venv-oldest/bin/python -m pytest -W 'ignore:`torch.jit.script_method` is deprecated:DeprecationWarning' $(WORKERS) $(CONTRACTS)

# With what `make lock` would write now, so with the locked torch, as the newest is 3 GB on Linux: TORCH="torch" takes it.
test-newest: .venv-lock/newest.txt
	@$(WITH_TORCH) $< > .venv-lock/asked.txt; \
	if cmp -s constraints.txt .venv-lock/asked.txt; then echo "constraints.txt holds the newest versions: nothing to test"; \
	else $(MAKE) --no-print-directory test-asked; fi

.PHONY: test-asked
test-asked:
	-diff constraints.txt .venv-lock/asked.txt
	$(INTERPRETER) -m venv .venv-newest
	.venv-newest/bin/pip install -qq --no-compile --constraint .venv-lock/asked.txt --editable ".[dev]"
	.venv-newest/bin/python -m pytest $(WORKERS) $(CONTRACTS)

# runs/ stays: it holds searches
clean:
	rm -rf .venv .venv-* build *.egg-info
