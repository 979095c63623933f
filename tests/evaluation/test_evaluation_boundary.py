import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from skimage.feature import canny

from moe3d.evaluation import (
    Frame,
    depth_boundary_error,
    edge_chamfer,
    edge_distances,
    edge_overlap,
    errors_near_boundaries,
    si_boundary_f1,
    si_edge_maps,
    sobel_edge_maps,
    sobel_f1,
)
from moe3d.evaluation.edges import fill_from_nearest, relative_step

DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0))
INTRINSICS = np.array([[15.0, 0.3, 7.2], [0, 14.0, 6.1], [0, 0, 1]])


# Plain loops, from the definitions.


def usable(depth):
    return math.isfinite(depth) and depth > 0


def compared(prediction, valid):
    return np.array(
        [[bool(v) and usable(p) for p, v in zip(*rows, strict=True)] for rows in zip(prediction, valid, strict=True)]
    )


def inside(array, i, j):
    return 0 <= i < array.shape[0] and 0 <= j < array.shape[1]


def loop_si(prediction, truth, valid):
    mask = compared(prediction, valid)
    thresholds = [1.05 + 0.2 * k / 9 for k in range(10)]
    total = {"f1": 0, "precision": 0, "recall": 0}
    any_pair = False
    for threshold in thresholds:
        precisions, recalls = [], []
        for di, dj in DIRECTIONS:
            hits = predicted = true = 0
            for i, j in np.ndindex(truth.shape):
                if not (inside(truth, i + di, j + dj) and mask[i, j] and mask[i + di, j + dj]):
                    continue
                any_pair = True
                p, g = (
                    (1 / max(d[i + di, j + dj], 1e-6)) / (1 / max(d[i, j], 1e-6)) > threshold
                    for d in (prediction, truth)
                )
                hits, predicted, true = hits + (p and g), predicted + p, true + g
            precisions.append(hits / max(predicted, 1))
            recalls.append(hits / max(true, 1))
        precision, recall = sum(precisions) / 4, sum(recalls) / 4
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0
        for key, value in (("f1", f1), ("precision", precision), ("recall", recall)):
            total[key] += value * threshold / sum(thresholds)
    return tuple(total.values()) if any_pair else (None, None, None)


def median_scale(prediction, truth, mask):
    return statistics.median(truth[mask]) / statistics.median(prediction[mask])


def loop_sobel_edges(depth, theta):
    height, width = depth.shape
    edges = np.zeros(depth.shape, bool)
    for i, j in np.ndindex(depth.shape):
        gx = gy = 0
        for d, weight in ((-1, 1), (0, 2), (1, 1)):
            row, column = min(max(i + d, 0), height - 1), min(max(j + d, 0), width - 1)
            gx += weight * (depth[row, min(j + 1, width - 1)] - depth[row, max(j - 1, 0)])
            gy += weight * (depth[min(i + 1, height - 1), column] - depth[max(i - 1, 0), column])
        edges[i, j] = math.sqrt(gx * gx + gy * gy) > theta
    return edges


def loop_sobel_maps(prediction, truth, valid, theta=0.25):
    """Two lists of the edges at the pixels that may be compared."""
    mask = compared(prediction, valid)
    if not mask.any():
        return [], []
    aligned = np.where(mask, prediction, 0) * median_scale(prediction, truth, mask)
    maps = loop_sobel_edges(aligned, theta), loop_sobel_edges(np.where(mask, truth, 0), theta)
    whole = [(i, j) for i, j in np.ndindex(mask.shape) if mask[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].all()]
    return tuple([edges[pixel] for pixel in whole] for edges in maps)


def loop_si_maps(prediction, truth, valid):
    mask = compared(prediction, valid)

    def edge(depth, i, j):
        return any(
            inside(depth, i + di, j + dj) and mask[i + di, j + dj] and (1 / depth[i + di, j + dj]) * depth[i, j] > 1.25
            for di, dj in DIRECTIONS
        )

    pixels = [pixel for pixel in np.ndindex(mask.shape) if mask[pixel]]
    return tuple([edge(depth, *pixel) for pixel in pixels] for depth in (prediction, truth))


def loop_f1(predicted, true):
    if not true:
        return None, None, None
    hits = sum(p and g for p, g in zip(predicted, true, strict=True))
    precision = hits / sum(predicted) if any(predicted) else 0
    recall = hits / sum(true) if any(true) else 0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0, precision, recall


