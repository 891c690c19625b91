# make train      train the example model (creates the environment first)
# make test       run the tests and doctests
# make test-fast  the same without the tests marked slow
# make test-full  the same with every point where tests take a cover: hours
# make evidence   measure what the papers claim; writes docs/evidence.md
# make docs       run the tutorials, build the site in build/site, strictly
# make check      lint, formatting, types and which folder imports which
# make format     rewrite the sources in the project's format
# make wheel      build dist/*, and try the wheel in an environment of its own
# make clean      remove environments, builds and caches; runs/ is kept
#
# PYTHON is the interpreter to create the environment VENV with; ARGS goes to
# the program that is run: make train ARGS=--help, make test ARGS='-k galore'.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN = $(VENV)/bin/python

# A process for each core. Tests of a file share compiled programs, and so each
# process gets a run of files; one that is done takes half of another's rest.
PARALLEL = -n auto --dist worksteal

# Modules must come from VENV, whatever the caller's shell has set.
unexport PYTHONPATH PYTHONHOME PYTHONSAFEPATH PYTHONSTARTUP
unexport PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT PIP_REQUIRE_VIRTUALENV
# pip leaves byte-compiling to the first import (--no-compile below), so that
# import must be allowed to write what it compiled.
unexport PYTHONDONTWRITEBYTECODE

PIP_INSTALL = $(BIN) -m pip install -qq --no-input --no-compile \
  --disable-pip-version-check

.PHONY: help train test test-fast test-full evidence docs check format wheel \
  clean
# Two installations at once would damage the environment they share.
.NOTPARALLEL:

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

train: $(VENV)/.stamp-examples
	$(BIN) examples/pretrain.py $(ARGS)

test: $(VENV)/.stamp-test
	$(BIN) -m pytest $(PARALLEL) $(ARGS)

test-fast: $(VENV)/.stamp-test
	$(BIN) -m pytest $(PARALLEL) -m 'not slow' $(ARGS)

test-full: $(VENV)/.stamp-test
	$(BIN) -m pytest $(PARALLEL) --full $(ARGS)

evidence: $(VENV)/.stamp-examples
	$(BIN) -m benchmarks.claims $(ARGS)

docs: $(VENV)/.stamp-docs
	NO_MKDOCS_2_WARNING=1 $(BIN) -m mkdocs build

check: $(VENV)/.stamp-dev
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(BIN) -m pyright --pythonpath $(BIN)
	$(VENV)/bin/lint-imports --no-cache

format: $(VENV)/.stamp-dev
	$(BIN) -m ruff check --select I --fix .
	$(BIN) -m ruff format .

# -I and the change of folder keep the source tree out of the import.
wheel: $(VENV)/.stamp-dev
	rm -rf dist build/wheel-venv
	$(BIN) -m build
	$(BIN) -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip install -qq --no-input --no-compile \
	  --disable-pip-version-check dist/*.whl
	cd build && wheel-venv/bin/python -I -c "import subspace_optax as s; \
	  assert 'wheel-venv' in s.__file__, s.__file__; \
	  print('The wheel installs and imports:', s.__file__)"

clean:
	rm -rf .venv .venv-* build dist
	rm -rf .hypothesis .pytest_cache .ruff_cache
	find subspace_optax benchmarks examples tests -name __pycache__ -prune \
	  -exec rm -rf {} +

# An interrupted run leaves no stamp, so the next one starts again from there.
$(VENV)/.stamp-venv:
	@$(PYTHON) -c '' || { \
	  echo "No Python found as '$(PYTHON)'. Install Python 3.11 or newer, or" \
	    "name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "'$(PYTHON)' is `$(PYTHON) --version 2>&1`, and Python 3.11 or newer" \
	    "is needed. Name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot create virtual environments. On Debian and" \
	    "Ubuntu: apt install python3-venv (or python3.X-venv for" \
	    "python3.X)."; exit 1; }
	@echo "Creating $(VENV) with `$(PYTHON) --version`"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.stamp-examples $(VENV)/.stamp-test $(VENV)/.stamp-docs \
    $(VENV)/.stamp-dev: \
    $(VENV)/.stamp-venv pyproject.toml
	@echo "Installing the package with its $(subst .stamp-,,$(@F)) extra into" \
	  "$(VENV) (up to a minute)"
	@$(PIP_INSTALL) -e '.[$(subst .stamp-,,$(@F))]'
	@touch $@
