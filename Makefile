# Every target builds .venv when it is missing, so each is one command on a fresh machine.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
CONFIG ?= configs/demo/direct.yaml
RATIOS ?= 0.1 0.25 0.5 1.0

.PHONY: setup demo test test-slow check bench features train evaluate ablate table report clean

setup: $(STAMP)

# constraints.txt pins what CI tested. The torch it names comes as a CUDA build where pip finds one for the machine.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	bash configs/demo/run.sh $(PY)

test: $(STAMP)
	$(PY) -m pytest -q

test-slow: $(STAMP)
	$(PY) -m pytest -q -m slow

check: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

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

bench: $(STAMP)
	set -e; for script in benchmarks/*.py; do $(PY) $$script; done

clean:
	rm -rf $(VENV) runs/demo
