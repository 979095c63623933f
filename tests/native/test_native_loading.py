"""The compiled module: found, refused with a reason, sharing PyTorch's threads; never an error at import."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import moe3d
from moe3d import _build
from moe3d.ops import native
from moe3d.ops.types import HeadOptions, HeadTensors
from support.problems import random_problem

HAS_NATIVE = _build.native().module is not None
needs_native = pytest.mark.skipif(not HAS_NATIVE, reason=_build.native().reason or "")


@pytest.fixture
def fresh():
    """Forgets what was loaded, before and after."""
    for cached in (_build.native, _build.record):
        cached.cache_clear()
    yield
    for cached in (_build.native, _build.record):
        cached.cache_clear()


def test_tensors_elsewhere_are_not_the_cpu_backends():
    options = HeadOptions(2, 2, 1.0, "exp", None, "mean", 0.3, False, 0.0, "auto")
    elsewhere = HeadTensors(*[torch.empty(1, device="meta")] * len(HeadTensors._fields))
    reason = native.CPUBackend().unsupported(elsewhere, options)
    assert reason == "x is on 'meta', and this backend works on the CPU"


def test_a_kernels_status_is_an_error_that_says_who_failed():
    native.check_status(0, "anybody")
    with pytest.raises(MemoryError, match=r"^the cpu backend ran out of memory$"):
        native.check_status(1, "the cpu backend")
    with pytest.raises(RuntimeError, match=r"^the cpu backend failed: status 99$"):
        native.check_status(99, "the cpu backend")


@needs_native
def test_there_is_one_openmp_runtime_in_the_process():
    script = """
import torch, moe3d
from moe3d import _build
head = moe3d.MoEHead(16, backend="cpu")
head(torch.randn(1, 16, 9, 9), (16, 16))
assert _build.native().module.has_thread_runtime()
print(open("/proc/self/maps").read())
"""
    path = os.pathsep.join([str(Path(moe3d.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", script]  # of its own: other tests load libraries that bring a runtime
    maps = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    mapped = {line.split()[-1] for line in maps.splitlines() if "/" in line}
    assert len({path for path in mapped if re.search(r"/lib(gomp|omp|iomp5)[-.\w]*\.so", path)}) == 1


@needs_native
def test_the_module_shows_no_symbol_but_its_own():
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    listing = subprocess.run(
        [nm, "-D", "--defined-only", _build.native().module.__file__], capture_output=True, text=True, check=True
    ).stdout
    functions = {line.split()[-1] for line in listing.splitlines() if line.split()[-2] in "TW"}
    assert functions <= {"PyInit__native", "_init", "_fini"}


def test_a_module_of_another_version_is_refused(monkeypatch, fresh):
    if not HAS_NATIVE:
        pytest.skip("no C++ part")
    monkeypatch.setattr(_build, "__version__", "9.9.9")
    assert "was built for moe3d" in moe3d.backends()["cpu"]
    with pytest.raises(
        RuntimeError, match="backend 'cpu' cannot run here because its C\\+\\+ part was built for moe3d"
    ):
        random_problem().run(backend="cpu")
    assert random_problem().run().prediction.isfinite().all()  # "auto" goes on without it


def test_a_module_that_cannot_be_loaded_tells_why(monkeypatch, fresh, tmp_path):
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"not a shared object")
    monkeypatch.setattr(_build, "_find", lambda name: broken if "native" in name else None)
    assert re.search(r"could not be loaded: .*_native\.so", moe3d.backends()["cpu"])


def test_a_build_that_failed_tells_its_reason(monkeypatch, fresh, tmp_path):
    record = tmp_path / _build.RECORD
    record.write_text('{"cpu": "its build failed: no compiler", "cuda": null}')
    monkeypatch.setattr(_build, "_find", lambda name: record if name == _build.RECORD else None)
    assert "no compiler" in moe3d.backends()["cpu"]


def test_an_installed_package_takes_no_module_of_another_one(monkeypatch, fresh, tmp_path):
    """As there may be one where an environment sees the system's packages, too."""
    (tmp_path / _build.RECORD).write_text('{"cpu": "it was built with MOE3D_BUILD=off", "cuda": null}')
    monkeypatch.setattr(_build, "_PACKAGE", tmp_path)
    assert "MOE3D_BUILD=off" in moe3d.backends()["cpu"]


def test_another_interpreters_module_is_left_alone(monkeypatch, fresh, tmp_path):
    ours = tmp_path / f"_native{EXTENSION_SUFFIXES[0]}"
    (tmp_path / "_native.a-first.so").write_bytes(b"")  # as beside ours in a folder that two versions of Python share
    (tmp_path / _build.RECORD).write_text('{"cpu": null, "cuda": null}')
    monkeypatch.setattr(_build, "_PACKAGE", tmp_path)
    assert "not built for this Python" in _build.native().reason
    ours.write_bytes(b"")
    _build.native.cache_clear()
    assert f"{ours.name} could not be loaded" in _build.native().reason


@needs_native
def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv(native.ISA_VARIABLE, "avx9000")
    assert "avx9000" in moe3d.backends()["cpu"]


def test_importing_the_package_does_not_load_the_module():
    code = "import sys, moe3d; sys.exit(moe3d._build.native.cache_info().currsize)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
