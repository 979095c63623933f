"""Cameras against NumPy, SciPy, PyTorch's own resizing and the real vggt package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from moe3d import geometry

finite = {"allow_nan": False, "allow_infinity": False}
seeds = st.integers(0, 2**32 - 1)


def camera(rng: np.random.Generator, *batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random intrinsics [*batch, 3, 3] with skew, and extrinsics [*batch, 3, 4], float64."""
    count = int(np.prod(batch))
    intrinsics = np.zeros((count, 3, 3))
    intrinsics[:, 0, 0], intrinsics[:, 1, 1] = rng.uniform(50, 500, (2, count))
    intrinsics[:, 0, 1] = rng.uniform(-3, 3, count)
    intrinsics[:, :2, 2] = rng.uniform(-20, 60, (count, 2))
    intrinsics[:, 2, 2] = 1
    rotation = Rotation.random(count, rng=rng).as_matrix()
    extrinsics = np.concatenate([rotation, rng.normal(0, 2, (count, 3, 1))], -1)
    return (
        torch.from_numpy(intrinsics).reshape(*batch, 3, 3),
        torch.from_numpy(extrinsics).reshape(*batch, 3, 4),
    )


def pixel_grid(height: int, width: int) -> torch.Tensor:
    """[H, W, 2] (column, row)."""
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([column, row], -1).double()


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_projection_undoes_unprojection(seed):
    rng = np.random.default_rng(seed)
    intrinsics, extrinsics = camera(rng, 2, 3)
    depth = torch.from_numpy(rng.uniform(0.2, 20, (2, 3, 5, 7)))
    points = geometry.unproject(depth, intrinsics, extrinsics)
    pixels, z = geometry.project(points.flatten(-3, -2), intrinsics, extrinsics)
    torch.testing.assert_close(pixels.unflatten(-2, (5, 7)), pixel_grid(5, 7).expand(2, 3, 5, 7, 2))
    torch.testing.assert_close(z.unflatten(-1, (5, 7)), depth)


def test_unprojects_as_the_inverse_matrices_say():
    rng = np.random.default_rng(0)
    intrinsics, extrinsics = camera(rng, 1)
    depth = rng.uniform(1, 5, (4, 6))
    homogeneous = np.concatenate([pixel_grid(4, 6).numpy(), np.ones((4, 6, 1))], -1)
    in_camera = homogeneous @ np.linalg.inv(intrinsics[0].numpy()).T * depth[..., None]
    rotation, translation = extrinsics[0, :, :3].numpy(), extrinsics[0, :, 3].numpy()
    in_world = (in_camera - translation) @ rotation
    ours = geometry.unproject(torch.from_numpy(depth), intrinsics[0])
    np.testing.assert_allclose(ours, in_camera, atol=1e-12)
    ours = geometry.unproject(torch.from_numpy(depth), intrinsics[0], extrinsics[0])
    np.testing.assert_allclose(ours, in_world, atol=1e-12)


def test_the_top_left_pixels_centre_is_the_origin():
    intrinsics = torch.tensor([[10.0, 0, 0], [0, 10, 0], [0, 0, 1]])
    points = geometry.unproject(torch.full((2, 2), 4.0), intrinsics)
    assert points[0, 0].tolist() == [0, 0, 4]
    assert points[1, 1].tolist() == pytest.approx([0.4, 0.4, 4])


@given(seeds, st.floats(0.2, 4), st.floats(0.2, 4))
@settings(max_examples=30, deadline=None)
def test_scaled_intrinsics_project_onto_the_resized_image(seed, sx, sy):
    rng = np.random.default_rng(seed)
    intrinsics, _ = camera(rng, 2)
    points = torch.from_numpy(rng.normal([0, 0, 5], 0.8, (2, 10, 3)))
    before, _ = geometry.project(points, intrinsics)
    after, _ = geometry.project(points, geometry.scale_intrinsics(intrinsics, sx, sy))
    torch.testing.assert_close(after, (before + 0.5) * torch.tensor([sx, sy]).double() - 0.5)


def test_scaled_intrinsics_follow_torchs_resizing():
    """Resizing the map of ray directions equals the ray directions of the resized camera, away from the border."""
    intrinsics = torch.tensor([[40.0, 0, 11.3], [0, 50, 8.1], [0, 0, 1]]).double()
    rays = geometry.unproject(torch.ones(18, 24).double(), intrinsics)
    resized = torch.nn.functional.interpolate(rays.permute(2, 0, 1)[None], size=(27, 72), mode="bilinear")
    scaled = geometry.scale_intrinsics(intrinsics, 3.0, 1.5)
    expected = geometry.unproject(torch.ones(27, 72).double(), scaled).permute(2, 0, 1)
    torch.testing.assert_close(resized[0, :, 2:-2, 3:-3], expected[:, 2:-2, 3:-3])


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_inverts_extrinsics_as_4x4_matrices(seed):
    _, extrinsics = camera(np.random.default_rng(seed), 2, 3)
    bottom = torch.tensor([0, 0, 0, 1.0]).double().expand(2, 3, 1, 4)
    expected = torch.linalg.inv(torch.cat([extrinsics, bottom], -2))[..., :3, :]
    torch.testing.assert_close(geometry.invert_extrinsics(extrinsics), expected)