def loop_iou(predicted, true):
    def iou(a, b):
        union = sum(x or y for x, y in zip(a, b, strict=True))
        return sum(x and y for x, y in zip(a, b, strict=True)) / union if union else None

    edge, other = iou(predicted, true), iou([not p for p in predicted], [not g for g in true])
    return edge, None if None in (edge, other) else (edge + other) / 2


def loop_distances(predicted, true):
    def nearest(pixel, edges):
        return min((math.dist(pixel, other) for other in edges), default=math.inf)

    predicted, true = (np.argwhere(edges).tolist() for edges in (predicted, true))
    if not true:
        return None, None
    to_true = [nearest(pixel, true) for pixel in predicted]
    close = [d for d in to_true if d < 10]
    if not close:
        return 10, 10
    to_predicted = [nearest(pixel, predicted) for pixel in true]
    both = [min(d, 10) for d in to_true + to_predicted]
    return sum(close) / len(close), sum(both) / (len(predicted) + len(true))


def loop_canny(depth, mask):
    filled = fill_from_nearest(depth, mask)
    span = filled.max() - filled.min()
    normalised = (filled - filled.min()) / span if span else filled * 0
    return canny(normalised, sigma=math.sqrt(2), low_threshold=0.15, high_threshold=0.3)


def loop_near_boundaries(prediction, truth, valid, kept=True):
    mask = compared(prediction, valid) & kept
    boundary = []
    for i, j in np.ndindex(truth.shape):
        for di, dj in DIRECTIONS:
            if inside(truth, i + di, j + dj) and valid[i, j] and valid[i + di, j + dj]:
                a, b = truth[i, j], truth[i + di, j + dj]
                if abs(a - b) / min(a, b) > 0.05:
                    boundary.append((i, j))
    pixels = [
        pixel for pixel in np.ndindex(mask.shape) if mask[pixel] and any(math.dist(pixel, b) <= 5 for b in boundary)
    ]
    if not pixels:
        return None, None
    scale = median_scale(prediction, truth, mask)
    pairs = [(scale * prediction[pixel], truth[pixel]) for pixel in pixels]
    return (
        sum(abs(p - g) / g for p, g in pairs) / len(pairs),
        sum(max(p / g, g / p) < 1.25 for p, g in pairs) / len(pairs),
    )


def loop_chamfer(prediction, truth, valid, kept=True):
    mask = compared(prediction, valid) & kept
    if not mask.any():
        return None
    edges = canny(np.log(fill_from_nearest(truth, valid)), sigma=math.sqrt(2), low_threshold=0.15, high_threshold=0.3)
    scale = median_scale(prediction, truth, mask)
    clouds = [], []
    for i, j in np.ndindex(truth.shape):
        if edges[max(i - 2, 0) : i + 3, max(j - 2, 0) : j + 3].any():
            ray = np.linalg.solve(INTRINSICS, [j, i, 1])
            if mask[i, j]:
                clouds[0].append(scale * prediction[i, j] * ray)
            if valid[i, j]:
                clouds[1].append(truth[i, j] * ray)
    if not clouds[0]:
        return None
    distance = cdist(*clouds)
    return distance.min(axis=1).mean() + distance.min(axis=0).mean()


def near(expected):
    """Equal up to rounding, None only to None."""
    if isinstance(expected, dict):
        return {key: near(value) for key, value in expected.items()}
    if isinstance(expected, tuple):
        return tuple(near(value) for value in expected)
    return None if expected is None else pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_si_f1_is_its_definition(case):
    assert si_boundary_f1(Frame(*case)) == near(loop_si(*case))


def test_sobel_f1_is_its_definition(case):
    assert sobel_f1(Frame(*case)) == near(loop_f1(*loop_sobel_maps(*case)))
    assert sobel_f1(Frame(*case), theta=1) == near(loop_f1(*loop_sobel_maps(*case, theta=1)))


def test_edge_overlap_is_its_definition(case):
    frame = Frame(*case)
    assert edge_overlap(*sobel_edge_maps(frame)) == near(loop_iou(*loop_sobel_maps(*case)))
    assert edge_overlap(*si_edge_maps(frame)) == near(loop_iou(*loop_si_maps(*case)))


def test_depth_boundary_error_is_its_definition(case):
    prediction, truth, valid = case
    mask = compared(prediction, valid)
    expected = (None, None)
    if mask.any():
        expected = loop_distances(loop_canny(prediction, mask), loop_canny(truth, valid))
    assert depth_boundary_error(Frame(*case)) == near(expected)


