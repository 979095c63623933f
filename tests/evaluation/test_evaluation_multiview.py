"""Multi-view metrics: what alignments recover, on which grid, and what is left out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from moe3d.evaluation import Predictions, score_sequence, truth_on_grid
from moe3d.evaluation.points import POINT_KEYS, Similarity
from support.evaluation import MemoryDataset, moved, perfect

SAMPLE = MemoryDataset({"a": 3}).samples["a"]
DISTANCES = ("acc_mean", "acc_median", "comp_mean", "comp_median")


def score(predictions, sample=SAMPLE, **choices):
    truth = truth_on_grid(sample, predictions.depth.shape[1:], sample.valid.numpy())
    return score_sequence(predictions, truth, **choices)


def somewhere(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return Similarity(scale, Rotation.from_rotvec(rng.normal(0, 2, 3)).as_matrix(), rng.normal(0, 5, 3))


def changed(predictions, **arrays):
    fields = ("frames", "depth", "intrinsics", "extrinsics", "points")
    return Predictions(**{**{name: getattr(predictions, name) for name in fields}, **arrays})


@pytest.mark.parametrize("align", ["umeyama-icp", "median-icp", "none"])
@pytest.mark.parametrize("size", [None, (6, 8), (5, 23), (24, 32)])
def test_a_perfect_prediction_scores_perfectly_at_any_resolution(align, size):
    metrics = score(perfect(SAMPLE, size), align=align).metrics
    assert [metrics[key] for key in DISTANCES] == pytest.approx([0] * 4, abs=1e-6)
    assert metrics["nc_mean"] == pytest.approx(1, abs=1e-4)
    assert metrics["coverage"] == 1 and metrics["nonfinite"] == 0


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100))
@settings(max_examples=10, deadline=None)
def test_another_world_and_unit_are_found(seed, scale):
    elsewhere = moved(perfect(SAMPLE), somewhere(seed, scale))
    for align in ("umeyama-icp", "median-icp"):
        result = score(elsewhere, align=align)
        assert [result.metrics[key] for key in DISTANCES] == pytest.approx([0] * 4, abs=1e-6), align
        assert result.scale == pytest.approx(1 / scale, rel=1e-6)


def test_without_alignment_a_shift_is_a_distance():
    shift = Similarity(1.0, np.eye(3), np.array([0.0, 0, 100]))
    metrics = score(moved(perfect(SAMPLE), shift), align="none").metrics
    assert metrics["acc_mean"] == pytest.approx(100, rel=0.05)


def test_a_plane_moved_by_a_centimetre():
    sample = MemoryDataset({"a": 1}).samples["a"]
    flat = torch.full_like(sample.depth, 2)
    still = torch.eye(3, 4)[None]
    sample = type(sample)(sample.images, flat, flat > 0, sample.intrinsics, still, sample.names)
    near = perfect(sample)
    # Points keep their rays, so the camera goes back instead: the plane as a whole moves along its normal.
    near.extrinsics[0, 2, 3] = -0.01
    metrics = score(near, sample, align="none").metrics
    assert [metrics[key] for key in DISTANCES] == pytest.approx([0.01] * 4)
    assert metrics["nc_mean"] == pytest.approx(1)


def test_median_icp_is_its_definition_where_icp_has_nothing_to_do():
    """A prediction stretched along one axis: what is left after the medians, computed anew."""
    stretched = perfect(SAMPLE)
    cameras, valid = SAMPLE.extrinsics.double().numpy(), SAMPLE.valid.numpy()
    world = truth_on_grid(SAMPLE, SAMPLE.depth.shape[1:], valid).points
    points = world @ cameras[0, :, :3].T + cameras[0, :, 3]
    predicted = 50 * points * [1, 1, 1.2]  # in the first camera's frame, which is its world
    stretched = changed(stretched, points=predicted, extrinsics=np.tile(np.eye(3, 4), (3, 1, 1)))
    result = score(stretched, align="median-icp", source="head")
    flat, true = predicted[valid], points[valid]
    spread = [np.median(np.linalg.norm(p - np.median(p, axis=0), axis=1)) for p in (flat, true)]
    assert result.scale == pytest.approx(spread[1] / spread[0])
    assert 0 < result.metrics["acc_mean"] < 0.5


def test_points_come_from_depth_or_from_the_head():
    predictions = perfect(SAMPLE)
    wrong_depth = changed(
        predictions,
        depth=np.random.default_rng(0).uniform(1, 9, predictions.depth.shape),
        points=truth_on_grid(SAMPLE, SAMPLE.depth.shape[1:], SAMPLE.valid.numpy()).points,
    )
    assert score(wrong_depth, source="head").metrics["acc_mean"] < 1e-6
    assert score(wrong_depth, source="depth").metrics["acc_mean"] > 0.05
    with pytest.raises(ValueError, match="hold no points of a head"):
        score(predictions, source="head")


@pytest.mark.parametrize("align", ["umeyama-icp", "median-icp", "none"])
def test_unusable_predictions_are_counted_and_left_out(align):
    predictions = perfect(SAMPLE)
    rng = np.random.default_rng(0)
    unusable = rng.random(predictions.depth.shape) < 0.2
    predictions.depth[unusable] = rng.choice([np.nan, np.inf, -np.inf, 0, -3], unusable.sum())
    result = score(predictions, align=align)
    valid = SAMPLE.valid.numpy()
    lost = int((unusable & valid).sum())
    assert result.metrics["nonfinite"] == lost
    assert result.metrics["coverage"] == pytest.approx(1 - lost / valid.sum())
    assert result.metrics["acc_mean"] == pytest.approx(0, abs=1e-6)
    assert result.metrics["comp_mean"] > 1e-3  # the truth stays whole
    np.testing.assert_array_equal(np.isfinite(result.distances), valid & ~unusable)


def test_a_camera_that_is_not_finite_loses_its_frame():
    predictions = perfect(SAMPLE)
    predictions.extrinsics[1] = np.nan
    metrics = score(predictions).metrics
    assert metrics["nonfinite"] == SAMPLE.valid[1].sum() and metrics["acc_mean"] == pytest.approx(0, abs=1e-6)


def test_the_world_is_the_first_camera_that_is_finite():
    predictions = perfect(SAMPLE)
    predictions.extrinsics[0] = np.nan
    metrics = score(predictions, align="median-icp").metrics
    assert metrics["nonfinite"] == SAMPLE.valid[0].sum() and metrics["acc_mean"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("align", ["umeyama-icp", "median-icp", "none"])
def test_depth_that_overflows_is_not_finite(align):
    predictions = perfect(SAMPLE)
    depth = predictions.depth.astype(np.float64)
    depth[1, 2, 3] = 1e300
    metrics = score(changed(predictions, depth=depth), align=align).metrics
    assert metrics["nonfinite"] == int(SAMPLE.valid[1, 2, 3]) and metrics["acc_mean"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("align", ["umeyama-icp", "median-icp", "none"])
@pytest.mark.parametrize("left", [0, 1])
def test_almost_nothing_left(align, left):
    predictions = perfect(SAMPLE)
    first = np.flatnonzero(SAMPLE.valid.numpy())[:left]
    depth = np.full(predictions.depth.size, np.nan)
    depth[first] = predictions.depth.flat[first]
    metrics = score(changed(predictions, depth=depth.reshape(predictions.depth.shape)), align=align).metrics
    assert metrics["coverage"] == pytest.approx(left / SAMPLE.valid.sum())
    if left:
        assert metrics["acc_mean"] == pytest.approx(0, abs=1e-6)
    else:
        assert all(metrics[key] is None for key in POINT_KEYS)


def test_the_edge_filter_drops_points():
    blurred = perfect(SAMPLE)
    blurred.depth[:] = (blurred.depth + np.roll(blurred.depth, 1, axis=2) + np.roll(blurred.depth, 1, axis=1)) / 3
    blurred.depth[~SAMPLE.valid.numpy()] = 3
    every, filtered = (score(blurred, align="none", edge_filter=t).metrics for t in (None, 0.05))
    assert filtered["coverage"] < every["coverage"] == 1 and filtered["acc_mean"] < every["acc_mean"]


def test_what_cannot_be_done_is_said():
    with pytest.raises(ValueError, match="align must be one of umeyama-icp, median-icp, none, got 'icp'"):
        score(perfect(SAMPLE), align="icp")
    with pytest.raises(ValueError, match="points must be one of depth, head, got 'both'"):
        score(perfect(SAMPLE), source="both")
    poseless = type(SAMPLE)(SAMPLE.images, SAMPLE.depth, SAMPLE.valid, SAMPLE.intrinsics, None, SAMPLE.names)
    with pytest.raises(ValueError, match="need camera poses"):
        truth_on_grid(poseless, (12, 16), SAMPLE.valid.numpy())