@given(st.lists(st.floats(-1, 1, **finite), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 1e-3))
def test_quaternion_to_matrix_is_scipys(quaternion):
    ours = geometry.quaternion_to_matrix(torch.tensor(quaternion, dtype=torch.float64))
    np.testing.assert_allclose(ours, Rotation.from_quat(quaternion).as_matrix(), atol=1e-12)


def test_quaternion_product_is_scipys():
    a, b = Rotation.random(20, random_state=0), Rotation.random(1, random_state=1)
    ours = geometry.quaternion_product(*(torch.from_numpy(rotation.as_quat()) for rotation in (a, b))).numpy()
    np.testing.assert_allclose(Rotation.from_quat(ours).as_matrix(), (a * b).as_matrix(), atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=-1), 1)


@given(st.lists(st.floats(-1, 1, **finite), min_size=3, max_size=3).filter(lambda v: np.linalg.norm(v) > 1e-3),
       st.one_of(st.floats(-np.pi, np.pi), st.sampled_from([0, np.pi, -np.pi, np.pi - 1e-9, 1e-9])))  # fmt: skip
def test_matrix_to_quaternion_is_scipys(axis, angle):
    rotation = Rotation.from_rotvec(np.array(axis) / np.linalg.norm(axis) * angle)
    ours = geometry.matrix_to_quaternion(torch.from_numpy(rotation.as_matrix())).numpy()
    assert ours[3] >= 0
    assert np.linalg.norm(ours) == pytest.approx(1)
    assert (Rotation.from_quat(ours).inv() * rotation).magnitude() < 1e-9
    if rotation.as_quat(canonical=True)[3] > 1e-6:  # at half a turn, q and -q are both canonical
        np.testing.assert_allclose(ours, rotation.as_quat(canonical=True), atol=1e-9)


def test_decoding_undoes_encoding():
    rng = np.random.default_rng(1)
    intrinsics, extrinsics = camera(rng, 4, 5)
    size = (120, 90)
    encoded = geometry.encode_pose(extrinsics, intrinsics, size)
    assert encoded.shape == (4, 5, 9)
    back_extrinsics, back_intrinsics = geometry.decode_pose(encoded, size)
    torch.testing.assert_close(back_extrinsics, extrinsics)
    for i in range(2):
        torch.testing.assert_close(back_intrinsics[..., i, i], intrinsics[..., i, i])
    assert (back_intrinsics[..., 0, 2] == 45).all()
    assert (back_intrinsics[..., 1, 2] == 60).all()


def test_field_of_view_comes_height_first():
    intrinsics = torch.tensor([[100.0, 0, 0], [0, 50, 0], [0, 0, 1]])
    encoded = geometry.encode_pose(torch.eye(3, 4), intrinsics, (100, 200))
    assert encoded.tolist() == pytest.approx([0, 0, 0, 0, 0, 0, 1, np.pi / 2, np.pi / 2])


def test_gradients_flow_through_decoding():
    rng = np.random.default_rng(2)
    pose = np.concatenate([rng.normal(0, 1, (2, 7)), rng.uniform(0.5, 1.5, (2, 2))], -1)
    pose = torch.from_numpy(pose).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: geometry.decode_pose(p, (30, 40)), (pose,))


def test_gradients_flow_through_encoding_even_without_rotation():
    extrinsics = torch.eye(3, 4).double().requires_grad_()
    intrinsics = torch.eye(3).double() * 50
    geometry.encode_pose(extrinsics, intrinsics, (30, 40)).sum().backward()
    assert torch.isfinite(extrinsics.grad).all()


@pytest.mark.real_vggt
def test_pose_encoding_is_vggts():
    theirs = pytest.importorskip("vggt.utils.pose_enc", reason="the real vggt package cannot be imported")
    intrinsics, extrinsics = (m.float() for m in camera(np.random.default_rng(3), 3, 50))
    size = (294, 518)
    encoded = geometry.encode_pose(extrinsics, intrinsics, size)
    expected = theirs.extri_intri_to_pose_encoding(extrinsics, intrinsics, size)
    torch.testing.assert_close(encoded, expected, atol=2e-6, rtol=1e-5)
    encoded[..., 3:7] *= 1.7  # predictions are not unit quaternions
    for ours, reference in zip(
        geometry.decode_pose(encoded, size), theirs.pose_encoding_to_extri_intri(encoded, size), strict=True
    ):
        torch.testing.assert_close(ours, reference, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: geometry.unproject(torch.ones(2, 2), torch.eye(4)), "intrinsics must end in dimensions 3x3"),
        (lambda: geometry.project(torch.ones(5, 3), torch.eye(2)), "intrinsics must end in dimensions 3x3"),
        (lambda: geometry.invert_extrinsics(torch.eye(4)), "extrinsics must end in dimensions 3x4, got shape"),
        (lambda: geometry.encode_pose(torch.eye(3), torch.eye(3), (2, 2)), "extrinsics must end in dimensions 3x4"),
        (lambda: geometry.decode_pose(torch.ones(2, 8), (2, 2)), r"pose_enc must have 9 numbers .*\(2, 8\)"),
        (lambda: geometry.matrix_to_quaternion(torch.ones(3, 4)), "matrix must end in dimensions 3x3"),
    ],
)
def test_wrong_shapes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
