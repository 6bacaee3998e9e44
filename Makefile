SHELL := bash
PYTHON ?= python3
WORKERS ?= 2
SAMPLES ?= 500
SEEDS ?= 42
REPORT = reports/03_scaling_$(SAMPLES)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
# Executed by test-full, not by test.
LONG := $(wildcard notebooks/0[4569]_*.ipynb)
# Modules and notebooks stay whole, so that their fixtures and kernels are made once.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
# In their order: later ones take from the store what earlier ones ran.
NBVAL := $(PYTEST) --no-loadscope-reorder --nbval-lax
# A stage: its name, its command. Says how long it took; one that fails ends the rest.
stage = @echo "== $(1)"; TIMEFORMAT="== $(1): %1lR"; time $(2)

# What `make study` takes; doit's tasks read them.
export ONLY CONFIRM JOBS HUB

.PHONY: help install study study-status report scaling claims reliability test test-full test-browser lint notebooks lab clean

help:
	@echo "make study      the reports that are out of date (ONLY=name,name JOBS=1 HUB=1; CONFIRM=1: short runs instead;"
	@echo "                ENGINE=dask ADDRESS=tcp://host:8786: on a cluster, docs/scale.md)"
	@echo "make study-status  how each report stands"
	@echo "make report     reports/index.html: all of it as pages to read (ONE=1: one file to send, reports/cvfp.html)"
	@echo "make scaling    the scaling law on real conversations, into reports/ (SAMPLES=500 SEEDS=42)"
	@echo "make claims     the ledger of claims, from the runs of this machine, into reports/"
	@echo "make reliability  inject faults, and write what came of it into reports/"
	@echo "make test       lint, types, tests, notebooks; without what takes long (WORKERS=2)"
	@echo "make test-full  the tests and notebooks that make test leaves out, a browser's and Colab's too (gigabytes)"
	@echo "make test-browser  JupyterLab in Chromium, if that is installed"
	@echo "make notebooks  execute notebooks/ anew at their defaults"
	@echo "make lab        open JupyterLab"

install: $(READY)

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "PYTHON: got $$($(PYTHON) --version); accepted: Python 3.11 or newer (make PYTHON=...)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $(READY)

# Where the sweeps of its notebooks run: what `cvfp.sweep` takes when nobody says.
study: export CVFP_ENGINE := $(or $(ENGINE),$(CVFP_ENGINE))
study: export CVFP_ADDRESS := $(or $(ADDRESS),$(CVFP_ADDRESS))

study: install
	$(BIN)/python -m doit run $(if $(CONFIRM),confirm,study) readme

study-status: install
	@$(BIN)/python dodo.py status

report: install
	$(BIN)/python -m benchmarks.pages $(if $(ONE),--one)

scaling: install
	mkdir -p reports
	$(BIN)/papermill notebooks/03_scaling.ipynb $(REPORT).ipynb -p samples $(SAMPLES) -p seeds $(SEEDS)
	$(BIN)/jupyter nbconvert --log-level WARN --to markdown --output-dir $(VENV)/report $(REPORT).ipynb
	cp $$(ls -v $(VENV)/$(REPORT:reports/%=report/%)_files/*.png | head -1) $(REPORT).png

claims: install
	$(BIN)/python -m cvfp.analysis.ledger reports/claims.md

FAULTS := $(addprefix tests/test_,kept.py checkpoint.py hostile.py)

# Tensors here are too small for a second thread: a worker a core, one thread a worker.
lint test test-full test-browser reliability: export OMP_NUM_THREADS := 1

reliability: install
	$(PYTEST) -q $(FAULTS) --reliability reports/reliability.md

lint: install
	$(call stage,format,$(BIN)/ruff format --check .)
	$(call stage,lint,$(BIN)/ruff check .)
	$(call stage,types,$(BIN)/mypy)

test: lint
	$(call stage,tests,$(PYTEST) -m "not full and not browser")
	$(call stage,notebooks,$(NBVAL) $(filter-out $(LONG),$(NOTEBOOKS)))

test-full: install
	$(call stage,long tests,$(PYTEST) -m full)
	$(call stage,long notebooks,$(NBVAL) $(LONG))
	$(MAKE) test-browser

test-browser: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-browser.txt
	$(call stage,browser,$(BIN)/python -m pytest -m browser tests/test_browser.py)

notebooks: install
	for book in $(NOTEBOOKS); do $(BIN)/papermill $$book $$book --cwd notebooks --no-progress-bar || exit 1; done

lab: install
	$(BIN)/jupyter lab notebooks

clean:
	rm -rf $(VENV)
