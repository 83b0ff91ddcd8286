# `make pretrain` trains the tiny model, `make test` runs every check. Both set up .venv first.
#   make pretrain ARGS="--steps 50"      make test ARGS="tests/unit -x"      make PYTHON=/path/to/python3.12 test
# Tests run in one process per core, at most eight; ARGS="-n 0" runs them in one process, for a debugger.
# `make soak` runs the long versions of the fault tests, for a night, and prints its counts.
#   make soak ARGS="-k kills"
# `make gpu` measures everything that needs a GPU, in an hour or less: docs/gpu.md.
#   make gpu ARGS="--limit 9m"

SHELL := /bin/bash
BIN := .venv/bin
SUITS := import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
# run each one: a name on PATH may be a stub that fails, or lack venv
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
	$$name -c '$(SUITS)' 2>/dev/null && { echo $$name; break; }; done)
ARGS ?=
SIDE_BY_SIDE := -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: pretrain test soak gpu lint clean

# Scripts of a virtual environment do not start under a path with spaces, so python starts them. Operators that
# DeepSpeed compiles stay in .venv: in the default folder, two environments would rebuild each other's forever.
pretrain: .venv/installed
	PATH="$$PWD/$(BIN):$$PATH" TORCH_EXTENSIONS_DIR="$$PWD/.venv/torch_extensions" \
	python $(BIN)/deepspeed --quiet megamask/pretrain.py --deepspeed zero2 --time-budget 4m $(ARGS)

test: .venv/installed lint
	PATH="$$PWD/$(BIN):$$PATH" python -m pytest $(SIDE_BY_SIDE) $(ARGS)

soak: .venv/installed
	MEGAMASK_SOAK=1 PATH="$$PWD/$(BIN):$$PATH" python -m pytest -s -o faulthandler_timeout=7200 tests/soak $(ARGS)

gpu: .venv/installed
	PATH="$$PWD/$(BIN):$$PATH" TORCH_EXTENSIONS_DIR="$$PWD/.venv/torch_extensions" \
	python -m megamask bench-gpu $(ARGS)

lint: .venv/installed
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy
	$(BIN)/python $(BIN)/lint-imports --no-logo

clean:
	rm -rf .venv build .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache megamask.egg-info

# An interrupted installation leaves .venv/installing and starts again: pip accepts a half-written package as complete.
.venv/installed: pyproject.toml constraints.txt
	@'$(or $(strip $(PYTHON)),false)' -c '$(SUITS)' || { \
		echo 'No Python 3.11, 3.12 or 3.13 with the module venv was found$(if $(strip $(PYTHON)), under $(PYTHON)).' \
		'Install one (Debian, Ubuntu: python3 and python3-venv) or name it: make PYTHON=/path/to/python3.12' >&2; exit 1; }
	@echo 'Installing torch, DeepSpeed and megamask into .venv, a few minutes and gigabytes the first time ...'
	@if [ -e .venv/installing ]; then clear=--clear; fi; '$(PYTHON)' -m venv $${clear:-} .venv
	@touch .venv/installing
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[test]'
	@mv .venv/installing $@
