# The verbs of this repository. A newcomer needs two: `make run` and `make test`.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PORT ?= 50051
PROMPT ?= What is the capital of France?
BIN := .venv/bin
RUN_READY := .venv/.ready-run
DEV_READY := .venv/.ready-dev
LOCKED_MODELS := models.lock
LOCK_FLAGS := -q --no-header --no-annotate --strip-extras --no-emit-options --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --allow-unsafe

.DEFAULT_GOAL := help
.PHONY: help run test test-slow check fix proto bench-quick lock clean

help: ## Say what there is
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(RUN_READY) ## Install, serve SmolLM2-135M-Instruct and stream a first answer (ONESHOT=1 stops after it)
	@$(BIN)/pathfox demo --port $(PORT) --prompt "$(PROMPT)" $(if $(ONESHOT),--oneshot)

test: check ## Everything that must be green: check, then all tests but the slow ones
	@$(BIN)/python -m pytest -m "not slow"

test-slow: $(DEV_READY) ## Long soaks and fault campaigns, before an issue is closed
	@$(BIN)/python -m pytest -m slow --timeout 3600

check: $(DEV_READY) ## Format, lint, types, import rules, protos and their stubs
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/buf lint protos
	@$(BIN)/python ops/proto.py --check

fix: $(DEV_READY) ## Mend what can be mended without thinking
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/buf format --write protos

proto: $(DEV_READY) ## Generate the stubs that are committed beside the protos
	@$(BIN)/python ops/proto.py

bench-quick: $(RUN_READY) ## What a step costs next to plain loops: a slow commit shows on any machine
	@$(BIN)/python ops/bench/quick.py

lock: $(DEV_READY) ## Resolve the pinned dependencies anew into the lock files
	@$(BIN)/pip-compile $(LOCK_FLAGS) -o requirements.lock pyproject.toml
	@$(BIN)/pip-compile $(LOCK_FLAGS) --extra dev -o requirements-dev.lock pyproject.toml

clean: ## Remove what was installed and built here
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis dist

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Pathfox needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	@$(PYTHON) -m venv .venv

$(RUN_READY): .venv/bin/python requirements.lock $(LOCKED_MODELS) pyproject.toml
	@$(BIN)/python ops/install.py requirements.lock
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r $(LOCKED_MODELS)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@c++ --version >/dev/null 2>&1 || g++ --version >/dev/null 2>&1 || clang++ --version >/dev/null 2>&1 \
		|| { echo "no C++ compiler here: installing one (ziglang, 100 MB; compiling takes a minute once)"; \
		$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r compiler.lock; }
	-@$(BIN)/python -m kernels.cpu.build
	@touch $@

$(DEV_READY): $(RUN_READY) requirements-dev.lock
	@$(BIN)/python ops/install.py requirements-dev.lock
	@touch $@
