"""Small images, ordinary and degenerate, on which every metric is held against a plain loop."""

import numpy as np
import pytest


def layered(rng, size=(13, 16)):
    """Slanted surfaces in front of each other, as a depth map and a blurred, noisy prediction of it."""
    height, width = size
    truth = 3 + 0.02 * np.arange(width) + 0.01 * np.arange(height)[:, None]
    for _ in range(3):
        top, left = rng.integers(height - 3), rng.integers(width - 3)
        truth[top : top + rng.integers(3, 8), left : left + rng.integers(3, 8)] = rng.uniform(1, 3)
    blurred = (truth + np.roll(truth, 1, axis=1) + np.roll(truth, -1, axis=0)) / 3
    return rng.uniform(0.2, 5) * blurred * np.exp(rng.normal(0, 0.02, size)), truth


def _cases():
    every = np.ones((13, 16), dtype=bool)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        prediction, truth = layered(rng)
        yield f"layers-{seed}", (prediction, truth, every)
        yield f"holes-{seed}", (prediction, truth, rng.random(truth.shape) < 0.8)
        yield f"noise-{seed}", (*np.exp(rng.normal(0, 0.3, (2, 13, 16))), rng.random(truth.shape) < 0.95)
        unusable = prediction.copy()
        unusable.flat[rng.choice(unusable.size, 40, replace=False)] = rng.choice([np.nan, np.inf, -np.inf, 0, -2], 40)
        yield f"unusable-predictions-{seed}", (unusable, truth, rng.random(truth.shape) < 0.9)
        yield f"tied-gaps-{seed}", (rng.uniform(1, 5, (13, 16)), rng.choice([1.0, 2.0, 3.0, 5.0], (13, 16)), every)
        yield f"sparse-{seed}", (prediction, truth, rng.random(truth.shape) < 0.3)

    nowhere, one = np.zeros_like(every), np.zeros_like(every)
    one[5, 7] = True
    invalid = truth.copy()
    invalid[0, 0] = np.nan
    invalid[1, 1] = -1
    yield "perfect", (truth, truth, every)
    yield "no-valid-pixel", (prediction, truth, nowhere)
    yield "no-valid-depth", (prediction, np.full(truth.shape, np.nan), nowhere)
    yield "invalid-depths", (prediction, invalid, np.isfinite(invalid) & (invalid > 0))
    yield "one-valid-pixel", (prediction, truth, one)
    yield "no-usable-prediction", (np.full(truth.shape, np.nan), truth, every)
    yield "constant-truth", (prediction, np.full(truth.shape, 2.0), every)
    yield "constant-prediction", (np.full(truth.shape, 0.7), truth, every)
    yield "both-constant", (np.full(truth.shape, 0.7), np.full(truth.shape, 2.0), every)
    yield "no-edges", (prediction, 2 + 1e-3 * np.arange(16) * np.ones((13, 1)), every)
    checkerboard = np.where(np.add.outer(np.arange(13), np.arange(16)) % 2, 1.0, 4.0)
    yield "all-edges", (checkerboard + 0.1, checkerboard, every)
    yield "one-pixel", (np.array([[3.0]]), np.array([[2.0]]), np.array([[True]]))
    yield "one-row", (prediction[:1], truth[:1], every[:1])
    yield "two-by-two", (prediction[:2, :2], np.array([[1.0, 2.0], [2.0, 1.0]]), every[:2, :2])


CASES = dict(_cases())


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    """(prediction, truth, valid), all on one grid."""
    return request.param


@pytest.fixture
def random_layers():
    """seed -> (prediction, truth) of continuous random depths, so that no comparison ties."""
    return lambda seed, size=(13, 16): layered(np.random.default_rng(seed), size)
