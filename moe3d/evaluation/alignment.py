"""Bring a prediction of unknown scale to the ground truth's, as each protocol does."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Alignment(NamedTuple):
    """depth -> max(scale * depth + shift, floor)."""

    scale: float = 1.0
    shift: float = 0.0
    floor: float = 0.0

    def apply(self, depth: np.ndarray) -> np.ndarray:
        return np.maximum(self.scale * depth + self.shift, self.floor)


def fit_alignment(prediction: np.ndarray, truth: np.ndarray, method: str = "median") -> Alignment:
    """Fit an alignment to pairs of depths.

    One alignment for a whole sequence is fitted to the pixels of all its frames, concatenated.

    Args:
        prediction, truth: [N] positive depths, N >= 1.
        method: "median": median(truth) / median(prediction). "scale-l1": the s that minimises
            sum |s prediction - truth|; the smallest, where several do. "scale-shift": least squares on
            s prediction + t (of least norm where constant predictions leave a choice), the result clamped to 1e-6.
            "none": as given.

    Raises:
        ValueError: unknown method, shapes that disagree, or no pixels.
    """
    if method not in _FITS:
        raise ValueError(f"align must be one of {', '.join(_FITS)}, got {method!r}")
    if prediction.shape != truth.shape or prediction.ndim != 1 or prediction.size == 0:
        raise ValueError(
            f"prediction and truth must be [N] with the same N >= 1, got {list(prediction.shape)}"
            f" and {list(truth.shape)}"
        )
    return _FITS[method](prediction, truth)


def _median(prediction, truth) -> Alignment:
    return Alignment(float(np.median(truth) / np.median(prediction)))


def _scale_l1(prediction, truth) -> Alignment:
    # sum |s p - g| = sum p |s - g/p|: the median of the ratios g/p, weighted by p.
    ratios = truth / prediction
    order = np.argsort(ratios)
    weight = np.cumsum(prediction[order])
    return Alignment(float(ratios[order][np.searchsorted(weight, weight[-1] / 2)]))


def _scale_shift(prediction, truth) -> Alignment:
    columns = np.stack([prediction, np.ones_like(prediction)], axis=1)
    (scale, shift), *_ = np.linalg.lstsq(columns, truth, rcond=None)
    return Alignment(float(scale), float(shift), floor=1e-6)


def _none(prediction, truth) -> Alignment:
    return Alignment()


_FITS = {"median": _median, "scale-l1": _scale_l1, "scale-shift": _scale_shift, "none": _none}
METHODS = tuple(_FITS)
