"""One point cloud of many frames: the confident, the smooth, and no more of them than asked for.

Every step reads the frames one at a time, so that memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moe3d.evaluation import survives_edge_filter
from moe3d.reconstruct.frames import ReconstructedFrame


@dataclass(frozen=True)
class PointSelection:
    """Which points of a reconstruction are kept.

    Raises:
        ValueError: a number out of range, an unknown source.
    """

    source: str = "depth"
    """"depth": depth unprojected with the predicted camera; "head": the point head's."""
    conf_percentile: float = 25.0
    """The least confident points, this many per cent of all frames' together, are dropped; 0 keeps all."""
    edge_filter: float | None = None
    """Points at depth edges are dropped: see :func:`~moe3d.evaluation.survives_edge_filter`."""
    max_points: int = 1_000_000
    """At most so many remain, chosen at random, the same in every run."""

    def __post_init__(self) -> None:
        if self.source not in ("depth", "head"):
            raise ValueError(f"points must be 'depth' or 'head', got {self.source!r}")
        if not 0 <= self.conf_percentile <= 100:
            raise ValueError(f"conf_percentile must lie between 0 and 100, got {self.conf_percentile}")
        if self.edge_filter is not None and not 0 < self.edge_filter < np.inf:
            raise ValueError(f"edge_filter must be a finite number above 0, got {self.edge_filter}")
        if self.max_points < 1:
            raise ValueError(f"max_points must be at least 1, got {self.max_points}")


class PointCloud(NamedTuple):
    """N points of S frames, frame by frame."""

    points: np.ndarray
    """[N, 3] float32 in the world."""
    colors: np.ndarray
    """[N, 3] uint8, sRGB."""
    pixels: np.ndarray
    """[N, 2] int32, where they come from: (column, row) on the model's grid."""
    counts: np.ndarray
    """[S] how many come from each frame."""


def select_points(frames: Iterable[ReconstructedFrame], selection: PointSelection) -> PointCloud:
    """The points that a selection keeps.

    Args:
        frames: read several times.

    Raises:
        ValueError: ``source`` is "head" and a frame has no point head's answer, or no point is left.
    """
    threshold = confidence_threshold(
        lambda: (_confidences(frame, selection) for frame in frames), selection.conf_percentile
    )
    available = np.array([_kept(frame, selection, threshold).sum() for frame in frames])
    if not available.any():
        raise ValueError("no point is left: use a lower --conf-percentile or a higher --edge-filter")
    upto = available.cumsum()
    if upto[-1] > selection.max_points:  # each frame loses the same part of its points
        upto = upto * selection.max_points // upto[-1]
    counts = np.diff(upto, prepend=0)
    random = np.random.default_rng(0)
    parts = [_take(frame, selection, threshold, count, random) for frame, count in zip(frames, counts, strict=True)]
    points, colors, pixels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return PointCloud(points, colors, pixels, counts)


def confidence_threshold(maps: Callable[[], Iterable[np.ndarray]], percentile: float) -> np.float32:
    """The confidence below which ``percentile`` per cent of all lie, exactly and in constant memory.

    It is ``np.percentile(all, percentile, method="lower")`` of all maps' finite values together, found by counting the
    upper and then the lower halves of their bits. Without finite values it is minus infinity.

    Args:
        maps: gives the float32 maps; called twice.
        percentile: between 0 and 100.
    """
    upper, lower = np.zeros((2, 1 << 16), dtype=np.int64)
    for values in maps():
        upper += np.bincount(_sort_keys(values) >> 16, minlength=1 << 16)
    if not upper.any():
        return np.float32(-np.inf)
    bucket, rank = _find_rank(upper, int(percentile / 100 * (upper.sum() - 1)))
    for values in maps():
        keys = _sort_keys(values)
        lower += np.bincount(keys[keys >> 16 == bucket] & 0xFFFF, minlength=1 << 16)
    return _from_sort_key(bucket << 16 | _find_rank(lower, rank)[0])


_SIGN = 1 << 31


def _sort_keys(values: np.ndarray) -> np.ndarray:
    """uint32 numbers that sort as the finite float32 values do."""
    bits = values[np.isfinite(values)].astype(np.float32).view(np.uint32)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def _from_sort_key(key: int) -> np.float32:
    bits = key ^ _SIGN if key & _SIGN else ~key & 0xFFFFFFFF
    return np.uint32(bits).view(np.float32)


def _find_rank(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """In which bucket the value of a rank (from 0) is, and which rank it has in there."""
    upto = np.cumsum(counts)
    bucket = int(np.searchsorted(upto, rank, side="right"))
    return bucket, rank - (int(upto[bucket - 1]) if bucket else 0)


def _seen(frame: ReconstructedFrame) -> np.ndarray:
    """[H, W] bool: where there is a depth."""
    return np.isfinite(frame.depth) & (frame.depth > 0)


def _confidence(frame: ReconstructedFrame, selection: PointSelection) -> np.ndarray:
    if selection.source == "depth":
        return frame.confidence
    if frame.points is None or frame.points_confidence is None:
        raise ValueError("points 'head' needs a model with a point head, and this one has none")
    return frame.points_confidence


def _confidences(frame: ReconstructedFrame, selection: PointSelection) -> np.ndarray:
    return _confidence(frame, selection)[_seen(frame)]


def _points(frame: ReconstructedFrame, selection: PointSelection) -> np.ndarray:
    return frame.unprojected() if selection.source == "depth" or frame.points is None else frame.points


def _kept(frame: ReconstructedFrame, selection: PointSelection, threshold: np.float32) -> np.ndarray:
    """[H, W] bool, before ``max_points``."""
    kept = _seen(frame) & (_confidence(frame, selection) >= threshold)
    kept &= np.isfinite(_points(frame, selection)).all(axis=-1)
    return kept if selection.edge_filter is None else kept & survives_edge_filter(frame.depth, selection.edge_filter)


def _take(
    frame: ReconstructedFrame, selection: PointSelection, threshold: np.float32, count: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``count`` of the frame's points, their colours and pixels."""
    rows, columns = np.nonzero(_kept(frame, selection, threshold))
    if count < len(rows):
        chosen = np.sort(random.choice(len(rows), count, replace=False))
        rows, columns = rows[chosen], columns[chosen]
    points = _points(frame, selection)[rows, columns]
    return points, frame.image[rows, columns], np.stack([columns, rows], axis=1).astype(np.int32)
