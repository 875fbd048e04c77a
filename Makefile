# Every command of the course. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PY     := $(BIN)/python
STAMP  := $(VENV)/.ready
# uv does not read pip's settings, so hand it pip's find-links (a folder of local wheels, if you have one).
FIND_LINKS = $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null || true)
# TORCH_BACKEND=cpu (or cu130, auto …) picks a build of torch; empty leaves the choice to the registry.
TORCH_BACKEND ?=
# One torch thread per pytest worker: two workers with two threads each fight over two cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

# `make check-chapter 3` is `make check-chapter N=3`; `make hint 1.4.b` is `make hint ID=1.4.b`.
WORDS := $(wordlist 2,9,$(MAKECMDGOALS))
ifneq ($(filter check-chapter hint,$(firstword $(MAKECMDGOALS))),)
  N  ?= $(firstword $(WORDS))
  ID ?= $(firstword $(WORDS))
  ifneq ($(WORDS),)
    .PHONY: $(WORDS)
    $(eval $(WORDS):;@:)
  endif
endif

.PHONY: help setup tour test test-fast test-notebooks bench lab check-chapter hint progress update \
        export exercises notebooks lint format lock clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "  \033[36mmake %-16s\033[0m %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv and install the locked requirements (quick when nothing changed)

$(STAMP): requirements.txt pyproject.toml
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else f"Python {v[0]}.{v[1]} found, 3.10 to 3.13 needed: make setup PYTHON=python3.12")' || { rm -rf $(VENV); exit 1; }
	@echo "Setting up $(VENV) with the locked packages (once; a minute or so) …"
	@$(PY) -m pip install --quiet --disable-pip-version-check uv
	@UV_FIND_LINKS="$${UV_FIND_LINKS:-$(FIND_LINKS)}" $(BIN)/uv pip install --quiet --python $(PY) \
	  $(if $(TORCH_BACKEND),--torch-backend=$(TORCH_BACKEND)) -r requirements.txt
	@$(BIN)/uv pip install --quiet --python $(PY) --no-deps --editable .
	@# Compiled once here, and not by every process that may not write beside it: importing torch is twice as fast.
	@$(PY) -m compileall -q -j 0 $$($(PY) -c 'import site; print(site.getsitepackages()[0])')/{torch,numpy,matplotlib,IPython} >/dev/null 2>&1 || true
	@# nbgrader is here for one preprocessor; its menu in JupyterLab would only puzzle a learner.
	@mkdir -p $(VENV)/etc/jupyter/labconfig
	@echo '{"disabledExtensions": {"@jupyter/nbgrader": true}}' > $(VENV)/etc/jupyter/labconfig/page_config.json
	@git config merge.notebook.driver '$(PY) -m tutorial_lib.nb.merge %O %A %B %P' 2>/dev/null || true # not a clone
	@touch $@

tour: setup ## train a Transformer on Shakespeare, see runs/tour/report.html
	$(PY) -m tutorial_lib.tour

test: setup ## every test, and every notebook through nbval
	$(ONE_THREAD) $(PY) -m pytest -n 2 --dist worksteal --durations 12 tests
	$(MAKE) --no-print-directory test-notebooks

test-fast: setup ## the tests that take seconds
	$(ONE_THREAD) $(PY) -m pytest -n 2 --dist worksteal -m "not slow and not browser" tests

# loadfile: without it, the cells of one notebook land in two kernels.
test-notebooks: setup ## every lesson and solution, run from top to bottom by nbval
	$(ONE_THREAD) $(PY) -m pytest -n 2 --dist loadfile --nbval-lax --nbval-current-env \
	  --nbval-cell-timeout 120 -p no:cacheprovider --ignore-glob='*/Untitled*' chapters solutions

bench: setup ## SmolLM2 in our Transformer and in transformers: speed and memory, side by side
	$(PY) benchmarks/pretrained.py $(ARGS)

lab: setup ## open JupyterLab on the course
	$(BIN)/jupyter lab

check-chapter: setup ## check your exercises: make check-chapter 1  (ARGS=--verbose, ARGS=--json)
	@$(PY) -m tutorial_lib.checks chapter "$(N)" $(ARGS)

hint: setup ## the next hint for an exercise: make hint 1.4.b
	@$(PY) -m tutorial_lib.checks hint "$(ID)" $(ARGS)

progress: setup ## what is done, what is next
	@$(PY) -m tutorial_lib.checks progress $(ARGS)

update: setup ## what is new in the course, around your own work  (FROM=upstream, where origin is your fork)
	@git pull --no-rebase --no-edit --autostash $(or $(FROM),origin) HEAD; ended=$$?; \
	both=$$(git diff --name-only --diff-filter=U); test -z "$$both" || { \
	  echo "You and the course both rewrote a cell in: $$both"; \
	  echo "Both texts are in that cell: open it, choose what stays, then git commit --all."; exit 1; }; exit $$ended

export: setup ## write tutorial_lib from the lessons  (ARGS=--check only compares)
	$(PY) -m tutorial_lib.nb.export $(ARGS)

exercises: setup ## write exercises/ from solutions/  (ARGS=--check only compares)
	$(PY) -m tutorial_lib.nb.exercises $(ARGS)

notebooks: setup ## normalize the metadata of lessons and solutions  (ARGS=--check only compares)
	$(PY) -m tutorial_lib.nb.normalise $(ARGS)

lint: setup ## ruff, and the three drift checks  (ARGS=--published: notebooks to the letter, as CI asks)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PY) -m tutorial_lib.nb.normalise $(or $(ARGS),--check)
	$(PY) -m tutorial_lib.nb.export --check
	$(PY) -m tutorial_lib.nb.exercises $(or $(ARGS),--check)

format: setup ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: setup ## re-solve requirements.txt for Python 3.10 to 3.13 (CUDA's own wheels come with torch)
	@echo "torch==2.13.0" > $(VENV)/constraints.txt
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.10 \
	  -c $(VENV)/constraints.txt --no-header --no-annotate -q | grep -vE '^(nvidia-|cuda-|triton|setuptools|pip=)' > requirements.txt

clean: ## remove the environment and the runs
	rm -rf $(VENV) runs .pytest_cache .ruff_cache
