# make demo: set up .venv and run the main job (supervised warm start, then PPO) on this machine.
# make test: set up .venv and run the tests. make lint: ruff and mypy.

VENV ?= .venv
PYTHON ?= python3
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check -q
# Without an NVIDIA driver: the tested CPU versions. With one: what pyproject.toml admits.
CONSTRAINTS := $(if $(shell command -v nvidia-smi 2>/dev/null),,-c constraints-cpu.txt)
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test lint docs clean

demo: $(VENV)/installed
	$(VENV)/bin/python examples/demo/run.py $(ARGS)

test: $(VENV)/installed-dev
	$(VENV)/bin/python -m pytest $(ARGS)

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

docs: $(VENV)/installed
	$(VENV)/bin/python -m verl.config.docs

# torch first and by itself: a range that admits a newer one would pull a CUDA build. TORCH_INDEX: where torch is from.
$(VENV)/installed: pyproject.toml constraints-cpu.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(if $(CONSTRAINTS),torch==$(shell sed -n 's/^torch==//p' constraints-cpu.txt),"torch>=2.11")
	$(PIP) install $(CONSTRAINTS) -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) install $(CONSTRAINTS) -e ".[dev,data,gguf]"
	touch $@

clean:
	rm -rf $(VENV) outputs build *.egg-info
