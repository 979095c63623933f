"""The whole model, images to depth and cameras: what the mixture costs end to end, the paper's number."""

from __future__ import annotations

import importlib.util

import pytest

from moe3d.benchmark.case import Case
from moe3d.benchmark.heads import names
from moe3d.benchmark.race import Effort

PEERS = tuple(names())
MINI_CHANNELS = 32  # of the features that MiniVGGT's tail gets


def cases(mode: str, device: str) -> list[tuple[Case, Effort]]:
    return _mini(mode, device) + _vggt(mode, device)


def _mini(mode: str, device: str) -> list[tuple[Case, Effort]]:
    if mode == "smoke":
        return [(Case(2, 28, 42, channels=MINI_CHANNELS, device=device), Effort(0.1, 2))]
    if device.startswith("cuda"):
        effort = Effort(10, 20, 200)
        return [(Case(f, channels=MINI_CHANNELS, precision="tf32", device=device), effort) for f in (1, 8)]
    many = (518, 518) if mode == "full" else (112, 224)
    effort = Effort(60, 5) if mode == "full" else Effort(8, 3)
    return [(Case(*size, channels=MINI_CHANNELS), effort) for size in ((1, 518, 518), (8, *many))]


def _vggt(mode: str, device: str) -> list[tuple[Case, Effort]]:
    if device.startswith("cuda") and mode != "smoke":
        return [(Case(frames, precision="tf32", device=device), Effort(20, 10, 100)) for frames in (8, 1)]
    return [(Case(1), Effort(120, 3))] if mode == "full" else []


def test_model(session, replay, case, effort, peer):
    suite = "mini" if case.channels == MINI_CHANNELS else "vggt"
    if suite == "vggt" and importlib.util.find_spec("vggt") is None:
        pytest.skip("needs the `vggt` package (github.com/facebookresearch/vggt)")
    replay(session.race(suite, case, effort, PEERS)[peer])
