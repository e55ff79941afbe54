# Everything a newcomer needs. Only python3 (3.11 or newer), make and a network are
# assumed; all packages go to .venv, pinned and checked by a lock:
#
#   LOCK=requirements.lock       all that developers need (the default)
#   LOCK=requirements-user.lock  the clip2fl command: runs, comparisons, reports
#   LOCK=requirements-node.lock  a site's node
#   TORCH_INDEX=URL              torch and torchvision from this index, and no CUDA

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
COMMAND := $(BIN)/clip2fl

# What .venv has holds until something else is named; `TORCH_INDEX=` names no index.
INSTALLED_LOCK := $(or $(shell sed -n 1p $(INSTALLED) 2>/dev/null),requirements.lock)
INSTALLED_INDEX := $(shell sed -n 2p $(INSTALLED) 2>/dev/null)
LOCK ?= $(INSTALLED_LOCK)
TORCH_INDEX ?= $(INSTALLED_INDEX)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-all check docs gallery bench lock clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

# Only the locks with hatchling can build the command: a node does not need it.
install: $(if $(shell grep '^hatchling==' $(LOCK)),$(COMMAND),$(INSTALLED)) ## Create .venv with the locked packages and the clip2fl command

# Something else than .venv has starts from an empty .venv: nothing is left over.
ifneq ($(INSTALLED)|$(INSTALLED_LOCK)|$(INSTALLED_INDEX),$(wildcard $(INSTALLED))|$(LOCK)|$(TORCH_INDEX))
.PHONY: $(INSTALLED)
CLEAR := --clear
endif

# The stamp is written last: an interrupted installation is taken up again.
$(INSTALLED): $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, '$(PYTHON)' is not: make install PYTHON=/path/to/python3.11" >&2; \
		exit 1; }
	$(PYTHON) deploy/install.py $(CLEAR) $(if $(TORCH_INDEX),--torch-index '$(TORCH_INDEX)') \
		$(LOCK) $(VENV)
	@printf '%s\n' '$(LOCK)' '$(TORCH_INDEX)' > $@

# A smaller lock does not have what some targets call.
needs-%:
	@grep -q '^$*==' $(LOCK) || { \
		echo "$(LOCK) does not have $*, which this target needs: make install LOCK=requirements.lock" >&2; \
		exit 1; }

# The command runs this checkout's code. What builds its entry point is locked, too.
$(COMMAND): $(INSTALLED) pyproject.toml
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation \
		--offline --editable .
	@touch $@

demo: needs-hatchling install ## Train on drawn images, without data to download, and write a report
	$(COMMAND) run --run-config conf/demo.toml --set 'run.dir="$(CURDIR)/runs"'

test: needs-pytest install ## Run all tests but the slow ones
	$(BIN)/python -m pytest -m "not slow"

test-all: needs-pytest install ## Run all tests
	$(BIN)/python -m pytest

check: needs-ruff install ## Lint, check format, types, imports and what make docs writes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m scripts.write_configuration --check

docs: needs-mkdocs install ## Write what is made from the configuration's schema, and build the site
	$(BIN)/python -m scripts.write_configuration
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

gallery: needs-hatchling install ## Renew the pictures of docs/gallery.md with the program; needs Chromium
	$(BIN)/python -m scripts.draw_gallery $(GALLERY)

bench: needs-hatchling install ## Time every stage against the published loops; half an hour
	$(BIN)/python -m benchmarks.stages
	$(BIN)/python -m benchmarks.flower conf/demo.toml
	$(BIN)/python -m benchmarks.scale

# Pins stay as they are while they still fit; remove requirements.lock to renew them all.
# The smaller locks take requirements.lock as a constraint: a package has the same pin in
# all of them.
COMPILE := $(BIN)/uv pip compile --quiet --universal --generate-hashes \
	--python-version 3.11 --no-emit-index-url --custom-compile-command "make lock"
SMALLER := $(COMPILE) --no-annotate --constraint requirements.lock

lock: ## Write the three locks from pyproject.toml
	@test -x $(BIN)/uv || { echo "uv is missing: run 'make install' first" >&2; exit 1; }
	$(COMPILE) --all-extras --output-file requirements.lock pyproject.toml
	$(SMALLER) --extra tensorboard --extra heif --group command \
		--output-file requirements-user.lock pyproject.toml
	$(SMALLER) --group node --output-file requirements-node.lock

clean: ## Remove caches and build results, but neither .venv nor runs
	rm -rf build dist *.egg-info *.fab .mypy_cache .pytest_cache .ruff_cache \
		.hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
