"""Hypersim: photorealistic interiors with exact distances and cameras.

Source: M. Roberts et al., "Hypersim: A Photorealistic Synthetic Dataset for Holistic Indoor Scene Understanding",
ICCV 2021; its files' conventions are those of github.com/apple/ml-hypersim. ``depth_meters`` is the distance along the
ray, poses are in asset units with OpenGL axes, and colour is linear radiance, tone mapped here as the toolkit does.

Each scene has its own camera, a matrix from normalised image coordinates to rays. About half of the scenes were
rendered through a tilted lens, which no pinhole at the same pose describes; they are left out. A lens that is only
shifted stays in: its principal point lies off the centre.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from moe3d.data.files import (
    OPENGL_TO_OPENCV,
    BrokenFrame,
    import_h5py,
    numbered,
    read_hdf5,
    world_to_camera,
)
from moe3d.data.folder import FolderDataset, Frame

SPLIT_FILE = "metadata_images_split_scene_v1.csv"
CAMERA_FILE = "metadata_camera_parameters.csv"
NO_TILT = 1e-5  # relative to the matrix's last entry: rounding in the published table, worth less than 0.01 pixels
TILTS = (np.array([0, 1, 2, 2]), np.array([1, 0, 0, 1]))  # rows and columns of the entries that a pinhole has not


class Hypersim(FolderDataset):
    """Sequences ``ai_VVV_NNN_cam_XX`` with frames ``frame.0000``: those of the split's public images on disk."""

    name = "hypersim"
    layout = (
        f"{SPLIT_FILE}, {CAMERA_FILE} (both from github.com/apple/ml-hypersim), ai_001_001/_detail and "
        "ai_001_001/images/scene_cam_00_final_hdf5/frame.0000.color.hdf5"
    )
    splits = ("test", "train", "val")

    def _list(self) -> dict[str, list[str]]:
        import_h5py(self.name)
        self._rays: dict[str, np.ndarray] = {}
        if not ((self.root / SPLIT_FILE).exists() and (self.root / CAMERA_FILE).exists()):
            return {}
        matrices = {row["scene_name"]: row for row in _rows(self.root / CAMERA_FILE)}
        sequences = {}
        for (scene, camera), numbers in self._public().items():
            images = numbered(_images(self.root / scene, camera, "final"), r"frame\.(\d+)\.color\.hdf5")
            reason = _unusable(matrices.get(scene))
            names = [f"frame.{number:04d}" for number in images if number in numbers]
            if names and reason:
                self._skip_sequence(f"{scene}_{camera}", reason)
            elif names:
                self._rays[scene] = _rays_from_uv(matrices[scene])
                sequences[f"{scene}_{camera}"] = names
        return sequences

    def _public(self) -> dict[tuple[str, str], set[int]]:
        """(scene, camera) -> frame numbers of the split's released images, for scenes that are on disk."""
        there = {path.name for path in self.root.glob("ai_*")}
        frames: dict[tuple[str, str], set[int]] = {}
        for row in _rows(self.root / SPLIT_FILE):
            if (
                row["split_partition_name"] == self.split
                and row["included_in_public_release"] == "True"
                and row["scene_name"] in there
            ):
                frames.setdefault((row["scene_name"], row["camera_name"]), set()).add(int(row["frame_id"]))
        return frames

    def _read(self, sequence: str, name: str) -> Frame:
        scene, camera = sequence[: len("ai_VVV_NNN")], sequence[len("ai_VVV_NNN_") :]
        folder, geometry = self.root / scene, _images(self.root / scene, camera, "geometry")
        colour = read_hdf5(_images(folder, camera, "final") / f"{name}.color.hdf5").astype(np.float32)
        entity = read_hdf5(geometry / f"{name}.render_entity_id.hdf5")
        distance = read_hdf5(geometry / f"{name}.depth_meters.hdf5").astype(np.float32)
        if colour.shape[:2] != entity.shape or distance.shape != entity.shape:
            raise BrokenFrame(f"{name}.color, depth_meters and render_entity_id differ in size")
        rays = self._rays[scene] @ _uv_from_pixels(*distance.shape)
        return Frame(
            image=tone_map(colour, entity != -1),
            depth=planar_depth(distance, rays),
            intrinsics=np.linalg.inv(rays),
            extrinsics=self._extrinsics(folder / "_detail", camera, int(name.removeprefix("frame."))),
        )

    def _extrinsics(self, detail: Path, camera: str, frame: int) -> np.ndarray:
        """Row k of the trajectory belongs to frame ``camera_keyframe_frame_indices[k]``."""
        indices, positions, orientations = self._once((detail, camera), lambda: _trajectory(detail / camera))
        scale = self._once(detail, lambda: _metres_per_unit(detail / "metadata_scene.csv"))
        rows = np.flatnonzero(indices == frame)
        if not len(rows):
            raise BrokenFrame("camera_keyframe_frame_indices.hdf5 does not have this frame")
        row = rows[0]
        return world_to_camera(np.column_stack([orientations[row] @ OPENGL_TO_OPENCV, positions[row] * scale]))


