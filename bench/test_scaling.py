"""The tail's cost against the number of frames and of experts, for those whose curves tell something."""

from __future__ import annotations

import moe3d
from moe3d.benchmark.case import Case
from moe3d.benchmark.peers import CONCATENATED, STOCK, STOCK_CACHED
from moe3d.benchmark.race import Effort

PEERS = (STOCK, STOCK_CACHED, CONCATENATED, *moe3d.backends())
FRAMES = (1, 2, 4, 8, 16, 32, 64)
EXPERTS = (1, 2, 4, 8, 16)


def cases(mode: str, device: str) -> list[tuple[Case, Effort]]:
    if mode == "smoke":
        return [(Case(9, 28, 28, experts=1, device=device), Effort(0.1, 2))]  # 9: VGGT computes at most 8 at a time
    if mode == "default":
        return []
    if device.startswith("cuda"):
        effort, size, precision = Effort(5, 10, 100), (518, 518), "bf16"
    else:
        effort, size, precision = Effort(10, 3), (112, 224), "ieee"
    frames = [Case(f, *size, precision=precision, device=device) for f in FRAMES]
    experts = [Case(1, experts=k, precision=precision, device=device) for k in EXPERTS]
    return [(case, effort) for case in dict.fromkeys(frames + experts)]


def test_scaling(session, replay, case, effort, peer):
    replay(session.race("tail", case, effort, PEERS)[peer])
