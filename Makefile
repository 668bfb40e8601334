# make demo   train on the data that ships with the package and rank videos for one user
# make test   lint, types, tests
# make bench  all benchmarks of a CPU, on an idle machine; BENCH=--full for the long ones (benchmarks/README.md)
# make bench-check   whether it is as fast as it was; BENCH=--store to keep what is measured as the mark
# Both make their own virtual environment in .venv the first time and reuse it afterwards.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
BENCH_READY := $(VENV)/.bench-ready

# FBGEMM is built for CPU or CUDA; take what this machine has, or say `make FBGEMM=cpu demo`.
FBGEMM ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
CPU_FBGEMM := $(if $(filter cpu,$(FBGEMM)),./packaging/fbgemm-gpu-cpu,)

# Several processes or tests on few cores: one thread each is faster than all fighting for them.
TEST_ENV := OMP_NUM_THREADS=1

.PHONY: demo test test-full lint types bench bench-check clean

demo: $(READY)
	$(BIN)/mtcl demo

test: lint types
	$(TEST_ENV) $(BIN)/pytest -n 3 --dist loadfile -m "not full"

test-full: lint types
	$(TEST_ENV) $(BIN)/pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

$(READY): pyproject.toml packaging/fbgemm-gpu-cpu/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed, this is " + sys.version'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 $(CPU_FBGEMM) -e '.[torchrec,tensorboard,balance,dev]'
	touch $@

bench: $(BENCH_READY)
	$(BIN)/python benchmarks/suite.py $(BENCH)

bench-check: $(BENCH_READY)
	$(BIN)/python benchmarks/check.py $(BENCH)

$(BENCH_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
