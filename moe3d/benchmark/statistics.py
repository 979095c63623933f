"""Quantiles, and ratios of medians with their confidence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_RESAMPLES = 4000


class Quantiles(NamedTuple):
    p20: float
    p50: float
    p80: float


class Ratio(NamedTuple):
    """A ratio of medians and its 95% confidence interval."""

    value: float
    low: float
    high: float

    @property
    def percent_more(self) -> Ratio:
        """The same as an overhead in percent: 1.07 is +7."""
        return Ratio(*(100 * (r - 1) for r in self))


def quantiles(times: Sequence[float]) -> Quantiles:
    """The 20th, 50th and 80th percentile, linear between neighbours."""
    return Quantiles(*(float(q) for q in np.quantile(times, (0.2, 0.5, 0.8))))


def ratio_of_medians(times: Sequence[float], baseline: Sequence[float], confidence: float = 0.95) -> Ratio:
    """median(times) / median(baseline) with a bootstrap interval over rounds.

    The two were measured in the same rounds, so a round is drawn for both at once (a paired bootstrap, percentile
    method): what slowed down a whole round, another program say, cancels. The draws are seeded: the same times give
    the same interval.

    Raises:
        ValueError: the two have different numbers of rounds, or none.
    """
    if len(times) != len(baseline) or not len(times):
        raise ValueError(f"times and baseline must come from the same rounds, got {len(times)} and {len(baseline)}")
    a, b = np.asarray(times), np.asarray(baseline)
    rounds = np.random.default_rng(0).integers(len(a), size=(_RESAMPLES, len(a)))
    ratios = np.median(a[rounds], axis=1) / np.median(b[rounds], axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, (tail, 1 - tail))
    return Ratio(float(np.median(a) / np.median(b)), float(low), float(high))
