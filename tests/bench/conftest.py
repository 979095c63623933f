"""Makes the repository's ``bench`` folder importable, behind everything else; backends that are wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moe3d.benchmark import roofline
from moe3d.ops import dispatch
from moe3d.ops.reference import ReferenceBackend

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))


class WrongBackend(ReferenceBackend):
    """Nearly right: predictions are a thousandth too large."""

    def forward(self, tensors, options):
        output = super().forward(tensors, options)
        return output._replace(prediction=1.001 * output.prediction)


@pytest.fixture
def small_ceilings(monkeypatch) -> None:
    """Ceilings are measured in no time."""
    monkeypatch.setitem(roofline._PROBES, "cpu", (1 << 20, 64))


@pytest.fixture
def wrong_backend(monkeypatch) -> str:
    """Its name; it takes the place of a real one."""
    monkeypatch.setitem(dispatch._REGISTRY, "cpu", WrongBackend())
    return "cpu"
