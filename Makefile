# Every target sets itself up in $(VENV) and works alone in a clean checkout.

VENV ?= .venv
EXTRAS ?= test
PYTEST_ARGS ?=
KILLS ?= 1000
MUTATIONS ?= 10000
# One thread in each process of the tests is faster than all cores in one; a process takes 2 GB.
PROCESSES ?= -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Empty unless an interpreter of a supported version can make virtual environments.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	2>/dev/null && { echo $$python; break; }; done)

demo_stamp := $(VENV)/.installed
test_stamp := $(VENV)/.installed-$(EXTRAS)
requirements := pyproject.toml constraints.txt $(wildcard setup.py kernels/autoquant_kernels/cpp/*)

.PHONY: demo test lint format docs robustness clean

demo: $(demo_stamp)
	$(VENV)/bin/autoquant search --budget-bpe 5.0

test: $(test_stamp)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV)/bin/python -m pytest $(PROCESSES) $(PYTEST_ARGS)

lint: $(test_stamp)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(test_stamp)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# A link to nothing, and a name of the API that is not there, end the build.
docs: $(VENV)/.installed-docs
	$(VENV)/bin/python -m mkdocs build --strict

# Hours; what it has done it does not do again. KILLS and MUTATIONS say how much.
robustness: $(test_stamp)
	$(VENV)/bin/python tests/robustness/long_run.py build/robustness \
		--kills $(KILLS) --mutations $(MUTATIONS)

clean:
	rm -rf $(VENV) build dist site *.egg-info

$(VENV)/bin/python:
	$(or $(PYTHON),$(error AutoQuant needs Python 3.11, 3.12 or 3.13 with venv: install one, or set PYTHON)) -m venv $(VENV)

$(demo_stamp): $(VENV)/bin/python $(requirements)
	@echo "Installing AutoQuant into $(VENV): minutes the first time, then seconds"
	$(VENV)/bin/python -m pip install -qq --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-%: $(VENV)/bin/python $(requirements)
	@echo "Installing AutoQuant [$*] into $(VENV): minutes the first time, then seconds"
	$(VENV)/bin/python -m pip install -qq --constraint constraints.txt --editable '.[$*]'
	touch $@ $(demo_stamp)
