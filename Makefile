# make demo       install into .venv if needed, and train on the bundled digits
# make test       also install the test tools, and run the tests in PROCESSES=2 processes
# make test-slow  run the slow tests
# make lint       run ruff and mypy
# make wheel      build dist/*.whl; it contains native/ if there are a C compiler and libjpeg-turbo's headers
# make clean      remove .venv and everything that was built
PYTHON ?= python3
PROCESSES ?= 2
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n $(PROCESSES) --dist worksteal
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-slow lint wheel clean

demo: .venv/installed
	$(BIN)/python train.py

test: .venv/installed-test
	$(PYTEST)

test-slow: .venv/installed-test
	$(PYTEST) -m slow

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: .venv/bin/python
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml setup.py constraints.txt $(wildcard native/*.[ch])
	@echo "installing into .venv (torch and its libraries: about 6 GB, some minutes)"
	$(INSTALL) -e .
	touch $@

.venv/installed-test: .venv/installed
	$(INSTALL) -e '.[test]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info src/*.egg-info src/reconverge/data/_native.*
