PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-slow lint bench table reference clean

demo: $(READY)
	$(BIN)/dapo-edge demo

test: $(READY)
	$(BIN)/python -m pytest

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/spine.py --full-size
	$(BIN)/python benchmarks/metrics.py

table: $(READY)
	$(BIN)/python benchmarks/surfaces_v1.py

reference: $(READY)
	$(BIN)/python -m dapo_edge.training.pretrain .cache/reference

$(READY): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,build,dev]'
	touch $(READY)

clean:
	rm -rf .venv build *.egg-info
