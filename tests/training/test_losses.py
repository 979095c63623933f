"""The losses against hand-written loops and known values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe3d.geometry import decode_pose, encode_pose, project, unproject
from moe3d.losses import (
    camera_loss,
    confidence_loss,
    entropy_loss,
    log_depth_loss,
    log_gradient_loss,
    moe_depth_loss,
    normalise_scale,
)

DEPTH_LOSSES = (moe_depth_loss, log_depth_loss, log_gradient_loss)


@pytest.fixture
def maps():
    """Predicted and true depth [2, 3, 7, 9] in float64, and which pixels are valid; the truth is 0 elsewhere."""
    generator = torch.Generator().manual_seed(0)
    depth, truth = (torch.rand(2, 2, 3, 7, 9, generator=generator, dtype=torch.float64) + 0.5).unbind()
    valid = torch.rand(2, 3, 7, 9, generator=generator) < 0.7
    return depth, truth * valid, valid


def pixels(valid):
    return [tuple(index) for index in valid.nonzero().tolist()]


def test_depth_loss_is_the_mean_square_over_valid_pixels(maps):
    depth, truth, valid = maps
    squares = [(depth[i] - truth[i]).item() ** 2 for i in pixels(valid)]
    assert moe_depth_loss(depth, truth, valid).item() == pytest.approx(sum(squares) / len(squares))


def test_log_depth_loss_is_the_mean_relative_error(maps):
    depth, truth, valid = maps
    errors = [abs(math.log(depth[i] / truth[i])) for i in pixels(valid)]
    assert log_depth_loss(depth, truth, valid).item() == pytest.approx(sum(errors) / len(errors))


@pytest.mark.parametrize("scales", [1, 2, 3])
def test_gradient_loss_compares_valid_neighbours_at_every_spacing(maps, scales):
    depth, truth, valid = maps
    error = torch.where(valid, (depth / truth.clamp(min=1e-9)).log(), torch.nan)
    expected = 0.0
    for step in (1, 2, 4)[:scales]:
        for axis in (0, 1):
            differences = []
            for b in range(2):
                for s in range(3):
                    for y in range(0, 7, step):
                        for x in range(0, 9, step):
                            other = (y + step, x) if axis == 0 else (y, x + step)
                            if other[0] < 7 and other[1] < 9:
                                differences.append(abs(error[b, s, y, x] - error[(b, s, *other)]))
            differences = [d for d in differences if not d.isnan()]
            expected += sum(differences) / max(1, len(differences))
    assert log_gradient_loss(depth, truth, valid, scales).item() == pytest.approx(float(expected) / scales)


def test_scale_and_offset_of_a_scene_leave_its_gradient_loss_alone(maps):
    depth, truth, valid = maps
    assert log_gradient_loss(3 * truth.clamp(min=0.1), truth, valid).item() == pytest.approx(0, abs=1e-12)
    once, thrice = (log_gradient_loss(factor * depth, truth, valid) for factor in (1, 3))
    assert once.item() == pytest.approx(thrice.item())


@pytest.mark.parametrize("loss", DEPTH_LOSSES)
def test_nothing_valid_gives_zero_and_zero_gradients(loss):
    depth = torch.rand(1, 1, 4, 4).add(0.5).requires_grad_()
    value = loss(depth, torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.bool))
    value.backward()
    assert value.item() == 0
    assert torch.equal(depth.grad, torch.zeros_like(depth))


@pytest.mark.parametrize("loss", DEPTH_LOSSES)
def test_invalid_pixels_get_no_gradient_even_where_they_are_nan(maps, loss):
    depth, truth, valid = maps
    depth = torch.where(valid, depth, torch.nan).requires_grad_()
    loss(depth, truth, valid).backward()
    assert depth.grad.isfinite().all()
    assert not depth.grad[~valid].any()


@pytest.mark.parametrize("loss", DEPTH_LOSSES)
def test_gradients_pass_gradcheck(maps, loss):
    depth, truth, valid = (m[:1, :1] for m in maps)
    assert torch.autograd.gradcheck(lambda d: loss(d, truth, valid), depth.requires_grad_())


def test_entropy_loss_of_uniform_weights_is_log_k():
    weights = torch.full((2, 4, 5, 6), 0.25, dtype=torch.float64)
    entropy = -(weights * weights.log()).sum(1)
    assert entropy_loss(entropy).item() == pytest.approx(math.log(4))


def test_confidence_loss_is_least_at_alpha_over_error_and_spares_the_depth():
    truth = torch.ones(1, 1, 8, 8)
    depth = torch.full_like(truth, 1.1).requires_grad_()
    confidence = torch.full_like(truth, 0.2 / math.log(1.1)).requires_grad_()
    confidence_loss(confidence, depth, truth, truth > 0).backward()
    assert confidence.grad.abs().max() < 1e-6
    assert depth.grad is None


def test_camera_loss_of_known_errors():
    truth = torch.zeros(1, 2, 9, dtype=torch.float64)
    translation, rotation, view = (torch.zeros_like(truth) for _ in range(3))
    translation[..., :3], rotation[..., 3:7], view[..., 7:] = 2, 0.5, 0.3
    everything = torch.tensor([True])
    assert camera_loss([translation], truth, everything).item() == pytest.approx(2)
    assert camera_loss([rotation], truth, everything).item() == pytest.approx(0.5)
    assert camera_loss([view], truth, everything).item() == pytest.approx(0.15)
    assert camera_loss([1e3 * translation], truth, everything).item() == pytest.approx(100)
    stages = camera_loss([translation, rotation, view], truth, everything)
    assert stages.item() == pytest.approx((0.36 * 2 + 0.6 * 0.5 + 0.15) / 3)


def test_camera_loss_leaves_out_scenes_that_do_not_count():
    generator = torch.Generator().manual_seed(0)
    pose, truth = torch.randn(2, 3, 2, 9, generator=generator).unbind()
    pose.requires_grad_()
    camera_loss([pose], truth, torch.tensor([True, False, True])).backward()
    assert not pose.grad[1].any() and pose.grad[[0, 2]].any()
    nothing = camera_loss([pose], truth, torch.zeros(3, dtype=torch.bool))
    nothing.backward()
    assert nothing.item() == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1 << 20), st.floats(0.01, 100))
def test_normalised_scenes_have_unit_mean_distance_in_the_first_camera_whatever_their_unit(seed, unit):
    generator = torch.Generator().manual_seed(seed)
    depth = torch.rand(2, 3, 12, 10, generator=generator, dtype=torch.float64) + 0.5
    valid = torch.rand(2, 3, 12, 10, generator=generator) < 0.8
    pose = torch.rand(2, 3, 9, generator=generator, dtype=torch.float64) + 0.2
    extrinsics, intrinsics = decode_pose(pose, (12, 10))

    scaled, cameras = normalise_scale(depth * unit, valid, intrinsics, extrinsics * _times_translation(unit))
    reference, same = normalise_scale(depth, valid, intrinsics, extrinsics)
    torch.testing.assert_close(scaled, reference, rtol=1e-3, atol=0)  # VGGT adds 1e-3 to the count
    torch.testing.assert_close(cameras, same, rtol=1e-3, atol=1e-6)

    assert torch.allclose(cameras[:, 0], torch.eye(3, 4, dtype=torch.float64))
    distance = unproject(scaled, intrinsics, cameras).norm(dim=-1)
    for scene in range(2):
        assert distance[scene][valid[scene]].mean().item() == pytest.approx(1, rel=1e-3)


def test_normalising_keeps_what_the_cameras_see():
    pose = torch.tensor([[[0.3, 0.1, -0.2, 0.1, 0.2, 0.0, 0.9, 0.8, 1.0], [0.5, 0, 0.1, 0, 0.1, 0.1, 0.9, 0.8, 1.0]]])
    extrinsics, intrinsics = decode_pose(pose.double(), (12, 10))
    depth = torch.rand(1, 2, 12, 10, dtype=torch.float64) + 1
    before = _first_in_second(depth, intrinsics, extrinsics)
    depth, extrinsics = normalise_scale(depth, depth > 0, intrinsics, extrinsics)
    after = _first_in_second(depth, intrinsics, extrinsics)
    torch.testing.assert_close(before, after)
    assert encode_pose(extrinsics, intrinsics, (12, 10))[0, 0, :3].abs().max() < 1e-12


def _first_in_second(depth, intrinsics, extrinsics):
    """Where the first frame's pixels land in the second."""
    points = unproject(depth, intrinsics, extrinsics)[0, 0].flatten(0, 1)
    return project(points, intrinsics[0, 1], extrinsics[0, 1])[0]


def _times_translation(unit):
    return torch.tensor([1, 1, 1, unit], dtype=torch.float64)
