"""Coloured point clouds as files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

# From OpenCV's axes (x right, y down, z forward) to glTF's (x right, y up, looking along -z).
_OPENCV_TO_GLTF = np.array([1, -1, -1])


def write_ply(path: str | os.PathLike[str], points: np.ndarray, colors: np.ndarray) -> None:
    """Write a binary PLY file in the points' own axes.

    Args:
        path: the file.
        points: [N, 3] finite coordinates, N >= 1.
        colors: [N, 3] uint8, sRGB.

    Raises:
        TypeError, ValueError: an array of another kind.
        OSError: the file cannot be written.
    """
    _write(path, points, colors, "ply")


def write_glb(path: str | os.PathLike[str], points: np.ndarray, colors: np.ndarray) -> None:
    """Write a binary glTF file in glTF's axes: y up, looking along -z.

    The colours are stored as they are, which is what trimesh, Open3D and MeshLab read. glTF itself calls vertex colours
    linear: a viewer that takes it at its word shows them paler.

    Args:
        path: the file.
        points: [N, 3] finite coordinates in OpenCV's axes (x right, y down, z forward), N >= 1.
        colors: [N, 3] uint8, sRGB.

    Raises:
        TypeError, ValueError: an array of another kind.
        OSError: the file cannot be written.
    """
    _write(path, np.asarray(points) * _OPENCV_TO_GLTF, colors, "glb")


def _write(path: str | os.PathLike[str], points: np.ndarray, colors: np.ndarray, kind: str) -> None:
    import trimesh

    points, colors = np.asarray(points, dtype=np.float32), np.asarray(colors)
    if points.ndim != 2 or points.shape[1] != 3 or len(points) == 0:
        raise ValueError(f"points must be [N, 3] with N >= 1, got shape {list(points.shape)}")
    if not np.isfinite(points).all():
        raise ValueError(f"points must be finite, got {int((~np.isfinite(points)).any(axis=1).sum())} that are not")
    if colors.dtype != np.uint8:
        raise TypeError(f"colors must be uint8, got {colors.dtype}")
    if colors.shape != points.shape:
        raise ValueError(f"colors must have the points' shape {list(points.shape)}, got {list(colors.shape)}")
    cloud = trimesh.PointCloud(points, np.column_stack([colors, np.full(len(colors), 255, np.uint8)]))
    Path(path).write_bytes(cloud.export(file_type=kind))
