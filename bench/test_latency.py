"""The first call of the tail in a fresh process, with cold and with warm compilation caches."""

from __future__ import annotations

import moe3d
from moe3d.benchmark.case import Case
from moe3d.benchmark.peers import COMPILED, CONCATENATED, STOCK
from moe3d.benchmark.race import Effort

PEERS = (STOCK, CONCATENATED, COMPILED, *moe3d.backends())


def cases(mode: str, device: str) -> list[tuple[Case, Effort]]:
    precision = "bf16" if device.startswith("cuda") else "ieee"
    if mode == "default":
        return []
    return [(Case(1, *((28, 42) if mode == "smoke" else (518, 518)), precision=precision, device=device), Effort())]


def test_latency(session, replay, case, effort, peer):
    replay(session.latency(case, peer))
