"""The whole depth head: the backbone's tokens to depth."""

from __future__ import annotations

from moe3d.benchmark.case import Case
from moe3d.benchmark.heads import names
from moe3d.benchmark.race import Effort

PEERS = tuple(names())


def cases(mode: str, device: str) -> list[tuple[Case, Effort]]:
    if mode == "smoke":
        return [(Case(2, 28, 42, device=device), Effort(0.1, 2))]
    if device.startswith("cuda"):
        return [(Case(frames, precision="tf32", device=device), Effort(10, 20, 200)) for frames in (8, 1)]
    if mode == "full":
        sizes = [(1, 518, 518), (1, 392, 518), (8, 392, 518), (8, 518, 518)]
        return [(Case(*size), Effort(30, 2 if size[0] > 1 else 3)) for size in sizes]
    return [(Case(1), Effort(20, 3))]


def test_head(session, replay, case, effort, peer):
    replay(session.race("head", case, effort, PEERS)[peer])
