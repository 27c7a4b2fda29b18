# The tasks: setup, lint, test, check, docs, dist, bench, bench-storage, demo. Each sets up .venv from the lock file first.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup lint test check docs dist bench bench-storage demo

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# Two files at a time: most of the tests of the cluster wait for Ray.
test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy benchmarks/*.py
	$(BIN)/lint-imports

check: lint docs dist

# Strict, which it is not where it is told to be quiet. The theme tells of its successor at each run.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# What a package index gets, and whether it takes it.
dist: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist . >/dev/null
	$(BIN)/twine check --strict dist/*

demo: setup
	rm -rf demo-merge
	$(BIN)/raymeld demo demo-merge

# make bench MODEL=7B DIR=/a/disk/with/room
MODEL ?= 4B
DIR ?= /tmp/raymeld-bench
bench: setup
	$(BIN)/python benchmarks/bench.py --model $(MODEL) --dir $(DIR)

# The same from S3 to S3, and from a hub over plain HTTP, on servers that it starts; 1.8B unless
# MODEL is given.
CHOSEN = $(if $(filter command line,$(origin MODEL)),--model $(MODEL))
bench-storage: setup
	$(BIN)/python benchmarks/storage.py --dir $(DIR) $(CHOSEN)
	$(BIN)/python benchmarks/storage.py --link 80 --dir $(DIR) $(CHOSEN)
	$(BIN)/python benchmarks/hub.py --dir $(DIR) $(CHOSEN)
