"""One system's prediction of some frames of a sequence, judged as a task asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moe3d.data import Sample
from moe3d.evaluation.alignment import Alignment, fit_alignment
from moe3d.evaluation.boundary import BOUNDARY_ETA, BOUNDARY_REACH
from moe3d.evaluation.depth import depth_metrics
from moe3d.evaluation.edges import distance_to, relative_step, si_edges
from moe3d.evaluation.frame import Frame
from moe3d.evaluation.multiview import score_sequence, truth_on_grid
from moe3d.evaluation.predictions import Predictions
from moe3d.evaluation.protocol import Protocol
from moe3d.evaluation.report import boundary_report

EDGE_RATIO = 1.1
"""Of neighbouring depths, above which a view shows an edge: in the middle of the thresholds of ``si_f1``."""


@dataclass(frozen=True)
class View:
    """What there is to see of one prediction, [H, W] on the grid that it is judged on."""

    depth: np.ndarray
    """Brought to metres; NaN where there is none."""
    truth: np.ndarray
    """Metres; NaN where not valid."""
    distances: np.ndarray | None
    """mv: metres from each point to the nearest true one, NaN where not judged; None for other tasks."""
    edges: np.ndarray
    true_edges: np.ndarray
    """bool, pixels with a neighbour more than ``EDGE_RATIO`` times nearer, as far as both depths are known."""


@dataclass(frozen=True)
class JudgedFrame:
    """One frame's figures, and what a page wants to show of it."""

    metrics: dict
    errors: np.ndarray
    """[N]: |p - g| / g of the judged pixels (boundary: those near a boundary), or distances in metres (mv)."""
    view: Callable[[], View]


@dataclass(frozen=True)
class Judged:
    """The frames, and what belongs to the sequence as a whole (mv)."""

    frames: list[JudgedFrame]
    whole: dict | None = None


def judge_depth(sample: Sample, mask: np.ndarray, predictions: Predictions, protocol: Protocol) -> Judged:
    """`depth_metrics` of each frame, aligned as the protocol says.

    Args:
        sample: S frames.
        mask: [S, H, W] bool, where their ground truth counts.
        predictions: of these frames, in this order.
    """
    truths = sample.depth.double().numpy()
    frames = [
        Frame(depth, truth, valid, "bilinear", protocol.edge_filter)
        for depth, truth, valid in zip(predictions.depth, truths, mask, strict=True)
    ]
    groups = [frames] * len(frames) if protocol.per == "sequence" else [[frame] for frame in frames]
    judged = []
    for index, (frame, group) in enumerate(zip(frames, groups, strict=True)):
        alignment = _fit(group, protocol.align)
        aligned = alignment.apply(frame.prediction[frame.kept])
        judged.append(
            JudgedFrame(
                depth_metrics(frame, alignment),
                np.abs(aligned / frame.truth[frame.kept] - 1),
                _later(predictions.depth[index], truths[index], mask[index], alignment),
            )
        )
    return Judged(judged)


def judge_boundary(sample: Sample, mask: np.ndarray, predictions: Predictions, protocol: Protocol) -> Judged:
    """`boundary_report` of each frame. Arguments as :func:`judge_depth`."""
    judged = []
    cameras = sample.intrinsics.double().numpy()
    for depth, truth, valid, camera in zip(
        predictions.depth, sample.depth.double().numpy(), mask, cameras, strict=True
    ):
        frame = Frame(depth, truth, valid, edge_filter=protocol.edge_filter)
        alignment = _fit([frame], "median")
        near = frame.kept & (distance_to(relative_step(frame.truth, valid) > BOUNDARY_ETA) <= BOUNDARY_REACH)
        judged.append(
            JudgedFrame(
                boundary_report(depth, truth, valid, camera, protocol.edge_filter),
                np.abs(alignment.apply(frame.prediction[near]) / frame.truth[near] - 1),
                _later(depth, truth, valid, alignment),
            )
        )
    return Judged(judged)


def judge_multiview(sample: Sample, mask: np.ndarray, predictions: Predictions, protocol: Protocol) -> Judged:
    """`score_sequence`; a frame's own figure is its mean accuracy. Arguments as :func:`judge_depth`."""
    height, width = predictions.depth.shape[1:]
    truth = truth_on_grid(sample, (height, width), mask)
    score = score_sequence(predictions, truth, protocol.align, protocol.points, protocol.edge_filter)
    judged = []
    for depth, true_depth, valid, distances in zip(
        predictions.depth, truth.depth, truth.valid, score.distances, strict=True
    ):
        errors = distances[np.isfinite(distances)]
        metrics = {"acc_mean": float(errors.mean()) if errors.size else None}
        view = _later(depth, true_depth, valid, Alignment(score.scale), distances)
        judged.append(JudgedFrame(metrics, errors, view))
    return Judged(judged, score.metrics)


JUDGES = {"mv": judge_multiview, "depth": judge_depth, "boundary": judge_boundary}


def _fit(frames: list[Frame], method: str) -> Alignment:
    """One alignment for all kept pixels of the frames; as given where there is none."""
    prediction, truth = (
        np.concatenate([getattr(frame, what)[frame.kept] for frame in frames]) for what in ("prediction", "truth")
    )
    return fit_alignment(prediction, truth, method) if truth.size else Alignment()


def _later(
    depth: np.ndarray, truth: np.ndarray, valid: np.ndarray, alignment: Alignment, distances: np.ndarray | None = None
) -> Callable[[], View]:
    """A view that costs nothing until somebody wants to see it."""

    def view() -> View:
        frame = Frame(depth, truth, valid)
        everywhere = Frame(depth, np.ones(truth.shape), np.ones(truth.shape, dtype=bool))
        return View(
            depth=np.where(everywhere.compared, alignment.apply(everywhere.prediction), np.nan),
            truth=np.where(valid, truth, np.nan),
            distances=distances,
            edges=si_edges(frame.prediction, frame.compared, EDGE_RATIO),
            true_edges=si_edges(frame.truth, frame.compared, EDGE_RATIO),
        )

    return view
