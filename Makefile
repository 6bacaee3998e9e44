PYTHON ?= python3
SAMPLES ?= 500
SEEDS ?= 42
REPORT = reports/03_scaling_$(SAMPLES)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NOTEBOOKS := $(wildcard notebooks/*.ipynb)

.PHONY: help install scaling claims test lint notebooks lab clean

help:
	@echo "make scaling    the scaling law on real conversations, into reports/ (SAMPLES=500 SEEDS=42)"
	@echo "make claims     the ledger of claims, from the runs of this machine, into reports/"
	@echo "make test       lint, types, tests, notebooks"
	@echo "make notebooks  execute notebooks/ anew at their defaults"
	@echo "make lab        open JupyterLab"

install: $(READY)

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "PYTHON: got $$($(PYTHON) --version); accepted: Python 3.11 or newer (make PYTHON=...)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $(READY)

scaling: install
	mkdir -p reports
	$(BIN)/papermill notebooks/03_scaling.ipynb $(REPORT).ipynb -p samples $(SAMPLES) -p seeds $(SEEDS)
	$(BIN)/jupyter nbconvert --log-level WARN --to markdown --output-dir $(VENV)/report $(REPORT).ipynb
	cp $$(ls -v $(VENV)/$(REPORT:reports/%=report/%)_files/*.png | head -1) $(REPORT).png

claims: install
	$(BIN)/python -m cvfp.analysis.ledger reports/claims.md

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest --nbval-lax notebooks/

notebooks: install
	for book in $(NOTEBOOKS); do $(BIN)/papermill $$book $$book --no-progress-bar || exit 1; done

lab: install
	$(BIN)/jupyter lab notebooks

clean:
	rm -rf $(VENV)
