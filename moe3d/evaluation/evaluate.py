"""A dataset through a protocol: every frame judged for every system, and all of it gathered in one report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from moe3d.data import AllFramesSkipped, Dataset, Sample
from moe3d.evaluation.depth import aggregate_depth
from moe3d.evaluation.judge import JUDGES, Judged, JudgedFrame, View
from moe3d.evaluation.points import POINT_KEYS
from moe3d.evaluation.predictions import Predictions
from moe3d.evaluation.protocol import Protocol, scene_of
from moe3d.evaluation.report import aggregate_boundary
from moe3d.evaluation.systems import System

NO_TRUTH = "no valid ground truth"
BADNESS = {"mv": "acc_mean", "depth": "abs_rel", "boundary": "flying_rate"}
"""What makes a frame a bad one; higher is worse."""
# Of relative errors, or of metres; the first and the last bin take the rest.
HISTOGRAM_EDGES = np.geomspace(1e-3, 1, 31)


@dataclass(frozen=True)
class FrameView:
    """A judged frame: what went in, and what each system made of it."""

    sequence: str
    frame: str
    image: np.ndarray
    """[3, H, W] in [0, 1], at the dataset's resolution."""
    systems: list[tuple[str, dict, View]]
    """(name, metrics, view)."""


Observer = Callable[[float | None, Callable[[], FrameView]], None]
"""Is offered every frame: how bad the first system is on it (None: undefined), and a function that makes its view."""


def evaluate(
    dataset: Dataset,
    systems: Sequence[System],
    protocol: Protocol,
    observe: Observer = lambda badness, view: None,
    advance: Callable[[], object] = lambda: None,
) -> dict:
    """Judge systems on a dataset.

    Args:
        dataset: its ``max_depth`` limits what is valid.
        systems: at least one, of different names. The report's own figures are the first one's.
        protocol: see there.
        observe: for pictures.
        advance: called after each of the protocol's batches.

    Returns:
        JSON-ready, with "protocol", which lists the frames that were judged, and those left out with the reason;
        "system", the first one's name; "sequences", each with "name", its metrics and its "frames"; "mean";
        "error_histogram", of relative errors or distances in metres; "compare", name -> the same three for every other
        system.

    Raises:
        FileNotFoundError, ValueError: a prediction that is missing or does not fit, or nothing to judge.
    """
    results = [_Result(system.name, protocol) for system in systems]
    without_truth = []
    for sequence, names in protocol.batches(dataset):
        sample, judged = _load(dataset, sequence, names, protocol)
        if sample is not None:
            without_truth += [(sequence, name) for name in sample.names if name not in judged]
        if sample is not None and judged:
            truth = _select(sample, judged)
            mask = protocol.mask(truth)
            judgements = []
            for system, result in zip(systems, results, strict=True):
                predictions = _predict(system, sequence, sample, judged)
                judgements.append(JUDGES[protocol.task](truth, mask, predictions, protocol))
                result.add(sequence, judged, judgements[-1])
            _show(observe, results, sequence, truth, judgements)
        advance()
    if not results[0].frames:
        raise ValueError(f"there is nothing to judge: no frame of {protocol.dataset} has valid ground truth")
    return _gather(results, dataset, protocol, without_truth)


def _load(dataset: Dataset, sequence: str, names: list[str], protocol: Protocol) -> tuple[Sample | None, list[str]]:
    """The sample, without its broken frames, and the names of the frames that can be judged."""
    try:
        sample = dataset.load(sequence, names)
    except AllFramesSkipped:
        return None, []
    return sample, [name for name, valid in zip(sample.names, protocol.mask(sample), strict=True) if valid.any()]


def _select(sample: Sample, names: list[str]) -> Sample:
    index = [sample.names.index(name) for name in names]
    fields = ("images", "depth", "valid", "intrinsics", "extrinsics")
    chosen: dict[str, Any] = {}
    for field in fields:
        tensor = getattr(sample, field)
        chosen[field] = None if tensor is None else tensor[index]
    return replace(sample, names=names, **chosen)


