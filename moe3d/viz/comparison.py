"""The pictures of one scene, stock head beside MoE head."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from scipy.ndimage import uniform_filter

from moe3d.viz.pictures import (
    depth_picture,
    depth_range,
    entropy_picture,
    error_picture,
    flying_picture,
    gate_picture,
    point_picture,
)

if TYPE_CHECKING:
    from moe3d.reconstruct.comparison import HeadResult, SceneComparison

ORBIT = np.radians([28, 14])
"""From where ``points_...`` look at the cloud: to the left of the camera and above it, by these angles."""
DETAIL = 6
"""``detail_...`` show this fraction of the width."""

_PHOTOGRAPHIC = ("input", "points", "detail_input")


def scene_pictures(scene: SceneComparison) -> dict[str, np.ndarray]:
    """Pictures by name, [H, W, 3] uint8.

    ``input``, ``depth_truth``, ``gate``, ``entropy``; with ``_stock`` and ``_moe`` at the end ``depth``, ``error``,
    ``flying`` (on the ground truth's grid), ``points`` (the cloud from the side) and ``detail`` (a part of the depth on
    the ground truth's grid, beside ``detail_input`` and ``detail_truth``: the part with the most true boundary pixels,
    whatever was predicted there). All depths have the colours of the truth's range.
    """
    near_far = depth_range(scene.truth, scene.valid)
    truth = depth_picture(np.where(scene.valid, scene.truth, np.nan), *near_far)
    detail = _busiest_part(scene.stock.flying.boundary)
    pictures = {
        "input": scene.image,
        "depth_truth": truth,
        "gate": gate_picture(scene.weights),
        "entropy": entropy_picture(scene.entropy, len(scene.weights)),
        "detail_input": scene.image[detail],
        "detail_truth": truth[detail],
    }
    for name, head in (("stock", scene.stock), ("moe", scene.moe)):
        frame = head.on_truth
        pictures |= {
            f"depth_{name}": depth_picture(head.depth, *near_far),
            f"error_{name}": error_picture(frame.prediction, frame.truth, frame.compared),
            f"flying_{name}": flying_picture(scene.image, head.flying.flying, head.flying.boundary),
            f"points_{name}": _from_the_side(head, scene),
            f"detail_{name}": depth_picture(frame.prediction, *near_far)[detail],
        }
    return pictures


def encode_picture(name: str, picture: np.ndarray) -> tuple[str, bytes]:
    """A picture of :func:`scene_pictures` as a file: its name with suffix, and its content.

    What looks like a photograph becomes a JPEG file, a map a PNG file, with a palette where 256 colours are enough.
    """
    image, buffer = Image.fromarray(picture), io.BytesIO()
    if name.startswith(_PHOTOGRAPHIC):
        image.save(buffer, "JPEG", quality=90, subsampling=0)
        return f"{name}.jpg", buffer.getvalue()
    if image.getcolors(256) is not None:
        image = _with_palette(picture)
    image.save(buffer, "PNG")
    return f"{name}.png", buffer.getvalue()


def _with_palette(picture: np.ndarray) -> Image.Image:
    """An exact palette image of a picture of at most 256 colours."""
    colors, index = np.unique(picture @ np.array([1 << 16, 1 << 8, 1]), return_inverse=True)
    image = Image.fromarray(index.reshape(picture.shape[:2]).astype(np.uint8))
    image.putpalette(np.stack([colors >> 16, colors >> 8 & 255, colors & 255], axis=1).ravel().tolist())
    return image


def _busiest_part(boundary: np.ndarray) -> tuple[slice, slice]:
    height, width = (max(side // DETAIL, 1) for side in boundary.shape)
    density = uniform_filter(boundary.astype(np.float64), (height, width), mode="constant")
    # Only windows that lie inside.
    inner = density[height // 2 : boundary.shape[0] - height // 2, width // 2 : boundary.shape[1] - width // 2]
    row, column = np.unravel_index(inner.argmax(), inner.shape)
    return slice(row, row + height), slice(column, column + width)


def _from_the_side(head: HeadResult, scene: SceneComparison) -> np.ndarray:
    """The cloud, turned around the middle of the true scene, whose place does not depend on the head."""
    height, width = head.depth.shape
    middle = np.array([0, 0, np.median(scene.truth[scene.valid])])
    points, colors = head.points.reshape(-1, 3), scene.model_image.reshape(-1, 3)
    (yaw_cos, pitch_cos), (yaw_sin, pitch_sin) = np.cos(ORBIT), np.sin(ORBIT)
    yaw = np.array([[yaw_cos, 0, -yaw_sin], [0, 1, 0], [yaw_sin, 0, yaw_cos]])
    pitch = np.array([[1, 0, 0], [0, pitch_cos, -pitch_sin], [0, pitch_sin, pitch_cos]])
    turned = (points - middle) @ (pitch @ yaw).T + middle
    return point_picture(turned, colors, (height, width), focal=width)
