# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
RUN := .venv/bin
DEMO := runs/digits
# Threads that wait asleep: awake ones slow a step tenfold where something else uses a core.
export OMP_WAIT_POLICY ?= PASSIVE

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1\t/' | expand -t 14

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(RUN)/pip install --quiet --upgrade pip
	$(RUN)/pip install --quiet -e '.[dev]'
	@touch $@

setup: .venv/installed  ## make .venv and install (the other targets do it by themselves)

demo: .venv/installed  ## train on scikit-learn's digits, sample, score and report: minutes on two CPU cores
	$(RUN)/accelerate launch scripts/train.py --config configs/digits.yaml --resume
	$(RUN)/python scripts/sample.py $(DEMO) --grid $(DEMO)/samples/grid.png
	$(RUN)/accelerate launch scripts/evaluate.py $(DEMO)
	$(RUN)/python scripts/report.py $(DEMO)
	@echo "Look at:"
	@ls -1 $(DEMO)/report.html $(DEMO)/samples/grid.png $(DEMO)/evaluation/*.md

compare: .venv/installed  ## a grid of 2 units, 2 batch sizes and 3 seeds on the digits, and its report: half an hour at most
	$(RUN)/python scripts/compare.py --config configs/digits.yaml --config configs/grids/digits.yaml
	@echo "Look at: runs/compare_digits/report.html"

bench: .venv/installed  ## measure training, sampling and scoring beside the official code's plain recipe
	$(RUN)/python scripts/benchmark.py --json runs/benchmark.json

test: .venv/installed  ## run the tests
	$(RUN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

torture: .venv/installed  ## the slow tests: kill -9 a run 120 times while it saves, train 20,000 steps, ...
	$(RUN)/python -m pytest tests/faults -m slow --capture=no

lint: .venv/installed  ## check style and types
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

coverage: .venv/installed  ## run the tests and list the lines that none of them reaches
	$(RUN)/python -m pytest --cov --cov-report=term-missing

.PHONY: help setup demo compare bench test torture lint coverage
