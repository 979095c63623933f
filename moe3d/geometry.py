"""Pinhole cameras: unprojection, projection, intrinsics under resizing, and VGGT's pose encoding.

Conventions, everywhere in the package:

- The centre of the top-left pixel is (0, 0), so an image of width W spans [-0.5, W - 0.5].
- Extrinsics are [..., 3, 4] world-to-camera matrices [R | t] with OpenCV axes: x right, y down, z forward.
- Depth is planar: the z coordinate in the camera's frame, not the distance along the ray.
- Every function accepts any leading (batch, frame) dimensions and is differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unproject(depth: Tensor, intrinsics: Tensor, extrinsics: Tensor | None = None) -> Tensor:
    """Lift every pixel of a depth map to a 3D point.

    Args:
        depth: [..., H, W] planar depth.
        intrinsics: [..., 3, 3] pinhole matrices in pixels; a skew entry is honoured.
        extrinsics: [..., 3, 4] world-to-camera; ``None`` keeps the points in the camera's frame.

    Returns:
        [..., H, W, 3] points in the world's frame (in the camera's without extrinsics), in depth's unit.

    Raises:
        ValueError: if a matrix has the wrong shape.
    """
    _require_matrix("intrinsics", intrinsics, (3, 3))
    height, width = depth.shape[-2:]
    row = torch.arange(height, dtype=depth.dtype, device=depth.device)[:, None]
    column = torch.arange(width, dtype=depth.dtype, device=depth.device)
    fx, skew, cx = (intrinsics[..., 0, i, None, None] for i in range(3))
    fy, cy = (intrinsics[..., 1, i, None, None] for i in (1, 2))
    y = (row - cy) / fy
    x = (column - cx - skew * y) / fx
    points = torch.stack(torch.broadcast_tensors(x * depth, y * depth, depth), dim=-1)
    if extrinsics is None:
        return points
    to_world = invert_extrinsics(extrinsics)
    return _transform(to_world[..., None, :, :], points)


def project(points: Tensor, intrinsics: Tensor, extrinsics: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Project points into cameras.

    Args:
        points: [..., N, 3] points in the world's frame (in the camera's without extrinsics).
        intrinsics: [..., 3, 3] in pixels.
        extrinsics: [..., 3, 4] world-to-camera, or ``None``.

    Returns:
        Pixels [..., N, 2] as (column, row), and planar depth [..., N]. Where depth <= 0 the point lies behind the
        camera and its pixel has no meaning.

    Raises:
        ValueError: if a matrix has the wrong shape.
    """
    _require_matrix("intrinsics", intrinsics, (3, 3))
    in_camera = points if extrinsics is None else _transform(extrinsics, points)
    homogeneous = in_camera @ intrinsics.mT
    return homogeneous[..., :2] / homogeneous[..., 2:], in_camera[..., 2]


def scale_intrinsics(intrinsics: Tensor, sx: float | Tensor, sy: float | Tensor) -> Tensor:
    """Intrinsics [..., 3, 3] of the image resized by ``sx`` horizontally and ``sy`` vertically.

    Resizing maps the image's borders onto each other, and the border lies at -0.5: cx' = (cx + 0.5) sx - 0.5.
    """
    _require_matrix("intrinsics", intrinsics, (3, 3))
    resize = torch.eye(3, dtype=intrinsics.dtype, device=intrinsics.device).repeat(*intrinsics.shape[:-2], 1, 1)
    for axis, scale in enumerate((sx, sy)):
        resize[..., axis, axis] = scale
        resize[..., axis, 2] = 0.5 * resize[..., axis, axis] - 0.5
    return resize @ intrinsics


def invert_extrinsics(extrinsics: Tensor) -> Tensor:
    """The inverse rigid motion: camera-to-world [..., 3, 4] of world-to-camera [..., 3, 4], and the other way round."""
    _require_matrix("extrinsics", extrinsics, (3, 4))
    rotation = extrinsics[..., :3].mT
    return torch.cat([rotation, -rotation @ extrinsics[..., 3:]], dim=-1)


