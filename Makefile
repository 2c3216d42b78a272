# Every target needs Python 3.10 or newer and a package index, nothing else.
#
#   make quickstart                  in a new environment, .venv
#   make test VENV=$VIRTUAL_ENV      in an environment of yours (a torch 2.9 or newer in it is kept)
#   make test PYTHON=python3.12      with another interpreter for .venv
#   make test ARGS="-k split"        with arguments for what the target runs

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=
TORCH ?= torch==2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

# Scripts are run as `$(PY) $(BIN)/name`: their first line names the folder the environment was made in, which may move.
BIN := $(abspath $(VENV))/bin
PY := $(BIN)/python
# Named after this checkout, so that another one's editable install in the same environment is not taken for ours.
STAMP := $(abspath $(VENV))/installed$(subst /,-,$(CURDIR))

.PHONY: help venv torch quickstart test lint types bench
.DEFAULT_GOAL := help

help:
	@echo "make quickstart | test | lint | types | bench | venv   (the variables are explained at the top of the Makefile)"

venv: $(STAMP)

$(PY):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 10) else \
	  "living_moe needs Python 3.10 or newer, got %d.%d; name another with PYTHON=." % v[:2])'
	$(PYTHON) -m venv "$(VENV)"

$(STAMP): setup.cfg pyproject.toml | $(PY)
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip
	@$(PY) -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)' 2>/dev/null \
	  || $(MAKE) --no-print-directory torch
	$(PY) -m pip install --editable '.[dev]'
	@touch "$@"

# PyPI's Linux wheel brings gigabytes of CUDA. Without an NVIDIA driver the CPU wheel is asked for first, unless pip has
# been told where to look: then that is where torch comes from.
torch: $(PY)
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null \
	  && ! $(PY) -m pip config list | grep -qE 'index-url|find-links|no-index' \
	  && $(PY) -m pip install --retries 1 --timeout 20 --index-url $(TORCH_CPU_INDEX) '$(TORCH)'; then :; \
	else $(PY) -m pip install '$(TORCH)' || $(PY) -m pip install 'torch>=2.9'; fi

quickstart: $(STAMP)
	$(PY) $(BIN)/living-moe quickstart $(ARGS)

# One thread a worker: two pools of spinning threads on two cores halve each other.
test: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) $(BIN)/pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The installed package, not the checkout: here the rooms are folders without their parent package. With it the benchmarks,
# which name each other, and a helper of the tests, as if those folders were on the path.
types: $(STAMP)
	rm -rf build
	$(PY) -m pip install --quiet --no-deps --target build/installed .
	test -f build/installed/living_moe/py.typed
	cd build/installed && MYPYPATH="$(CURDIR)/benchmarks:$(CURDIR)/tests" $(PY) $(BIN)/mypy \
	  --config-file "$(CURDIR)/setup.cfg" --cache-dir "$(CURDIR)/.mypy_cache" --explicit-package-bases \
	  living_moe "$(CURDIR)"/benchmarks/*.py

bench: $(STAMP)
	$(PY) benchmarks/throughput.py $(ARGS)
