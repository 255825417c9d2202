# Everything here sets itself up: a machine needs only python3 and make (and a network on the first run).
SHELL := /bin/sh
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := build/demo/tiny
TEST_WORKERS ?= 2
PROMPT ?= The capital of France is
ARGS ?=

.PHONY: help setup demo test test-slow check format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## install Python 3.12, the project and its development set into .venv

# uv comes from PATH, from python3, or (with pip) into .uv; it finds or downloads the Python that .python-version names.
# The set is installed once and again when pyproject.toml or .python-version change.
$(STAMP): pyproject.toml .python-version
	@set -e; \
	if uv --version >/dev/null 2>&1; then uv=uv; \
	elif python3 -m uv --version >/dev/null 2>&1; then uv="python3 -m uv"; \
	else \
		uv=.uv/bin/uv; \
		if ! $$uv --version >/dev/null 2>&1; then \
			echo "uv is not installed: fetching it into .uv"; \
			if python3 -m pip --version >/dev/null 2>&1; then \
				python3 -m pip install --quiet --upgrade --target .uv --only-binary=:all: --ignore-requires-python uv || true; \
			elif python3 -c "import ensurepip, venv" >/dev/null 2>&1; then \
				python3 -m venv .uv && .uv/bin/python -m pip install --quiet uv || true; \
			fi; \
			if ! $$uv --version >/dev/null 2>&1; then \
				echo "Could not fetch uv: python3 needs a pip of 2020 or later, or the venv module, and a network." >&2; \
				echo "Install uv by hand and run make again." >&2; \
				exit 1; \
			fi; \
		fi; \
	fi; \
	$$uv venv --quiet --allow-existing $(VENV); \
	$$uv pip install --quiet --python $(BIN)/python --editable '.[dev]'; \
	touch $@

$(DEMO)/config.json: | $(STAMP)
	$(BIN)/mimo-jax synthesize --preset tiny --out $(DEMO)

demo: $(STAMP) $(DEMO)/config.json ## generate text with a tiny random checkpoint in the release's layout (PROMPT=...)
	$(BIN)/mimo-jax generate --model $(DEMO) --prompt "$(PROMPT)" --max-new-tokens 64

test: $(STAMP) ## the suite a person waits for (ARGS=... go to pytest)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile -m "not slow" $(ARGS)

test-slow: $(STAMP) ## what takes longer: soaks, notebooks, GPU compilation, device matrices
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile -m slow $(ARGS)

check: $(STAMP) ## ruff (lint and format) and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP) ## let ruff format and fix what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove everything make produced, the virtual environment included
	rm -rf $(VENV) .uv build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
