# Each target sets up what it needs; a second call finds it set up and starts at once.
.DEFAULT_GOAL := help
# the newest that is there and works: pyenv's stand-ins for others are there and do not
WORKS  := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
PYTHON ?= $(shell for python in python3.14 python3.13 python3.12 python3.11 python3; do \
            $$python -c '$(WORKS)' 2>/dev/null && echo $$python && break; done)
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
ROOT   ?= outputs/dev
ENV    ?= local
# not Untitled, as JupyterLab calls them, and not _scratch: they are nobody's stage, and keep what they show
NOTEBOOKS = notebooks/[!_U]*.ipynb examples/*/notebooks/[!_U]*.ipynb
# what running and saving a notebook leaves in it, beside outputs and counts
LEFT = metadata.papermill cell.metadata.papermill cell.metadata.editable cell.metadata.slideshow \
  $(addprefix metadata.language_info.,codemirror_mode file_extension mimetype nbconvert_exporter pygments_lexer version)
STRIP = $(BIN)/nbstripout --keep-id --extra-keys "$(LEFT)"

.PHONY: help setup up demo test fresh faults lint format lab bench images lock clean

help:  ## Show this help
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(READY)  ## Create .venv and install the locked packages (with uv where there is one)

$(READY): requirements.lock pyproject.toml
	@$(or $(PYTHON),false) -c '$(WORKS)' 2>/dev/null || { echo "Python 3.11 to 3.14 with its venv is needed" \
	  "(on Debian: apt-get install python3-venv), or make PYTHON=/path/to/one"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up .venv: about two minutes, once"
	@# -e . stands alone: pip refuses it beside hashed requirements
	@# uv, and for a folder of its own pip, leaves the compiling to the first import, and where
	@# PYTHONDONTWRITEBYTECODE is set to every import
	@if command -v uv >/dev/null; then \
	  VIRTUAL_ENV=$(VENV) uv pip install --quiet --compile-bytecode --require-hashes -r requirements.lock && \
	  VIRTUAL_ENV=$(VENV) uv pip install --quiet --no-deps --no-build-isolation -e .; \
	else \
	  $(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements.lock && \
	  $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .; \
	fi
	@$(BIN)/python -m compileall -q app etl pipeline
	@touch $@

up: setup  ## Run everything: Prefect, the six schedules, the API, the dashboard
	@$(BIN)/python orchestrate.py up --env $(ENV)

demo: export ROOT := $(ROOT)
demo: setup  ## One pass of all stages on a scratch root (ROOT=outputs/dev, or s3://bucket/prefix)
	@$(BIN)/python orchestrate.py run all --env dev --root "$$ROOT"
	@echo; echo "What next:"
	@echo "  make lab    the notebooks in JupyterLab, on what was just written"
	@echo "  make up     everything on its schedule, with dashboard and API"
	@echo "  $(BIN)/python orchestrate.py runs list --root '$$ROOT'    the runs; runs open ID shows a report"

test: setup  ## Run the tests
	@$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

fresh:  ## The tests and a short `make up` in a fresh Debian 13 (as root, with debootstrap; a quarter of an hour)
	@tools/fresh

faults: setup  ## Provoke every fault in full numbers (most of an hour)
	@$(BIN)/python tests/faults

lint: setup  ## Check style, notebooks included, types, declared imports, and every stage's parameters
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/deptry .
	@$(STRIP) --verify $(NOTEBOOKS)
	@$(BIN)/python orchestrate.py check
	@cd examples/clicks && ../../$(BIN)/etl check

format: setup  ## Format the code and strip the notebooks' outputs
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format --quiet .
	@$(STRIP) $(NOTEBOOKS)

lab: setup  ## Open the project in JupyterLab, its notebooks on the scratch root that `make demo` fills
	@ETL_CHARTS=plotly JUPYTER_DEFAULT_PROVISIONER_NAME=forked-kernel $(BIN)/jupyter lab --ip=127.0.0.1 --port=8888 \
	  --ServerApp.root_dir='$(CURDIR)' --ServerApp.preferred_dir='$(CURDIR)/notebooks' \
	  --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate \
	  $(if $(filter 0,$(shell id -u)),--allow-root)

bench: setup  ## Measure, side by side (three quarters of an hour)
	@for script in $(filter-out benchmarks/measure.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

images: setup  ## Take the pictures of docs/images anew (needs chromium; five minutes)
	@$(BIN)/python tools/images.py

lock:  ## Resolve the packages anew (needs uv)
	uv pip compile --quiet --universal --no-strip-extras --generate-hashes --extra dev --python-version 3.11 \
	  --no-emit-index-url --no-header pyproject.toml -o requirements.lock

clean:  ## Remove the environment and the caches; outputs/ stays
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
