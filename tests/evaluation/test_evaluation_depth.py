import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe3d.evaluation import Alignment, Frame, aggregate_depth, depth_metrics, fit_alignment
from moe3d.evaluation.depth import DEPTH_KEYS


def loop_errors(prediction, truth, valid):
    """Median-aligned errors, straight from their definitions."""
    pairs = [
        (p, g)
        for p, g, v in zip(prediction.flat, truth.flat, valid.flat, strict=True)
        if v and math.isfinite(p) and p > 0
    ]
    if not pairs:
        return dict.fromkeys(DEPTH_KEYS)
    scale = statistics.median(g for _, g in pairs) / statistics.median(p for p, _ in pairs)
    pairs = [(scale * p, g) for p, g in pairs]

    def mean(values):
        return sum(values) / len(pairs)

    return {
        "abs_rel": mean(abs(p - g) / g for p, g in pairs),
        **{f"delta{i}": mean(max(p / g, g / p) < 1.25**i for p, g in pairs) for i in (1, 2, 3)},
        "sq_rel": mean((p - g) ** 2 / g for p, g in pairs),
        "rmse": math.sqrt(mean((p - g) ** 2 for p, g in pairs)),
        "log_rmse": math.sqrt(mean((math.log(p) - math.log(g)) ** 2 for p, g in pairs)),
    }


def near(expected):
    """Equal up to rounding, None only to None."""
    if isinstance(expected, dict):
        return {key: near(value) for key, value in expected.items()}
    if isinstance(expected, tuple):
        return tuple(near(value) for value in expected)
    return None if expected is None else pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_errors_are_their_definitions(case):
    metrics = depth_metrics(Frame(*case, resample="bilinear"))
    expected = loop_errors(*case)
    assert {key: metrics[key] for key in DEPTH_KEYS} == near(expected)


def test_a_prediction_off_by_a_factor_has_errors_known_by_hand():
    truth = np.full((4, 5), 2.0)
    metrics = depth_metrics(Frame(1.3 * truth, truth, truth > 0), align="none")
    assert {key: metrics[key] for key in DEPTH_KEYS} == pytest.approx(
        {"abs_rel": 0.3, "delta1": 0, "delta2": 1, "delta3": 1, "sq_rel": 0.18, "rmse": 0.6, "log_rmse": math.log(1.3)}
    )
    assert metrics["nonfinite"] == 0 and metrics["coverage"] == 1 and metrics["pixels"] == 20


@pytest.mark.parametrize("align", ["median", "scale-l1", "scale-shift", "none"])
def test_a_perfect_prediction_has_no_error(random_layers, align):
    _, truth = random_layers(0)
    metrics = depth_metrics(Frame(truth, truth, truth > 0), align)
    assert [metrics[key] for key in DEPTH_KEYS] == pytest.approx([0, 1, 1, 1, 0, 0, 0], abs=1e-12)


@given(st.integers(0, 10_000), st.floats(0.01, 100))
@settings(deadline=None)
def test_aligned_errors_do_not_depend_on_the_scale(seed, scale):
    prediction, truth = np.random.default_rng(seed).uniform(0.5, 5, (2, 6, 7))
    before, after = (depth_metrics(Frame(p, truth, truth > 0)) for p in (prediction, scale * prediction))
    assert after == pytest.approx(before, rel=1e-9)


def test_scale_l1_minimises_the_mean_absolute_error(random_layers):
    prediction, truth = random_layers(3)
    frame = Frame(prediction, truth, truth > 0)
    best = fit_alignment(prediction.ravel(), truth.ravel(), "scale-l1").scale
    errors = [np.abs(scale * prediction - truth).mean() for scale in (best, 0.999 * best, 1.001 * best)]
    assert errors[0] < min(errors[1:])
    assert depth_metrics(frame, "scale-l1") == depth_metrics(frame, Alignment(best))


def test_one_alignment_can_serve_a_sequence(random_layers):
    frames = [Frame(p, g, g > 0) for p, g in (random_layers(seed) for seed in range(3))]
    prediction, truth = (np.concatenate([getattr(f, name)[f.kept] for f in frames]) for name in ("prediction", "truth"))
    alignment = fit_alignment(prediction, truth, "median")
    assert alignment.scale == pytest.approx(statistics.median(truth) / statistics.median(prediction))
    for frame in frames:
        aligned = alignment.scale * frame.prediction
        expected = np.mean(np.abs(aligned - frame.truth) / frame.truth)
        assert depth_metrics(frame, alignment)["abs_rel"] == pytest.approx(expected)


def test_dropped_pixels_are_left_out(random_layers):
    prediction, truth = random_layers(1)
    frame = Frame(prediction, truth, truth > 0, edge_filter=0.1)
    metrics, expected = depth_metrics(frame), loop_errors(prediction, truth, frame.kept)
    assert 0 < metrics["coverage"] == frame.kept.mean() < 1
    assert {key: metrics[key] for key in DEPTH_KEYS} == near(expected)


def test_an_image_with_nothing_left_is_null_and_weighs_nothing(random_layers):
    prediction, truth = random_layers(0)
    good = depth_metrics(Frame(prediction, truth, truth > 0))
    empty = depth_metrics(Frame(prediction * np.nan, truth, truth > 0))
    assert [empty[key] for key in DEPTH_KEYS] == [None] * 7
    assert (empty["nonfinite"], empty["coverage"], empty["pixels"]) == (truth.size, 0, 0)
    both = aggregate_depth([good, empty])
    assert {key: both[key] for key in DEPTH_KEYS} == pytest.approx({key: good[key] for key in DEPTH_KEYS})
    assert both["nonfinite"] == truth.size and both["coverage"] == 0.5
    assert aggregate_depth([empty])["abs_rel"] is None
    invalid = depth_metrics(Frame(prediction, truth, np.zeros(truth.shape, bool)))
    assert aggregate_depth([invalid]) == {**dict.fromkeys(DEPTH_KEYS), "nonfinite": 0, "coverage": None}


def test_images_are_weighted_by_their_pixels():
    rng = np.random.default_rng(0)
    frames = []
    for height in (2, 9, 5):
        prediction, truth = rng.uniform(1, 3, (2, height, 7))
        prediction[0, 0] = np.nan
        frames.append(Frame(prediction, truth, rng.random((height, 7)) < 0.9))
    relative = np.concatenate([(np.abs(f.prediction - f.truth) / f.truth)[f.kept] for f in frames])
    reports = [depth_metrics(frame, "none") for frame in frames]
    total = aggregate_depth(reports)
    assert total["abs_rel"] == pytest.approx(relative.mean())
    # Means of root mean squares are means of the images' values, as in MonST3R, not the root over all pixels.
    pixels = [frame.kept.sum() for frame in frames]
    assert total["rmse"] == pytest.approx(
        sum(n * r["rmse"] for n, r in zip(pixels, reports, strict=True)) / sum(pixels)
    )
    assert total["coverage"] == sum(pixels) / sum(frame.valid.sum() for frame in frames)
