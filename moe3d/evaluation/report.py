"""The whole boundary suite: one image's report, and a dataset's."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from moe3d.evaluation.boundary import (
    depth_boundary_error,
    edge_chamfer,
    edge_overlap,
    errors_near_boundaries,
    si_boundary_f1,
    si_edge_maps,
    sobel_edge_maps,
    sobel_f1,
)
from moe3d.evaluation.flying import aggregate_sweeps, default_entry, flying_rate_interval, flying_sweep
from moe3d.evaluation.frame import Frame

MEAN_KEYS = (
    "si_f1",
    "sobel_f1",
    "edge_iou",
    "edge_miou",
    "edge_iou_si",
    "edge_miou_si",
    "dbe_acc",
    "dbe_comp",
    "edge_chamfer",
    "abs_rel_boundary",
    "delta1_boundary",
    "coverage",
)


def boundary_report(prediction, truth, valid, intrinsics=None, edge_filter: float | None = None) -> dict:
    """One image's boundary and flying-point metrics.

    Args:
        prediction: [h, w] planar depth in any unit and at any resolution, brought to the truth's by nearest neighbour.
        truth: [H, W] planar depth in metres.
        valid: [H, W] bool.
        intrinsics: [3, 3] camera matrix of the truth's grid; without it `edge_chamfer` is None.
        edge_filter: see `Frame`. It removes points, not edges: flying points, errors near boundaries, `edge_chamfer`
            and `coverage` change, the metrics of edge maps do not.

    Returns:
        JSON-ready, with the keys of `MEAN_KEYS`, `flying_rate` (eta 0.05, beta 0.2), `nonfinite`, and the counts of
        `flying_sweep` under `protocol`. None is undefined.

    Raises:
        TypeError, ValueError: as `Frame` and `edge_chamfer`.
    """
    frame = Frame(prediction, truth, valid, edge_filter=edge_filter)
    sobel, si = edge_overlap(*sobel_edge_maps(frame)), edge_overlap(*si_edge_maps(frame))
    dbe_acc, dbe_comp = depth_boundary_error(frame)
    near_boundaries = errors_near_boundaries(frame)
    sweep = flying_sweep(frame)
    return {
        "si_f1": si_boundary_f1(frame).f1,
        "sobel_f1": sobel_f1(frame).f1,
        "edge_iou": sobel.iou,
        "edge_miou": sobel.miou,
        "edge_iou_si": si.iou,
        "edge_miou_si": si.miou,
        "dbe_acc": dbe_acc,
        "dbe_comp": dbe_comp,
        "edge_chamfer": None if intrinsics is None else edge_chamfer(frame, intrinsics),
        "abs_rel_boundary": near_boundaries["abs_rel"],
        "delta1_boundary": near_boundaries["delta1"],
        "coverage": frame.coverage,
        "flying_rate": default_entry(sweep)["rate"],
        "nonfinite": frame.nonfinite,
        "protocol": {"flying_sweep": sweep},
    }


def aggregate_boundary(reports: Sequence[dict], scenes: Sequence[Hashable] | None = None) -> dict:
    """A dataset's report from the `boundary_report` of its images.

    Args:
        reports: at least one.
        scenes: the scene of each image, for the confidence interval; by default each image is a scene of its own.

    Returns:
        The same keys, with plain means over the images where a metric is defined, `flying_rate` as total flying / total
        boundary pixels, `nonfinite` summed; and `flying_rate_ci`, its 95% interval (`flying_rate_interval`).

    Raises:
        ValueError: no reports, or `scenes` of another length.
    """
    if not reports:
        raise ValueError("reports must hold at least one image's report, got none")
    scenes = range(len(reports)) if scenes is None else scenes
    if len(scenes) != len(reports):
        raise ValueError(f"scenes must name one scene per report, got {len(scenes)} for {len(reports)} reports")
    sweeps = [report["protocol"]["flying_sweep"] for report in reports]
    sweep = aggregate_sweeps(sweeps)
    headline = [default_entry(one) for one in sweeps]
    return {
        **{key: _mean_of_defined([report[key] for report in reports]) for key in MEAN_KEYS},
        "flying_rate": default_entry(sweep)["rate"],
        "flying_rate_ci": flying_rate_interval(
            [entry["flying"] for entry in headline], [entry["boundary"] for entry in headline], scenes
        ),
        "nonfinite": sum(report["nonfinite"] for report in reports),
        "protocol": {"flying_sweep": sweep},
    }


def _mean_of_defined(values: list[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None
