# Everything a newcomer needs. Only python3 (3.11 or newer), make and a network are
# assumed; all packages go to .venv, pinned and checked by requirements.lock.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
COMMAND := $(BIN)/clip2fl

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-all check docs gallery bench lock clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

install: $(COMMAND) ## Create .venv with the locked packages and the clip2fl command

# The stamp is written last: an interrupted installation is taken up again.
$(INSTALLED): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, '$(PYTHON)' is not: make install PYTHON=/path/to/python3.11" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)
	awk '/^[^ #]/ {uv = /^uv==/} uv && !/#/' requirements.lock > $(VENV)/uv.lock
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r $(VENV)/uv.lock
	$(BIN)/uv pip install --python $(BIN)/python --require-hashes --compile-bytecode \
		-r requirements.lock
	@touch $@

# The command runs this checkout's code. What builds its entry point is locked, too.
$(COMMAND): $(INSTALLED) pyproject.toml
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation \
		--offline --editable .
	@touch $@

demo: install ## Train on drawn images, without any download, and write a report
	$(COMMAND) run --run-config conf/demo.toml --set 'run.dir="$(CURDIR)/runs"'

test: install ## Run the tests that take seconds
	$(BIN)/python -m pytest -m "not slow"

test-all: install ## Run all tests
	$(BIN)/python -m pytest

check: install ## Lint, check format, types, imports and what make docs writes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m scripts.write_configuration --check

docs: install ## Write what is made from the configuration's schema, and build the site
	$(BIN)/python -m scripts.write_configuration
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

gallery: install ## Renew the pictures of docs/gallery.md with the program; needs Chromium
	$(BIN)/python -m scripts.draw_gallery $(GALLERY)

bench: install ## Time every stage against the published loops; half an hour
	$(BIN)/python -m benchmarks.stages
	$(BIN)/python -m benchmarks.flower conf/demo.toml
	$(BIN)/python -m benchmarks.scale

# Pins stay as they are while they still fit; remove requirements.lock to renew them all.
lock: ## Write requirements.lock from pyproject.toml
	@test -x $(BIN)/uv || { echo "uv is missing: run 'make install' first" >&2; exit 1; }
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 \
		--no-emit-index-url --custom-compile-command "make lock" \
		--all-extras --output-file requirements.lock pyproject.toml

clean: ## Remove caches and build results, but neither .venv nor runs
	rm -rf build dist *.egg-info *.fab .mypy_cache .pytest_cache .ruff_cache \
		.hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
