"""The median filter guided by an image, in PyTorch and compiled, against SciPy's and NumPy's medians; in the head."""

import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

import moe3d.sharpen
from moe3d.nn import MoEHead
from moe3d.ops.native import ISA_VARIABLE
from moe3d.ops.native_sharpen import can_sharpen
from moe3d.sharpen import sharpen
from support.isas import isas

PYTORCH = "pytorch"


def ways():
    return [PYTORCH, *isas()]


@pytest.fixture(params=ways())
def way(request, monkeypatch):
    """PyTorch's operators, or an instruction set of the compiled filter."""
    if request.param == PYTORCH:
        monkeypatch.setattr(moe3d.sharpen, "can_sharpen", lambda *_: False)
    else:
        monkeypatch.setenv(ISA_VARIABLE, request.param)
        some = torch.ones(1, 2, 2)
        assert can_sharpen(some, torch.ones(1, 3, 2, 2), None, 5)
    return request.param


def random(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5


@pytest.mark.parametrize("window", [1, 3, 5, 7])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("width", [1, 16, 37])
def test_one_colour_makes_it_scipys_median_filter(way, window, passes, width):
    depth = random(2, 13, width)
    expected = depth.numpy()
    for _ in range(passes):
        expected = np.stack([ndimage.median_filter(frame, window, mode="nearest") for frame in expected])
    sharp = sharpen(depth, torch.full((2, 3, 13, width), 0.3), passes, window=window, edge_ratio=1)
    np.testing.assert_array_equal(sharp, expected)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    depth=arrays.arrays(
        np.float32, st.tuples(st.integers(1, 9), st.integers(1, 20)), elements=st.floats(0.125, 10, width=32)
    ),
    window=st.sampled_from([1, 3, 5]),
    sigma=st.floats(0.03, 2),
    seed=st.integers(0, 2**31),
)
def test_each_pixel_becomes_numpys_weighted_quantile(way, depth, window, sigma, seed):
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


def test_a_ramp_between_two_colours_becomes_a_step_where_the_colour_changes(way):
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


def test_only_windows_with_an_edge_change(way):
    depth, image = random(1, 20, 20) * 0.04 + 1, torch.zeros(1, 3, 20, 20)  # from 1.02 to 1.06
    depth[..., 10:] += 1
    changed = (sharpen(depth, image, 1) != depth).any(dim=1)[0].nonzero()[:, 0]
    assert changed.tolist() == [8, 9, 10, 11]
    assert (sharpen(depth, image, 1, edge_ratio=1) != depth).float().mean() > 0.8
    depth[..., 10:] = torch.nan
    torch.testing.assert_close(sharpen(depth, image), depth, equal_nan=True)


def test_no_pass_changes_nothing_and_frames_do_not_mix(way):
    depth, image = random(2, 8, 9), random(2, 3, 8, 9, seed=1)
    assert sharpen(depth, image, 0) is depth
    torch.testing.assert_close(sharpen(depth, image)[1:], sharpen(depth[1:], image[1:]), rtol=0, atol=0)


def test_infinite_depth_and_unknown_pixels(way):
    depth, image = random(1, 9, 40), random(1, 3, 9, 40, seed=1)
    valid = random(1, 9, 40, seed=2) > 0.8
    depth[valid & (random(1, 9, 40, seed=3) > 1.4)] = torch.inf
    expected = sharpen(depth.double(), image, 2, valid=valid).float()
    unknown = torch.where(valid, depth, torch.nan)
    sharp = sharpen(unknown, image, 2, valid=valid)
    assert sharp[~valid].isnan().all() and torch.equal(sharp[valid], expected[valid])


@pytest.mark.parametrize("sigma", [1e-200, 1e-20, 1e20, 1e200])
def test_no_sigma_is_too_small_or_too_large(way, sigma):
    depth, grey = random(1, 9, 40), (random(1, 1, 9, 40, seed=1) > 1).float().expand(1, 3, 9, 40)
    sharp = sharpen(depth, grey, 1, sigma=sigma, edge_ratio=1)
    if sigma > 1:
        torch.testing.assert_close(sharp, sharpen(depth, torch.zeros_like(grey), 1, edge_ratio=1), rtol=0, atol=0)
    else:
        torch.testing.assert_close(sharp, sharpen(depth, 1e3 * grey, 1, edge_ratio=1), rtol=0, atol=0)


def test_the_compiled_filter_gives_the_same_with_any_number_of_threads_and_layout(way):
    depth, image = random(3, 30, 41), random(3, 3, 30, 41, seed=1)
    expected, before = sharpen(depth, image), torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            sharp = sharpen(depth.mT.contiguous().mT, image.movedim(1, -1).contiguous().movedim(-1, 1))
            assert torch.equal(sharp, expected)
    finally:
        torch.set_num_threads(before)


def test_what_the_compiled_filter_leaves_to_pytorch():
    depth, image = random(1, 8, 9), random(1, 3, 8, 9)
    some = depth.clone().requires_grad_()
    sharpen(some, image, 2).sum().backward()  # each pixel's gradient goes to the depth that it took
    assert some.grad.sum() == depth.numel() and some.grad.unique().numel() > 1
    assert not can_sharpen(some, image, None, 5) and not can_sharpen(depth, image, None, 11)
    assert not can_sharpen(depth.half(), image, None, 5) and not can_sharpen(depth.to("meta"), image, None, 5)
    expected = torch.stack([torch.from_numpy(ndimage.median_filter(depth[0].numpy(), 11, mode="nearest"))])
    assert torch.equal(sharpen(depth, torch.zeros_like(image), 1, window=11, edge_ratio=1), expected)


@pytest.mark.parametrize("shape", [(0, 8, 9), (1, 0, 9), (1, 8, 0)])
def test_nothing_to_sharpen(shape):
    assert sharpen(torch.ones(shape), torch.ones(shape[0], 3, *shape[1:])).shape == shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": random(8, 9)}, "depth must be [B, H, W], got [8, 9]"),
        ({"image": random(1, 3, 8, 8)}, "image must be [1, 3, 8, 9] to fit depth, got [1, 3, 8, 8]"),
        ({"valid": torch.ones(1, 8, 8)}, "valid must be [1, 8, 9] to fit depth, got [1, 8, 8]"),
        ({"valid": torch.ones(1, 8, 9, dtype=torch.uint8)}, "valid must be bool, got uint8"),
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
