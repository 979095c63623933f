"""How well a depth map's boundaries stand where the ground truth's do.

Every metric takes a `Frame` built with `resample="nearest"` and returns None for what is undefined. Pixels, or pairs of
neighbours, without valid ground truth or without a usable prediction are left out of prediction and truth alike.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial import cKDTree

from moe3d.evaluation.alignment import fit_alignment
from moe3d.evaluation.depth import depth_errors
from moe3d.evaluation.edges import (
    NEIGHBOURS,
    canny_edges,
    dilate,
    distance_to,
    erode,
    fill_from_nearest,
    min_max_normalised,
    nearer_ratios,
    relative_step,
    si_edges,
    sobel_magnitude,
)
from moe3d.evaluation.frame import Frame
from moe3d.geometry import unproject

SI_THRESHOLDS = np.linspace(1.05, 1.25, 10)
DBE_LIMIT = 10.0  # pixels
BOUNDARY_ETA = 0.05
BOUNDARY_REACH = 5.0  # pixels


class BoundaryScore(NamedTuple):
    """Each in [0, 1], or all None where no pixel can be compared."""

    f1: float | None
    precision: float | None
    recall: float | None


class EdgeOverlap(NamedTuple):
    """Intersection over union of edge pixels, and its mean with that of the others; None where a union is empty."""

    iou: float | None
    miou: float | None


def si_boundary_f1(frame: Frame) -> BoundaryScore:
    """Scale-invariant boundary F1 of Depth Pro (arXiv 2410.02073, section 3 and its released code).

    An edge points from a pixel to a neighbour more than t times nearer. Precision and recall are means over the four
    directions of hits / max(edges, 1), so a direction without edges counts 0; scores are averaged over ten thresholds
    t from 1.05 to 1.25, weighted by t.
    """
    pairs = [frame.compared[pixel] & frame.compared[neighbour] for pixel, neighbour in NEIGHBOURS]
    if not any(pair.any() for pair in pairs):
        return BoundaryScore(None, None, None)
    predicted = [ratio[pair] for ratio, pair in zip(nearer_ratios(frame.prediction), pairs, strict=True)]
    true = [ratio[pair] for ratio, pair in zip(nearer_ratios(frame.truth), pairs, strict=True)]
    scores = [_four_way_score([p > t for p in predicted], [g > t for g in true]) for t in SI_THRESHOLDS]
    return BoundaryScore(*(float(np.average(score, weights=SI_THRESHOLDS)) for score in zip(*scores, strict=True)))


def sobel_f1(frame: Frame, theta: float = 0.25) -> BoundaryScore:
    """F1 of Sobel edges in metric depth (Hu et al., arXiv 1803.08673), the prediction median-aligned; 0/0 is 0.

    Args:
        theta: gradient magnitude, in metres, above which a pixel is an edge.
    """
    predicted, true = sobel_edge_maps(frame, theta)
    if not true.size:
        return BoundaryScore(None, None, None)
    hits = np.sum(predicted & true)
    return _score(hits / max(predicted.sum(), 1), hits / max(true.sum(), 1))


def sobel_edge_maps(frame: Frame, theta: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
    """(predicted, true) edges, [N] bool over the pixels whose whole 3x3 window can be compared."""
    mask = erode(frame.compared, 3)
    aligned = _median_aligned(frame, frame.compared)
    return sobel_magnitude(aligned)[mask] > theta, sobel_magnitude(frame.truth)[mask] > theta


def si_edge_maps(frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    """(predicted, true) scale-invariant edges at t = 1.25, four directions united, [N] bool over compared pixels."""
    mask = frame.compared
    return si_edges(frame.prediction, mask)[mask], si_edges(frame.truth, mask)[mask]


def edge_overlap(predicted: np.ndarray, true: np.ndarray) -> EdgeOverlap:
    """Overlap of two edge maps of one shape, such as those of `sobel_edge_maps` and `si_edge_maps`."""
    edge, other = _iou(predicted, true), _iou(~predicted, ~true)
    return EdgeOverlap(edge, None if edge is None or other is None else (edge + other) / 2)


def depth_boundary_error(frame: Frame) -> tuple[float | None, float | None]:
    """iBims-1 depth boundary errors, accuracy and completeness, in pixels (Koch et al., arXiv 1805.01328).

    Both depth maps are filled from the nearest readable pixel, min-max normalised and passed through Canny.
    """
    if not frame.compared.any():
        return None, None
    predicted, true = (
        canny_edges(min_max_normalised(fill_from_nearest(depth, mask)))
        for depth, mask in ((frame.prediction, frame.compared), (frame.truth, frame.valid))
    )
    return edge_distances(predicted, true)


def edge_distances(predicted: np.ndarray, true: np.ndarray) -> tuple[float | None, float | None]:
    """The distances behind `depth_boundary_error`, for edge maps from anywhere (iBims-1 annotates its own).

    Args:
        predicted, true: [H, W] bool.

    Returns:
        Accuracy, the mean distance to a true edge of the predicted edges less than 10 px from one; and completeness,
        the mean distance, at most 10 px, of the edges of either map to the other. Both are 10 without a predicted edge
        less than 10 px from a true one, both None without true edges.
    """
    if not true.any():
        return None, None
    to_true = distance_to(true)[predicted]
    close = to_true[to_true < DBE_LIMIT]
    if not close.size:
        return DBE_LIMIT, DBE_LIMIT
    to_predicted = distance_to(predicted)[true]
    both_ways = np.minimum(np.concatenate([to_true, to_predicted]), DBE_LIMIT)
    return float(close.mean()), float(both_ways.mean())


def errors_near_boundaries(frame: Frame) -> dict[str, float | None]:
    """`depth_errors` over the kept pixels within 5 px of a ground-truth boundary (relative step above 0.05).

    Median alignment over all kept pixels.
    """
    boundary = relative_step(frame.truth, frame.valid) > BOUNDARY_ETA
    near = frame.kept & (distance_to(boundary) <= BOUNDARY_REACH)
    return depth_errors(_median_aligned(frame, frame.kept)[near], frame.truth[near])


def edge_chamfer(frame: Frame, intrinsics) -> float | None:
    """Chamfer distance of the point clouds at edges, in metres: mean(prediction -> truth) + mean(truth -> prediction).

    Edges are Canny on the ground truth's log depth, dilated by a 5x5 window (the flying points' window). The prediction
    is median-aligned over all kept pixels, and both depths are unprojected.

    Args:
        intrinsics: [3, 3] camera matrix of the ground truth's grid, the centre of the top-left pixel at (0, 0).

    Raises:
        ValueError: `intrinsics` is not a finite, invertible [3, 3] matrix.
    """
    intrinsics = np.array(intrinsics, dtype=np.float64)
    if intrinsics.shape != (3, 3) or not np.isfinite(intrinsics).all() or np.linalg.det(intrinsics) == 0:
        raise ValueError(f"intrinsics must be an invertible [3, 3] camera matrix, got {intrinsics.tolist()}")
    if not frame.kept.any():
        return None
    at_edges = dilate(canny_edges(np.log(fill_from_nearest(frame.truth, frame.valid))), 5)
    predicted, true = at_edges & frame.kept, at_edges & frame.valid
    if not predicted.any():
        return None
    cloud = _unproject(_median_aligned(frame, frame.kept), predicted, intrinsics)
    true_cloud = _unproject(frame.truth, true, intrinsics)
    there, _ = cKDTree(true_cloud).query(cloud)
    back, _ = cKDTree(cloud).query(true_cloud)
    return float(there.mean() + back.mean())


def _median_aligned(frame: Frame, pixels: np.ndarray) -> np.ndarray:
    if not pixels.any():
        return frame.prediction  # of which no pixel will be read
    return fit_alignment(frame.prediction[pixels], frame.truth[pixels], "median").apply(frame.prediction)


def _score(precision: float, recall: float) -> BoundaryScore:
    total = precision + recall
    return BoundaryScore(float(2 * precision * recall / total) if total else 0.0, float(precision), float(recall))


def _four_way_score(predicted: list[np.ndarray], true: list[np.ndarray]) -> BoundaryScore:
    hits = np.array([np.count_nonzero(p & g) for p, g in zip(predicted, true, strict=True)])
    precision = hits / np.maximum([np.count_nonzero(p) for p in predicted], 1)
    recall = hits / np.maximum([np.count_nonzero(g) for g in true], 1)
    return _score(precision.mean(), recall.mean())


def _iou(a: np.ndarray, b: np.ndarray) -> float | None:
    union = np.sum(a | b)
    return float(np.sum(a & b) / union) if union else None


def _unproject(depth: np.ndarray, mask: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    return unproject(torch.from_numpy(depth), torch.from_numpy(intrinsics)).numpy()[mask]
