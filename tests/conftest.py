"""Fixtures of all tests, and the count of those that need the real ``vggt`` package and did not get it."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for `support`, whatever the import mode

from support.backends import cannot_run, runners

NO_SKIPS = "MOE3D_NO_SKIPS"  # set by `make test-real`
_REAL_VGGT_SKIPS = pytest.StashKey[list]()


def pytest_configure(config):
    config.stash[_REAL_VGGT_SKIPS] = []


@functools.cache
def _why_no_real_vggt() -> str | None:
    try:
        importlib.import_module("vggt.models.vggt")
    except ImportError as error:
        return f"the real `vggt` package cannot be imported ({error})"
    return None


def pytest_runtest_setup(item):
    if item.get_closest_marker("real_vggt") is not None and _why_no_real_vggt():
        pytest.skip(_why_no_real_vggt())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("real_vggt") is not None:
        item.config.stash[_REAL_VGGT_SKIPS].append(item.nodeid)
    return report


def pytest_sessionfinish(session, exitstatus):
    if session.config.stash[_REAL_VGGT_SKIPS] and os.environ.get(NO_SKIPS) == "1" and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    skipped = config.stash[_REAL_VGGT_SKIPS]
    if not skipped:
        return
    line = f"{len(skipped)} tests skipped because the real `vggt` package cannot be imported"
    if os.environ.get(NO_SKIPS) == "1":
        line += f", and {NO_SKIPS}=1 forbids that"
    terminalreporter.write_line(line)


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


@pytest.fixture(autouse=True)
def _leave_the_global_random_state_alone():
    """Tests that seed PyTorch must not decide what other tests draw."""
    with torch.random.fork_rng(devices=[]):
        yield
