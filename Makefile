# make help lists the targets. Needed on the machine: python3 >= 3.10 with venv and headers, a C++20
# compiler (g++ or CXX=...), make. Everything else goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD := build/pip
TORCH := $(shell grep '^torch==' constraints.txt)
# What pyproject.toml says the package needs, quoted.
REQUIREMENTS := $(shell sed -n '/^dependencies = \[/,/^\]/s/^ *\("[^"]*"\),$$/\1/p' pyproject.toml)

# The compiler that make was told to use is the one that CMake uses; cmake and ninja are in .venv.
export CXX
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BUILD_STAMP := $(VENV)/.stamp-build
PACKAGE_STAMP := $(VENV)/.stamp-package
LINT_STAMP := $(VENV)/.stamp-lint
TEST_STAMP := $(VENV)/.stamp-test
BENCH_STAMP := $(VENV)/.stamp-bench
SOURCES := CMakeLists.txt pyproject.toml $(wildcard README.md LICENSE) \
  $(shell find csrc python -type f -not -name '*.pyc' -not -name '*.so' 2>/dev/null)
CXX_FILES = $(shell find csrc examples tests/cpp tests/fuzz -name '*.cpp' -o -name '*.hpp' \
  -o -name '*.h' -o -name '*.c' \
  -o -name '*.inc' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo install test test-slow test-all test-cpp test-arm build-tests lint bench bench-serving sanitize \
  fuzz fuzz-networks wheel wheel-arm gpu-build gpu-test gpu-test-kernels gpu-test-python gpu-sanitize gpu-bench clean distclean
.NOTPARALLEL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help:
	@echo "make demo       train, compress and run a small CNN; prints the tables (sets up .venv first)"
	@echo "make test       the C++ and the fast Python tests"
	@echo "make test-all   every test, the slow and the heavy ones too"
	@echo "make test-arm   the C++ tests on three emulated ARM processors (cross compiler and qemu of the system)"
	@echo "make lint       ruff, mypy, clang-format"
	@echo "make bench      speed beside torch, ONNX Runtime and OpenVINO, checked results first; K=resnet18: a part"
	@echo "make bench-serving  the server beside the same server on torch and OpenVINO"
	@echo "make sanitize   C++ tests under the address, undefined-behaviour and thread sanitizers"
	@echo "make fuzz       ten minutes of fuzzing of what reads files, with clang's libFuzzer if it is there"
	@echo "make fuzz-networks  random networks against their float models; MINUTES=10 SEED=0"
	@echo "make wheel      dist/: a wheel for other machines, tested in an empty environment, and the sdist"
	@echo "make wheel-arm  dist/: libadalayer for 64-bit ARM as an archive, cross-compiled; ROOT=...: a wheel, too"
	@echo "make gpu-test   builds for the GPU at hand and tests there; gpu-bench: speed; no .venv, no network"
	@echo "make install    only set up .venv with the package and what lint and the tests need"
	@echo "make clean      remove build products and caches (distclean: .venv too)"

demo: $(PACKAGE_STAMP)
	$(BIN)/adalayer demo

install: $(PACKAGE_STAMP) $(LINT_STAMP) $(TEST_STAMP)

# Side by side, a process per core; each of them with one thread, or they would fight for the cores.
# (Tests of threads set their number themselves.)
SIDE_BY_SIDE := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
MARKS ?= not slow
test: test-cpp $(TEST_STAMP)
	$(SIDE_BY_SIDE) -m "$(MARKS)"

test-slow: build-tests $(TEST_STAMP)
	$(SIDE_BY_SIDE) -m "slow and not heavy"

# Models of one structure are exported once elsewhere (tests/conftest.py).
test-all: test-cpp $(TEST_STAMP)
	ADALAYER_FRESH_EXPORTS=1 $(BIN)/python -m pytest

test-cpp: build-tests
	$(BIN)/ctest --test-dir $(BUILD) --verbose -j 2

# Needs no .venv; skipped with a sentence where the cross compiler or the emulator is missing.
test-arm:
	@.ci/arm $(if $(QUICK),quick,$(CPU))

# In the folder that the package was built in, whose object files they share. Python tests load the
# GPU in software that is among them.
build-tests: $(PACKAGE_STAMP)
	$(BIN)/cmake --build $(BUILD)

# With the package, because mypy reads the types of what it depends on.
lint: $(PACKAGE_STAMP) $(LINT_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

# All of it writes docs/performance.md; a part (make bench K=resnet18) only prints, and keeps its
# samples in a file of its own. STRICT=1: a missed target fails the run.
BENCH := $(BIN)/python -m pytest bench --benchmark-columns=median,iqr,min,rounds \
  --benchmark-group-by=group --benchmark-sort=name $(if $(STRICT),--strict-targets)
bench: $(PACKAGE_STAMP) $(BENCH_STAMP)
ifdef K
	$(BENCH) -k "$(K)" --results build/bench/part.json
else
	$(BENCH)
	$(BIN)/python -m bench.report
endif

bench-serving: $(PACKAGE_STAMP) $(BENCH_STAMP)
	$(BIN)/python -m bench.serving.load

# In the build of the sanitizers as it is, whatever the compiler: tests/fuzz/driver.cpp.
FUZZ_SECONDS ?= 60

# Some kernels place memory where older thread sanitizers do not expect it; without address
# randomisation they agree. Where setarch is missing or forbidden, the tests run as they are.
# Fuzzing takes one core and its time; the next build has the others meanwhile.
sanitize: $(BUILD_STAMP)
	$(BIN)/cmake --preset asan-ubsan
	$(BIN)/cmake --build --preset asan-ubsan
	$(BIN)/ctest --preset asan-ubsan
	$(BIN)/cmake --preset tsan
	@.ci/fuzz build/asan-ubsan $(FUZZ_SECONDS) & fuzzing=$$!; \
	  $(BIN)/cmake --build --preset tsan; built=$$?; \
	  wait $$fuzzing && exit $$built
	@if setarch "$$(uname -m)" -R true 2>/dev/null; then \
	  setarch "$$(uname -m)" -R $(BIN)/ctest --preset tsan; \
	else \
	  $(BIN)/ctest --preset tsan; \
	fi

# libFuzzer where clang has it (FUZZ_CXX=... names another compiler), which is built with it first;
# then what Python reads, guided by atheris where there is a wheel of it.
FUZZ_MINUTES ?= 10
FUZZ_CXX ?= $(firstword $(foreach c,clang++ clang++-19 clang++-18 clang++-17 clang++-16 clang++-15 \
  clang++-14,$(if $(shell command -v $(c) 2>/dev/null),$(c))) $(CXX))
fuzz: $(PACKAGE_STAMP)
	CXX="$(FUZZ_CXX)" $(BIN)/cmake --preset fuzz
	$(BIN)/cmake --build --preset fuzz
	.ci/fuzz build/fuzz $$(($(FUZZ_MINUTES) * 48))
	@$(INSTALL) "adalayer_native[fuzz]" || \
	  echo "no atheris for this Python: without coverage"
	$(BIN)/python tests/fuzz/fuzz_python.py --seconds $$(($(FUZZ_MINUTES) * 12))

# Findings go to build/fuzz-networks; the last line says with which SEED to go on. FILES=...: judges
# findings once more.
fuzz-networks: $(PACKAGE_STAMP) $(TEST_STAMP)
	PYTHONPATH=tests $(BIN)/python -W ignore -m fuzz_networks --minutes $(or $(MINUTES),10) \
	  --seed $(or $(SEED),0) $(FILES)

wheel: $(BUILD_STAMP)
	.ci/wheel

# ROOT=...: a wheel, too, for the CPython whose files are in that folder (.ci/wheel-arm says how).
wheel-arm: $(BUILD_STAMP)
	.ci/wheel-arm $(ROOT) $(SITE)

# ---- on a machine with an NVIDIA GPU ------------------------------------------------------------
# These use the machine's own python3 with torch, and nothing is downloaded: cmake, ninja, nvcc,
# pybind11 and pytest have to be there.

GPU_PYTHON ?= python3
GPU_BUILD := build/gpu
GPU_SITE := $(CURDIR)/$(GPU_BUILD)/site
GPU_ENV := PYTHONPATH=$(GPU_SITE)
# Machine code for the device at hand alone; 90a where it is 9.0. Without a device: ARCH=90a-real.
ARCH ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | \
  sed -e 's/\.//' -e 's/^90$$/90a/' -e 's/$$/-real/')

gpu-build:
	@command -v nvcc >/dev/null || test -x /usr/local/cuda/bin/nvcc || \
	  { echo "The CUDA compiler nvcc was not found."; exit 1; }
	@test -n "$(ARCH)" || { echo "nvidia-smi names no GPU; say which, as in ARCH=90a-real"; exit 1; }
	@mkdir -p build
	cmake -S . -B $(GPU_BUILD) -G Ninja -DCMAKE_BUILD_TYPE=Release -DADALAYER_CUDA=ON \
	  -DADALAYER_BUILD_PYTHON=ON -DADALAYER_BUILD_TESTS=ON -DCMAKE_CUDA_ARCHITECTURES=$(ARCH) \
	  -DPython_EXECUTABLE="$$(command -v $(GPU_PYTHON))" >$(GPU_BUILD).log 2>&1 || \
	  { cat $(GPU_BUILD).log; exit 1; }
	cmake --build $(GPU_BUILD) --target _C adalayer_cuda test_cuda_device
	rm -rf $(GPU_SITE) && mkdir -p $(GPU_SITE)
	cp -r python/adalayer_native $(GPU_SITE)/
	cp $(GPU_BUILD)/_C*.so $(GPU_BUILD)/csrc/cuda/libadalayer_cuda.so $(GPU_SITE)/adalayer_native/

# Kernels first, each group by itself, so that a failure says where; then Python; then the sanitizer.
gpu-test: gpu-test-kernels gpu-test-python gpu-sanitize

# A process for each: after a fault a process can do nothing more on its GPU.
GPU_GROUPS := a_device every_width few_channels large_kernels tiles_that every_choice random_shapes \
  sparse_weights every_operation a_graph batches_of every_way in_parts streams residual profiles \
  quantizing begins_anywhere errors
gpu-test-kernels: gpu-build
	@failed=; for group in $(GPU_GROUPS); do \
	  timeout 120 $(GPU_BUILD)/csrc/cuda/test_cuda_device $$group || failed="$$failed $$group"; \
	done; test -z "$$failed" || { echo "FAILED:$$failed"; exit 1; }

gpu-test-python: gpu-build
	@failed=; for file in tests/test_gpu_ops.py tests/test_gpu_engine.py; do \
	  $(GPU_ENV) $(GPU_PYTHON) -m pytest -p no:cacheprovider -W default -q --tb=short \
	    --maxfail=20 --durations=5 -m gpu $$file || failed="$$failed $$file"; \
	done; test -z "$$failed" || { echo "FAILED:$$failed"; exit 1; }

# (racecheck is slow: the tests whose kernels share memory between threads.)
gpu-sanitize: gpu-build
	@if command -v compute-sanitizer >/dev/null; then \
	  compute-sanitizer --tool memcheck --error-exitcode 9 $(GPU_BUILD)/csrc/cuda/test_cuda_device \
	    every_width large_kernels few_channels sparse_weights every_operation graph quantizing && \
	  compute-sanitizer --tool racecheck --error-exitcode 9 $(GPU_BUILD)/csrc/cuda/test_cuda_device \
	    every_width every_operation few_channels; \
	else \
	  echo "compute-sanitizer was not found: left out"; \
	fi

# ONLY=linears: some sections; MINUTES: of the whole (bench/gpu.py). Writes docs/performance.md.
gpu-bench: gpu-build
	$(GPU_ENV) $(GPU_PYTHON) -m bench.gpu --minutes $(or $(MINUTES),8) $(if $(ONLY),--only $(ONLY))
	$(GPU_ENV) $(GPU_PYTHON) -m bench.gpu_report

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(PACKAGE_STAMP) python/adalayer_native/*.so
	find python tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV)

# ---- set-up -----------------------------------------------------------------------------------

# One clear sentence each for what a bare machine may lack, before anything is downloaded.
define check_machine
@command -v "$(PYTHON)" >/dev/null 2>&1 || \
  { echo "adalayer_native needs Python 3.10 or newer, and '$(PYTHON)' was not found (set PYTHON=...)."; exit 1; }
@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
  { echo "adalayer_native needs Python 3.10 or newer, but '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1) (set PYTHON=...)."; exit 1; }
@"$(PYTHON)" -c 'import ensurepip, venv' >/dev/null 2>&1 || \
  { echo "Python's venv module is missing; install it (on Debian and Ubuntu: python3-venv)."; exit 1; }
@"$(PYTHON)" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || \
  { echo "The headers of Python (Python.h) are missing; install them (on Debian and Ubuntu: python3-dev)."; exit 1; }
@command -v $(firstword $(CXX)) >/dev/null 2>&1 || \
  { echo "No C++ compiler: '$(CXX)' was not found; install g++ (on Debian and Ubuntu: g++) or set CXX=..."; exit 1; }
@printf '#include <concepts>\nint main() {}\n' | $(CXX) -std=c++20 -x c++ -fsyntax-only - >/dev/null 2>&1 || \
  { echo "The C++ compiler '$(CXX)' has no C++20; g++ 11 or newer is needed (or set CXX=...)."; exit 1; }
endef

INSTALL := $(BIN)/python -m pip install -q -c constraints.txt

$(BUILD_STAMP): constraints.txt pyproject.toml
	$(check_machine)
	@test -x $(BIN)/python || { echo "Creating $(VENV)"; "$(PYTHON)" -m venv $(VENV); }
	$(INSTALL) --upgrade pip scikit-build-core pybind11 cmake ninja
	@touch $@

# A wheel, installed as a user would: the demo and the tests run what a user would get, and a file that
# was forgotten in the package fails here. The build folder is kept, so that a changed file recompiles
# alone. It is configured for the C++ tests, too, but only what the wheel holds is built.
# Compiling needs no torch: that is downloaded meanwhile (and not left behind by an interrupted make:
# what a shell starts in the background does not hear of it).
WHEEL = $(BIN)/python -m pip wheel -q --no-deps --no-build-isolation --wheel-dir $(BUILD)/wheel \
  --config-settings=build-dir=$(BUILD) \
  --config-settings=build.targets=wheel_contents \
  --config-settings=cmake.define.ADALAYER_BUILD_TESTS=ON .
$(PACKAGE_STAMP): $(BUILD_STAMP) $(SOURCES)
	$(check_machine)
	@echo "Compiling adalayer_native, some minutes of two cores; $(TORCH) and what else it needs are installed meanwhile (once; a large download)"
	@rm -rf $(BUILD)/wheel
	@{ $(INSTALL) "$(TORCH)" $(REQUIREMENTS) && echo "$(TORCH) is installed"; } & installing=$$!; \
	  .ci/watch-build $(BUILD) wheel_contents & watching=$$!; \
	  trap 'kill $$installing $$watching' INT TERM; \
	  $(WHEEL); built=$$?; \
	  kill $$watching; \
	  wait $$installing && exit $$built
	@$(INSTALL) --no-deps --force-reinstall $(BUILD)/wheel/*.whl
	@touch $@

# The package is installed already, so that only what an extra asks for is added; torch satisfies
# every requirement on it and stays. torchvision is for the networks that tests and benchmarks take from
# it. Without its dependencies, because it would replace the CPU build of torch; its Python code works
# beside any.
$(LINT_STAMP): constraints.txt pyproject.toml | $(PACKAGE_STAMP)
	@echo "Installing the tools of a developer"
	$(INSTALL) "adalayer_native[dev]"
	@touch $@

$(TEST_STAMP): constraints.txt pyproject.toml | $(PACKAGE_STAMP)
	@echo "Installing what the tests need"
	$(INSTALL) --no-deps torchvision
	$(INSTALL) "adalayer_native[dev,serve]"
	@touch $@

$(BENCH_STAMP): constraints.txt pyproject.toml | $(PACKAGE_STAMP)
	@echo "Installing the runtimes that the benchmarks compare with"
	$(INSTALL) --no-deps torchvision
	$(INSTALL) "adalayer_native[bench,serve]"
	@touch $@