@given(st.integers(0, 10_000), st.sampled_from([0, 0.005, 0.05, 1]), st.sampled_from([0, 0.005, 0.05, 1]))
@settings(max_examples=40, deadline=None)
def test_edge_distances_are_their_definition(seed, predicted_density, true_density):
    rng = np.random.default_rng(seed)
    predicted, true = rng.random((24, 25)) < predicted_density, rng.random((24, 25)) < true_density
    assert edge_distances(predicted, true) == near(loop_distances(predicted, true))


def test_edge_distances_known_by_hand():
    predicted, true = np.zeros((2, 30, 30), bool)
    true[10, 10] = True
    assert edge_distances(predicted, true) == (10, 10)
    predicted[13, 14] = True  # 5 px away
    assert edge_distances(predicted, true) == (5, 5)
    predicted[10, 25] = True  # 15 px away: not counted by accuracy, counted as 10 by completeness
    assert edge_distances(predicted, true) == (5, pytest.approx((5 + 10 + 5) / 3))
    assert edge_distances(predicted, ~predicted & False) == (None, None)


def test_errors_near_boundaries_are_their_definition(case):
    errors = errors_near_boundaries(Frame(*case))
    assert (errors["abs_rel"], errors["delta1"]) == near(loop_near_boundaries(*case))


def test_edge_chamfer_is_its_definition(case):
    assert edge_chamfer(Frame(*case), INTRINSICS) == near(loop_chamfer(*case))


@pytest.mark.parametrize("seed", range(3))
def test_dropped_points_are_missing_from_point_metrics_only(random_layers, seed):
    prediction, truth = random_layers(seed)
    valid = np.random.default_rng(seed).random(truth.shape) < 0.95
    free, filtered = (Frame(prediction, truth, valid, edge_filter=t) for t in (None, 0.3))
    assert 0.3 < filtered.coverage < 0.97
    errors = errors_near_boundaries(filtered)
    assert (errors["abs_rel"], errors["delta1"]) == near(loop_near_boundaries(prediction, truth, valid, filtered.kept))
    assert edge_chamfer(filtered, INTRINSICS) == near(loop_chamfer(prediction, truth, valid, filtered.kept))
    assert si_boundary_f1(filtered) == si_boundary_f1(free) and sobel_f1(filtered) == sobel_f1(free)
    assert depth_boundary_error(filtered) == depth_boundary_error(free)


@pytest.mark.parametrize("seed", range(3))
def test_holes_are_filled_from_a_nearest_pixel(random_layers, seed):
    depth, _ = random_layers(seed)
    mask = np.random.default_rng(seed).random(depth.shape) < 0.1
    filled, known = fill_from_nearest(depth, mask), np.argwhere(mask)
    for pixel in np.ndindex(depth.shape):
        distances = [math.dist(pixel, other) for other in known]
        nearest = [depth[tuple(other)] for other, d in zip(known, distances, strict=True) if d == min(distances)]
        assert filled[pixel] in nearest


def test_the_cases_reach_every_metric(random_layers):
    """So that no comparison above is None against None only."""
    prediction, truth = random_layers(0)
    frame = Frame(prediction, truth, truth > 0)
    assert 0 < si_boundary_f1(frame).f1 < 1 and 0 < sobel_f1(frame).f1 < 1
    assert 0 < depth_boundary_error(frame)[1] < 10 and edge_chamfer(frame, INTRINSICS) > 0
    for maps in (sobel_edge_maps(frame), si_edge_maps(frame)):
        assert 0 < edge_overlap(*maps).iou < 1 and 0 < edge_overlap(*maps).miou < 1


def box(shift=0):
    truth = np.full((40, 50), 4.0)
    truth[12:28, 15 + shift : 35 + shift] = 2
    return truth


def test_a_perfect_prediction_scores_perfectly():
    truth = box()
    frame = Frame(3.7 * truth, truth, truth > 0)
    assert si_boundary_f1(frame) == (1, 1, 1) and sobel_f1(frame) == (1, 1, 1)
    assert edge_overlap(*sobel_edge_maps(frame)) == edge_overlap(*si_edge_maps(frame)) == (1, 1)
    assert depth_boundary_error(frame) == (0, 0)
    assert edge_chamfer(frame, INTRINSICS) == pytest.approx(0, abs=1e-12)
    errors = errors_near_boundaries(frame)
    assert errors["abs_rel"] == pytest.approx(0, abs=1e-12) and errors["delta1"] == 1


