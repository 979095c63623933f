"""Point clouds, read back by trimesh."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import trimesh

from moe3d.reconstruct import write_glb, write_ply


@pytest.fixture
def cloud():
    rng = np.random.default_rng(0)
    return rng.normal(size=(50, 3)).astype(np.float32), rng.integers(0, 256, (50, 3), dtype=np.uint8)


def test_ply_keeps_points_and_colors(tmp_path, cloud):
    points, colors = cloud
    write_ply(tmp_path / "points.ply", points, colors)
    read = trimesh.load(tmp_path / "points.ply")
    np.testing.assert_array_equal(read.vertices, points)
    np.testing.assert_array_equal(read.colors[:, :3], colors)


def test_glb_is_in_gltf_axes_and_keeps_colors(tmp_path, cloud):
    points, colors = cloud
    write_glb(tmp_path / "points.glb", points, colors)
    (read,) = trimesh.load(tmp_path / "points.glb").geometry.values()
    np.testing.assert_array_equal(read.vertices, points * [1, -1, -1])
    np.testing.assert_array_equal(read.colors[:, :3], colors)


def test_what_the_camera_sees_above_and_ahead_is_y_up_and_minus_z(tmp_path):
    above_and_ahead = np.array([[0.0, -1.0, 2.0]])  # OpenCV: y down, z forward
    write_glb(tmp_path / "points.glb", above_and_ahead, np.zeros((1, 3), np.uint8))
    (read,) = trimesh.load(tmp_path / "points.glb").geometry.values()
    np.testing.assert_array_equal(read.vertices, [[0, 1, -2]])


def test_glb_is_points_without_a_transformation(tmp_path, cloud):
    """Read from the file's bytes: the axes must not come from a matrix that a reader could drop."""
    write_glb(tmp_path / "points.glb", *cloud)
    content = (tmp_path / "points.glb").read_bytes()
    magic, version, total, length, kind = struct.unpack("<4sIII4s", content[:20])
    assert (magic, version, total, kind) == (b"glTF", 2, len(content), b"JSON")
    scene = json.loads(content[20 : 20 + length])
    (primitive,) = scene["meshes"][0]["primitives"]
    assert primitive["mode"] == 0 and set(primitive["attributes"]) >= {"POSITION", "COLOR_0"}
    identity = np.eye(4).T.ravel().tolist()
    assert all(node.get("matrix", identity) == identity for node in scene["nodes"])


@pytest.mark.parametrize("write", [write_ply, write_glb])
@pytest.mark.parametrize(
    ("points", "colors", "error", "says"),
    [
        (np.zeros((0, 3)), np.zeros((0, 3), np.uint8), ValueError, r"points must be \[N, 3\] with N >= 1"),
        (np.zeros((3, 4, 3)), np.zeros((3, 4, 3), np.uint8), ValueError, r"points must be .* got shape \[3, 4, 3\]"),
        (np.array([[0, np.nan, 1], [1, 1, 1]]), np.zeros((2, 3), np.uint8), ValueError, "points must be finite, got 1"),
        (np.zeros((2, 3)), np.zeros((2, 3)), TypeError, "colors must be uint8, got float64"),
        (np.zeros((2, 3)), np.zeros((3, 3), np.uint8), ValueError, r"colors must have .* \[2, 3\], got \[3, 3\]"),
    ],
)
def test_unfit_arrays_are_refused_and_write_nothing(tmp_path, write, points, colors, error, says):
    with pytest.raises(error, match=says):
        write(tmp_path / "points", points, colors)
    assert not any(tmp_path.iterdir())
