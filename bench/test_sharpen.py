"""The filter that ``sharpen`` asks for, four passes: no part of the head's own cost."""

from __future__ import annotations

from moe3d.benchmark.case import Case
from moe3d.benchmark.race import Effort
from moe3d.benchmark.sharpening import names

PEERS = tuple(names())


def cases(mode: str, device: str) -> list[tuple[Case, Effort]]:
    if mode == "smoke":
        return [(Case(2, 42, 56, experts=1, device=device), Effort(0.1, 2))]
    return [(Case(frames, experts=1, device=device), Effort(10, 5)) for frames in ((1, 8) if mode == "full" else (1,))]


def test_sharpen(session, replay, case, effort, peer):
    replay(session.race("sharpen", case, effort, PEERS)[peer])
