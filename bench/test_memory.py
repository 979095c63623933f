"""Peak memory of a call of the tail, each in a process of its own."""

from __future__ import annotations

import moe3d
from moe3d.benchmark.case import Case
from moe3d.benchmark.peers import BY_EXPERT_CACHED, CONCATENATED, STOCK, STOCK_CACHED
from moe3d.benchmark.race import Effort

PEERS = (STOCK, STOCK_CACHED, BY_EXPERT_CACHED, CONCATENATED, *moe3d.backends())


def cases(mode: str, device: str) -> list[tuple[Case, Effort]]:
    precision = "bf16" if device.startswith("cuda") else "ieee"
    if mode == "smoke":
        return [(Case(1, 28, 42, precision=precision, device=device), Effort())]
    frames = (1, 8) if mode == "full" or device.startswith("cuda") else (1,)
    return [(Case(f, precision=precision, device=device), Effort()) for f in frames]


def test_memory(session, replay, case, effort, peer):
    replay(session.memory(case, peer))
