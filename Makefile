# Every target sets up what it needs: a virtual environment in .venv with the exact versions of constraints.txt.
# PYTHON chooses the interpreter that .venv is made from; CI=true turns a missing client program into a failure.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST_ARGS ?=
ARGS ?=

.DEFAULT_GOAL := help

.PHONY: help setup demo test lint format bench conformance crash fuzz fuzz-store clean

help:
	@echo "make demo         the main job from nothing: daemon, vdisk over iSCSI, snapshot, clone, online split, verification"
	@echo "make test         all tests (PYTEST_ARGS='-k name' to choose)"
	@echo "make lint         ruff and mypy --strict"
	@echo "make bench        benches; against tgt they need root, tgt, libiscsi-bin and qemu-utils"
	@echo "make conformance  protocol conformance suites; needs libiscsi-bin"
	@echo "make crash        crash and power-loss tests, long form (ARGS=\"--replay 'STATE'\" for one state)"
	@echo "make fuzz         fuzzer over all that a peer's bytes reach (FUZZ_ARGS='--seconds 600 --seed 1'); guided by coverage too where atheris is installed"
	@echo "make fuzz-store   fuzzer of the whole store against an oracle (ARGS=\"--seconds 3600 --jobs 2\", ARGS=\"--replay 'SEED:OPTIONS'\")"
	@echo "make setup        only the virtual environment"
	@echo "make clean        remove .venv and caches"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "cleaved needs Python 3.11 or newer; choose it with PYTHON=..., e.g. make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "this Python lacks the venv module; install it: apt-get install python3-venv" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/python -m daemon.demo

test: $(READY)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The folders below hold programs of their own, each with --help; what is there is what runs.
bench: $(READY)
	@for module in $(basename $(wildcard tests/load/bench_*.py)); do \
	    echo "== $$module"; $(BIN)/python -m $$(echo $$module | tr / .) || exit 1; done

conformance: $(READY)
	@for module in $(basename $(wildcard tests/conformance/*_suite.py)); do \
	    echo "== $$module"; $(BIN)/python -m $$(echo $$module | tr / .) || exit 1; done

crash: $(READY)
	$(BIN)/python -m tests.crash.run $(ARGS)
	@test -n "$(ARGS)" || CLEAVED_LONG=1 $(BIN)/python -m pytest tests/crash tests/storage/test_model.py $(PYTEST_ARGS)

FUZZ_ARGS ?=

fuzz: $(READY)
	$(BIN)/python -m tests.fuzz.run $(FUZZ_ARGS)
	$(BIN)/python -m tests.fuzz.guided $(FUZZ_ARGS)

fuzz-store: $(READY)
	$(BIN)/python -m tests.fuzz.store.run $(ARGS)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
