"""Racing the formulations that a backend has of the same operation, and writing down which one wins where.

A backend takes part by having two more attributes (:class:`Tunable`); nothing else needs to know about it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch

from moe3d.benchmark.accuracy import Error
from moe3d.benchmark.case import VGGT_CHUNK, Case, arithmetic, precisions
from moe3d.benchmark.peers import CONCATENATED, TailField
from moe3d.benchmark.race import Contestant, Effort, race
from moe3d.benchmark.statistics import quantiles
from moe3d.ops import dispatch
from moe3d.ops.types import HeadOptions, HeadTensors, MoEOutput
from moe3d.position import position_tables

EFFORT = Effort(seconds=5, least_rounds=20, most_rounds=100)


@runtime_checkable
class Tunable(Protocol):
    """What a backend has beside :class:`~moe3d.ops.backend.Backend` if there is something to choose."""

    def candidates(self, tensors: HeadTensors, options: HeadOptions) -> Mapping[str, Callable[[], MoEOutput]]:
        """Ways to compute this call, by names that tell what they are."""
        ...

    def choose(self, tensors: HeadTensors, options: HeadOptions, candidate: str) -> None:
        """Write into the backend's own table that calls like this one shall be computed so from now on."""
        ...


def is_tunable(backend: str) -> bool:
    return isinstance(dispatch._REGISTRY[backend], Tunable)


def tuning_cases(device: str) -> list[Case]:
    """One for each entry that VGGT's calls have in a backend's table, those in bfloat16 first.

    Entries know neither the frames of a call nor their size: VGGT's largest call stands for all.
    """
    kinds = itertools.product(reversed(precisions(device)), (4, 1))
    return [Case(VGGT_CHUNK, experts=experts, precision=p, device=device) for p, experts in kinds]


def tune(backend: str, case: Case, effort: Effort = EFFORT) -> dict:
    """Race a tunable backend's candidates for one case, each checked first, and let it write down the fastest.

    Returns:
        {"times_ms": {candidate: median}, "refused": {candidate: why}, "chosen": candidate or None}
    """
    tunable: Any = dispatch._REGISTRY[backend]
    field = TailField(case, [CONCATENATED])
    inputs, weights = field.inputs[torch.contiguous_format], field.weights_of(case)
    pos = position_tables(case.size, case.channels, case.width / case.height, inputs[0])
    options = HeadOptions(*case.size, 1.0, "exp", "expp1", "mean", 0.3, False, 0.0, case.precision)
    tensors = [HeadTensors(x, *weights, None, *pos) for x in inputs]
    ways = [tunable.candidates(t, options) for t in tensors]
    contestants = [
        Contestant(name, partial(_in_turn, [way[name] for way in ways]), partial(_check, field, case, name))
        for name in ways[0]
    ]
    with arithmetic(case.precision), torch.no_grad():
        outcomes = race(field.contestants() + contestants, case.device, effort)
    del outcomes[CONCATENATED]  # it only judges
    times = {name: 1e3 * quantiles(o.times).p50 for name, o in outcomes.items() if o.times}
    chosen = min(times, key=times.__getitem__) if times else None
    if chosen is not None:
        tunable.choose(tensors[0], options, chosen)
    return {"times_ms": times, "refused": {n: o.refused for n, o in outcomes.items() if o.refused}, "chosen": chosen}


def _in_turn(runs: Sequence[Callable[[], MoEOutput]]) -> Callable[[int], MoEOutput]:
    """One candidate on each of the inputs, which are too large together to stay in a cache."""
    return lambda i: runs[i % len(runs)]()


def _check(field: TailField, case: Case, name: str, output: MoEOutput) -> Error:
    entropy = output.entropy if case.gated else None
    return field.judge(name, CONCATENATED, (output.prediction, output.confidence, entropy), field.truth_of(case))
