# lungct: two commands matter, `make run` and `make test`. Bare `make` lists everything.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export OPENBLAS_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup run test lint check export notebooks docs bench lab clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP) ## create .venv and install everything (once)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
	  || { echo "lungct needs Python 3.11, 3.12 or 3.13: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

run: $(STAMP) ## the whole course on generated phantoms, up to runs/phantom/report/index.html
	$(BIN)/lungct run

test: $(STAMP) ## all tests; LUNGCT_REAL_DATA=/folder adds those on real series
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP) ## ruff over code and tests
	$(BIN)/ruff check lungct tests .ci bench docs

check: $(STAMP) ## exports in sync, notebooks in good order
	$(BIN)/python .ci/export.py --check
	$(BIN)/python .ci/check_notebooks.py

export: $(STAMP) ## write lungct/ from the notebooks
	$(BIN)/python .ci/export.py

notebooks: $(STAMP) ## execute all notebooks on the default phantoms and keep their outputs
	$(BIN)/python .ci/refresh_notebooks.py

docs: $(STAMP) ## the book, into docs/_build/html
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python docs/stage.py
	$(BIN)/python -m sphinx -q -b html docs/_staging docs/_build/html

bench: $(STAMP) ## speed against peers, into bench/results.md; ONLY=store for one part (peers: see bench/README.md)
	$(BIN)/python bench/bench.py $(if $(ONLY),--only $(ONLY))

lab: $(STAMP) ## open the course in JupyterLab
	$(BIN)/jupyter lab nbs

clean: ## remove builds and the runs on generated phantoms; real runs and .venv stay
	rm -rf runs/phantom runs/notebooks docs/_build docs/_staging build
