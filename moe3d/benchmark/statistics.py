"""Quantiles, and ratios of medians with their confidence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_RESAMPLES = 4000
_LEAST_ROUNDS = 6  # of a bootstrap: of 3 rounds, 74 of 100 intervals hold the truth instead of 95, of 5 rounds 93


class Quantiles(NamedTuple):
    p20: float
    p50: float
    p80: float


class Ratio(NamedTuple):
    """A ratio of medians and what :func:`spread` names: its 95% confidence interval, or the range of a few rounds."""

    value: float
    low: float
    high: float

    @property
    def percent_more(self) -> Ratio:
        """The same as an overhead in percent: 1.07 is +7."""
        return Ratio(*(100 * (r - 1) for r in self))


def spread(rounds: int) -> str:
    """What a ratio's bounds are."""
    return "95% interval" if rounds >= _LEAST_ROUNDS else f"range of {rounds} round{'s' if rounds > 1 else ''}"


def quantiles(times: Sequence[float]) -> Quantiles:
    """The 20th, 50th and 80th percentile, linear between neighbours."""
    return Quantiles(*(float(q) for q in np.quantile(times, (0.2, 0.5, 0.8))))


def ratio_of_medians(times: Sequence[float], baseline: Sequence[float], confidence: float = 0.95) -> Ratio:
    """median(times) / median(baseline) with a bootstrap interval over rounds; the range of fewer than 6 rounds' ratios.

    The two were measured in the same rounds, so a round is drawn for both at once (a paired bootstrap, percentile
    method): what slowed down a whole round, another program say, cancels. The draws are seeded: the same times give
    the same interval.

    Raises:
        ValueError: the two have different numbers of rounds, or none.
    """
    if len(times) != len(baseline) or not len(times):
        raise ValueError(f"times and baseline must come from the same rounds, got {len(times)} and {len(baseline)}")
    a, b = np.asarray(times), np.asarray(baseline)
    if len(a) < _LEAST_ROUNDS:
        return Ratio(float(np.median(a) / np.median(b)), float((a / b).min()), float((a / b).max()))
    rounds = np.random.default_rng(0).integers(len(a), size=(_RESAMPLES, len(a)))
    ratios = np.median(a[rounds], axis=1) / np.median(b[rounds], axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, (tail, 1 - tail))
    return Ratio(float(np.median(a) / np.median(b)), float(low), float(high))
