"""What every metric of one image reads: a predicted depth map beside its ground truth, on the ground truth's grid."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from moe3d.evaluation.edge_filter import survives_edge_filter


class Frame:
    """One predicted depth map beside its ground truth.

    Args:
        prediction: [h, w] planar depth in any unit. It covers the whole ground-truth image whatever its resolution.
        truth: [H, W] planar depth in metres.
        valid: [H, W] bool, where the ground truth may be trusted.
        resample: how the prediction comes to [H, W]: "nearest" (boundaries and flying points, which interpolation
            would invent) or "bilinear" (depth errors).
        edge_filter: drop predicted points where the 3x3 range of the prediction, on its own grid, exceeds this
            fraction of its depth (`survives_edge_filter`); None keeps all.

    Attributes:
        prediction, truth: [H, W] float64; 1 wherever there is nothing to read.
        valid: [H, W] bool, as given.
        compared: [H, W] bool, the valid pixels with a finite positive prediction. Metrics of the depth *map* (edges)
            read these: the edge filter removes points, not edges.
        kept: [H, W] bool, the compared pixels that survive the edge filter. Metrics of *points* read these.

    Raises:
        TypeError: `valid` is not boolean, or a depth map is not numeric.
        ValueError: a depth map is not [H, W] or empty, sizes disagree, `truth` is not finite and positive wherever it
            is valid, `resample` is unknown, or `edge_filter` is not a positive number.
    """

    def __init__(self, prediction, truth, valid, resample: str = "nearest", edge_filter: float | None = None):
        prediction, truth = _depth_map(prediction, "prediction"), _depth_map(truth, "truth")
        valid = _validity(valid, truth)
        if resample not in RESAMPLERS:
            raise ValueError(f"resample must be one of {', '.join(RESAMPLERS)}, got {resample!r}")

        # NaN, so that interpolation cannot blend an unusable depth into a usable one.
        usable = np.where(np.isfinite(prediction) & (prediction > 0), prediction, np.nan)
        resampled = RESAMPLERS[resample](usable, truth.shape)
        predicted = np.isfinite(resampled)

        self.prediction = np.where(predicted, resampled, 1.0)
        self.truth = np.where(valid, truth, 1.0)
        self.valid = valid
        self.compared = valid & predicted
        self.kept = self.compared
        if edge_filter is not None:
            self.kept = self.compared & resize_nearest(survives_edge_filter(prediction, edge_filter), truth.shape)

    @property
    def nonfinite(self) -> int:
        """How many valid pixels have no finite positive prediction."""
        return int(self.valid.sum() - self.compared.sum())

    @property
    def coverage(self) -> float | None:
        """The fraction of valid pixels that point metrics read; None without valid pixels."""
        return float(self.kept.sum() / self.valid.sum()) if self.valid.any() else None


def resize_nearest(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h, w] to [H, W] = size: row i reads source row floor((i + 0.5) h / H), columns alike, in integer arithmetic."""
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, image.shape, strict=True))
    return image[rows[:, None], columns]


def resize_bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h, w] to [H, W] = size: half-pixel centres, edges replicated, no antialiasing.

    A non-finite pixel makes every output non-finite whose 2x2 source support holds it.
    """
    if image.shape == tuple(size):
        return image
    zoom = [new / old for new, old in zip(size, image.shape, strict=True)]
    return ndimage.zoom(image, zoom, order=1, mode="nearest", grid_mode=True)


RESAMPLERS = {"nearest": resize_nearest, "bilinear": resize_bilinear}


def _depth_map(values, name: str) -> np.ndarray:
    try:
        depth = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be an array of depths, got {type(values).__name__}") from None
    if depth.ndim != 2 or depth.size == 0:
        raise ValueError(f"{name} must be a non-empty [H, W] depth map, got shape {list(depth.shape)}")
    return depth


def _validity(values, truth: np.ndarray) -> np.ndarray:
    valid = np.asarray(values)
    if valid.dtype != bool:
        raise TypeError(f"valid must be boolean, got {valid.dtype}")
    if valid.shape != truth.shape:
        raise ValueError(f"valid must have truth's shape {list(truth.shape)}, got {list(valid.shape)}")
    wrong = int(np.sum(valid & ~(np.isfinite(truth) & (truth > 0))))
    if wrong:
        raise ValueError(f"truth must be finite and positive wherever valid is set, but is not at {wrong} pixels")
    return valid
