import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moe3d.evaluation import Frame, flying_points, flying_rate_interval, flying_sweep
from moe3d.evaluation.flying import aggregate_sweeps, default_entry

SETTINGS = [(eta, beta) for eta in (0.02, 0.05, 0.1) for beta in (0.1, 0.2, 0.3)]


def loop_flying(prediction, truth, valid, eta, beta, kept=None):
    """(flying, boundary) maps, straight from the definition."""
    height, width = truth.shape
    usable = np.array(
        [
            [bool(v) and math.isfinite(p) and p > 0 for p, v in zip(*rows, strict=True)]
            for rows in zip(prediction, valid, strict=True)
        ]
    )
    kept = usable if kept is None else usable & kept
    on_boundary = np.zeros(truth.shape, bool)
    for i, j in np.ndindex(truth.shape):
        for k, m in ((i, j + 1), (i, j - 1), (i + 1, j), (i - 1, j)):
            if 0 <= k < height and 0 <= m < width and valid[i, j] and valid[k, m]:
                step = abs(truth[i, j] - truth[k, m]) / min(truth[i, j], truth[k, m])
                on_boundary[i, j] |= step > eta

    def window(i, j):
        return slice(max(i - 2, 0), i + 3), slice(max(j - 2, 0), j + 3)

    interior = [pixel for pixel in np.ndindex(truth.shape) if kept[pixel] and not on_boundary[window(*pixel)].any()]
    flying, counted = np.zeros((2, *truth.shape), bool)
    if not interior:
        return flying, counted
    scale = statistics.median(truth[p] for p in interior) / statistics.median(prediction[p] for p in interior)
    for pixel in np.ndindex(truth.shape):
        if not (on_boundary[pixel] and usable[pixel]):
            continue
        counted[pixel] = True
        depths = sorted(truth[window(*pixel)][valid[window(*pixel)]])
        gaps = [b - a for a, b in itertools.pairwise(depths)]
        split = gaps.index(max(gaps)) + 1
        d1, d2 = statistics.median(depths[:split]), statistics.median(depths[split:])
        margin = beta * (d2 - d1)
        flying[pixel] = kept[pixel] and d1 + margin <= scale * prediction[pixel] <= d2 - margin
    return flying, counted


@pytest.mark.parametrize("eta, beta", [(0.02, 0.1), (0.05, 0.2), (0.1, 0.3), (0.5, 0.0)])
def test_flying_points_are_their_definition(case, eta, beta):
    points = flying_points(Frame(*case), eta, beta)
    flying, boundary = loop_flying(*case, eta, beta)
    np.testing.assert_array_equal(points.boundary, boundary)
    np.testing.assert_array_equal(points.flying, flying)
    assert points.rate == (flying.sum() / boundary.sum() if boundary.any() else None)


def test_dropped_points_do_not_fly_but_count(random_layers):
    prediction, truth = random_layers(0, (30, 40))
    valid = np.random.default_rng(0).random(truth.shape) < 0.97
    free, filtered = (flying_points(Frame(prediction, truth, valid, edge_filter=t)) for t in (None, 0.25))
    expected, _ = loop_flying(
        prediction, truth, valid, 0.05, 0.2, Frame(prediction, truth, valid, edge_filter=0.25).kept
    )
    np.testing.assert_array_equal(filtered.flying, expected)
    np.testing.assert_array_equal(filtered.boundary, free.boundary)
    assert 0 < filtered.rate < free.rate


def test_the_sweep_is_nine_single_settings(case):
    frame = Frame(*case)
    sweep = flying_sweep(frame)
    assert [(entry["eta"], entry["beta"]) for entry in sweep] == SETTINGS
    for entry in sweep:
        points = flying_points(frame, entry["eta"], entry["beta"])
        assert (entry["flying"], entry["boundary"]) == (points.flying.sum(), points.boundary.sum())
        assert entry["rate"] == points.rate
    assert default_entry(sweep)["rate"] == flying_points(frame).rate


