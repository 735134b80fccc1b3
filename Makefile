# `make run` and `make test` need Python >= 3.11 and make, nothing else: uv is taken from PATH, or fetched into .venv.

VENV := .venv
BIN := $(VENV)/bin
OWN_UV := $(VENV)/uv/bin/uv
UV := $(shell uv --version >/dev/null 2>&1 && echo uv || echo $(OWN_UV))
export UV_PROJECT_ENVIRONMENT := $(VENV)

.DEFAULT_GOAL := help
.PHONY: help run install test chaos model check lint format bench bench-full clean

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(VENV)/.run ## Valkey, the API and a worker; options: make run ARGS="--port 9000"
	@exec $(BIN)/endmark dev $(ARGS)

install: $(VENV)/.run ## what `make run` needs, and optional parts: make install EXTRA=nanobot (pydantic-ai, langgraph, otel)
	$(UV) sync --frozen --no-dev --inexact $(addprefix --extra ,$(EXTRA))

test: $(VENV)/.dev ## every test, two at a time; options: make test ARGS="-k supervisor"
	$(BIN)/pytest -n 2 $(ARGS)

chaos: export CHAOS_SECONDS := $(or $(CHAOS_SECONDS),300)
chaos: $(VENV)/.dev ## kill and cut processes for CHAOS_SECONDS (300), with CHAOS_SEED or a new one
	$(BIN)/pytest tests/chaos/test_chaos.py -s $(ARGS)

model: export MODEL_SIZE := large
model: $(VENV)/.dev ## every order of steps of a small deployment, at larger sizes than the tests
	$(BIN)/pytest tests/model -s $(ARGS)

check: lint ## everything but the tests: style, types, import rules
	$(BIN)/mypy
	$(BIN)/lint-imports

lint: $(VENV)/.dev ## style only
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/.dev ## repair what ruff can repair
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.dev ## the goals of docs/performance.md, each beside what this machine does, in five minutes
	$(BIN)/python -m benchmarks.short $(ARGS)

bench-full: $(VENV)/.bench ## every benchmark, in a bit more than an hour, and docs/performance.md with its plots
	$(BIN)/python -m benchmarks.full $(ARGS)

clean: ## remove the environment and every cache; data in .endmark stays
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis dist
	find api worker shared cli tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Two stamps, because running needs a quarter of the packages that testing needs. `--inexact` keeps them from undoing
# each other: what `make test` installed stays, and counts for `make run`.
$(VENV)/.run: pyproject.toml uv.lock | $(filter $(OWN_UV),$(UV))
	$(UV) sync --frozen --no-dev --inexact
	@touch $@

$(VENV)/.dev: pyproject.toml uv.lock | $(filter $(OWN_UV),$(UV))
	$(UV) sync --frozen
	@touch $(VENV)/.run $@

$(VENV)/.bench: $(VENV)/.dev
	$(UV) sync --frozen --inexact --group bench
	@touch $@

# Without uv: a venv of the first suitable Python, and uv in a folder inside it that `uv sync` leaves alone.
$(OWN_UV):
	@for python in python3.13 python3.12 python3.11 python3; do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "Endmark needs Python 3.11 or later; found none as python3.13, python3.12, python3.11 or python3." >&2; exit 1; \
	fi; \
	set -x; $$found -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(VENV)/uv uv
