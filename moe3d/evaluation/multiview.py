"""Multi-view reconstruction: predicted points of several frames against the true surface that these frames see."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from moe3d.data import Sample
from moe3d.evaluation.edge_filter import survives_edge_filter
from moe3d.evaluation.frame import resize_nearest
from moe3d.evaluation.points import POINT_KEYS, Cloud, Similarity, fit_similarity, icp, score_cloud
from moe3d.evaluation.predictions import Predictions
from moe3d.geometry import scale_intrinsics, unproject

_FAR = 1e100  # coordinates beyond it, whose squares overflow, count as not finite
ALIGNMENTS = ("umeyama-icp", "median-icp", "none")
POINT_SOURCES = ("depth", "head")


@dataclass(frozen=True)
class MultiViewScore:
    """One sequence's result, with maps on the prediction's grid."""

    metrics: dict[str, float | int | None]
    """``POINT_KEYS`` in metres, ``nonfinite`` and ``coverage`` as in :class:`~moe3d.evaluation.Frame`."""
    distances: np.ndarray
    """[S, h, w] metres from each judged pixel's point to the nearest true one; NaN elsewhere."""
    scale: float
    """From the prediction's unit to metres, as the alignment found it."""


@dataclass(frozen=True)
class GridTruth:
    """Ground truth on a prediction's grid, [S, h, w]: depth and validity read at the nearest pixel, and points in the
    world's frame [S, h, w, 3], unprojected with the true cameras and intrinsics scaled to the grid."""

    depth: np.ndarray
    valid: np.ndarray
    points: np.ndarray
    extrinsics: np.ndarray
    """[S, 3, 4]."""


def truth_on_grid(sample: Sample, size: tuple[int, int], mask: np.ndarray) -> GridTruth:
    """Ground truth as a prediction of ``size`` (h, w) meets it.

    Args:
        sample: S frames with extrinsics.
        mask: [S, H, W] bool, where the ground truth counts.

    Raises:
        ValueError: the sample has no extrinsics.
    """
    if sample.extrinsics is None:
        raise ValueError("multi-view metrics need camera poses, and this dataset has none")
    depth = np.stack([resize_nearest(frame, size) for frame in sample.depth.double().numpy()])
    valid = np.stack([resize_nearest(frame, size) for frame in mask])
    height, width = sample.depth.shape[1:]
    intrinsics = scale_intrinsics(sample.intrinsics.double(), size[1] / width, size[0] / height)
    points = unproject(torch.from_numpy(depth), intrinsics, sample.extrinsics.double())
    return GridTruth(depth, valid, points.numpy(), sample.extrinsics.double().numpy())


def score_sequence(
    predictions: Predictions,
    truth: GridTruth,
    align: str = "umeyama-icp",
    source: str = "depth",
    edge_filter: float | None = None,
) -> MultiViewScore:
    """Judge one sequence.

    Args:
        predictions: of the truth's S frames, in their order.
        truth: on the predictions' grid.
        align: "umeyama-icp" (Pi3): the similarity of Umeyama over all judged pixels, then ICP. "median-icp" (Spann3R,
            CUT3R): both clouds in their first camera's frame, moved to median z = 0, the prediction scaled to the
            truth's median distance from its per-axis median, both moved back by the truth's median z and mapped to the
            world by the first true camera; then ICP. "none": as given.
        source: "depth" unprojects predicted depth with predicted cameras, "head" takes the predicted points.
        edge_filter: see :func:`~moe3d.evaluation.survives_edge_filter`, on the predicted depth.

    Points without a finite prediction, or with a depth that is not positive, are left out; the true cloud stays whole.

    Raises:
        ValueError: an unknown ``align`` or ``source``, or points that are not there.
    """
    if align not in ALIGNMENTS:
        raise ValueError(f"align must be one of {', '.join(ALIGNMENTS)}, got {align!r}")
    points = predicted_points(predictions, source)
    compared = truth.valid & (np.abs(points) < _FAR).all(axis=-1)  # false for NaN, too
    kept = compared
    if edge_filter is not None:
        kept = compared & np.stack([survives_edge_filter(depth, edge_filter) for depth in predictions.depth])
    counts = {
        "nonfinite": int(truth.valid.sum() - compared.sum()),
        "coverage": float(kept.sum() / truth.valid.sum()) if truth.valid.any() else None,
    }
    distances = np.full(kept.shape, np.nan)
    if not kept.any():
        return MultiViewScore({**dict.fromkeys(POINT_KEYS), **counts}, distances, 1.0)
    scale, aligned = _pre_align(points[kept], truth, kept, align, predictions.extrinsics)
    surface = Cloud(truth.points[truth.valid])
    if align != "none":
        aligned = icp(aligned, surface).apply(aligned)
    score = score_cloud(Cloud(aligned), surface)
    distances[kept] = score.distances
    return MultiViewScore({**score.metrics, **counts}, distances, scale)


def predicted_points(predictions: Predictions, source: str) -> np.ndarray:
    """[S, h, w, 3] float64 in the prediction's world frame; NaN where there is none."""
    if source not in POINT_SOURCES:
        raise ValueError(f"points must be one of {', '.join(POINT_SOURCES)}, got {source!r}")
    if source == "head":
        if predictions.points is None:
            raise ValueError("points must be depth: these predictions hold no points of a head")
        return predictions.points.astype(np.float64)
    depth = np.where(predictions.depth > 0, predictions.depth, np.nan).astype(np.float64)
    matrices = (torch.from_numpy(m.astype(np.float64)) for m in (predictions.intrinsics, predictions.extrinsics))
    return unproject(torch.from_numpy(depth), *matrices).numpy()


def _pre_align(
    points: np.ndarray, truth: GridTruth, kept: np.ndarray, align: str, cameras: np.ndarray
) -> tuple[float, np.ndarray]:
    """The scale, and the predicted points [N, 3] in the true world before ICP."""
    if align == "none":
        return 1.0, points
    if align == "umeyama-icp":
        similarity = fit_similarity(points, truth.points[kept])
        return similarity.scale, similarity.apply(points)
    first = _first_known(cameras)
    to_camera, to_true_camera = _motion(cameras[first]), _motion(truth.extrinsics[first])
    here, there = to_camera.apply(points), to_true_camera.apply(truth.points[kept])
    shift, true_shift = (np.array([0, 0, np.median(cloud[:, 2])]) for cloud in (here, there))
    spread, true_spread = _spread(here), _spread(there)
    scale = true_spread / spread if spread and true_spread else 1.0  # a point has none
    return scale, _inverse(to_true_camera).apply((here - shift) * scale + true_shift)


def _first_known(cameras: np.ndarray) -> int:
    """The first camera that is finite: the first of all, unless it was lost."""
    known = np.isfinite(cameras).all(axis=(1, 2)).nonzero()[0]
    if not len(known):
        raise ValueError("align median-icp needs a camera that is finite, and these predictions hold none")
    return int(known[0])


def _spread(points: np.ndarray) -> float:
    """The median distance from the per-axis median."""
    return float(np.median(np.linalg.norm(points - np.median(points, axis=0), axis=1)))


def _motion(extrinsics: np.ndarray) -> Similarity:
    extrinsics = np.asarray(extrinsics, dtype=np.float64)
    return Similarity(1.0, extrinsics[:, :3], extrinsics[:, 3])


def _inverse(motion: Similarity) -> Similarity:
    return Similarity(1.0, motion.rotation.T, -motion.rotation.T @ motion.translation)
