"""Depth errors: AbsRel, delta and their companions."""

from __future__ import annotations

import numpy as np

from moe3d.evaluation.alignment import Alignment, fit_alignment
from moe3d.evaluation.frame import Frame

DEPTH_KEYS = ("abs_rel", "delta1", "delta2", "delta3", "sq_rel", "rmse", "log_rmse")


def depth_errors(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float | None]:
    """The errors of Eigen et al. (arXiv 1406.2283) over pairs of aligned depths.

    Args:
        prediction, truth: [N] positive depths in metres.

    Returns:
        abs_rel = mean |p - g| / g; delta_i = mean(max(p/g, g/p) < 1.25^i); sq_rel = mean (p - g)^2 / g and rmse in
        metres; log_rmse in nats. All None without pixels.
    """
    if truth.size == 0:
        return dict.fromkeys(DEPTH_KEYS)
    difference = prediction - truth
    ratio = np.maximum(prediction / truth, truth / prediction)
    errors = {
        "abs_rel": np.mean(np.abs(difference) / truth),
        "delta1": np.mean(ratio < 1.25),
        "delta2": np.mean(ratio < 1.25**2),
        "delta3": np.mean(ratio < 1.25**3),
        "sq_rel": np.mean(difference**2 / truth),
        "rmse": np.sqrt(np.mean(difference**2)),
        "log_rmse": np.sqrt(np.mean(np.log(ratio) ** 2)),
    }
    return {key: float(error) for key, error in errors.items()}


def depth_metrics(frame: Frame, align: str | Alignment = "median") -> dict[str, float | int | None]:
    """One image's depth errors.

    Args:
        frame: built with `resample="bilinear"`, as the protocols do.
        align: a method of `fit_alignment`, or an alignment already fitted (to the image's sequence).

    Returns:
        `depth_errors` over the kept pixels, `nonfinite` and `coverage`, and the counts that `aggregate_depth` needs:
        `pixels` (kept) and `valid_pixels`.
    """
    prediction, truth = frame.prediction[frame.kept], frame.truth[frame.kept]
    if isinstance(align, str):
        align = fit_alignment(prediction, truth, align) if truth.size else Alignment()
    aligned = align.apply(prediction)
    return {
        **depth_errors(aligned, truth),
        "nonfinite": frame.nonfinite,
        "coverage": frame.coverage,
        "pixels": truth.size,
        "valid_pixels": int(frame.valid.sum()),
    }


def aggregate_depth(reports: list[dict]) -> dict[str, float | int | None]:
    """The mean of `depth_metrics` over images, each weighted by the pixels it was measured on (MonST3R, CUT3R).

    Images without any left weigh nothing; a dataset without any left has None everywhere.
    """
    pixels = np.array([report["pixels"] for report in reports])
    valid = sum(report["valid_pixels"] for report in reports)
    measured = [report for report in reports if report["pixels"]]
    means = {
        key: float(np.average([report[key] for report in measured], weights=pixels[pixels > 0])) if measured else None
        for key in DEPTH_KEYS
    }
    return {
        **means,
        "nonfinite": sum(report["nonfinite"] for report in reports),
        "coverage": float(pixels.sum() / valid) if valid else None,
    }
