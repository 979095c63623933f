"""Racing the formulations that a backend has of the same operation, and writing down which one wins where.

A backend takes part by having two more attributes (:class:`Tunable`); nothing else needs to know about it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import torch

from moe3d.benchmark.accuracy import Error
from moe3d.benchmark.case import Case, arithmetic, precisions
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


def tune(backend: str, device: str, cases: Sequence[Case] | None = None, effort: Effort = EFFORT) -> dict | None:
    """Race a backend's candidates over VGGT's cases, each checked first, and let it write down the fastest.

    Returns:
        {case: {"times_ms": {candidate: median}, "refused": {candidate: why}, "chosen": candidate or None}}; None if the
        backend has nothing to choose.
    """
    tunable = dispatch._REGISTRY[backend]
    if not isinstance(tunable, Tunable):
        return None
    return {case_key(c): _tune_case(tunable, c, effort) for c in (_cases(device) if cases is None else cases)}


def case_key(case: Case) -> str:
    return f"{case.precision} {case.frames}x{case.height}x{case.width} C{case.channels} K{case.experts} N{case.hidden}"


def _cases(device: str) -> list[Case]:
    sizes = [(1, 518, 518), (8, 518, 518), (8, 154, 518), (8, 392, 518)]
    kinds = itertools.product(precisions(device), sizes, (4, 1))
    return [Case(*size, experts=experts, precision=p, device=device) for p, size, experts in kinds]


def _tune_case(tunable: Tunable, case: Case, effort: Effort) -> dict:
    field = TailField(case, [CONCATENATED])
    x, weights = field.inputs[torch.contiguous_format][0], field.weights_of(case)
    pos = position_tables(case.size, case.channels, case.width / case.height, x)
    tensors = HeadTensors(x, *weights, None, *pos)
    options = HeadOptions(*case.size, 1.0, "exp", "expp1", "mean", 0.3, False, 0.0, case.precision)
    contestants = [
        Contestant(name, partial(_ignoring_inputs, run), partial(_check, field, case, name))
        for name, run in tunable.candidates(tensors, options).items()
    ]
    with arithmetic(case.precision), torch.no_grad():
        outcomes = race(field.contestants() + contestants, case.device, effort)
    del outcomes[CONCATENATED]  # it only judges
    times = {name: 1e3 * quantiles(o.times).p50 for name, o in outcomes.items() if o.times}
    chosen = min(times, key=times.__getitem__) if times else None
    if chosen is not None:
        tunable.choose(tensors, options, chosen)
    return {"times_ms": times, "refused": {n: o.refused for n, o in outcomes.items() if o.refused}, "chosen": chosen}


def _ignoring_inputs(run: Callable[[], MoEOutput]) -> Callable[[int], MoEOutput]:
    return lambda i: run()


def _check(field: TailField, case: Case, name: str, output: MoEOutput) -> Error:
    entropy = output.entropy if case.gated else None
    return field.judge(name, CONCATENATED, (output.prediction, output.confidence, entropy), field.truth_of(case))
