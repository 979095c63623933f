"""Racing the formulations that a backend has of the same operation, and writing down which one wins where.

A backend takes part by having two more attributes (:class:`Tunable`); nothing else needs to know about it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from moe3d.benchmark.accuracy import Error, Judge, Outputs
from moe3d.benchmark.case import PRECISIONS, Case, arithmetic
from moe3d.benchmark.peers import CONCATENATED, TailField
from moe3d.benchmark.race import Contestant, Effort, race
from moe3d.benchmark.statistics import quantiles
from moe3d.ops import dispatch
from moe3d.ops.types import HeadOptions, HeadTensors, MoEOutput
from moe3d.position import position_tables

EFFORT = Effort(seconds=5, least_rounds=20, most_rounds=100)


@runtime_checkable
class Tunable(Protocol):
    """What a backend has beside :class:`~moe3d.ops.backend.Backend` if there is something to choose.

    Attributes:
        tuned_table: the file of its choices, in its own folder: {device name: {case: candidate}}, cases as
            :func:`case_key` writes them.
    """

    tuned_table: Path

    def candidates(self, tensors: HeadTensors, options: HeadOptions) -> Mapping[str, Callable[[], MoEOutput]]:
        """Ways to compute this call, by names that mean the same in the next version."""
        ...


def tune(backend: str, device: str, cases: Sequence[Case] | None = None, effort: Effort = EFFORT) -> dict | None:
    """Race a backend's candidates over VGGT's cases, each checked first, and write its table.

    Returns:
        {case: {candidate: median in ms, or why it was refused}}; None if the backend has nothing to choose.
    """
    tunable = dispatch._REGISTRY[backend]
    if not isinstance(tunable, Tunable):
        return None
    results = {}
    for case in _cases(device) if cases is None else cases:
        results[case_key(case)] = _race_candidates(tunable, case, effort)
    _write(tunable.tuned_table, device_name(device), results)
    return results


def case_key(case: Case) -> str:
    return f"{case.precision} {case.frames}x{case.height}x{case.width} C{case.channels} K{case.experts} N{case.hidden}"


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else torch.device(device).type


def _cases(device: str) -> list[Case]:
    sizes = [(1, 518, 518), (8, 518, 518), (8, 154, 518), (8, 392, 518)]
    precisions = PRECISIONS if torch.device(device).type == "cuda" else ("ieee", "bf16")
    return [Case(*size, experts=k, precision=p, device=device) for p in precisions for size in sizes for k in (4, 1)]


def _race_candidates(tunable: Tunable, case: Case, effort: Effort) -> dict[str, float | str]:
    field = TailField(case, [CONCATENATED])
    x, weights = field.inputs[torch.contiguous_format][0], field.weights_of(case)
    tensors = HeadTensors(x, *weights, None, *position_tables(case.size, case.channels, case.width / case.height, x))
    options = HeadOptions(*case.size, 1.0, "exp", "expp1", "mean", 0.3, False, 0.0, case.precision)
    check = partial(_check, field.judge, field.truth_of(case))
    contestants = field.contestants() + [
        Contestant(name, lambda run=run: lambda i: run(), partial(check, name))
        for name, run in tunable.candidates(tensors, options).items()
    ]
    with arithmetic(case.precision), torch.no_grad():
        outcomes = race(contestants, case.device, effort)
    del outcomes[CONCATENATED]  # it only judges
    return {name: o.refused or 1e3 * quantiles(o.times).p50 for name, o in outcomes.items()}


def _check(judge: Judge, truth: Outputs, name: str, output: MoEOutput) -> Error:
    return judge(name, CONCATENATED, (output.prediction, output.confidence, output.entropy), truth)


def _write(path: Path, device: str, results: Mapping[str, Mapping[str, float | str]]) -> None:
    """This device's choices: the fastest of those that are right; other devices' stay."""
    table = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    table[device] = {}
    for case, times in results.items():
        right = {name: ms for name, ms in times.items() if not isinstance(ms, str)}
        if right:
            table[device][case] = min(right, key=right.__getitem__)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", "utf-8")
    os.replace(unfinished, path)
