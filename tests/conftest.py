"""Fixtures of all tests, and the count of those that need the real ``vggt`` package and did not get it."""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for `support`, whatever the import mode

from moe3d.benchmark.case import arithmetic
from support.backends import cannot_run, runners

NO_SKIPS = "MOE3D_NO_SKIPS"  # set by `make test-real`
TAKE_MINUTES = {"test_triton_interpreter.py", "test_native_sanitized.py", "test_triton_compile.py"}


def pytest_configure(config):
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # Started in the background; what tests start would inherit it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.pluginmanager.register(RealVggtSkips(), "real-vggt-skips")


class RealVggtSkips:
    """Counts them from the reports, which reach this process from the workers of pytest-xdist, too."""

    def __init__(self):
        self.forbidden = os.environ.get(NO_SKIPS) == "1"
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report):
        if report.skipped and not hasattr(report, "wasxfail") and "real_vggt" in report.keywords:
            self.skipped.append(report.nodeid)

    def pytest_sessionfinish(self, session, exitstatus):
        if self.skipped and self.forbidden and exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if not self.skipped:
            return
        line = f"{len(self.skipped)} tests skipped because the real `vggt` package cannot be imported"
        terminalreporter.write_line(line + (f", and {NO_SKIPS}=1 forbids that" if self.forbidden else ""))


@functools.cache
def _why_no_real_vggt() -> str | None:
    try:
        importlib.import_module("vggt.models.vggt")
    except ImportError as error:
        return f"the real `vggt` package cannot be imported ({error})"
    return None


def pytest_collection_modifyitems(items):
    """What takes minutes begins first: a worker that got it last would go on alone."""
    items.sort(key=lambda item: item.path.name not in TAKE_MINUTES)


def pytest_runtest_setup(item):
    if item.get_closest_marker("real_vggt") is not None and _why_no_real_vggt():
        pytest.skip(_why_no_real_vggt())


if os.environ.get("MOE3D_EMULATE_CUDA") == "1":  # set by `make test-emulated`; before runners() looks around
    from support import emulator

    emulator.install()


@pytest.fixture(params=runners(), ids=str)
def runner(request):
    """Every (backend, device) that can run; a call that it refuses with a reason skips the test."""
    return request.param


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    try:
        return (yield)
    except RuntimeError as error:
        chosen = pyfuncitem.funcargs.get("runner")
        if chosen is None or chosen.backend == "reference" or not cannot_run(error, chosen.backend):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session", autouse=True)
def _auto_precision_is_float32():
    """Tolerances for "auto" are float32's; a GPU's own default is tf32. First of all fixtures, as some compute."""
    with arithmetic("ieee"):
        yield


@pytest.fixture(autouse=True)
def _leave_the_global_random_state_alone():
    """Tests that seed PyTorch must not decide what other tests draw."""
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture
def vggt_loader(monkeypatch):
    """The real package's loader. Of torchvision it needs ToTensor only, which is one line."""
    transforms = types.ModuleType("torchvision.transforms")
    transforms.ToTensor = lambda: lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    torchvision = types.ModuleType("torchvision")
    torchvision.transforms = transforms
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision.transforms", transforms)
    return pytest.importorskip("vggt.utils.load_fn", reason="needs the real vggt package").load_and_preprocess_images
