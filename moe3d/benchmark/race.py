"""Interleaved timing: everybody runs in every round, in a new random order, after everybody was found right.

Machines drift: they warm up, and other programs come and go. Medians over rounds that hold one sample of each
contestant share that drift, so it leaves their ratios alone.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from moe3d.benchmark.accuracy import Error, Wrong
from moe3d.benchmark.clock import time_call

Call = Callable[[int], Any]  # runs on the i-th of several inputs

# On CUDA
_UNTIMED_CALLS = 4  # torch.compile records its CUDA graph in the second call, slowly
_ESTIMATES = 3
_SAMPLE_S = 10e-3  # everybody's: who is called once a sample pays for a launch and a synchronisation in every call
_MOST_REPEATS = 500


class Unavailable(Exception):
    """A contestant cannot run here; the message says why."""


@dataclass(frozen=True)
class Effort:
    """Rounds go on for ``seconds``, but there are at least and at most so many of them."""

    seconds: float = 20.0
    least_rounds: int = 5
    most_rounds: int = 30


@dataclass(frozen=True)
class Contestant:
    """Who races.

    Attributes:
        prepare: gives the call to be timed, or raises :class:`Unavailable`.
        check: takes the outputs of the first call and gives their error, or raises
            :class:`~moe3d.benchmark.accuracy.Wrong`.
    """

    name: str
    prepare: Callable[[], Call]
    check: Callable[[Any], Error]


@dataclass
class Outcome:
    """What became of a contestant: times in seconds per call, one a round; or why there are none."""

    times: list[float] = field(default_factory=list)
    error: Error | None = None
    skipped: str | None = None
    refused: str | None = None


def race(contestants: Sequence[Contestant], device: str, effort: Effort, seed: int = 0) -> dict[str, Outcome]:
    """Check every contestant, then time those that are right, interleaved.

    A wrong one, and one that raises, is refused (its ``refused`` says why) and gets no time. One that cannot run is
    skipped.
    """
    outcomes = {contestant.name: Outcome() for contestant in contestants}
    admitted = {c.name: call for c in contestants if (call := _admit(c, outcomes[c.name])) is not None}
    samplers = {name: _Sampler(call, device) for name, call in admitted.items()}
    rng = random.Random(seed)
    start = time.perf_counter()
    for done in range(effort.most_rounds if samplers else 0):
        spent = time.perf_counter() - start
        if done >= effort.least_rounds and spent + spent / done > effort.seconds:
            break
        for name in rng.sample(list(samplers), len(samplers)):
            outcomes[name].times.append(samplers[name]())
    return outcomes


def _admit(contestant: Contestant, outcome: Outcome) -> Call | None:
    """The contestant's call, if its first result is right; this first call also compiles and warms up."""
    try:
        call = contestant.prepare()
        outcome.error = contestant.check(call(0))
    except Unavailable as reason:
        outcome.skipped = str(reason)
    except Wrong as reason:
        outcome.refused = str(reason)
    except Exception as error:  # of whatever kind: the others still race
        outcome.refused = f"{type(error).__name__}: {error}"
    else:
        return call
    return None


class _Sampler:
    """Takes one sample of a call: seconds per call.

    On CUDA over several calls, so that gaps between launches are hidden as they are in a busy program: as many as the
    fastest of some calls, once everything is compiled and recorded, says that a sample needs.
    """

    def __init__(self, call: Call, device: str):
        self.call, self.device = call, device
        self.input = 0
        self.repeats = 1
        if torch.device(device).type == "cuda":
            for _ in range(_UNTIMED_CALLS):
                self._run()
            fastest = min(self() for _ in range(_ESTIMATES))
            self.repeats = min(_MOST_REPEATS, math.ceil(_SAMPLE_S / fastest))

    def __call__(self) -> float:
        with _no_garbage_collection():
            return time_call(self._run, self.device) / self.repeats

    def _run(self) -> None:
        for _ in range(self.repeats):
            self.input += 1
            self.call(self.input)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
