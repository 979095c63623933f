import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from moe3d.evaluation import Alignment, fit_alignment

METHODS = ("median", "scale-l1", "scale-shift", "none")


def pairs(seed, count):
    return np.random.default_rng(seed).uniform(0.1, 9, (2, count))


@pytest.mark.parametrize("count", [1, 2, 3, 50, 51])
def test_median_is_the_ratio_of_medians(count):
    prediction, truth = pairs(count, count)
    expected = statistics.median(truth) / statistics.median(prediction)
    assert fit_alignment(prediction, truth, "median") == (pytest.approx(expected, rel=1e-14), 0, 0)


@given(st.integers(0, 10_000), st.integers(1, 40))
@settings(deadline=None)
def test_scale_l1_attains_the_minimum_of_the_absolute_error(seed, count):
    prediction, truth = pairs(seed, count)

    def cost(scale):
        return sum(abs(scale * p - g) for p, g in zip(prediction, truth, strict=True))

    scale = fit_alignment(prediction, truth, "scale-l1").scale
    # The cost is convex and piecewise linear, so its minimum lies at one of its kinks g / p.
    assert cost(scale) <= min(cost(g / p) for p, g in zip(prediction, truth, strict=True)) * (1 + 1e-12)
    assert cost(scale) <= optimize.minimize_scalar(cost, bounds=(0, 100), method="bounded").fun * (1 + 1e-12)


def test_scale_l1_takes_the_smallest_of_equally_good_scales():
    assert fit_alignment(np.ones(4), np.array([4.0, 1, 3, 2]), "scale-l1").scale == 2


@pytest.mark.parametrize("count", [2, 3, 60])
def test_scale_shift_is_least_squares(count):
    prediction, truth = pairs(count, count)
    line = stats.linregress(prediction, truth)
    assert fit_alignment(prediction, truth, "scale-shift") == (
        pytest.approx(line.slope, rel=1e-10),
        pytest.approx(line.intercept, rel=1e-10),
        1e-6,
    )


@pytest.mark.parametrize("prediction, truth", [([3.0], [2.0]), ([3.0] * 5, [1.0, 2, 3, 4, 5])])
def test_scale_shift_of_a_constant_prediction_is_the_mean(prediction, truth):
    prediction, truth = np.array(prediction), np.array(truth)
    np.testing.assert_allclose(fit_alignment(prediction, truth, "scale-shift").apply(prediction), truth.mean())


def test_scale_shift_clamps_what_it_made_negative():
    aligned = fit_alignment(np.array([1.0, 2, 3, 4]), np.array([9.0, 1, 0.1, 0.1]), "scale-shift").apply(
        np.array([1.0, 40.0])
    )
    assert aligned[0] > 1 and aligned[1] == 1e-6


def test_none_is_the_identity():
    depth = np.array([1e-9, 2, 1e9])
    np.testing.assert_array_equal(fit_alignment(depth, depth[::-1], "none").apply(depth), depth)


@pytest.mark.parametrize("method", ["median", "scale-l1", "scale-shift"])
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 100))
@settings(deadline=None)
def test_alignment_undoes_any_scale(method, seed, scale):
    prediction, truth = pairs(seed, 30)
    aligned = fit_alignment(prediction, truth, method).apply(prediction)
    rescaled = prediction * scale
    np.testing.assert_allclose(fit_alignment(rescaled, truth, method).apply(rescaled), aligned, rtol=1e-9)


@pytest.mark.parametrize("method", ["median", "scale-l1", "scale-shift"])
def test_an_exact_multiple_is_recovered(method):
    prediction = pairs(0, 30)[0]
    np.testing.assert_allclose(fit_alignment(prediction, 3 * prediction, method).apply(prediction), 3 * prediction)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="align must be one of median, scale-l1, scale-shift, none, got 'l2'"):
        fit_alignment(np.ones(2), np.ones(2), "l2")
    with pytest.raises(ValueError, match=r"same N >= 1, got \[0\] and \[0\]"):
        fit_alignment(np.ones(0), np.ones(0))
    with pytest.raises(ValueError, match=r"got \[2\] and \[3\]"):
        fit_alignment(np.ones(2), np.ones(3))


def test_alignment_is_scale_then_shift_then_floor():
    np.testing.assert_array_equal(Alignment(2, -3, 0.5).apply(np.array([1.0, 2, 5])), [0.5, 1, 7])
