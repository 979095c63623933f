"""The pytest-benchmark front of :mod:`moe3d.benchmark`.

All contestants of a case are measured together, interleaved, when the first of their tests runs; each test then plays
its own times back to pytest-benchmark, whose table therefore shows interleaved times. Our own summary comes after it.

A suite is a module with ``cases(mode, device)``, a list of (case, effort), and ``PEERS``, the names of those who run;
``mode`` is "default", "full" or "smoke". Its tests take ``case``, ``effort``, ``peer`` and what it needs of
``session`` (measures) and ``replay`` (reports).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe3d.benchmark.race import Outcome
from moe3d.benchmark.records import append_jsonl
from moe3d.benchmark.session import Session
from moe3d.benchmark.tables import summary

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser):
    group = parser.getgroup("moe3d", "moe3d's benchmarks")
    group.addoption("--full", action="store_true", help="all sizes, frames, experts, training, first calls (long)")
    group.addoption(
        "--smoke", action="store_true", help="tiny sizes: checks the suites, measures nothing worth keeping"
    )
    group.addoption("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    group.addoption("--record", action="store_true", help="append the results to bench/results/<cpu or cuda>.jsonl")


def pytest_configure(config):
    if config.getoption("smoke") and config.getoption("record"):
        raise pytest.UsageError("--smoke measures nothing worth keeping: run it without --record")


def _mode(config) -> str:
    return "full" if config.getoption("full") else "smoke" if config.getoption("smoke") else "default"


def _device(config) -> str:
    return config.getoption("device") or ("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc):
    if "peer" not in metafunc.fixturenames:
        return
    cases = metafunc.module.cases(_mode(metafunc.config), _device(metafunc.config))
    peers = metafunc.module.PEERS
    metafunc.parametrize(
        ("case", "effort", "peer"),
        [pytest.param(case, effort, peer, id=f"{case.label}-{peer}") for case, effort in cases for peer in peers],
    )


def pytest_collection_modifyitems(items):
    for item in items:
        if "replay" in item.fixturenames:
            group = f"{item.originalname.removeprefix('test_')} {item.callspec.params['case'].label}"
            item.add_marker(pytest.mark.benchmark(timer=CLOCK, group=group))


class ReplayClock:
    """A clock that stands still until it is told how much time has passed."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = ReplayClock()


@pytest.fixture
def session(request) -> Session:
    stash = request.config.stash
    if SESSION not in stash:
        stash[SESSION] = Session(_device(request.config), ROOT)
    return stash[SESSION]


@pytest.fixture
def replay(benchmark):
    """Reports an outcome as this test's: skipped, refused (a failure), or measured."""

    def report(outcome: Outcome) -> None:
        if outcome.skipped:
            benchmark.skipped = True
            pytest.skip(outcome.skipped)
        assert not outcome.refused, f"refused: {outcome.refused}"
        times = iter(outcome.times)
        benchmark.pedantic(lambda: CLOCK.advance(next(times)), rounds=len(outcome.times))

    return report


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    records = config.stash[SESSION].records if SESSION in config.stash else []
    if not records:
        return
    terminalreporter.section("moe3d")
    terminalreporter.write_line(summary(records))
    if config.getoption("record"):
        path = RESULTS / f"{records[0].run['device']}.jsonl"
        append_jsonl(path, records)
        terminalreporter.write_line(f"\n{len(records)} results appended to {path.relative_to(ROOT)}")
