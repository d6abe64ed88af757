# make demo    install what the comparison needs and run it at demo size
# make test    install everything and check it: ruff, mypy, pytest
# make speed   repeat a small benchmark and warn of ratios that have grown
# make lint, make format, make clean

PYTHON ?= python3
DEMO ?= --depths 2 --seeds 3 --epochs 8
PYTEST_ARGS ?=
STORED ?= benchmarks/results/2026-11-23-bench-quick-cpu.json

BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: demo test speed lint format clean

demo: .venv/demo.stamp
	$(BIN)/spectralmoe compare --data mnist5k --out runs/demo $(DEMO)

test: lint
	$(BIN)/pytest -n auto --dist loadfile $(PYTEST_ARGS)

speed: .venv/test.stamp
	$(BIN)/spectralmoe bench --check $(STORED)

lint: .venv/test.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/test.stamp
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/pyvenv.cfg:
	$(PYTHON) -m venv .venv

.venv/demo.stamp: pyproject.toml constraints.txt | .venv/pyvenv.cfg
	$(INSTALL) -e ".[data]"
	touch $@

.venv/test.stamp: pyproject.toml constraints.txt | .venv/pyvenv.cfg
	$(INSTALL) -e ".[data,vision,hf,dev]"
	touch $@
