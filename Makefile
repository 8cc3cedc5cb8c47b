# make run   install, then the quickstart sweep        make test   install, then everything CI checks
# make stress   the long tests of reliability (half an hour)        make mutants   mistakes that the tests must find
# make fuzz     the parsers, guided by coverage (FUZZ_SECONDS=600 each)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test stress mutants fuzz lint docs clean

run: $(VENV)/.installed
	$(BIN)/fedsweep run configs/quickstart.yaml

test: $(VENV)/.installed-test lint
	$(BIN)/pytest -n 2 --dist worksteal

stress: $(VENV)/.installed-test
	$(BIN)/python tests/stress/stress.py

mutants: $(VENV)/.installed-test
	$(BIN)/python tests/mutants/kill_mutants.py

fuzz: $(VENV)/.installed-test
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[fuzz]'
	$(BIN)/python tests/fuzz/fuzz.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/make_configuration.py --check

docs: $(VENV)/.installed
	$(BIN)/python docs/make_configuration.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info .fuzz .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
