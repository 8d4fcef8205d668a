# Each target sets up what it needs: a virtual environment in .venv with exactly what requirements/ says.
PYTHON ?= python3
VENV ?= .venv
PROFILE ?=
WORKERS ?= 3
BENCH ?= all
# a file's tests stay together, for what they share, and the files come in the order of tests/conftest.py: what takes longest first
SIDE_BY_SIDE = --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
RUN = env PATH="$(abspath $(VENV))/bin:$$PATH"
# one pip at a time: cron may say `make up` while another installs what has changed; the second waits, and finds it there
LOCKED = $(shell command -v flock >/dev/null && echo flock Makefile)
PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check
# Installs requirements/$(1).txt. pip would be silent for minutes, so a line every three seconds says how far it is; what is wrong
# pip says itself, on stderr. The lines end with pip, or with the shell around it.
INSTALL = $(LOCKED) sh -c 'log=$(VENV)/pip.log; : > $$log; packages=$(VENV)/lib/python*/site-packages; \
  all=$$(cat $(2) requirements/$(1).txt | grep -c "=="); \
  (while sleep 3 > /dev/null && kill -0 $$$$; do \
    echo "  $$(grep -cE "^ *(Collecting|Requirement)" $$log) of $$all packages fetched, $$(ls -d $$packages/*.dist-info | wc -l) installed"; \
  done) 2> /dev/null & \
  $(PIP) --requirement requirements/$(1).txt > $$log; code=$$?; kill $$!; exit $$code'

.DEFAULT_GOAL := help
.PHONY: help repro control study evidence test test-quick test-system test-week bench lint up down deploy deepspeed

help: ## what can be made
	@echo "make TARGET [PYTHON=python3.12] [PROFILE=tiny|smoke|small|wan-1.3b]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-11s %s\n", $$1, $$2}' Makefile

repro: $(VENV)/.cpu ## the whole pipeline, from clips to report; PROFILE=smoke writes params.yaml first (smoke: 5 minutes)
	@$(if $(PROFILE),$(RUN) python -m tasks profile use $(PROFILE),true)
	@$(RUN) python -m tasks repro

control: $(VENV)/.cpu ## after repro: stage 2 with a memoryless teacher, and the paired comparison (tiny: 10 minutes)
	@$(RUN) python -m tasks control

study: $(VENV)/.cpu ## the planned trainings of study/plan.yaml that are missing, after a forecast of the hours; goes on where it stopped
	@$(RUN) python -P -m study $(if $(PROFILE),--profile $(PROFILE)) run

evidence: $(VENV)/.cpu ## docs/evidence.md from the committed cells in study/cells
	@$(RUN) python -P -m study page

test: $(VENV)/.dev ## the tests, by three processes on two cores, because many wait; WORKERS=6 on four
	@$(RUN) python -m pytest $(SIDE_BY_SIDE)

test-quick: $(VENV)/.dev ## those that take no time, while one works
	@$(RUN) python -m pytest $(SIDE_BY_SIDE) -m "not slow" -q

test-system: WORKERS = 2 # servers, browsers and limits of seconds: a third would be in their way
test-system: $(VENV)/.dev ## a real server, worker and browser (apt-get install chromium): runs, cancels, kills
	@CF_SYSTEM=1 $(RUN) python -m pytest $(SIDE_BY_SIDE) tests/system

up: $(VENV)/.cpu ## the Prefect server, a worker and a watch over the nights, on 127.0.0.1; what runs already is left alone
	@$(RUN) python -m tasks up

down: $(VENV)/.cpu ## stops them, and everything they started
	@$(RUN) python -m tasks down

deploy: $(VENV)/.cpu ## pipeline, nightly and evaluate as deployments with run forms
	@$(RUN) python -m tasks deploy

test-week: $(VENV)/.dev ## seven nights on a project of seconds, and what goes wrong in them (10 minutes; not in CI)
	@$(RUN) python -m tests.week.week

bench: $(VENV)/.dev ## every number of docs/speed.md again, on an idle machine (half an hour); BENCH=chunk for one benchmark of it
	@$(RUN) nice python -m benchmarks $(BENCH)

lint: $(VENV)/.dev ## ruff, mypy, and who may import whom
	@$(RUN) ruff check .
	@$(RUN) mypy
	@$(RUN) lint-imports --no-logo --no-cache

deepspeed: $(VENV)/.deepspeed ## the engine for several ranks, into the same environment

$(VENV)/.cpu: requirements/cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo not there), but Python 3.11 or newer is needed; name one: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "installing $$(grep -c == requirements/cpu.txt) packages into $(VENV), once: PyTorch, diffusers, DVC, Prefect, W&B and what they need."
	@echo "That is a download of several hundred MB and 2.5 GB on disk, which takes minutes."
	@$(LOCKED) sh -c 'test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)'
	@$(call INSTALL,cpu)
	@$(LOCKED) $(PIP) -qq --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.deepspeed: requirements/deepspeed.txt $(VENV)/.cpu
	@DS_BUILD_OPS=0 DS_SKIP_CUDA_CHECK=1 $(LOCKED) $(PIP) -qq --no-deps --no-build-isolation --requirement requirements/deepspeed.txt
	@touch $@

$(VENV)/.dev: requirements/dev.txt requirements/workers.txt requirements/cluster.txt $(VENV)/.cpu $(VENV)/.deepspeed
	@echo "installing what tests and checks need"
	@$(call INSTALL,dev,requirements/cpu.txt requirements/workers.txt requirements/cluster.txt)
	@touch $@
