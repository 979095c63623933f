"""Selecting points: against NumPy on everything at once, which the package never does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe3d.evaluation import survives_edge_filter
from moe3d.reconstruct.frames import ReconstructedFrame
from moe3d.reconstruct.points import PointSelection, confidence_threshold, select_points


def make_frame(seed, height=9, width=12, **replaced):
    rng = np.random.default_rng(seed)
    arrays = {
        "image": rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        "depth": rng.uniform(1, 2, (height, width)).astype(np.float32),
        "confidence": rng.exponential(size=(height, width)).astype(np.float32) + 1,
        "intrinsics": np.array([[20, 0, 6], [0, 25, 4], [0, 0, 1]], np.float32),
        "extrinsics": np.eye(3, 4, dtype=np.float32) + np.float32(seed) * np.eye(3, 4, 3, dtype=np.float32),
        "original_size": np.array([2 * height, 3 * width]),
        "original_intrinsics": np.array([[60, 0, 19], [0, 50, 8.5], [0, 0, 1]], np.float32),
    }
    return ReconstructedFrame(**(arrays | replaced))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=5), elements=st.floats(width=32)),
        min_size=1,
        max_size=3,
    ),
    st.floats(0, 100),
)
def test_the_threshold_is_numpys_percentile_of_everything(maps, percentile):
    values = np.concatenate([m[np.isfinite(m)] for m in maps])
    found = confidence_threshold(lambda: iter(maps), percentile)
    if not len(values):
        assert found == -np.inf
    else:  # by rank, which NumPy computes in float64 too
        assert found == np.sort(values)[int(percentile / 100 * (len(values) - 1))]
        if percentile in (0, 50, 100):
            assert found == np.percentile(values, percentile, method="lower")


def test_confidence_edges_and_missing_depth_drop_points():
    holes = make_frame(1)
    holes.depth[2, 3], holes.depth[4, 5], holes.depth[6, 7] = 0, np.nan, -1
    frames = [make_frame(0), holes]
    selection = PointSelection(conf_percentile=40, edge_filter=0.9)
    everything = np.concatenate([f.confidence[np.isfinite(f.depth) & (f.depth > 0)] for f in frames])
    threshold = np.percentile(everything, 40, method="lower")
    cloud = select_points(frames, selection)
    expected, colors = [], []
    for frame in frames:
        with np.errstate(invalid="ignore"):
            kept = (frame.depth > 0) & (frame.confidence >= threshold)
        kept &= survives_edge_filter(frame.depth, 0.9)
        expected.append(frame.unprojected()[kept])
        colors.append(frame.image[kept])
    np.testing.assert_array_equal(cloud.points, np.concatenate(expected))
    np.testing.assert_array_equal(cloud.colors, np.concatenate(colors))
    assert cloud.counts.tolist() == [len(part) for part in expected]
    assert 0 < cloud.counts.sum() < len(everything)


def test_unprojection_by_hand():
    frame = make_frame(2)
    point = frame.unprojected()[3, 8]  # the camera stands at x = -2
    z = frame.depth[3, 8]
    np.testing.assert_allclose(point, [(8 - 6) / 20 * z - 2, (3 - 4) / 25 * z, z], rtol=1e-5)


@pytest.mark.parametrize("limit", [1, 2, 50, 107, 216, 10**6])
def test_no_more_points_than_asked_for_and_the_same_in_every_run(limit):
    frames = [make_frame(0), make_frame(1)]
    cloud, again = (select_points(frames, PointSelection(conf_percentile=0, max_points=limit)) for _ in range(2))
    assert len(cloud.points) == min(limit, 2 * 9 * 12) and abs(int(cloud.counts[0]) - int(cloud.counts[1])) <= 1
    np.testing.assert_array_equal(cloud.points, again.points)
    everything = {tuple(p) for f in frames for p in f.unprojected().reshape(-1, 3)}
    assert {tuple(p) for p in cloud.points} <= everything and len({tuple(p) for p in cloud.points}) == len(cloud.points)


def test_the_point_heads_points_have_their_own_confidence():
    rng = np.random.default_rng(5)
    points = rng.normal(size=(9, 12, 3)).astype(np.float32)
    points[0, 0] = np.inf
    own = rng.random((9, 12)).astype(np.float32)
    frame = make_frame(0, points=points, points_confidence=own)
    cloud = select_points([frame], PointSelection("head", conf_percentile=50))
    kept = (own >= np.percentile(own, 50, method="lower")) & np.isfinite(points).all(axis=-1)
    np.testing.assert_array_equal(cloud.points, points[kept])


@pytest.mark.parametrize(
    ("selection", "says"),
    [
        ({"source": "tracks"}, "points must be 'depth' or 'head', got 'tracks'"),
        ({"conf_percentile": 100.5}, "conf_percentile must lie between 0 and 100, got 100.5"),
        ({"conf_percentile": float("nan")}, "conf_percentile must lie"),
        ({"edge_filter": 0.0}, "edge_filter must be a finite number above 0"),
        ({"max_points": 0}, "max_points must be at least 1, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(selection, says):
    with pytest.raises(ValueError, match=says):
        PointSelection(**selection)


def test_nothing_left_and_no_point_head_are_errors():
    with pytest.raises(ValueError, match="no point is left: use a lower --conf-percentile"):
        select_points([make_frame(0)], PointSelection(edge_filter=1e-6))
    with pytest.raises(ValueError, match="points 'head' needs a model with a point head"):
        select_points([make_frame(0)], PointSelection("head"))
