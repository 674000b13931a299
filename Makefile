# The commands of manifold_sde. `make help` lists them.
#
# An active virtual environment is used; without one, .venv is made. A torch that is already there
# is kept. Only Python 3.11 or newer and make are needed: tools/environment.py does the rest.

PYTHON ?= python3
JOBS ?= auto
ENVIRONMENT := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),$(CURDIR)/.venv)
BIN := "$(ENVIRONMENT)/bin"

# Several processes of one thread each are faster here than one of several threads.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help run test verify-thorough lint format docs pages bench clean environment bench-environment

help: ## this table
	@printf 'make TARGET, where TARGET is\n\n'
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-15s %s\n", $$1, $$2}' Makefile
	@printf '\nPYTHON=/path/to/python names the Python that makes .venv; '
	@printf 'JOBS=n sets the\nnumber of test processes.\n'

run: environment ## Figure 2 of the paper, in its quick form, into results/
	@$(BIN)/manifold-sde figure 2
	@printf '\nThis was the quick form. The full one: %s figure 2 --full\n' \
		"$(if $(VIRTUAL_ENV),,.venv/bin/)manifold-sde"

test: lint ## lint, types, and all tests (README, docstrings, examples too)
	@$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

verify-thorough: environment ## the checks of the theorems that take minutes
	@$(ONE_THREAD) $(BIN)/python -m pytest -m thorough -n $(JOBS)

lint: environment ## ruff (rules and format) and mypy, changing nothing
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: environment ## format the code and mend what ruff can mend
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: environment ## the site, into docs/_build/html; warnings are errors
	@$(ONE_THREAD) $(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html
	@$(ONE_THREAD) $(BIN)/python -m sphinx -W --keep-going -b doctest docs docs/_build/doctest
	@echo 'The site: docs/_build/html/index.html'

pages: environment ## write tables, outputs and pictures into README and docs
	@$(ONE_THREAD) $(BIN)/python -m tools.documents

bench: bench-environment ## the benchmarks, side by side with their peers
	@$(ONE_THREAD) $(BIN)/python -m benchmarks

clean: ## remove caches and built files (keeps .venv and results/)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@rm -rf docs/_build docs/gallery docs/generated docs/sg_execution_times.rst
	@find . -path ./.venv -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

environment:
	@$(call need_python) tools/environment.py all,geomstats

bench-environment:
	@$(call need_python) tools/environment.py all,geomstats,bench

define need_python
command -v $(PYTHON) >/dev/null 2>&1 || { \
	echo 'manifold_sde needs Python 3.11 or newer, and there is no "$(PYTHON)" here.' >&2; \
	echo '  hint:     install Python, or name it: make run PYTHON=/path/to/python3.12' >&2; \
	exit 1; }; $(PYTHON)
endef