def _predict(system: System, sequence: str, sample: Sample, names: list[str]) -> Predictions:
    try:
        return system.predict(sequence, sample).select(names)
    except ValueError as error:
        raise ValueError(f"{system.name}, sequence '{sequence}': {error}") from None


def _show(observe: Observer, results: list[_Result], sequence: str, truth: Sample, judgements: list[Judged]) -> None:
    for index, name in enumerate(truth.names):
        judged = [judgement.frames[index] for judgement in judgements]

        def view(index: int = index, name: str = name, judged: list[JudgedFrame] = judged) -> FrameView:
            systems = [
                (result.name, frame.metrics, frame.view()) for result, frame in zip(results, judged, strict=True)
            ]
            return FrameView(sequence, name, truth.images[index].numpy(), systems)

        observe(judged[0].metrics[BADNESS[results[0].protocol.task]], view)


def _gather(results: list[_Result], dataset: Dataset, protocol: Protocol, without_truth: list[tuple[str, str]]) -> dict:
    skipped = [asdict(record) for record in dataset.skipped]
    skipped += [{"sequence": sequence, "frame": frame, "reason": NO_TRUTH} for sequence, frame in without_truth]
    first, *others = (result.report() for result in results)
    sweep = {"flying_sweep": first.pop("flying_sweep")} if "flying_sweep" in first else {}
    frames = {entry["name"]: [frame["name"] for frame in entry["frames"]] for entry in first["sequences"]}
    return {
        "protocol": {**protocol.describe(dataset), "frames": frames, "skipped": skipped, **sweep},
        "system": results[0].name,
        **first,
        "compare": {result.name: report for result, report in zip(results[1:], others, strict=True)},
    }


class _Result:
    """One system's figures, as they come in."""

    def __init__(self, name: str, protocol: Protocol) -> None:
        self.name, self.protocol = name, protocol
        self.frames: dict[str, list[dict]] = {}  # by sequence
        self.whole: dict[str, dict] = {}  # a sequence's own metrics, where they are no mean of its frames'
        self.counts = np.zeros(len(HISTOGRAM_EDGES) - 1, dtype=np.int64)

    def add(self, sequence: str, names: list[str], judged: Judged) -> None:
        named = [{"name": name, **frame.metrics} for name, frame in zip(names, judged.frames, strict=True)]
        self.frames.setdefault(sequence, []).extend(named)
        if judged.whole is not None:
            self.whole[sequence] = judged.whole
        for frame in judged.frames:
            clipped = np.clip(frame.errors, HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
            self.counts += np.histogram(clipped, HISTOGRAM_EDGES)[0]

    def report(self) -> dict:
        total = self._total(list(self.frames))
        return {
            "sequences": [
                {"name": name, **_flat(self._total([name])), "frames": [_flat(frame) for frame in frames]}
                for name, frames in self.frames.items()
            ],
            "mean": _flat(total),
            "error_histogram": {"edges": HISTOGRAM_EDGES.tolist(), "counts": self.counts.tolist()},
            **total.get("protocol", {}),  # the sweep of flying points
        }

    def _total(self, sequences: list[str]) -> dict:
        """Over all frames of some sequences."""
        if self.protocol.task == "mv":
            return _mean([self.whole[name] for name in sequences])
        named = [(name, frame) for name in sequences for frame in self.frames[name]]
        frames = [frame for _, frame in named]
        if self.protocol.task == "depth":
            return aggregate_depth(frames)
        scenes = [scene_of(self.protocol.dataset, name, frame["name"]) for name, frame in named]
        return aggregate_boundary(frames, scenes)


def _flat(metrics: dict) -> dict:
    return {key: value for key, value in metrics.items() if key != "protocol"}


def _mean(metrics: list[dict]) -> dict:
    """Plain means where defined; pixels without a prediction are summed up."""
    means: dict[str, float | int | None] = {}
    for key in (*POINT_KEYS, "coverage"):
        defined = [entry[key] for entry in metrics if entry[key] is not None]
        means[key] = float(np.mean(defined)) if defined else None
    return {**means, "nonfinite": sum(entry["nonfinite"] for entry in metrics)}
