# `make help` lists the targets.
PORT ?= 8000
DATA ?= .studio
PYTHON ?= python3
REAL ?= ../shared/real
LENGTH ?= short
MINUTES ?= 10
TESTS ?=

BIN := .venv/bin
REALLY = MINI_STUDIO_TEST_REAL=$(wildcard $(REAL)) MINI_STUDIO_TEST_LENGTH=$(LENGTH) $(BIN)/python -m pytest -m real --durations 15
STAMP := .venv/.installed
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
# an install is about 5.8 GB on Linux, where torch brings its CUDA libraries
NEEDED_MB := 7000

.DEFAULT_GOAL := help
.PHONY: help venv run demo env test real test-real soak check format lock clean schemas

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{printf "  make %-9s %s\n", $$1, $$2}'
	@echo "  variables: PORT=$(PORT) DATA=$(DATA) PYTHON=$(PYTHON) REAL=$(REAL) LENGTH=$(LENGTH) MINUTES=$(MINUTES)"

venv: $(STAMP) ## install into .venv

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Mini Studio needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo not there)." \
	    "Name another one: make run PYTHON=python3.12" >&2; exit 2; }
	@free=$$(df -Pm . | awk 'NR == 2 {print $$4}'); test -x $(BIN)/uv || test "$$free" -ge $(NEEDED_MB) || { \
	  echo "Only $$free MB are free here and the installation needs about $(NEEDED_MB): free some space, or clone to another disk." >&2; exit 2; }
	@echo "[1/3] virtual environment in .venv (about 15 MB)"
	@$(PYTHON) -m venv .venv || { echo "Could not make .venv: install the venv module of $(PYTHON) (Debian: python3-venv)." >&2; exit 2; }
	@echo "[2/3] installer uv (about 25 MB)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	@echo "[3/3] Mini Studio with torch, Ray, the broker and the S3 server (up to 3 GB to fetch the first time: torch with its CUDA libraries)"
	@$(BIN)/uv pip install --python $(BIN)/python -c constraints.txt --compile-bytecode -e '.[dev]' 2>&1 | { grep -v --line-buffered '^ [+~-] ' || true; }
	@du -sh .venv | awk '{print "installed: " $$1 " in .venv"}'
	@touch $@

run: $(STAMP) ## start the studio in the foreground; Ctrl-C stops all of it
	@exec $(BIN)/python -m mini_studio.embedded --data "$(DATA)" --port "$(PORT)" --with-parent

demo: $(STAMP) ## do the main job on the running studio
	@exec $(BIN)/mini-studio demo --data "$(DATA)"

env: ## write the secrets of compose.yaml to .env, once
	@umask 077; set -C; (for name in MONGO_ROOT_PASSWORD MONGO_PASSWORD S3_ACCESS_KEY S3_SECRET_KEY RAY_TOKEN ADMIN_TOKEN; do \
	  echo "STUDIO_$$name=$$(od -An -N 24 -t x1 /dev/urandom | tr -d ' \n')"; done > .env) 2>/dev/null || { \
	  echo ".env is there already (or cannot be written): its secrets belong to what is in the volumes, so it is left as it is." >&2; exit 2; }

test: $(STAMP) ## all tests, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile

real: ## get the real services that test-real starts, by the scripts in REAL (10 to 20 minutes the first time: Kubernetes is built)
	@test -x "$(REAL)/kubernetes" || { \
	  echo "There is no $(REAL)/kubernetes to build a control plane with: name a folder that has one, make real REAL=DIR," \
	    "or running services, MINI_STUDIO_TEST_KAFKA=host:port and so on (tests/fakes/real_*.py) for make test-real." >&2; exit 2; }
	command -v prometheus >/dev/null || { apt-get update -q && apt-get install -qy prometheus; } >/dev/null
	for service in kafka mongo s3 helm kubernetes; do "$(REAL)/$$service" install; done
	"$(REAL)/kubernetes" install-keda

test-real: $(STAMP) ## tests on real services, which the scripts in REAL start, two files at a time, then the fault programs; LENGTH=full for the long forms, TESTS=tests/faults/test_ray.py for some
	@test -n "$$MINI_STUDIO_TEST_KAFKA" -o -x "$(REAL)/kafka" || { \
	  echo "There is no $(REAL)/kafka to start an Apache Kafka with: name a folder that has one, make test-real REAL=DIR," \
	    "or running services, MINI_STUDIO_TEST_KAFKA=host:port and so on (what kills and pauses one is then skipped)." >&2; exit 2; }
	$(if $(TESTS),$(REALLY) $(TESTS),$(REALLY) -n 2 --dist loadfile --ignore tests/faults && $(REALLY) tests/faults)

soak: $(STAMP) ## kill everything at random under load for MINUTES, then check that nothing was lost or done twice
	$(BIN)/python -m tests.faults.soak --minutes $(MINUTES)

check: $(STAMP) ## format, lint, types, import contracts, published schemas
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m mini_studio.publishing --check

schemas: $(STAMP) ## generate schemas/published, docs/events.md and docs/settings.md from the models
	$(BIN)/python -m mini_studio.publishing

format: $(STAMP) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix-only .

lock: $(STAMP) ## write what is installed to constraints.txt
	$(BIN)/uv pip freeze --python $(BIN)/python --exclude-editable > constraints.txt

clean: ## remove the virtual environment and caches; data stays
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info
