# Two commands do everything, set-up included:  make demo,  make test.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# The oldest runtime runs on the oldest Python where there is one that starts.
OLDEST_PYTHON := $(shell for p in python3.10 $(PYTHON); do $$p -c "" 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check
# Two at a time, and the tests of a file in one process, so that they share what they set up.
PARALLEL := -n 2 --dist loadfile
SUITE := -m pytest $(PARALLEL) device_tests/device -p no:cacheprovider -m "not slow and not kills"

# The page of `edgelocal report` is drawn by a real browser. Where one can be installed, the tests insist on it.
BROWSER := $(strip $(foreach name,chromium chromium-browser google-chrome google-chrome-stable,$(shell command -v $(name))))
CAN_INSTALL := $(and $(filter 0,$(shell id -u)),$(shell command -v apt-get))

.PHONY: demo test setup lint device-suites browser slow memory matrix aarch64 clean artifacts artifact-tests
.PHONY: gpu gpu-prepare gpu-suite gpu-runtime gpu-parity gpu-parity-tf32 gpu-parity-bf16 gpu-gradients gpu-bench gpu-learning gpu-pages

demo: $(VENV)/ready
	rm -rf out/demo
	mkdir -p out
	$(BIN)/edgelocal demo --out out/demo

test: lint device-suites artifact-tests browser
	$(if $(BROWSER)$(CAN_INSTALL),EDGELOCAL_REQUIRE_BROWSER=1) $(BIN)/python -m pytest $(PARALLEL)

setup: $(VENV)/ready

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The device side in environments as a device has them: no torch, no onnx; the oldest supported runtime, and the
# training build of ONNX Runtime. The newest runs with the whole suite.
device-suites: .venv-oldest/ready .venv-training/ready
	.venv-oldest/bin/python $(SUITE)
	.venv-training/bin/python $(SUITE)

browser:
	$(if $(BROWSER),,$(if $(CAN_INSTALL),@apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core > /dev/null))

slow: $(VENV)/ready
	$(BIN)/python -m pytest -m slow

# The promises M1 and M2 over the zoo: every network, three budgets, 200 steps, with and without RLIMIT_DATA. Hours.
memory: $(VENV)/ready
	mkdir -p out/memory
	$(BIN)/python benchmarks/memory_promises.py out/memory --json out/memory/result.json

# The device suite and trainings on every pair of Python and ONNX Runtime; needs python3.10 to python3.13 on PATH.
matrix: $(VENV)/ready
	$(BIN)/nox

# The same 20 steps on x86-64 and under an emulated 64-bit Arm userland; docs/aarch64.md says what it needs.
aarch64:
	PYTHON=$(PYTHON) benchmarks/aarch64.sh out/aarch64

# What makes artifacts for ONNX Runtime's training build, with PyTorch beside it.
artifact-tests: .venv-artifacts/ready
	.venv-artifacts/bin/python -m pytest $(PARALLEL) device_tests/export/test_artifacts.py -p no:cacheprovider

# Both runtimes side by side on five networks (docs/decisions/0013). Not part of `test`: an hour.
artifacts: artifact-tests
	.venv-artifacts/bin/python benchmarks/runtimes.py

# On a machine with an NVIDIA GPU (docs/cuda.md). Every stage goes on where it ended: `make gpu-bench MINUTES=8` again and
# again. GPU_PYTHON=python3 takes an interpreter that has all packages, and installs nothing.
GPU_PYTHON ?= .venv-gpu/bin/python
GPU_READY := $(if $(filter .venv-gpu/bin/python,$(GPU_PYTHON)),.venv-gpu/ready)
GPU := PYTHONPATH=$(CURDIR)$(addprefix :,$(PYTHONPATH)) $(GPU_PYTHON)
GPU_PARITY := benchmarks/parity.py --device cuda --result out/cuda/result.json --optimizers "sgd nesterov,adamw" \
	--networks resnet20,resnet32,vgg11,mobilenetv2,vit,mlp
CUDA ?= cuda13# or cuda12, for older drivers
MINUTES ?= 0
EPOCHS ?= 30
GPU_LEARNING := benchmarks/learning_full.py $(CIFAR) --epochs $(EPOCHS) --minutes $(MINUTES)

gpu:
	$(MAKE) gpu-suite
	$(MAKE) gpu-runtime
	$(MAKE) gpu-parity
	$(MAKE) gpu-parity-tf32
	$(MAKE) gpu-parity-bf16
	$(MAKE) gpu-gradients
	$(MAKE) gpu-bench
	$(MAKE) gpu-learning

# What needs no GPU: the bundles, and with CIFAR=... the unpacked images.
gpu-prepare: $(GPU_READY)
	$(GPU) benchmarks/cuda.py --prepare
	$(if $(CIFAR),$(GPU) $(GPU_LEARNING) --prepare)

gpu-suite: $(GPU_READY)
	EDGELOCAL_REQUIRE_GPU=1 $(GPU) -m pytest device_tests/device/test_gpu.py device_tests/device/test_gpu_training.py \
		-p no:cacheprovider -s

# The device suite on the CPU of this runtime: a build for CUDA must do that as well as any.
gpu-runtime: $(GPU_READY)
	$(GPU) $(SUITE)

gpu-parity: $(GPU_READY)
	$(GPU) $(GPU_PARITY) --minutes $(MINUTES)
	$(MAKE) gpu-pages

gpu-parity-tf32: $(GPU_READY)
	$(GPU) $(GPU_PARITY) --minutes $(MINUTES) --tf32
	$(MAKE) gpu-pages

gpu-parity-bf16: $(GPU_READY)
	$(GPU) $(GPU_PARITY) --minutes $(MINUTES) --bf16
	$(MAKE) gpu-pages

gpu-gradients: $(GPU_READY)
	$(GPU) benchmarks/cuda_gradients.py --device cuda --write
	$(MAKE) gpu-pages

gpu-bench: $(GPU_READY)
	$(GPU) benchmarks/cuda.py --minutes $(MINUTES)
	$(MAKE) gpu-pages

gpu-learning: $(GPU_READY)
	$(GPU) $(GPU_LEARNING)
	$(MAKE) gpu-pages

gpu-pages: $(GPU_READY)
	$(GPU) benchmarks/cuda.py --write > /dev/null
	$(GPU) benchmarks/learning_full.py --write

.venv-gpu/ready: pyproject.toml
	@echo "Installing into .venv-gpu (PyTorch and ONNX Runtime with CUDA: several GB)"
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python $(PIP) --editable ".[export,$(CUDA),image,test]"
	touch $@

$(VENV)/ready: pyproject.toml constraints/newest.txt
	@echo "Installing into $(VENV) (PyTorch and all: some 1.4 GB, minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) --constraint constraints/newest.txt --editable ".[export,runtime,image,demo,dev]"
	touch $@

.venv-oldest/ready: pyproject.toml constraints/oldest.txt
	$(OLDEST_PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python $(PIP) --constraint constraints/oldest.txt --editable ".[image,test]" onnxruntime
	touch $@

.venv-training/ready: pyproject.toml constraints/training.txt
	$(PYTHON) -m venv .venv-training
	.venv-training/bin/python $(PIP) --constraint constraints/training.txt --editable ".[image,test]" onnxruntime-training-cpu
	touch $@

.venv-artifacts/ready: pyproject.toml constraints/training.txt
	$(PYTHON) -m venv .venv-artifacts
	.venv-artifacts/bin/python $(PIP) --constraint constraints/training.txt --editable ".[export,ort-training,test]" torch==2.13.0
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-training .venv-artifacts .venv-gpu out build dist
