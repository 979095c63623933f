"""Quantiles and bootstrap intervals against NumPy and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap

from moe3d.benchmark.statistics import Ratio, quantiles, ratio_of_medians, spread

TIMES = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40)


@given(TIMES)
def test_quantiles_are_numpys(times):
    assert quantiles(times) == pytest.approx(tuple(np.percentile(times, (20, 50, 80))))


@given(TIMES, st.floats(0.1, 10))
def test_a_constant_ratio_is_certain(times, ratio):
    result = ratio_of_medians([ratio * t for t in times], times)
    assert result == pytest.approx((ratio, ratio, ratio))


def test_the_value_is_the_ratio_of_medians_and_lies_in_its_interval():
    rng = np.random.default_rng(1)
    a, b = rng.lognormal(0, 0.1, 21), rng.lognormal(0.3, 0.1, 21)
    value, low, high = ratio_of_medians(list(a), list(b))
    assert value == pytest.approx(np.median(a) / np.median(b))
    assert low < value < high


def test_the_interval_is_scipys_paired_bootstrap():
    rng = np.random.default_rng(2)
    drift = rng.lognormal(0, 0.2, 30)
    a, b = drift * rng.lognormal(0.1, 0.02, 30), drift * rng.lognormal(0, 0.02, 30)
    ours = ratio_of_medians(list(a), list(b))

    def ratio(a, b, axis):
        return np.median(a, axis=axis) / np.median(b, axis=axis)

    options = {"paired": True, "vectorized": True, "n_resamples": 20_000, "method": "percentile"}
    theirs = bootstrap((a, b), ratio, random_state=np.random.default_rng(3), **options).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_the_interval_covers_the_truth():
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(200):
        drift = rng.lognormal(0, 0.3, 15)
        ratio = ratio_of_medians(1.1 * drift * rng.lognormal(0, 0.05, 15), drift * rng.lognormal(0, 0.05, 15))
        covered += ratio.low <= 1.1 <= ratio.high
    assert covered >= 180


def test_of_few_rounds_there_is_a_range_and_no_interval():
    a, b = [3.0, 1.0, 2.0, 5.0, 4.0], [2.0, 2.0, 2.0, 2.0, 1.0]
    assert ratio_of_medians(a, b) == (1.5, 0.5, 4.0)
    assert [spread(rounds) for rounds in (1, 3, 5)] == ["range of 1 round", "range of 3 rounds", "range of 5 rounds"]
    assert spread(6) == "95% interval"


def test_equal_times_give_equal_intervals():
    a, b = [3.0, 1.0, 2.0, 5.0], [2.0, 2.5, 2.0, 1.0]
    assert ratio_of_medians(a, b) == ratio_of_medians(a, b)


@pytest.mark.parametrize("a, b", [([], []), ([1.0], [1.0, 2.0])])
def test_times_of_different_rounds_cannot_be_compared(a, b):
    with pytest.raises(ValueError, match=f"same rounds, got {len(a)} and {len(b)}"):
        ratio_of_medians(a, b)


def test_overhead_in_percent():
    assert Ratio(1.07, 1.05, 0.98).percent_more == pytest.approx((7, 5, -2))