def tone_map(colour: np.ndarray, lit: np.ndarray) -> np.ndarray:
    """The toolkit's tone mapping: the 90th percentile of the brightness goes to 0.8, then a gamma of 2.2.

    Args:
        colour: [H, W, 3] linear radiance; what is not finite neither counts nor shines through: NaN is black.
        lit: [H, W] bool, the pixels that show an object; the percentile is theirs.

    Returns:
        [H, W, 3] float32 in [0, 1].
    """
    brightness = colour @ np.array([0.3, 0.59, 0.11], np.float32)
    counted = brightness[lit & np.isfinite(brightness)]
    scale = 1.0
    if counted.size:
        percentile = np.percentile(counted, 90)
        scale = 0.8**2.2 / percentile if percentile >= 1e-4 else 0.0
    linear = np.nan_to_num(np.clip(colour, 0, 1e30)) * np.float32(scale)
    return np.clip(linear ** np.float32(1 / 2.2), 0, 1)


def planar_depth(distance: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """[H, W] z of the points at a distance [H, W] along the rays ``rays @ (column, row, 1)`` = (x, y, 1)."""
    height, width = distance.shape
    row, column = np.mgrid[:height, :width]
    directions = rays @ np.stack([column, row, np.ones_like(row)]).reshape(3, -1)
    return distance / np.linalg.norm(directions, axis=0).reshape(height, width)


def _rays_from_uv(row: dict[str, str]) -> np.ndarray:
    """[3, 3] from (u, v, 1) to rays (x, y, 1) with OpenCV axes, of a camera without tilt."""
    matrix = OPENGL_TO_OPENCV @ _matrix(row, "M_cam_from_uv", 3)
    matrix[TILTS] = 0
    return matrix / matrix[2, 2]


def _uv_from_pixels(height: int, width: int) -> np.ndarray:
    """[3, 3]: u in (-1, 1) to the right and v in (-1, 1) upwards, at the centres of the pixels (column, row)."""
    return np.array([[2 / width, 0, 1 / width - 1], [0, -2 / height, 1 - 1 / height], [0, 0, 1]])


def _unusable(row: dict[str, str] | None) -> str | None:
    if row is None:
        return f"{CAMERA_FILE} does not have the scene"
    matrix = _matrix(row, "M_cam_from_uv", 3) / abs(float(row["M_cam_from_uv_22"]))
    skewed = [*matrix[TILTS], float(row["M_proj_01"])]
    return "a tilt-shift camera" if np.abs(skewed).max() > NO_TILT else None


def _matrix(row: dict[str, str], name: str, size: int) -> np.ndarray:
    return np.array([[float(row[f"{name}_{i}{j}"]) for j in range(size)] for i in range(size)])


def _trajectory(folder: Path) -> tuple[np.ndarray, ...]:
    """Frame numbers [N], positions [N, 3] in asset units and camera-to-world rotations [N, 3, 3] with OpenGL axes."""
    kinds = ("frame_indices", "positions", "orientations")
    arrays = tuple(read_hdf5(folder / f"camera_keyframe_{kind}.hdf5") for kind in kinds)
    if len({len(array) for array in arrays}) > 1:
        raise BrokenFrame("camera_keyframe_frame_indices, positions and orientations differ in length")
    return arrays


def _metres_per_unit(path: Path) -> float:
    values = {row["parameter_name"]: row["parameter_value"] for row in _rows(path)} if path.exists() else {}
    if "meters_per_asset_unit" not in values:
        raise BrokenFrame("metadata_scene.csv does not have meters_per_asset_unit")
    return float(values["meters_per_asset_unit"])


def _images(scene: Path, camera: str, kind: str) -> Path:
    return scene / "images" / f"scene_{camera}_{kind}_hdf5"


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
