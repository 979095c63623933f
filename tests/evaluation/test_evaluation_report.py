import json

import numpy as np
import pytest
from scipy import ndimage
from skimage.data import stereo_motorcycle

from moe3d.evaluation import Frame, aggregate_boundary, boundary_report, flying_points, si_boundary_f1, sobel_f1

MEANS = {
    "si_f1", "sobel_f1", "edge_iou", "edge_miou", "edge_iou_si", "edge_miou_si", "dbe_acc", "dbe_comp", "edge_chamfer",
    "abs_rel_boundary", "delta1_boundary", "coverage",
}  # fmt: skip
KEYS = MEANS | {"flying_rate", "nonfinite", "protocol"}
MAP_METRICS = MEANS - {"edge_chamfer", "abs_rel_boundary", "delta1_boundary", "coverage"}
INTRINSICS = np.array([[15.0, 0, 7.5], [0, 15, 6], [0, 0, 1]])


@pytest.fixture(scope="module")
def motorcycle():
    """(depth in metres, valid, intrinsics) of Middlebury 2014 Motorcycle at half its shipped size."""
    *_, disparity = stereo_motorcycle()
    valid = np.isfinite(disparity) & (disparity > 0)
    depth = 0.193001 * 994.978 / (np.where(valid, disparity, 1) + 31.086)
    return depth[::2, ::2], valid[::2, ::2], np.array([[497.5, 0, 185], [0, 497.5, 125], [0, 0, 1]])


def test_a_report_is_complete_json_whatever_the_image(case):
    report = boundary_report(*case, INTRINSICS)
    assert report.keys() == KEYS
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    total = aggregate_boundary([report])
    assert total.keys() == KEYS | {"flying_rate_ci"}
    assert json.loads(json.dumps(total, allow_nan=False)) == total
    assert {key: total[key] for key in KEYS} == report and total["flying_rate_ci"] is None


def test_values_come_from_the_metrics(random_layers):
    prediction, truth = random_layers(0)
    report = boundary_report(prediction, truth, truth > 0, INTRINSICS)
    frame = Frame(prediction, truth, truth > 0)
    assert report["si_f1"] == si_boundary_f1(frame).f1 and report["sobel_f1"] == sobel_f1(frame).f1
    assert report["flying_rate"] == flying_points(frame).rate
    assert all(report[key] is not None for key in KEYS)
    assert boundary_report(prediction, truth, truth > 0)["edge_chamfer"] is None


def test_no_valid_pixel_leaves_everything_undefined(random_layers):
    prediction, truth = random_layers(0)
    report = boundary_report(prediction, truth, np.zeros(truth.shape, bool), INTRINSICS)
    assert report["nonfinite"] == 0
    assert all(report[key] is None for key in MEANS | {"flying_rate"})


def test_a_prediction_of_any_resolution_is_resampled(random_layers):
    prediction, truth = random_layers(0, (12, 16))
    coarse = prediction[1::3, ::2]
    report = boundary_report(coarse, truth, truth > 0, INTRINSICS)
    assert report == boundary_report(coarse.repeat(3, axis=0).repeat(2, axis=1), truth, truth > 0, INTRINSICS)


def test_aggregation_leaves_out_what_is_undefined(random_layers):
    flat = np.full((9, 9), 2.0)
    reports = [
        boundary_report(p, g, g > 0, INTRINSICS) for p, g in (random_layers(seed, (30, 40)) for seed in range(3))
    ]
    reports.append(boundary_report(flat * np.where(np.eye(9), np.nan, 1), flat, flat > 0, INTRINSICS))
    assert reports[-1]["dbe_acc"] is None and reports[-1]["si_f1"] == 0
    total = aggregate_boundary(reports, scenes=["a", "a", "b", "c"])
    for key in MEANS:
        values = [report[key] for report in reports if report[key] is not None]
        assert total[key] == pytest.approx(sum(values) / len(values))
    assert total["nonfinite"] == 9
    default = [e for e in total["protocol"]["flying_sweep"] if (e["eta"], e["beta"]) == (0.05, 0.2)]
    assert total["flying_rate"] == default[0]["flying"] / default[0]["boundary"]
    low, high = total["flying_rate_ci"]
    assert low <= total["flying_rate"] <= high
    assert aggregate_boundary(reports, scenes=["a", "a", "b", "c"]) == total


def test_aggregation_names_what_is_wrong(random_layers):
    with pytest.raises(ValueError, match="reports must hold at least one"):
        aggregate_boundary([])
    prediction, truth = random_layers(0)
    with pytest.raises(ValueError, match="one scene per report, got 2 for 1 reports"):
        aggregate_boundary([boundary_report(prediction, truth, truth > 0)], scenes=["a", "b"])


def test_real_ground_truth_scores_perfectly_against_itself(motorcycle):
    depth, valid, intrinsics = motorcycle
    report = boundary_report(depth, depth, valid, intrinsics)
    for key in ("si_f1", "sobel_f1", "edge_iou", "edge_miou", "edge_iou_si", "edge_miou_si", "delta1_boundary"):
        assert report[key] == 1
    for key in ("dbe_acc", "dbe_comp", "edge_chamfer", "abs_rel_boundary", "nonfinite"):
        assert report[key] == 0
    assert report["coverage"] == 1
    assert report["flying_rate"] < 0.2  # the floor: steep surfaces, and windows with three of them


def test_blur_makes_points_fly_and_the_edge_filter_removes_them(motorcycle):
    depth, valid, intrinsics = motorcycle
    blurred = ndimage.gaussian_filter(depth, 1.5)
    perfect, blurry, filtered = (
        boundary_report(prediction, depth, valid, intrinsics, edge_filter=t)
        for prediction, t in ((depth, None), (blurred, None), (blurred, 0.03))
    )
    assert blurry["flying_rate"] > 2 * perfect["flying_rate"] and blurry["si_f1"] < 0.5
    assert filtered["flying_rate"] < 0.5 * blurry["flying_rate"] and filtered["coverage"] < 0.95
    assert filtered["abs_rel_boundary"] < blurry["abs_rel_boundary"]
    assert all(filtered[key] == blurry[key] for key in MAP_METRICS)
    boundaries = [[e["boundary"] for e in r["protocol"]["flying_sweep"]] for r in (filtered, blurry)]
    assert boundaries[0] == boundaries[1]