def test_a_shift_by_one_pixel_costs_half_the_si_score_and_some_of_the_others():
    truth = box()
    frame = Frame(box(shift=1), truth, truth > 0)
    # The two vertical sides miss entirely; the two horizontal ones hit 19 of 20 pixels.
    assert si_boundary_f1(frame) == (pytest.approx(19 / 40),) * 3
    assert 0.3 < sobel_f1(frame).f1 < 1
    assert edge_overlap(*si_edge_maps(frame)).iou < edge_overlap(*sobel_edge_maps(frame)).iou < 1
    accuracy, completeness = depth_boundary_error(frame)
    assert 0 < accuracy <= 1 and 0 < completeness <= 1
    assert edge_chamfer(frame, INTRINSICS) > 0.01
    assert errors_near_boundaries(frame)["abs_rel"] > 0.01


def test_a_boundary_for_depth_errors_is_a_step_of_more_than_5_percent():
    truth = np.full((20, 20), 2.0)
    for far, defined in ((2.09, False), (2.11, True)):
        truth[:, 10:] = far
        assert (errors_near_boundaries(Frame(truth, truth, truth > 0))["abs_rel"] is not None) == defined


def test_si_f1_clamps_depths_below_a_millionth():
    truth = box()
    scores = [si_boundary_f1(Frame(scale * truth, truth, truth > 0)).f1 for scale in (1e-5, 1e-8)]
    assert scores == [1, 0]


def test_si_edges_lie_on_the_far_side():
    truth = box()
    edges, _ = si_edge_maps(Frame(truth, truth, truth > 0))
    assert np.all(truth[edges.reshape(truth.shape)] == 4) and edges.sum() == 2 * (16 + 20)


def test_without_edges_scores_are_zero_and_overlaps_undefined():
    flat = np.full((9, 9), 2.0)
    frame = Frame(flat, flat, flat > 0)
    assert si_boundary_f1(frame) == (0, 0, 0) and sobel_f1(frame) == (0, 0, 0)
    assert edge_overlap(*sobel_edge_maps(frame)) == edge_overlap(*si_edge_maps(frame)) == (None, None)
    assert depth_boundary_error(frame) == (None, None) and edge_chamfer(frame, INTRINSICS) is None
    assert errors_near_boundaries(frame)["abs_rel"] is None


def test_invalid_ground_truth_fabricates_no_edges():
    truth = np.full((12, 12), 2.0)
    truth[4:8, 4:8] = 0
    frame = Frame(np.full((12, 12), 5.0), truth, truth > 0)
    for predicted, true in (sobel_edge_maps(frame), si_edge_maps(frame)):
        assert not predicted.any() and not true.any()
    assert not relative_step(frame.truth, frame.valid).any()
    assert depth_boundary_error(frame) == (None, None)


@given(st.integers(0, 10_000), st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_no_metric_depends_on_the_predictions_scale(seed, scale):
    rng = np.random.default_rng(seed)
    prediction, truth = np.exp(rng.normal(0, 0.2, (2, 12, 13)))
    valid = rng.random(truth.shape) < 0.9
    before, after = Frame(prediction, truth, valid), Frame(scale * prediction, truth, valid)
    assert si_boundary_f1(after) == near(si_boundary_f1(before))
    assert sobel_f1(after) == near(sobel_f1(before))
    assert depth_boundary_error(after) == near(depth_boundary_error(before))
    assert errors_near_boundaries(after) == near(errors_near_boundaries(before))
    assert edge_chamfer(after, INTRINSICS) == near(edge_chamfer(before, INTRINSICS))


@given(st.integers(0, 10_000), st.sampled_from([np.flipud, np.fliplr, np.transpose]))
@settings(max_examples=30, deadline=None)
def test_no_direction_is_preferred(seed, turn):
    rng = np.random.default_rng(seed)
    images = [*np.exp(rng.normal(0, 0.2, (2, 12, 13))), rng.random((12, 13)) < 0.9]
    before, after = Frame(*images), Frame(*map(turn, images))
    assert si_boundary_f1(after) == near(si_boundary_f1(before))
    assert sobel_f1(after) == near(sobel_f1(before))
    assert edge_overlap(*map(np.sort, si_edge_maps(after))) == near(edge_overlap(*map(np.sort, si_edge_maps(before))))
    assert errors_near_boundaries(after) == near(errors_near_boundaries(before))


@pytest.mark.parametrize("intrinsics", [np.eye(4), np.zeros((3, 3)), np.full((3, 3), np.nan), [1, 2, 3]])
def test_unusable_intrinsics_are_named(intrinsics):
    with pytest.raises(ValueError, match=r"intrinsics must be an invertible \[3, 3\] camera matrix, got"):
        edge_chamfer(Frame(box(), box(), box() > 0), intrinsics)
