# make repro   the papers' tables and figures, in about 20 minutes on two cores, and a report with a verdict for each claim
# make repro-full  the same with more seeds, tokens and steps: in about an hour and a quarter
# make test    the whole test suite
# make lint    style and format
# make bench   time what this machine can run, against what is installed
# make gpu     GPU tests, then benchmarks, on the machine's own Python: nothing is installed
# make gpu-65b what a training step of LLaMA-65B's shapes takes, and of 33B's (48 GB, 24 GiB are aimed at); likewise
#
# All but the last two make .venv first. PYTHON=python3.12 chooses the interpreter, of .venv or for `make gpu`.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help repro repro-full test gpu-test lint format bench gpu gpu-65b has-gpu clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras: installed again only when what it depends on has changed.
$(VENV)/.%: $(BIN)/python setup.py constraints.txt
	@echo "Installing into $(VENV) with the extra [$*] (torch is large: minutes on a slow line) ..."
	$(PIP) -e ".[$*]"
	@touch $@

repro: $(VENV)/.repro
	$(BIN)/python -m paper_repro

repro-full: $(VENV)/.repro
	$(BIN)/python -m paper_repro --full

test: $(VENV)/.test
	$(BIN)/python -m pytest

gpu-test: $(VENV)/.test
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m gpu

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks

# A test that fails does not keep the rest from being timed: the benchmarks check each result themselves.
gpu: has-gpu
	@failed=0; \
	TRITON_INTERPRET=0 $(PYTHON) -m pytest -m gpu -q || failed=1; \
	$(PYTHON) -m benchmarks || failed=1; \
	exit $$failed

gpu-65b: has-gpu
	@failed=0; \
	$(PYTHON) -m paper_repro memory --model 33b --run || failed=1; \
	$(PYTHON) -m paper_repro memory --model 65b --run || failed=1; \
	exit $$failed

has-gpu:
	@$(PYTHON) -c "import torch; raise SystemExit(not torch.cuda.is_available())" || \
		{ echo "make gpu: $(PYTHON) must have torch and see a CUDA GPU, and does not" >&2; exit 1; }

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
