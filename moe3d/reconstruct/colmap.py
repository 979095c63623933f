"""COLMAP's binary model: cameras, poses and points that Gaussian splatting trainers, MVS and COLMAP itself open.

The format (https://colmap.github.io/format.html) is little endian, and its pixel coordinates are half a pixel larger
than this package's: there the centre of the top-left pixel is (0.5, 0.5).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from moe3d.geometry import matrix_to_quaternion
from moe3d.reconstruct.frames import ReconstructedFrame
from moe3d.reconstruct.points import PointCloud

PINHOLE = 1  # COLMAP's number of the camera model with the parameters fx, fy, cx, cy

_CAMERA = np.dtype([("id", "<u4"), ("model", "<i4"), ("size", "<u8", 2), ("parameters", "<f8", 4)])
_POSE = np.dtype([("id", "<u4"), ("quaternion", "<f8", 4), ("translation", "<f8", 3), ("camera", "<u4")])
_OBSERVATION = np.dtype([("pixel", "<f8", 2), ("point", "<i8")])
_POINT = np.dtype(
    [
        ("id", "<u8"), ("position", "<f8", 3), ("color", "u1", 3), ("error", "<f8"), ("track_length", "<u8"),
        ("image", "<u4"), ("observation", "<u4"),
    ]
)  # fmt: skip


def write_colmap(folder: Path, files: Sequence[str], frames: Sequence[ReconstructedFrame], cloud: PointCloud) -> None:
    """Write ``cameras.bin``, ``images.bin`` and ``points3D.bin``.

    Every frame has its own camera, for its image at the original size, and every point is seen in the one image that it
    comes from.

    Args:
        folder: exists, and is empty.
        files: the images' file names, as COLMAP is to find them.
        frames: in the files' order.
        cloud: their points.

    Raises:
        OSError: a file cannot be written.
    """
    cameras = np.zeros(len(frames), _CAMERA)
    first = 0
    with (folder / "images.bin").open("wb") as file:
        _write_count(file, len(frames))
        for index, (name, frame) in enumerate(zip(files, frames, strict=True)):
            cameras[index] = _camera(index + 1, frame)
            pixels = cloud.pixels[first : first + cloud.counts[index]]
            _write_image(file, index + 1, name, frame, _observations(frame, pixels, first))
            first += len(pixels)
    with (folder / "cameras.bin").open("wb") as file:
        _write_count(file, len(frames))
        file.write(cameras.tobytes())
    with (folder / "points3D.bin").open("wb") as file:
        _write_count(file, len(cloud.points))
        file.write(_points(cloud).tobytes())


def _write_count(file: BinaryIO, count: int) -> None:
    file.write(count.to_bytes(8, "little"))


def _camera(number: int, frame: ReconstructedFrame) -> tuple:
    (fx, _, cx), (_, fy, cy) = frame.original_intrinsics[:2]
    return number, PINHOLE, frame.original_size[::-1], (fx, fy, cx + 0.5, cy + 0.5)


def _write_image(file: BinaryIO, number: int, name: str, frame: ReconstructedFrame, observations: np.ndarray) -> None:
    pose = np.zeros((), _POSE)
    x, y, z, w = matrix_to_quaternion(torch.from_numpy(frame.extrinsics[:, :3]).double()).numpy()
    pose[()] = number, (w, x, y, z), frame.extrinsics[:, 3], number
    file.write(pose.tobytes() + os.fsencode(name) + b"\0")
    _write_count(file, len(observations))
    file.write(observations.tobytes())


def _observations(frame: ReconstructedFrame, pixels: np.ndarray, first: int) -> np.ndarray:
    """Where points ``first + 1`` onwards are seen: pixels of the model's grid as pixels of the original image."""
    grid, original = (matrix.astype(np.float64) for matrix in (frame.intrinsics, frame.original_intrinsics))
    homogeneous = np.column_stack([pixels, np.ones(len(pixels))]) @ (original @ np.linalg.inv(grid)).T
    observations = np.zeros(len(pixels), _OBSERVATION)
    observations["pixel"] = homogeneous[:, :2] + 0.5
    observations["point"] = np.arange(first, first + len(pixels)) + 1
    return observations


def _points(cloud: PointCloud) -> np.ndarray:
    points = np.zeros(len(cloud.points), _POINT)
    points["id"] = np.arange(len(points)) + 1
    points["position"], points["color"], points["error"] = cloud.points, cloud.colors, -1.0  # -1: not measured
    points["track_length"] = 1
    points["image"] = np.repeat(np.arange(len(cloud.counts)) + 1, cloud.counts)
    points["observation"] = np.concatenate([np.arange(count) for count in cloud.counts])
    return points
