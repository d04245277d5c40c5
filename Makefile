# Two commands need nothing but Python 3.11+ and git: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Where this is set, every process compiles PyTorch's sources again: twice the time of its import.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test test-all tests test-vendors lint setup clean
.DEFAULT_GOAL := demo

setup: $(VENV)/ready

# --no-compile: Python compiles what is imported, a fraction of these packages
$(VENV)/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-compile --no-deps -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

demo: setup
	$(BIN)/vbcompile demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Types are checked beside the tests: both take one core at a time.
test: setup
	+$(MAKE) --jobs=2 lint tests

# Every form of each kernel on each target
test-all:
	+$(MAKE) test FORMS=--matrix

tests: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(FORMS)

# Opt-in: our kernels through compilers of Intel's and Ascend's, and the real torch-npu; see docs/vendors/README.md
test-vendors: setup
	cd tests && ../$(BIN)/python -m vendors.software_ascend
	cd tests && ../$(BIN)/python -m vendors.triton_ascend
	cd tests && ../$(BIN)/python -m vendors.triton_intel

clean:
	rm -rf $(VENV) build dist *.egg-info
