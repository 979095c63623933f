"""Racing a backend's candidates."""

from __future__ import annotations

import time

import pytest

from moe3d.benchmark.case import Case
from moe3d.benchmark.race import Effort
from moe3d.benchmark.tuning import Tunable, case_key, tune
from moe3d.ops import dispatch
from moe3d.ops.reference import ReferenceBackend

CASE = Case(1, 28, 28, experts=2)


class ThreeWays(ReferenceBackend):
    """A slow way, a fast way, and the fastest, which is wrong."""

    def __init__(self):
        self.choices = {}

    def candidates(self, tensors, options):
        right = self.forward(tensors, options)
        wrong = right._replace(confidence=right.confidence + 1)
        return {"slow": lambda: time.sleep(0.02) or right, "fast": lambda: right, "wrong": lambda: wrong}

    def choose(self, tensors, options, candidate):
        self.choices[tensors.x.shape, options.precision] = candidate


@pytest.fixture
def backend(monkeypatch):
    tunable = ThreeWays()
    monkeypatch.setitem(dispatch._REGISTRY, "triton", tunable)
    return tunable


def test_the_fastest_right_candidate_is_chosen(backend):
    result = tune("triton", "cpu", [CASE], Effort(0, 3, 3))[case_key(CASE)]
    assert result["chosen"] == "fast" and result["times_ms"]["slow"] >= 20 > result["times_ms"]["fast"]
    assert "wrong" not in result["times_ms"] and "wrong: relative RMS error" in result["refused"]["wrong"]
    assert backend.choices == {((1, 128, 16, 16), "ieee"): "fast"}


def test_nothing_is_chosen_where_all_are_wrong(backend, monkeypatch):
    monkeypatch.setattr(backend, "candidates", lambda tensors, options: {"broken": lambda: 1 / 0})
    result = tune("triton", "cpu", [CASE], Effort(0, 1, 1))[case_key(CASE)]
    assert result == {"times_ms": {}, "refused": {"broken": "ZeroDivisionError: division by zero"}, "chosen": None}
    assert backend.choices == {}


def test_cases_have_names_of_their_own():
    cases = [
        CASE,
        Case(1, 28, 42, experts=2),
        Case(2, 28, 28, experts=2),
        Case(1, 28, 28),
        Case(1, 28, 28, 2, precision="bf16"),
    ]
    assert len({case_key(case) for case in cases}) == len(cases)


def test_a_backend_with_nothing_to_choose():
    assert not isinstance(ReferenceBackend(), Tunable)
    assert tune("reference", "cpu") is None
