# Every command sets up what it needs in .venv. On a machine with a GPU the environment sees the Python packages that
# are installed already, so that their torch is used; elsewhere it gets the pinned one.

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
VGGT   ?= .external/vggt
TESTS  ?=
JOBS   ?= 2

HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
SOURCES := pyproject.toml setup.py constraints.txt $(shell find moe3d kernels csrc -type f -not -name '*.pyc' 2>/dev/null)

ifeq ($(HAS_GPU),yes)
VENV_FLAGS := --system-site-packages
PIP_FLAGS  :=
else
VENV_FLAGS :=
PIP_FLAGS  := -c constraints.txt
endif

.PHONY: demo test test-real test-export test-emulated bench gpu native-sanitize native-aarch64 lint docs dist test-dist clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(VENV)/bin/moe3d demo --out demo

test: $(VENV)/.tools
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

# The tests that need VGGT's own package (github.com/facebookresearch/vggt), checked out in $(VGGT); no skip allowed.
# VGGT=<checkout>:<StreamVGGT's checkout>/src runs those of its relatives that can be imported, too.
test-real: $(VENV)/.tools
	$(PY) -m pip install -q $(PIP_FLAGS) huggingface_hub einops
	PYTHONPATH=$(VGGT) MOE3D_NO_SKIPS=1 $(VENV)/bin/pytest -q -m "real_vggt or relatives"

# The tests of exported models, with those that compile C++ for minutes.
test-export: $(VENV)/.tools
	MOE3D_COMPILE=1 $(VENV)/bin/pytest -q tests/export

# The operation's tests, all of them, with the CUDA kernels on the emulator (csrc/test/device_host.h).
test-emulated: $(VENV)/.tools
	MOE3D_EMULATE_CUDA=1 OMP_NUM_THREADS=1 $(VENV)/bin/pytest -q -n $(JOBS) tests/ops -k cuda-cpu

# Appends to bench/results/ and draws bench/results/*.svg anew.
bench: $(VENV)/.tools
	$(VENV)/bin/pytest bench --benchmark-only --record
	$(PY) -m bench.plot

# For a machine with a GPU and no network: resumable stages, the most valuable first; elsewhere a dry run.
gpu:
	$(PYTHON) -m bench.gpu

# The C++ CPU kernels alone, under AddressSanitizer and UndefinedBehaviorSanitizer.
native-sanitize:
	rm -f build/sanitize/computed
	$(MAKE) build/sanitize/computed

build/sanitize/computed: build/sanitize/native_driver
	$< write $@

# They again, built for aarch64 and emulated: what they compute there against what they computed here. Needs Debian's
# g++-aarch64-linux-gnu and qemu-user-static.
native-aarch64: build/sanitize/computed build/aarch64/native_driver
	qemu-aarch64-static -L /usr/aarch64-linux-gnu build/aarch64/native_driver compare $<

DRIVER_sanitize := -DMOE3D_SANITIZE=ON
DRIVER_aarch64 := -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++

build/%/native_driver: $(shell find csrc -type f)
	cmake -S csrc -B build/$* -DMOE3D_DRIVER=ON $(DRIVER_$*)
	cmake --build build/$* --parallel

lint: $(VENV)/.tools
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

docs: $(VENV)/.tools
	$(PY) -m mkdocs build

# The sdist and, from it, the wheel for $(PYTHON), in dist/; then what they hold. MOE3D_BUILD=off: a wheel for every Python.
dist:
	rm -rf dist
	$(PYTHON) -m venv --clear build/release
	build/release/bin/python -m pip install -q build twine pytest
	build/release/bin/python -m build
	build/release/bin/python -m twine check --strict dist/*
	MOE3D_DIST=$(CURDIR)/dist build/release/bin/python -m pytest -q --noconftest tests/test_dist.py

# The wheel as a user gets it, in a new environment far from this checkout: first with nothing else on the PATH, no compiler
# either, then under the tests that the sdist carries, whose own copy of the package is removed.
# TESTS="tests/test_package.py tests/ops" runs some of them, JOBS=1 all in one process.
test-dist: dist
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && set -ex && \
	tar -xzf dist/*.tar.gz --strip-components 1 -C "$$folder" && cd "$$folder" && rm -r moe3d kernels && \
	$(PYTHON) -m venv $(VENV_FLAGS) .venv && \
	.venv/bin/python -m pip install -q $(PIP_FLAGS) $(CURDIR)/dist/*.whl && \
	env -i PATH="$$folder/.venv/bin" moe3d info && \
	env -i PATH="$$folder/.venv/bin" moe3d demo --out demo && \
	.venv/bin/python -m pip install -q $(PIP_FLAGS) "$$(echo $(CURDIR)/dist/*.whl)[dev]" && \
	.venv/bin/python -m pip install -q $(PIP_FLAGS) --no-deps --ignore-requires-python depth-anything-3 && \
	MOE3D_DIST=$(CURDIR)/dist OMP_NUM_THREADS=1 .venv/bin/pytest -q -n $(JOBS) --dist loadfile $(TESTS)

clean:
	rm -rf $(VENV) build dist *.egg-info demo

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)

$(VENV)/.installed: $(VENV)/bin/python $(SOURCES)
	$(PY) -m pip install -q $(PIP_FLAGS) .
	@touch $@

$(VENV)/.tools: $(VENV)/.installed
	$(PY) -m pip install -q $(PIP_FLAGS) '.[dev]'
	$(PY) -m pip install -q $(PIP_FLAGS) --no-deps --ignore-requires-python depth-anything-3  # it would bring an old numpy
	@touch $@
