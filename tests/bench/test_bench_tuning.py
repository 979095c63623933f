"""Racing a backend's candidates."""

from __future__ import annotations

import time

import pytest
import torch

from moe3d.benchmark import case as benchmark_case
from moe3d.benchmark import tuning
from moe3d.benchmark.case import PRECISIONS, Case, random_weights
from moe3d.benchmark.race import Effort
from moe3d.benchmark.tuning import is_tunable, tune, tuning_cases
from moe3d.ops import dispatch
from moe3d.ops.reference import ReferenceBackend
from moe3d.ops.types import HeadOptions, HeadTensors

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
    result = tune("triton", CASE, Effort(0, 3, 3))
    assert result["chosen"] == "fast" and result["times_ms"]["slow"] >= 20 > result["times_ms"]["fast"]
    assert "wrong" not in result["times_ms"] and "wrong: relative RMS error" in result["refused"]["wrong"]
    assert backend.choices == {((1, 128, 16, 16), "ieee"): "fast"}


def test_nothing_is_chosen_where_all_are_wrong(backend, monkeypatch):
    monkeypatch.setattr(backend, "candidates", lambda tensors, options: {"broken": lambda: 1 / 0})
    result = tune("triton", CASE, Effort(0, 1, 1))
    assert result == {"times_ms": {}, "refused": {"broken": "ZeroDivisionError: division by zero"}, "chosen": None}
    assert backend.choices == {}


def test_inputs_take_turns(backend, monkeypatch):
    """A single one would stay in a GPU's cache, and be measured there."""
    seen = []
    monkeypatch.setattr(benchmark_case, "_ROTATED_BYTES", 3 * 128 * 16 * 16 * 4)

    def candidates(tensors, options):
        right = ReferenceBackend().forward(tensors, options)
        return {"only": lambda: seen.append(tensors.x.data_ptr()) or right}

    monkeypatch.setattr(backend, "candidates", candidates)
    assert tune("triton", CASE, Effort(0, 6, 6))["chosen"] == "only"
    assert len(set(seen)) == 3 and seen[:3] == seen[3:6]


def test_each_entry_of_the_table_is_raced_once(monkeypatch):
    """Of the cases with one key the last would overwrite the others' choices; bfloat16 is the most wanted."""
    pytest.importorskip("triton")
    from moe3d.ops.triton import _call

    def key(case):
        x = torch.empty((), dtype=case.dtype).expand(case.frames, case.channels, *case.source_size)
        options = HeadOptions(*case.size, 1.0, "exp", "expp1", "mean", 0.3, False, 0.0, case.precision)
        call = _call(HeadTensors(x, *random_weights(case, 0), None, None, None), options)
        return call.precision.kind, call.shape_class

    monkeypatch.setattr(tuning, "precisions", lambda device: PRECISIONS)
    raced = [key(case) for case in tuning_cases("cpu")]
    vggt = [(1, 518, 518), (8, 518, 518), (8, 154, 518), (8, 392, 518)]
    used = {key(Case(*size, experts=k, precision=p)) for size in vggt for k in (4, 1) for p in PRECISIONS}
    assert len(raced) == len(set(raced)) and set(raced) == used
    assert [kind for kind, _ in raced[:2]] == ["half", "half"]


def test_a_backend_with_nothing_to_choose(backend):
    assert is_tunable("triton") and not is_tunable("reference")
