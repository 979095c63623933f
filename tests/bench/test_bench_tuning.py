"""Racing a backend's candidates."""

from __future__ import annotations

import json
import time

import pytest

from moe3d.benchmark.case import Case
from moe3d.benchmark.race import Effort
from moe3d.benchmark.tuning import Tunable, case_key, tune
from moe3d.ops import dispatch
from moe3d.ops.reference import ReferenceBackend

CASE = Case(1, 28, 28, experts=2)


class TwoWays(ReferenceBackend):
    """A fast way, a slow way, and the fastest, which is wrong."""

    def __init__(self, table):
        self.tuned_table = table

    def candidates(self, tensors, options):
        right = self.forward(tensors, options)
        wrong = right._replace(confidence=right.confidence + 1)
        return {"slow": lambda: time.sleep(0.02) or right, "fast": lambda: right, "wrong": lambda: wrong}


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "tables" / "tuned.json"
    monkeypatch.setitem(dispatch._REGISTRY, "triton", TwoWays(path))
    return path


def test_the_fastest_right_candidate_is_written_down(table):
    results = tune("triton", "cpu", [CASE], Effort(0, 3, 3))
    times = results[case_key(CASE)]
    assert times["slow"] >= 20 > times["fast"] and "wrong: relative RMS error" in times["wrong"]
    assert json.loads(table.read_text()) == {"cpu": {case_key(CASE): "fast"}}


def test_other_devices_choices_stay(table):
    table.parent.mkdir()
    table.write_text(json.dumps({"NVIDIA H200": {"a": "b"}}))
    tune("triton", "cpu", [CASE], Effort(0, 1, 1))
    assert json.loads(table.read_text())["NVIDIA H200"] == {"a": "b"}


def test_a_backend_with_nothing_to_choose():
    assert not isinstance(ReferenceBackend(), Tunable)
    assert tune("reference", "cpu") is None
