# make demo | make demo-llm | make deploy-demo | make test | make docs | make check | make clean   (git, make, Python 3.11 or newer)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo demo-llm deploy-demo test test-slow docs lint check clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    eight clients, three methods, three minutes: a table, a report, models to talk to"
	@echo "make demo-llm    a real language model at three institutes that answer patients; fetches 98 MB and MedQuAD; ten minutes"
	@echo "make deploy-demo    a server and three sites on Flower, on this machine; one is killed and comes back"
	@echo "make test    the test suite"
	@echo "make docs    the documentation as a site, in build/site"
	@echo "make check   what CI runs: linters, types, tests, slow tests"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fedalt needs Python 3.11 or newer; call: make PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/fedalt compare recipes/demo.yaml --methods local,fedit,fedalt --out runs/demo --overwrite

MEDQUAD := build/MedQuAD# or where you have a copy of the repository

demo-llm: $(STAMP)
	$(BIN)/fedalt prepare smollm2
	test -d $(MEDQUAD) || git clone --quiet --depth 1 https://github.com/abachaa/MedQuAD $(MEDQUAD)
	test -d build/medquad || $(BIN)/fedalt prepare medquad --from $(MEDQUAD) --out build/medquad
	$(BIN)/fedalt compare recipes/demo_llm.yaml --data build/medquad --methods local,fedit,fedalt --out runs/demo-llm --overwrite
	$(BIN)/fedalt generate runs/demo-llm/fedalt-seed42 --compare 0,1,2 "What are the treatments for Asthma ?"

deploy-demo: $(STAMP)
	$(BIN)/python examples/deploy_demo.py

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile  # by file: set-ups and finished runs serve a whole file

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist loadfile --no-loadscope-reorder --durations=12

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test test-slow

clean:
	rm -rf $(VENV) build *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
