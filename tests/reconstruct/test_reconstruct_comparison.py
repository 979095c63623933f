"""One scene through two heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from moe3d.data import Sample
from moe3d.evaluation import Frame, boundary_report, depth_metrics
from moe3d.geometry import encode_pose, project
from moe3d.reconstruct.comparison import METRICS, compare_heads, prepare_views

SIZE, WIDTH = (60, 84), 70


class Oracle(nn.Module):
    """Predicts a given depth, whatever it sees, with the true intrinsics, and a gate of two experts."""

    def __init__(self, depth, sample):
        super().__init__()
        self.depth, self.sample = depth, sample

    def forward(self, images):
        (height, width), frames = images.shape[-2:], len(images)
        depth = nn.functional.interpolate(self.depth[None, None], (height, width), mode="nearest-exact")[0]
        pose = encode_pose(self.sample.extrinsics[:1], self.sample.intrinsics[:1], SIZE)
        weights = torch.tensor([0.25, 0.75])[:, None, None].expand(2, height, width)
        return {
            "depth": depth[None, :, :, :, None].expand(1, frames, -1, -1, -1),
            "pose_enc": pose[None].expand(1, frames, -1),
            "depth_weights": weights[None, None].expand(1, frames, -1, -1, -1),
            "depth_entropy": -(weights * weights.log()).sum(0)[None, None].expand(1, frames, -1, -1),
        }


@pytest.fixture
def sample():
    height, width = SIZE
    depth = torch.full((2, height, width), 4.0)
    depth[:, 15:45, 20:60] = 2.0
    valid = torch.ones_like(depth, dtype=torch.bool)
    valid[:, :5] = False
    intrinsics = torch.tensor([[80.0, 0, width / 2], [0, 80.0, height / 2], [0, 0, 1]]).repeat(2, 1, 1)
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    depth = depth.where(valid, 0)
    return Sample(images, depth, valid, intrinsics, torch.eye(3, 4).repeat(2, 1, 1), ["a", "b"])


def _filled(depth):
    return depth.where(depth > 0, 4.0)


def test_views_are_prepared_as_the_loader_does(sample):
    views = prepare_views(sample, WIDTH)
    assert views.shape == (2, 3, 56, 70)


def test_the_truth_in_another_unit_scores_perfectly(sample):
    perfect = Oracle(7 * _filled(sample.depth[0]), sample)
    result = compare_heads(sample, prepare_views(sample, WIDTH), perfect, perfect).moe
    assert set(result.metrics) == set(METRICS)
    assert result.metrics["delta1"] > 0.95 and result.metrics["abs_rel"] < 0.02  # bilinear resampling blurs the edge
    assert result.metrics["flying_rate"] == 0
    np.testing.assert_allclose(np.unique(result.depth), [2, 4], rtol=1e-5)


def test_the_metrics_are_those_of_the_evaluation(sample):
    generator = torch.Generator().manual_seed(1)
    guess = _filled(sample.depth[0]) * torch.empty(SIZE).uniform_(0.7, 1.4, generator=generator)
    worse = Oracle(guess, sample)
    images = prepare_views(sample, WIDTH)
    metrics = compare_heads(sample, images, worse, worse).stock.metrics
    prediction, truth, valid = (
        worse(images)["depth"][0, 0, ..., 0].numpy(),
        sample.depth[0].numpy(),
        sample.valid[0].numpy(),
    )
    errors = depth_metrics(Frame(prediction, truth, valid, resample="bilinear"))
    boundaries = boundary_report(prediction, truth, valid)
    assert metrics["abs_rel"] == pytest.approx(errors["abs_rel"]) and metrics["delta1"] == errors["delta1"]
    assert metrics["si_f1"] == pytest.approx(boundaries["si_f1"])
    assert metrics["flying_rate"] == boundaries["flying_rate"]


def test_each_head_gets_its_own_result(sample):
    good, flat = Oracle(_filled(sample.depth[0]), sample), Oracle(torch.full(SIZE, 3.0), sample)
    scene = compare_heads(sample, prepare_views(sample, WIDTH), flat, good)
    assert scene.stock.metrics["delta1"] < scene.moe.metrics["delta1"]
    assert scene.stock.metrics["si_f1"] == 0 < scene.moe.metrics["si_f1"]


def test_points_project_back_onto_their_pixels_at_their_depth(sample):
    model = Oracle(_filled(sample.depth[0]), sample)
    images = prepare_views(sample, WIDTH)
    result = compare_heads(sample, images, model, model).stock
    height, width = images.shape[-2:]
    # The true camera, whose field of view the model gives, on the model's grid, its principal point as VGGT decodes it.
    intrinsics = torch.tensor([[80 * width / SIZE[1], 0, width / 2], [0, 80 * height / SIZE[0], height / 2], [0, 0, 1]])
    pixels, depth = project(torch.from_numpy(result.points).reshape(-1, 3), intrinsics)
    rows, columns = np.mgrid[:height, :width]
    np.testing.assert_allclose(pixels.reshape(height, width, 2), np.stack([columns, rows], axis=-1), atol=1e-3)
    np.testing.assert_array_equal(depth.reshape(height, width), result.depth)


def test_the_gate_and_the_images_come_along(sample):
    model = Oracle(_filled(sample.depth[0]), sample)
    images = prepare_views(sample, WIDTH)
    scene = compare_heads(sample, images, model, model)
    assert scene.weights.shape == (2, 56, 70) and scene.entropy.shape == (56, 70)
    np.testing.assert_allclose(scene.weights[:, 3, 4], [0.25, 0.75])
    np.testing.assert_array_equal(scene.image, (sample.images[0] * 255).round().byte().permute(1, 2, 0))
    np.testing.assert_array_equal(scene.model_image, (images[0] * 255).round().byte().permute(1, 2, 0))


@pytest.mark.parametrize("nothing", [torch.nan, torch.inf, 0.0])
def test_a_head_that_predicts_nothing_has_no_metrics(sample, nothing):
    broken, good = Oracle(torch.full(SIZE, nothing), sample), Oracle(_filled(sample.depth[0]), sample)
    scene = compare_heads(sample, prepare_views(sample, WIDTH), good, broken)
    assert scene.moe.metrics == {"abs_rel": None, "delta1": None, "si_f1": None, "flying_rate": None}
    assert scene.stock.metrics["delta1"] > 0.95
