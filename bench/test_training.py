"""A training step of the tail, with the decoder frozen and with gradients to it."""

from __future__ import annotations

from moe3d.benchmark.case import Case
from moe3d.benchmark.race import Effort
from moe3d.benchmark.training import names

PEERS = tuple(names())


def cases(mode: str, device: str) -> list[tuple[Case, Effort]]:
    if mode == "smoke":
        return [(Case(1, 42, 56, device=device), Effort(0.1, 2))]
    if device.startswith("cuda"):
        return [(Case(8, precision=p, device=device), Effort(10, 10, 100)) for p in ("tf32", "bf16")]
    return [(Case(1, 154, 518), Effort(40, 5)), (Case(1), Effort(60, 5))] if mode == "full" else []


def test_training(session, replay, case, effort, peer):
    replay(session.race("training", case, effort, PEERS)[peer])


def test_decoder_training(session, replay, case, effort, peer):
    replay(session.race("decoder training", case, effort, PEERS)[peer])


def test_training_memory(session, replay, case, effort, peer):
    replay(session.memory(case, peer, "training"))


def test_decoder_training_memory(session, replay, case, effort, peer):
    replay(session.memory(case, peer, "decoder training"))