def ramp_over_a_step(width, shift):
    """A step from 2 m to 4 m between columns 19 and 20, predicted as a linear ramp so wide, its middle so far off."""
    columns = np.arange(40)
    truth = np.where(columns < 20, 2.0, 4.0) * np.ones((16, 1))
    fraction = np.clip((columns - (19.5 + shift)) / width + 0.5, 0, 1)
    return (2 + 2 * fraction) * np.ones((16, 1)), truth


@pytest.mark.parametrize(
    "width, shift, beta, rate",
    [  # The two boundary columns lie at these fractions of the gap:
        (1, 0, 0.1, 0),  # 0 and 1
        (2, 0, 0.2, 1),  # 1/4 and 3/4
        (2, 0, 0.25, 1),  # ... where the interval is closed
        (2, 0, 0.3, 0),
        (4, 0, 0.3, 1),  # 3/8 and 5/8
        (4, 1.5, 0.2, 0.5),  # 0 and 1/4
        (4, 1.5, 0.3, 0),
        (4, -1.5, 0.1, 0.5),  # 3/4 and 1
        (4, 0.5, 0.3, 0.5),  # 1/4 and 1/2
    ],
)
@pytest.mark.parametrize("scale", [1, 0.125])
def test_a_blurred_step_flies_as_computed_by_hand(width, shift, beta, rate, scale):
    prediction, truth = ramp_over_a_step(width, shift)
    points = flying_points(Frame(scale * prediction, truth, truth > 0), beta=beta)
    assert points.rate == rate
    assert points.boundary.sum() == 2 * 16 and points.boundary[:, 19:21].all()


def test_a_perfect_prediction_of_two_flat_surfaces_does_not_fly():
    _, truth = ramp_over_a_step(1, 0)
    assert flying_points(Frame(5 * truth, truth, truth > 0)).rate == 0


def test_the_middle_of_three_surfaces_flies_even_when_it_is_right():
    truth = np.ones((20, 30))
    truth[:, 10:12], truth[:, 12:] = 2, 3.5  # the largest gap is 2 to 3.5, so d1 lies below 2 beside the first step
    points = flying_points(Frame(truth, truth, truth > 0))
    assert points.flying[:, 10].all() and points.rate == points.flying.sum() / points.boundary.sum() > 0


def test_a_step_of_exactly_eta_is_no_boundary():
    truth = np.where(np.arange(20) < 10, 4.0, 4.25) * np.ones((9, 1))
    frame = Frame(truth, truth, truth > 0)
    assert not flying_points(frame, eta=1 / 16).boundary.any()
    assert flying_points(frame, eta=0.06).boundary.sum() == 18


def test_dropped_points_do_not_set_the_scale():
    prediction, truth = ramp_over_a_step(2, 0)
    prediction[:, :12] = np.where(np.add.outer(np.arange(16), np.arange(12)) % 2, 20, 100)
    free, filtered = (flying_points(Frame(prediction, truth, truth > 0, edge_filter=t)) for t in (None, 0.7))
    assert filtered.rate == 1  # the ramp's 2.5 m and 3.5 m, in true scale
    assert free.rate == 0.5  # scaled by median(truth) / median(prediction) = 3 / 4: only the 3.5 m still hangs between


