PYTHON ?= python3
SAMPLES ?= 500
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NOTEBOOKS := $(wildcard notebooks/*.ipynb)

.PHONY: help install scaling test lint notebooks lab clean

help:
	@echo "make scaling    the scaling law on real conversations, into reports/ (SAMPLES=500)"
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
	$(BIN)/papermill notebooks/03_scaling.ipynb reports/03_scaling.ipynb -p samples $(SAMPLES)
	$(BIN)/jupyter nbconvert --log-level WARN --to markdown --output-dir $(VENV)/report reports/03_scaling.ipynb
	cp $(VENV)/report/03_scaling_files/*.png reports/03_scaling.png

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
