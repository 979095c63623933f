import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe3d.evaluation import Frame, resize_bilinear, resize_nearest, survives_edge_filter

SIZES = st.tuples(st.integers(1, 23), st.integers(1, 23))


@given(SIZES, SIZES)
@settings(deadline=None)
def test_nearest_reads_the_pixel_under_the_centre(old, new):
    image = np.arange(old[0] * old[1]).reshape(old)
    resized = resize_nearest(image, new)
    assert resized.shape == new
    for i in range(new[0]):
        for j in range(new[1]):
            row, column = (math.floor((k + Fraction(1, 2)) * o / n) for k, o, n in zip((i, j), old, new, strict=True))
            assert resized[i, j] == image[row, column]


@given(SIZES, SIZES)
@settings(deadline=None)
def test_bilinear_is_pytorchs_without_corners_or_antialiasing(old, new):
    image = np.random.default_rng(0).uniform(1, 9, old)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(image)[None, None], size=new, mode="bilinear", align_corners=False, antialias=False
    )
    np.testing.assert_allclose(resize_bilinear(image, new), expected[0, 0].numpy(), rtol=1e-12)


def test_the_same_size_changes_nothing():
    image = np.random.default_rng(0).uniform(1, 9, (5, 7))
    np.testing.assert_array_equal(resize_bilinear(image, (5, 7)), image)
    np.testing.assert_array_equal(resize_nearest(image, (5, 7)), image)


@pytest.mark.parametrize("hole", [np.nan, np.inf, 0.0, -5.0])
@pytest.mark.parametrize("resample", ["nearest", "bilinear"])
def test_unusable_depths_neither_spread_nor_count(hole, resample):
    prediction = np.full((4, 4), 3.0)
    prediction[1, 2] = hole
    frame = Frame(prediction, np.full((8, 8), 2.0), np.ones((8, 8), bool), resample=resample)
    assert np.all(frame.prediction[frame.compared] == 3)
    expected = np.ones((8, 8), bool)
    if resample == "nearest":
        expected[2:4, 4:6] = False
    else:
        expected[1:5, 3:7] = False  # every output pixel with the hole in its 2x2 support
    np.testing.assert_array_equal(frame.compared, expected)
    assert frame.nonfinite == 64 - expected.sum()


def test_counts(case):
    prediction, truth, valid = case
    frame = Frame(prediction, truth, valid)
    usable = sum(bool(v) and math.isfinite(p) and p > 0 for p, v in zip(prediction.flat, valid.flat, strict=True))
    assert frame.nonfinite == valid.sum() - usable
    assert frame.coverage == (usable / valid.sum() if valid.any() else None)
    np.testing.assert_array_equal(frame.prediction[frame.compared], prediction[frame.compared])
    np.testing.assert_array_equal(frame.truth[valid], truth[valid])


@pytest.mark.parametrize("tolerance", [1e-3, 0.03, 0.3])
def test_edge_filter_looks_at_the_3x3_range(case, tolerance):
    depth = case[0]
    survives = survives_edge_filter(depth, tolerance)
    for i, j in np.ndindex(depth.shape):
        window = depth[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
        window = [d for d in window.flat if math.isfinite(d) and d > 0]
        usable = math.isfinite(depth[i, j]) and depth[i, j] > 0
        assert survives[i, j] == (usable and (max(window) - min(window)) / depth[i, j] <= tolerance)


def test_edge_filter_keeps_a_range_of_exactly_the_tolerance():
    np.testing.assert_array_equal(survives_edge_filter([[4.0, 5.0]], 0.25), [[True, True]])
    np.testing.assert_array_equal(survives_edge_filter([[4.0, 5.0]], 0.24), [[False, True]])


def test_edge_filter_works_on_the_predictions_own_grid():
    prediction = np.full((3, 6), 2.0)
    prediction[:, 3:] = 4
    dropped = np.zeros((3, 6), bool)
    dropped[:, 2:4] = True
    frame = Frame(prediction, np.ones((9, 24)), np.ones((9, 24), bool), edge_filter=0.03)
    np.testing.assert_array_equal(~frame.kept, dropped.repeat(3, axis=0).repeat(4, axis=1))
    assert frame.compared.all() and frame.nonfinite == 0 and frame.coverage == 2 / 3


def test_a_looser_filter_keeps_more(random_layers):
    prediction, truth = random_layers(0)
    valid = np.ones(truth.shape, bool)
    coverage = [Frame(prediction, truth, valid, edge_filter=t).coverage for t in (1e-4, 0.03, 0.1, 0.3, 1e6)]
    assert coverage == sorted(coverage) and coverage[0] < coverage[2] < coverage[-1] == 1


def test_arguments_are_left_alone_and_any_numeric_type_is_read():
    prediction, truth = np.full((3, 4), 2, np.float32), np.full((6, 8), 3, np.int64)
    valid = np.ones((6, 8), bool)
    for array in (prediction, truth, valid):
        array.flags.writeable = False
    frame = Frame(prediction, truth, valid, resample="bilinear", edge_filter=0.1)
    assert frame.prediction.dtype == frame.truth.dtype == np.float64
    assert np.all(frame.prediction == 2) and np.all(frame.truth == 3)


GOOD = np.ones((4, 5))
VALID = np.ones((4, 5), bool)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((GOOD[None], GOOD, VALID), ValueError, r"prediction must be a non-empty \[H, W\] .* got shape \[1, 4, 5\]"),
        ((GOOD[:0], GOOD, VALID), ValueError, r"prediction must be a non-empty .* got shape \[0, 5\]"),
        ((GOOD, GOOD[0], VALID), ValueError, r"truth must be .* got shape \[5\]"),
        (("depth", GOOD, VALID), TypeError, "prediction must be an array of depths, got str"),
        ((GOOD, GOOD, VALID.astype(int)), TypeError, "valid must be boolean, got int"),
        ((GOOD, GOOD, VALID[:3]), ValueError, r"valid must have truth's shape \[4, 5\], got \[3, 5\]"),
        ((GOOD, GOOD * np.nan, VALID), ValueError, "truth must be finite and positive .* not at 20 pixels"),
        ((GOOD, GOOD * 0, VALID), ValueError, "truth must be finite and positive .* not at 20 pixels"),
        ((GOOD, GOOD, VALID, "cubic"), ValueError, "resample must be one of nearest, bilinear, got 'cubic'"),
        ((GOOD, GOOD, VALID, "nearest", 0), ValueError, "edge_filter must be a finite number above 0, got 0"),
        ((GOOD, GOOD, VALID, "nearest", np.nan), ValueError, "edge_filter must be .* got nan"),
        ((GOOD, GOOD, VALID, "nearest", "much"), ValueError, "edge_filter must be .* got 'much'"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        Frame(*arguments)
