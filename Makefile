PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo rigs test test-slow test-gpu lint bench bench-gpu peers table reference clean

demo: $(READY)
	$(BIN)/dapo-edge demo

# Servers, emulators and SDKs for the tests of cameras, from Debian's packages and by pip. Needs root.
rigs: $(READY)
	tests/rigs/install.sh $(BIN)/python

# Two processes share the tests that only compute; those that measure time or hold cameras follow alone.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not gpu and not alone'
	$(BIN)/python -m pytest -m 'alone and not slow and not gpu' --durations 10

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# By the Python that has torch with CUDA, or TensorRT and pycuda: make test-gpu PYTHON=python3. A GPU machine's own Python
# has not all that the other tests and their conftest need, and its packages warn of what they like.
test-gpu:
	$(PYTHON) -m pytest tests/gpu -m gpu -rs -W default --confcutdir=tests/gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/spine.py --full-size
	$(BIN)/python benchmarks/metrics.py
	$(BIN)/python benchmarks/int8.py
	$(BIN)/python benchmarks/line.py
	$(BIN)/python benchmarks/outside.py
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/roofline.py --full-size
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/guard.py

bench-gpu:
	$(PYTHON) benchmarks/gpu.py $(ARGS)

# What benchmarks/peers.py compares with. anomalib has an environment of its own: it brings its own torch and open_clip.
peers: $(READY) .venv-peers/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[peers]'

.venv-peers/.ready:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check 'anomalib[openvino,cpu,clip]==2.7.0'
	touch $@

table: $(READY)
	$(BIN)/python benchmarks/surfaces_v1.py

reference: $(READY)
	$(BIN)/python -m dapo_edge.training.pretrain .cache/reference

$(READY): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,build,dev]'
	touch $(READY)

clean:
	rm -rf .venv .venv-peers build *.egg-info
