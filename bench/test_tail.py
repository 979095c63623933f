"""The tail alone: fused features to depth. Everybody runs."""

from __future__ import annotations

from moe3d.benchmark.case import Case, precisions
from moe3d.benchmark.peers import peers
from moe3d.benchmark.race import Effort

PEERS = tuple(peers())


def cases(mode: str, device: str) -> list[tuple[Case, Effort]]:
    if mode == "smoke":
        return [(Case(frames, 42, 56, device=device), Effort(0.1, 2)) for frames in (1, 2)]
    if device.startswith("cuda"):
        raced = ("tf32", "bf16", "ieee") if mode == "full" else ("tf32", "bf16")
        return [(Case(f, precision=p, device=device), Effort(10, 20, 200)) for p in raced for f in (8, 1)]
    if mode == "full":
        sizes = [
            (1, 154, 518),
            (8, 154, 518),
            (1, 392, 518),
            (8, 392, 518),
            (1, 518, 518),
            (8, 518, 518),
            (1, 1036, 1036),
        ]
        raced = [Case(*size) for size in sizes]
        if "bf16" in precisions(device):
            raced += [Case(frames, precision="bf16") for frames in (1, 8)]
        return [(case, Effort(60, 5)) for case in raced]
    # 8 frames of VGGT's 518 x 518 would take all the time there is: small ones stand for them.
    return [(Case(1, 518, 518), Effort(20, 3)), (Case(8, 112, 224), Effort(20, 3))]


def test_tail(session, replay, case, effort, peer):
    replay(session.race("tail", case, effort, PEERS)[peer])
