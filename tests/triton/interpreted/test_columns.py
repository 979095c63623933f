"""Commuted columns: chosen through the table of launch configurations, then judged like the direct formulation."""

import math

import pytest
import torch
import torch.nn.functional as F

from moe3d.benchmark.tuning import Tunable
from moe3d.kernels import passes
from moe3d.kernels.columns import strip_width
from moe3d.ops import dispatch
from moe3d.ops.types import HeadOptions, HeadTensors
from support import truth
from support.accuracy import ENTROPY_ABSOLUTE, Comparison, assert_within
from support.problems import random_problem

BASE = {"batch": 1, "channels": 16, "hidden": 16, "gate_hidden": 16, "experts": 2}


@pytest.fixture(autouse=True)
def chosen(monkeypatch, tmp_path):
    """Choose columns for every call that they can serve, and count their launches."""
    monkeypatch.setenv("MOE3D_CACHE", str(tmp_path))
    launched, original = [], passes.column_table
    monkeypatch.setattr(passes, "column_table", lambda *a: launched.append(1) or original(*a))
    yield launched
    assert launched, "the direct formulation ran"


def choose(p, skip_below=0.0):
    backend = dispatch._REGISTRY["triton"]
    assert isinstance(backend, Tunable)
    call = call_of(p, skip_below)
    backend.choose(*call, next(n for n in backend.candidates(*call) if n.startswith("columns")))
    return p


def call_of(p, skip_below=0.0):
    pos = p.pos or (None, None)
    tensors = HeadTensors(*(p.tensors.get(n) for n in HeadTensors._fields[:-2]), *pos)
    return tensors, HeadOptions(*p.size, 1.0, "exp", "expp1", "mean", 0.3, False, skip_below, "auto")


def test_what_is_chosen_is_what_was_raced():
    p = choose(random_problem(**BASE, source=(1, 3), size=(2, 6)))
    raced = dispatch._REGISTRY["triton"].candidates(*call_of(p))
    got = p.run(backend="triton")
    names = [n for n, run in raced.items() if torch.equal(run().prediction, got.prediction)]
    assert names and all(n.startswith("columns") for n in names)


@pytest.mark.parametrize(
    "arguments",
    [
        {"source": (3, 12), "size": (5, 23), "pos": True, "gate_logits": True},
        {"source": (1, 3), "size": (1, 6), "pos": True, "experts": 1},
        {"source": (2, 5), "size": (2, 8), "channels": 48, "hidden": 48, "mode": "argmax"},
        {"source": (2, 1), "size": (3, 20), "pos": True, "dtype": torch.float16, "batch": 2},
        {"source": (2, 4), "size": (3, 9), "dtype": torch.float16},
    ],
    ids=["several strips", "one row", "48 channels", "one column", "float16"],
)
def test_accuracy(arguments):
    """The rule of every backend, on the outputs: the backward pass knows no columns."""
    p = choose(random_problem(**BASE | arguments))
    ours = p.run(backend="triton", return_experts=True)
    plain = truth.evaluate(p, conv=p.tensors["x"].dtype, mix=torch.float32)
    for name, *values in zip(ours._fields, ours, plain, truth.evaluate(p.double()), strict=True):
        assert_within(name, Comparison(*(v.double() for v in values)), ENTROPY_ABSOLUTE if name == "entropy" else 0.0)


def test_nan_reaches_exactly_its_footprint():
    p = choose(random_problem(**BASE, source=(4, 7), size=(7, 16)))
    clean = p.run(backend="triton")
    x = p.tensors["x"].clone()
    x[0, 3, 2, 3] = math.nan
    got = p.with_tensors(x=x).run(backend="triton")
    pixel = torch.zeros(1, 1, 4, 7, dtype=torch.float64)
    pixel[0, 0, 2, 3] = 1.0
    weight = F.interpolate(pixel, size=p.size, mode="bilinear", align_corners=True)
    spread = F.max_pool2d((weight > 1e-9).double(), 3, stride=1, padding=1) > 0
    assert torch.equal(got.prediction.isnan(), spread)
    assert torch.equal(got.prediction[~spread], clean.prediction[~spread])


def test_skipping():
    p = random_problem(**BASE | {"experts": 4}, source=(3, 9), size=(5, 18), pos=True)
    p = choose(p.with_tensors(gate_w2=40.0 * p.tensors["gate_w2"]), skip_below=1e-6)
    got, exact = p.run(backend="triton", skip_below=1e-6), truth.evaluate(p.double())
    torch.testing.assert_close(got.prediction.double(), exact.prediction, rtol=1e-4, atol=1e-4)


def test_a_strip_holds_every_source_column_that_it_needs(chosen):
    chosen.append("no launch needed")
    for source in range(2, 40):
        for target in range(2, 90):
            width = strip_width(source, target, 32)
            for first in range(0, target if width > 0 else 0, max(width, 1)):
                taps = range(max(first - 1, 0), min(first + width + 1, target))
                lower = [t * (source - 1) // (target - 1) for t in taps]
                assert lower[-1] + 1 - lower[0] < 16, (source, target)
