"""The median filter guided by an image, against SciPy's and NumPy's medians, and in the head."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from moe3d.nn import MoEHead
from moe3d.sharpen import sharpen


def random(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5


@pytest.mark.parametrize("window", [1, 3, 5, 7])
@pytest.mark.parametrize("passes", [1, 3])
def test_one_colour_makes_it_scipys_median_filter(window, passes):
    depth = random(2, 13, 17)
    expected = depth.numpy()
    for _ in range(passes):
        expected = np.stack([ndimage.median_filter(frame, window, mode="nearest") for frame in expected])
    sharp = sharpen(depth, torch.full((2, 3, 13, 17), 0.3), passes, window=window, edge_ratio=1)
    np.testing.assert_array_equal(sharp, expected)


@settings(max_examples=50, deadline=None)
@given(
    depth=arrays.arrays(np.float32, st.tuples(*[st.integers(1, 9)] * 2), elements=st.floats(0.125, 10, width=32)),
    window=st.sampled_from([1, 3, 5]),
    sigma=st.floats(0.03, 2),
    seed=st.integers(0, 2**31),
)
def test_each_pixel_becomes_numpys_weighted_quantile(depth, window, sigma, seed):
    """NumPy's inverted CDF, in float64. Where rounding decides which depth has half of the weight, either is right."""
    generator = np.random.default_rng(seed)
    image = generator.uniform(size=(3, *depth.shape)).astype(np.float32)
    valid = generator.uniform(size=depth.shape) < 0.8
    given = [torch.from_numpy(array)[None] for array in (depth, image, valid)]
    sharp = sharpen(*given[:2], 1, window=window, sigma=sigma, edge_ratio=1, valid=given[2])[0].numpy()
    reach = window // 2
    for y, x in np.ndindex(*depth.shape):
        if not valid[y, x]:
            assert sharp[y, x] == depth[y, x]
            continue
        rows = np.clip(np.arange(y - reach, y + reach + 1), 0, depth.shape[0] - 1)
        columns = np.clip(np.arange(x - reach, x + reach + 1), 0, depth.shape[1] - 1)
        around = np.ix_(rows, columns)
        difference = image[(slice(None), *around)].astype(np.float64) - image[:, y, x, None, None]
        weights = np.exp(-(difference**2).sum(0) / (2 * sigma**2)) * valid[around]
        low, high = (
            np.quantile(depth[around].ravel(), q, weights=weights.ravel(), method="inverted_cdf")
            for q in (0.5 - 1e-5, 0.5 + 1e-5)
        )
        assert low <= sharp[y, x] <= high and sharp[y, x] in depth


def test_a_ramp_between_two_colours_becomes_a_step_where_the_colour_changes():
    columns = torch.arange(16)
    depth = (1 + ((columns - 4) / 8).clamp(0, 1)).expand(1, 9, 16)  # from 1 to 2 over eight pixels
    image = torch.where(columns < 7, 0.2, 0.8).expand(1, 3, 9, 16)
    steps = sharpen(depth, image, 4).diff(dim=-1).abs()
    assert steps[..., 6].min() > 0.4 and depth.diff(dim=-1).abs().max() == 0.125
    assert sharpen(depth, image, 4).unique().numel() <= depth.unique().numel()  # nothing is made up


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_type_stays(dtype):
    depth = random(1, 6, 7).to(dtype)
    sharp = sharpen(depth, random(1, 3, 6, 7, seed=1))
    assert sharp.dtype == dtype and torch.isin(sharp, depth).all()


def test_only_windows_with_an_edge_change():
    depth, image = random(1, 20, 20) * 0.04 + 1, torch.zeros(1, 3, 20, 20)  # from 1.02 to 1.06
    depth[..., 10:] += 1
    changed = (sharpen(depth, image, 1) != depth).any(dim=1)[0].nonzero()[:, 0]
    assert changed.tolist() == [8, 9, 10, 11]
    assert (sharpen(depth, image, 1, edge_ratio=1) != depth).float().mean() > 0.8
    depth[..., 10:] = torch.nan
    torch.testing.assert_close(sharpen(depth, image), depth, equal_nan=True)


def test_no_pass_changes_nothing_and_frames_do_not_mix():
    depth, image = random(2, 8, 9), random(2, 3, 8, 9, seed=1)
    assert sharpen(depth, image, 0) is depth
    torch.testing.assert_close(sharpen(depth, image)[1:], sharpen(depth[1:], image[1:]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": random(8, 9)}, "depth must be [B, H, W], got [8, 9]"),
        ({"image": random(1, 3, 8, 8)}, "image must be [1, 3, 8, 9] to fit depth, got [1, 3, 8, 8]"),
        ({"valid": torch.ones(1, 8, 8)}, "valid must be [1, 8, 9] to fit depth, got [1, 8, 8]"),
        ({"passes": -1}, "passes must be an integer of at least 0, got -1"),
        ({"passes": True}, "passes must be an integer of at least 0, got True"),
        ({"window": 4}, "window must be an odd number of pixels, got 4"),
        ({"edge_ratio": 0.9}, "edge_ratio must be a finite number of at least 1, got 0.9"),
        ({"sigma": 0.0}, "sigma must be a finite number above 0, got 0.0"),
        ({"sigma": float("nan")}, "sigma must be a finite number above 0, got nan"),
    ],
)
def test_errors_name_the_argument(changes, message):
    arguments = {"depth": random(1, 8, 9), "image": random(1, 3, 8, 9)} | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        sharpen(**arguments)


@torch.no_grad()
def test_a_head_sharpens_in_eval_mode_only():
    x, image, size = torch.randn(2, 8, 6, 7), random(2, 3, 12, 14), (12, 14)
    plain = MoEHead(8, 2, 2, expert_hidden=8, gate_hidden=8).eval()
    head = MoEHead(8, 2, 2, expert_hidden=8, gate_hidden=8, sharpen=2).eval()
    expected, output = plain(x, size), head(x, size, image=image)
    torch.testing.assert_close(output.prediction, sharpen(expected.prediction[:, 0], image, 2)[:, None])
    torch.testing.assert_close(output.confidence, expected.confidence)
    torch.testing.assert_close(head.train()(x, size, image=image).prediction, plain.train()(x, size).prediction)
    head.sharpen = 0
    torch.testing.assert_close(head.eval()(x, size).prediction, expected.prediction)


def test_a_head_says_what_it_cannot_sharpen():
    with pytest.raises(ValueError, match="sharpen must be 0 for a prediction of 3 channels, got 2"):
        MoEHead(8, 4, sharpen=2)
    with pytest.raises(ValueError, match=r"sharpen must be an integer of at least 0, got 1\.5"):
        MoEHead(8, 2, sharpen=1.5)
    with pytest.raises(ValueError, match="image must be given to a head with image_gate or sharpen, got None"):
        MoEHead(8, 2, sharpen=2)(torch.randn(1, 8, 6, 7), (12, 14))
