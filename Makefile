# make demo    train a small CNN on the digits and prune it, from nothing but python3
# make test    run the test suite
# make check   lint, format, types, layers: what CI runs before the tests
# make conformance   check every torchvision classification CNN (about half an hour), ONLY=resnet* for some of them
# make faults        kill actors, nodes, drivers and servers at 75 seeded moments (about 18 minutes) and write infra/faults
# make benchmark     measure this project beside others: PART=selection NETWORK=lenet SEED=0 DATA=data CHECKPOINTS=checkpoints
#                    (infra/benchmark/README.md says what each part is); make benchmark-page makes tables and plots of it
# make clean   remove caches, builds and the demo's results; .venv stays
#
# PYTHON picks the interpreter (3.11 or newer); PYTEST_ARGS goes to pytest, for example PYTEST_ARGS="-m slow".
# Without it two processes share the tests file by file; PYTEST_ARGS= runs them in one.

PYTHON ?= python3
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
ONLY ?= *
PART ?= all
NETWORK ?= all
SEED ?= 0
BUDGET ?=
METHODS ?=
THREADS ?= 0
FORCE ?=
DATA ?= data
CHECKPOINTS ?= checkpoints
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo

# Nothing that runs from here reports home.
export DO_NOT_TRACK := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true
export RAY_USAGE_STATS_ENABLED := 0

# Some wheels are near a gigabyte: wait longer than uv's 30 seconds for a slow connection.
UV_HTTP_TIMEOUT ?= 300
export UV_HTTP_TIMEOUT

# $(call install,REQUIREMENT): uv resolves and downloads about five times faster; pip does it where uv is missing or fails
# (pip, for one, reads the index settings of pip.conf, and uv does not).
define install
	@echo "Installing $(1) into $(VENV): about 5 GB the first time"
	@if [ -x $(BIN)/uv ] && $(BIN)/uv pip install --quiet --python $(BIN)/python --editable "$(1)"; then :; else \
		echo "Installing with pip instead of uv: this takes some minutes."; \
		$(BIN)/python -m pip install --quiet --editable "$(1)"; \
	fi
endef

.PHONY: demo test check conformance faults benchmark benchmark-page clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

demo: $(VENV)/.runtime
	rm -rf $(DEMO)
	mkdir -p $(DEMO)
	$(BIN)/entprune train --model digits_cnn --data digits --output $(DEMO)/dense.safetensors
	$(BIN)/entprune prune --model digits_cnn --checkpoint $(DEMO)/dense.safetensors --data digits \
		--max-accuracy-drop 1.0 --register entprune-demo --output $(DEMO)/pruned

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

conformance: $(VENV)/.dev
	$(BIN)/python -m tests.conformance --only "$(ONLY)" --output runs/conformance.json

faults: $(VENV)/.dev
	$(BIN)/python -m pytest tests/faults -m "slow or not slow" --fault-table infra/faults/faults.json
	$(BIN)/python infra/faults/render.py

benchmark: $(VENV)/.dev
	$(BIN)/python -m infra.benchmark --part "$(PART)" --network "$(NETWORK)" --seed "$(SEED)" --budget "$(BUDGET)" \
		--methods "$(METHODS)" --threads "$(THREADS)" --data-root "$(DATA)" --checkpoints "$(CHECKPOINTS)" \
		$(if $(DEVICE),--device "$(DEVICE)") $(if $(PRUNED),--pruned "$(PRUNED)") $(if $(FORCE),--force)

benchmark-page: $(VENV)/.dev
	$(BIN)/python -m infra.benchmark.render --root

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage $(DEMO)
	find entprune tasks flows tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "entprune needs Python 3.11 or newer, $(PYTHON) is `$(PYTHON) --version 2>&1`; name another: make PYTHON=python3.11" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet uv || echo "uv cannot be installed here: pip will do its work"
	touch $@

$(VENV)/.runtime: pyproject.toml $(VENV)/.created
	$(call install,.)
	touch $@

# The development set contains the runtime, so both stamps are new.
$(VENV)/.dev: pyproject.toml $(VENV)/.created
	$(call install,.[dev])
	touch $(VENV)/.runtime $@
