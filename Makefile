# Everything here sets itself up: a machine needs only python3 and make (and a network on the first run).
SHELL := /bin/sh
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
AOT := .venv-aot
TEST_WORKERS ?= 2
PROMPT ?= What is the capital of France?
ARGS ?=

.PHONY: help setup demo test test-slow check check-gpu-compile nano protos notebooks docs format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

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
	echo $$uv > $@

# Apart, so that nothing else ever asks the CUDA plugin for a GPU.
$(AOT)/.installed: $(STAMP)
	@set -e; uv=$$(cat $(STAMP)); \
	$$uv venv --quiet --allow-existing $(AOT); \
	$$uv pip install --quiet --python $(AOT)/bin/python --editable '.[aot,dev]'; \
	touch $@

demo: $(STAMP) ## let the small model in the package answer (PROMPT=...)
	$(BIN)/mimo-jax generate --ask "$(PROMPT)"

# The commands that made the model in the package. Each goes on where it was; what is done is not done again.
TRAIN := $(BIN)/mimo-jax train
NANO := runs/nano
CORPUS := --corpus $(NANO)/corpus
PRETRAIN := --steps 2200 --batch 4 --length 512 --final 1 --warmup 50 --seed 0
FINISH := --start-from $(NANO)/base --steps 160 --batch 1 --length 4096 --final 0.05 --warmup 10 --seed 1
DISTIL := --steps 2000 --batch 4 --anchors 384 --final 0.05 --seed 0
WIDEN := --start-from $(NANO)/distilled --steps 900 --batch 4 --anchors 384 --learning-rate 1e-3 --final 0.05 --seed 1

nano: $(STAMP) ## train the model in the package again, from nothing, into runs/nano (some hours)
	test -e $(NANO)/corpus/corpus.json || $(TRAIN) corpus --out $(NANO)/corpus --documents 24000 --seed 0
	$(TRAIN) backbone $(CORPUS) --out $(NANO)/base $(PRETRAIN)
	$(TRAIN) backbone $(CORPUS) --out $(NANO)/qat --qat $(FINISH)
	$(TRAIN) export $(CORPUS) --run $(NANO)/qat --out $(NANO)/model --overwrite
	$(TRAIN) regenerate --model $(NANO)/model --out $(NANO)/answers.jsonl --prompts 6200 --reworded 0 --batch 256 --seed 11
	$(TRAIN) drafter --model $(NANO)/model --answers $(NANO)/answers.jsonl --out $(NANO)/drafter $(DISTIL)
	$(TRAIN) export --run $(NANO)/drafter --out $(NANO)/distilled --overwrite
	$(TRAIN) regenerate --model $(NANO)/model --out $(NANO)/reworded.jsonl --prompts 4000 --batch 256 --seed 12
	$(TRAIN) drafter --model $(NANO)/model --answers $(NANO)/reworded.jsonl --out $(NANO)/wide $(WIDEN)
	$(TRAIN) export --run $(NANO)/wide --out $(NANO)/model/dflash --overwrite

test: $(STAMP) ## the suite a person waits for (ARGS=... go to pytest)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile -m "not slow and not gpu_compile" $(ARGS)

test-slow: $(STAMP) ## what takes longer: soaks, notebooks, device matrices
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile -m slow $(ARGS)

check-gpu-compile: $(AOT)/.installed ## compile the real size for H200s, on a machine that has none
	$(AOT)/bin/python -m pytest -m gpu_compile $(ARGS)

check: $(STAMP) ## ruff (lint and format) and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The stubs stand beside their .proto, as the release of grpcio-tools in the development set writes them.
PROTOS := serve/protos/mimo/serve/v1/generation.proto
PROTOS_OUT ?= .

protos: $(STAMP) ## write the gRPC stubs again from their .proto
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=$(PROTOS_OUT) --pyi_out=$(PROTOS_OUT) --grpc_python_out=$(PROTOS_OUT) $(PROTOS)

notebooks: $(STAMP) ## write the .ipynb again from their scripts
	$(BIN)/jupytext --quiet --update --to ipynb notebooks/*.py

docs: $(STAMP) ## write the list of files and the README's picture again
	$(BIN)/python docs/tree.py
	$(BIN)/python docs/pictures/rounds.py

format: $(STAMP) ## let ruff format and fix what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove everything make produced, the virtual environment included
	rm -rf $(VENV) $(AOT) .uv build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
