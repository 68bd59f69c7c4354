# Two commands do everything: `make reproduce` and `make test`. `make help` lists the rest.
#
# PYTHON: the interpreter that .venv is made with (3.11 or later); VENV: where it is made, so that
# `make test PYTHON=python3.13 VENV=.venv-3.13` leaves .venv alone. ARGS: passed on, where help says so.

PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
BIN    := $(VENV)/bin

# The environment may name another virtual environment or another kernel's folder: neither counts here.
unexport VIRTUAL_ENV PYTHONHOME PYTHONPATH
export JUPYTER_PREFER_ENV_PATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# A copied or moved tree would run the package of the tree that it came from: make .venv anew there.
ifneq ($(shell cat $(VENV)/made-in 2>/dev/null),$(CURDIR))
.PHONY: $(VENV)/locked
endif
# And `make test PYTHON=python3.13` means it: not with the .venv of another Python.
ifeq ($(origin PYTHON),command line)
ifneq ($(shell cat $(VENV)/made-with 2>/dev/null),$(PYTHON))
.PHONY: $(VENV)/locked
endif
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup reproduce test lab bench lock format clean

help: ## List the targets
	@echo 'usage: make TARGET'
	@grep -hE '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z]+):.*## (.*)/  \1|\2/' | \
	  while IFS='|' read -r target text; do printf '%-12s %s\n' "$$target" "$$text"; done

setup: $(VENV)/installed ## Make .venv with the exact packages of requirements.lock
	@:

$(VENV)/locked: requirements.lock
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo 'make: no $(PYTHON) on the PATH. Install Python 3.11 or later (apt-get install python3 python3-venv),' >&2; \
	  echo '      or name one: make setup PYTHON=/path/to/python3' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: Python 3.11 or later is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo '      Name another one: make setup PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: $(PYTHON) cannot make virtual environments. On Debian: apt-get install python3-venv" >&2; exit 1; }
	@test ! -e $(VENV) || test -f $(VENV)/pyvenv.cfg || { \
	  echo 'make: $(VENV) is there but is no virtual environment: move it away, or set VENV=' >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version): a minute or two the first time"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --require-hashes --only-binary :all: -r requirements.lock
	@printf '%s' '$(CURDIR)' > $(VENV)/made-in
	@printf '%s' '$(PYTHON)' > $(VENV)/made-with
	@touch $@

# --no-build-isolation: the build backend is the locked one, not one fetched for the occasion.
# JupyterLab's plug-in for news and new releases asks hosts outside: off, in this environment only.
NEWS := @jupyterlab/apputils-extension:announcements
$(VENV)/installed: $(VENV)/locked pyproject.toml
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@said=$$($(BIN)/jupyter labextension disable --level=sys_prefix $(NEWS) 2>&1) || { echo "$$said" >&2; exit 1; }
	@touch $@

reproduce: setup ## Run every report; then open reports/index.html (ARGS='--mixes NAME --out DIR')
	$(BIN)/nvmx-lab reproduce $(ARGS)

test: setup ## Lint, type-check and test (ARGS='-k NAME' selects tests)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/pytest -n $(JOBS) --dist loadgroup $(ARGS)

lab: setup ## Open the notebooks in JupyterLab
	$(BIN)/jupyter lab --LabApp.extension_manager=readonly --notebook-dir=notebooks $(ARGS)

bench: setup ## Measure speed against the goals (a few minutes; leave the machine idle)
	$(BIN)/pytest tests/benchmarks -o python_files='bench_*.py' --benchmark-columns=min,median,max,rounds $(ARGS)

format: setup ## Sort imports and mend what the linter can mend
	$(BIN)/ruff check --fix .

# The resolver lives in a folder of its own: it is no part of the environment that it describes.
lock: ## Resolve pyproject.toml anew into requirements.lock
	@test -x .cache/uv/bin/uv || { $(PYTHON) -m venv .cache/uv && .cache/uv/bin/python -m pip install --quiet 'uv==0.13.9'; }
	.cache/uv/bin/uv pip compile pyproject.toml --extra test --group build --universal --python-version 3.11 \
	  --generate-hashes --no-header --no-annotate --no-emit-index-url --upgrade --quiet --output-file requirements.lock

clean: ## Remove .venv, caches and built files; reports stay
	rm -rf .venv .venv-* .cache .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks build dist
	find nvmx_lab tests notebooks -name __pycache__ -type d -prune -exec rm -rf {} +
