"""The Motorcycle pair: its published numbers, and its cameras against its own photographs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage.data import stereo_motorcycle

from moe3d import geometry
from moe3d.data import Sample, open_dataset


@pytest.fixture(scope="module")
def pair() -> Sample:
    return open_dataset("motorcycle").load("motorcycle", ["left", "right"])


def test_depth_is_that_of_the_published_calibration(pair):
    """Numbers of scikit-image's documentation for the reduced images; not those that the loader is built from."""
    disparity = stereo_motorcycle()[2]
    known = np.isfinite(disparity)
    assert np.array_equal(pair.valid[0].numpy(), known)
    expected = 0.193001 * 994.978 / (disparity[known] + 31.086)
    np.testing.assert_allclose(pair.depth[0].numpy()[known], expected, rtol=1e-5)


def test_the_right_view_has_no_ground_truth(pair):
    assert not pair.valid[1].any()
    assert (pair.depth[1] == 0).all()


def test_images_are_the_photographs(pair):
    left, right, _ = stereo_motorcycle()
    for image, photograph in zip(pair.images, (left, right), strict=True):
        assert np.array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), photograph)


def test_one_frame_can_be_loaded_alone(pair):
    right = open_dataset("motorcycle").load("motorcycle", ["right"])
    assert torch.equal(right.images[0], pair.images[1])
    assert torch.equal(right.extrinsics[0], pair.extrinsics[1])


def test_a_root_or_a_split_is_refused():
    with pytest.raises(ValueError, match="takes no root, got '/data'"):
        open_dataset("motorcycle", "/data")
    with pytest.raises(ValueError, match="has no splits, got 'test'"):
        open_dataset("motorcycle", split="test")


def photometric_error(pair: Sample) -> float:
    """Median difference between the left photograph and the right one warped into it by the ground truth."""
    points = geometry.unproject(pair.depth[0], pair.intrinsics[0], pair.extrinsics[0]).flatten(0, 1)
    pixels, _ = geometry.project(points, pair.intrinsics[1], pair.extrinsics[1])
    height, width = pair.depth.shape[1:]
    grid = 2 * (pixels + 0.5) / torch.tensor([width, height]) - 1
    warped = torch.nn.functional.grid_sample(
        pair.images[1:], grid.view(1, height, width, 2), align_corners=False, padding_mode="border"
    )
    inside = pair.valid[0] & (grid.abs() < 1).all(-1).view(height, width)
    return float((warped[0] - pair.images[0])[:, inside].abs().median())


def shifted(pair: Sample, pixels: float) -> Sample:
    """The right camera's principal point moved sideways, which moves where every point lands."""
    intrinsics = pair.intrinsics.clone()
    intrinsics[1, 0, 2] += pixels
    return replace(pair, intrinsics=intrinsics)


def with_baseline(pair: Sample, factor: float) -> Sample:
    extrinsics = pair.extrinsics.clone()
    extrinsics[1, 0, 3] *= factor
    return replace(pair, extrinsics=extrinsics)


def test_ground_truth_and_cameras_warp_one_photograph_onto_the_other(pair):
    error = photometric_error(pair)
    assert error < 0.025
    assert error < 0.35 * photometric_error(replace(pair, extrinsics=pair.extrinsics[:1].repeat(2, 1, 1)))
    assert error < 0.35 * photometric_error(with_baseline(pair, -1))
    assert error < 0.9 * min(photometric_error(with_baseline(pair, factor)) for factor in (0.97, 1.03))
    assert error < 0.9 * min(photometric_error(shifted(pair, pixels)) for pixels in (-1, 1))
