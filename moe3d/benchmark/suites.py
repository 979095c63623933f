"""The suites: which contestants race over what, and what each race is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from moe3d.benchmark import heads, peers, sharpening, training
from moe3d.benchmark.case import Case, arithmetic
from moe3d.benchmark.peers import TailField
from moe3d.benchmark.race import Contestant, Effort, Outcome, race
from moe3d.benchmark.sharpening import SharpeningField
from moe3d.benchmark.training import TrainingField


class Field(Protocol):
    def contestants(self) -> list[Contestant]: ...


@dataclass(frozen=True)
class Race:
    """One suite of interleaved races.

    Attributes:
        names: everybody who may run.
        field: builds the contestants of a case.
        about: one line for tables.
    """

    names: Callable[[], Sequence[str]]
    field: Callable[..., Field]
    about: str

    def run(self, case: Case, effort: Effort, names: Sequence[str] | None = None, seed: int = 0) -> dict[str, Outcome]:
        """Check and time the named contestants (by default all), and those by whom they are judged."""
        with arithmetic(case.precision):
            return race(self._contestants(case, names, seed), case.device, effort, seed)

    def call(self, case: Case, name: str, seed: int = 0) -> Callable[[int], object]:
        """One contestant's call, unchecked, for the probe."""
        return next(c for c in self._contestants(case, [name], seed) if c.name == name).prepare()

    def _contestants(self, case: Case, names: Sequence[str] | None, seed: int) -> list[Contestant]:
        return self.field(case, list(self.names()) if names is None else list(names), seed).contestants()


RACES = {
    "tail": Race(lambda: list(peers.peers()), TailField, "the tail: fused features to depth"),
    "head": Race(heads.names, heads.head_field, "the whole depth head: VGGT's tokens to depth"),
    "mini": Race(heads.names, heads.mini_field, "the whole MiniVGGT: images to depth and cameras"),
    "vggt": Race(heads.names, heads.vggt_field, "the whole VGGT-1B with random weights: images to depth and cameras"),
    "training": Race(training.names, TrainingField, "a training step of the tail: forward, backward, AdamW"),
    "decoder training": Race(
        training.names,
        partial(TrainingField, to_features=True),
        "a training step of the tail with gradients to its features, as a trained decoder needs them",
    ),
    "sharpen": Race(sharpening.names, SharpeningField, "the filter of depth's edges, four passes"),
}

# The names under which the peak memory of a race's calls is recorded.
MEMORY_SUITES = {"tail": "memory", "training": "training memory", "decoder training": "decoder training memory"}
