# Each target installs what it needs first: `make demo` or `make test` is all a fresh clone takes.
#   make PYTHON=python3.12 ...   another interpreter for .venv
#   make test ARGS="-k plan"     further arguments for pytest, a benchmark or the demo

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test check format clean

help:
	@echo "make install      .venv with the package and its development tools"
	@echo "make demo         the main job on the built-in model -> reports/demo/"
	@echo "make test         all tests"
	@echo "make check        format, lint, types"
	@echo "make format       format and fix what can be fixed"
	@echo "make bench-NAME   one figure of the README"
	@echo "make clean        remove caches and build outputs (delete .venv by hand to start over)"

install: $(INSTALLED)

# The stamp is written last, so an interrupted install is taken up again.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": name another with make PYTHON=...")'
	@echo "Installing into $(VENV); the first time takes a few minutes."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,postgres]'
	@touch $@

demo: install
	$(BIN)/shiva-search optimize --model fashion-dit --device cpu --max-latency 65% --out reports/demo $(ARGS)

test: install
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-%: install
	$(BIN)/python -m benchmarks.$(subst -,_,$*) $(ARGS)

clean:
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
