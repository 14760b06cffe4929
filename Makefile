# Two commands for a newcomer: `make serve` and `make test`. All targets start from a clean clone and may be repeated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
TORCH := torch==2.13.0

.PHONY: setup dev serve test test-all test-cuda chaos recovery soak overload fuzz check format bench clean

setup: $(VENV)/.engine

dev: $(VENV)/.dev

$(BIN)/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Bascule needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.engine: pyproject.toml | $(BIN)/python
	@echo "installing the engine (a few minutes the first time)"
	$(PIP) $(TORCH)
	$(PIP) --editable '.[engine]'
	@$(BIN)/python -m bascule.engine.native.build
	@touch $@

$(VENV)/.dev: $(VENV)/.engine
	@echo "installing what tests and checks need"
	$(PIP) --editable '.[engine,dev]'
	@touch $@

serve: setup
	$(BIN)/bascule serve smollm2 --host 127.0.0.1 --port 8000

# Two processes: each begins with a line of tests that start servers, and takes all other tests in turn (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -q -n 2

test: dev
	$(PYTEST) -m "not full"

test-all: dev
	$(PYTEST)

CUDA := cuda:0

test-cuda: dev
	BASCULE_TEST_DEVICE=$(CUDA) $(BIN)/python -m pytest -q tests/unit/test_cuda_*.py

CHAOS := --seed 1

chaos: dev
	PYTHONPATH=tests $(BIN)/python -m chaos $(CHAOS)

RECOVERY := --rounds 5

recovery: dev
	PYTHONPATH=tests $(BIN)/python -m chaos.recovery $(RECOVERY)

SOAK := --seed 2 --minutes 30 --gap 2

soak: dev
	PYTHONPATH=tests $(BIN)/python -m chaos --soak $(SOAK)

OVERLOAD := --systems adaptive/slo,disaggregated/slo --rates 11,13 --search 25

overload: dev
	$(BIN)/python benchmarks/overload.py $(OVERLOAD)

FUZZ_INPUTS := 100000

fuzz: dev
	BASCULE_FUZZ_INPUTS=$(FUZZ_INPUTS) $(BIN)/python -m pytest -q tests/fuzz

check: dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	@awk 'FNR == 401 { print FILENAME " is over 400 lines"; bad = 1 } END { exit bad }' $$(git ls-files '*.py')

format: dev
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

bench: dev
	$(BIN)/python benchmarks/layouts.py

clean:
	rm -rf $(VENV) .venv-vllm build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