@given(st.integers(0, 10_000), st.floats(0.01, 100))
@settings(max_examples=40, deadline=None)
def test_the_scale_of_the_prediction_does_not_matter(seed, scale):
    rng = np.random.default_rng(seed)
    truth = rng.uniform(2, 2.05, (14, 15))
    truth[:, 9:] += rng.uniform(0.5, 2)
    prediction = truth * np.exp(rng.normal(0, 0.2, truth.shape))
    before, after = (flying_points(Frame(p, truth, truth > 0)) for p in (prediction, scale * prediction))
    assert before.boundary.any()
    np.testing.assert_array_equal(after.flying, before.flying)
    np.testing.assert_array_equal(after.boundary, before.boundary)


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_wider_surfaces_and_higher_steps_leave_fewer(seed):
    rng = np.random.default_rng(seed)
    truth = 2 + np.where(np.arange(15) > 8, rng.uniform(0.5, 2), 0) + rng.uniform(0, 0.1, (14, 15))
    sweep = flying_sweep(Frame(truth * np.exp(rng.normal(0, 0.2, truth.shape)), truth, truth > 0))
    flying = np.array([entry["flying"] for entry in sweep]).reshape(3, 3)
    boundary = np.array([entry["boundary"] for entry in sweep]).reshape(3, 3)
    assert np.all(np.diff(flying, axis=1) <= 0)
    assert np.all(np.diff(boundary, axis=0)[boundary[:-1] > 0] <= 0) and np.all(np.diff(boundary, axis=1) == 0)


def test_without_an_interior_nothing_is_counted():
    truth = np.where(np.add.outer(np.arange(8), np.arange(8)) % 2, 1.0, 4.0)
    points = flying_points(Frame(truth, truth, truth > 0))
    assert points.rate is None and not points.boundary.any() and not points.flying.any()


@pytest.mark.parametrize("argument, value", [("eta", 0), ("eta", math.nan), ("beta", -0.1), ("beta", 0.6)])
def test_settings_out_of_range_are_named(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be .* got {value}"):
        flying_points(Frame(np.ones((3, 3)), np.ones((3, 3)), np.ones((3, 3), bool)), **{argument: value})


def test_sweeps_are_summed_before_dividing(random_layers):
    frames = [Frame(p, g, g > 0) for p, g in (random_layers(seed, (20, 25 + seed)) for seed in range(3))]
    frames.append(Frame(np.ones((4, 4)), np.ones((4, 4)), np.ones((4, 4), bool)))  # no boundary
    total = aggregate_sweeps([flying_sweep(frame) for frame in frames])
    for entry, (eta, beta) in zip(total, SETTINGS, strict=True):
        points = [flying_points(frame, eta, beta) for frame in frames]
        flying, boundary = (sum(getattr(p, name).sum() for p in points) for name in ("flying", "boundary"))
        assert entry == {"eta": eta, "beta": beta, "flying": flying, "boundary": boundary, "rate": flying / boundary}


def test_interval_of_two_scenes_spans_them():
    # A quarter of the draws holds the first scene twice, a quarter the second: both lie beyond 2.5%.
    assert flying_rate_interval([10, 30], [100, 100], ["a", "b"]) == [0.1, 0.3]


def test_frames_of_one_scene_are_drawn_together():
    flying, boundary, scenes = [0, 20, 30, 30], [100, 100, 100, 100], ["a", "a", "b", "b"]
    assert flying_rate_interval(flying, boundary, scenes) == [0.1, 0.3]
    assert flying_rate_interval(flying, boundary, range(4)) != [0.1, 0.3]


def test_interval_agrees_with_scipys_percentile_bootstrap():
    rng = np.random.default_rng(0)
    boundary = rng.integers(50, 500, 40)
    flying = rng.binomial(boundary, rng.uniform(0.1, 0.6, 40))
    expected = stats.bootstrap(
        (flying, boundary),
        lambda f, b, axis: f.sum(axis) / b.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    low, high = flying_rate_interval(flying, boundary, range(40))
    assert (low, high) == pytest.approx(tuple(expected), abs=0.006)
    assert low < flying.sum() / boundary.sum() < high


def test_interval_is_reproducible_and_needs_two_scenes():
    flying, boundary = [3, 8, 1, 9], [10, 20, 30, 15]
    assert flying_rate_interval(flying, boundary, range(4)) == flying_rate_interval(flying, boundary, range(4), seed=0)
    assert flying_rate_interval(flying, boundary, ["a"] * 4) is None
    assert flying_rate_interval([3, 0], [10, 0], ["a", "b"]) is None
    assert flying_rate_interval([], [], []) is None