def encode_pose(extrinsics: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> Tensor:
    """VGGT's pose encoding: [translation (3), quaternion xyzw (4), fov_h, fov_w], fov = 2 atan(side / (2 f)), radians.

    Args:
        extrinsics: [..., 3, 4] world-to-camera.
        intrinsics: [..., 3, 3] in pixels of an image of ``size``; the principal point is not encoded.
        size: (height, width) of the image.

    Returns:
        [..., 9].

    Raises:
        ValueError: if a matrix has the wrong shape.
    """
    _require_matrix("extrinsics", extrinsics, (3, 4))
    _require_matrix("intrinsics", intrinsics, (3, 3))
    focal = torch.stack([intrinsics[..., 1, 1], intrinsics[..., 0, 0]], dim=-1)
    fov = 2 * torch.atan(0.5 * focal.new_tensor(size) / focal)
    return torch.cat([extrinsics[..., 3], matrix_to_quaternion(extrinsics[..., :3]), fov], dim=-1)


def decode_pose(pose_enc: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Cameras of a pose encoding (see :func:`encode_pose`).

    The quaternion need not be normalised. The principal point is put at (W / 2, H / 2), as VGGT does: half a pixel off
    the exact image centre in this package's pixel convention, and kept so that both decode a prediction alike.

    Args:
        pose_enc: [..., 9].
        size: (height, width) of the image.

    Returns:
        Extrinsics [..., 3, 4], world-to-camera, and intrinsics [..., 3, 3] in pixels.

    Raises:
        ValueError: if the last dimension is not 9.
    """
    if pose_enc.shape[-1] != 9:
        raise ValueError(f"pose_enc must have 9 numbers in its last dimension, got shape {tuple(pose_enc.shape)}")
    extrinsics = torch.cat([quaternion_to_matrix(pose_enc[..., 3:7]), pose_enc[..., :3, None]], dim=-1)
    half = 0.5 * pose_enc.new_tensor(size)
    fy, fx = (half / torch.tan(0.5 * pose_enc[..., 7:])).unbind(-1)
    zero, one = torch.zeros_like(fx), torch.ones_like(fx)
    cy, cx = (half[i].expand_as(fx) for i in range(2))
    entries = torch.stack([fx, zero, cx, zero, fy, cy, zero, zero, one], dim=-1)
    return extrinsics, entries.unflatten(-1, (3, 3))


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] of quaternions [..., 4] in xyzw order, of any non-zero length."""
    x, y, z, w = torch.nn.functional.normalize(quaternion, dim=-1).unbind(-1)
    entries = [
        1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
        2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
        2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(entries, dim=-1).unflatten(-1, (3, 3))


def quaternion_product(a: Tensor, b: Tensor) -> Tensor:
    """The rotation by ``b`` [..., 4], then by ``a`` [..., 4]: their Hamilton product, xyzw."""
    vector_a, real_a, vector_b, real_b = a[..., :3], a[..., 3:], b[..., :3], b[..., 3:]
    vector_a, vector_b = torch.broadcast_tensors(vector_a, vector_b)
    vector = real_a * vector_b + real_b * vector_a + torch.linalg.cross(vector_a, vector_b)
    return torch.cat([vector, real_a * real_b - (vector_a * vector_b).sum(-1, keepdim=True)], dim=-1)


def matrix_to_quaternion(matrix: Tensor) -> Tensor:
    """Unit quaternions [..., 4] in xyzw order with w >= 0 of rotation matrices [..., 3, 3].

    The symmetric matrix 4 q q^T is linear in the rotation's entries; its row with the largest diagonal entry is the
    best-conditioned multiple of q (Shepperd's method).
    """
    _require_matrix("matrix", matrix, (3, 3))
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in matrix.unbind(-2))
    outer = torch.stack(
        [
            torch.stack([1 + a - e - i, b + d, c + g, h - f], dim=-1),
            torch.stack([b + d, 1 - a + e - i, f + h, c - g], dim=-1),
            torch.stack([c + g, f + h, 1 - a - e + i, d - b], dim=-1),
            torch.stack([h - f, c - g, d - b, 1 + a + e + i], dim=-1),
        ],
        dim=-2,
    )
    best = outer.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)
    row = torch.take_along_dim(outer, best[..., None, None], dim=-2).squeeze(-2)
    quaternion = torch.nn.functional.normalize(row, dim=-1)
    return torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)


def _transform(motion: Tensor, points: Tensor) -> Tensor:
    """Apply rigid motions [..., 3, 4] to points [..., N, 3]."""
    return points @ motion[..., :3].mT + motion[..., None, :, 3]


def _require_matrix(name: str, matrix: Tensor, shape: tuple[int, int]) -> None:
    if tuple(matrix.shape[-2:]) != shape:
        raise ValueError(f"{name} must end in dimensions {shape[0]}x{shape[1]}, got shape {tuple(matrix.shape)}")
