"""A reconstructed scene as files that other programs open. Frames are read one at a time, whatever their number."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from moe3d.evaluation import Predictions, write_predictions
from moe3d.reconstruct.colmap import write_colmap
from moe3d.reconstruct.frames import FrameFolder, ReconstructedFrame
from moe3d.reconstruct.images import open_image, read_image
from moe3d.reconstruct.point_files import write_glb, write_ply
from moe3d.reconstruct.points import PointCloud, PointSelection, select_points

DEPTH_LEVELS = 65535
"""A 16-bit picture's largest value; 0 stands for no depth."""
_EXIF_ORIENTATION = 0x0112


class Scene:
    """A reconstruction with what its exports need.

    Args:
        name: of the scene; its files begin with it.
        frames: at least one.
        files: the images that the frames come from.
        selection: of the points of clouds.
    """

    def __init__(self, name: str, frames: FrameFolder, files: Sequence[Path], selection: PointSelection) -> None:
        self.name, self.frames, self.files, self.selection = name, frames, files, selection

    @functools.cached_property
    def cloud(self) -> PointCloud:
        return select_points(self.frames, self.selection)


Exporter = Callable[[Path, Scene], None]
"""Writes a scene into a folder that exists."""


def export_predictions(folder: Path, scene: Scene) -> None:
    """``<scene>.npz``, what ``moe3d eval --predictions`` reads (:class:`~moe3d.evaluation.Predictions`)."""
    first, count = scene.frames[0], len(scene.frames)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:

        def array(name: str, of_frame: np.ndarray) -> np.ndarray:
            """On disk, not in memory."""
            path = Path(scratch) / f"{name}.npy"
            return np.lib.format.open_memmap(path, "w+", np.float32, (count, *of_frame.shape))

        arrays = {
            name: array(name, getattr(first, name)) for name in ("depth", "intrinsics", "extrinsics", "confidence")
        }
        if first.points is not None:
            arrays["points"] = array("points", first.points)
        for index, frame in enumerate(scene.frames):
            for name, values in arrays.items():
                values[index] = getattr(frame, name)
        write_predictions(folder, scene.name, Predictions(scene.frames.names, **arrays))


def export_ply(folder: Path, scene: Scene) -> None:
    """``<scene>.ply``, the points in OpenCV's axes."""
    write_ply(folder / f"{scene.name}.ply", scene.cloud.points, scene.cloud.colors)


def export_glb(folder: Path, scene: Scene) -> None:
    """``<scene>.glb``, the points in glTF's axes."""
    write_glb(folder / f"{scene.name}.glb", scene.cloud.points, scene.cloud.colors)


def export_colmap(folder: Path, scene: Scene) -> None:
    """``<scene>/colmap/sparse/0`` and ``<scene>/colmap/images``, the images at their original size, upright."""
    target = folder / scene.name / "colmap"
    model, images = target / "sparse" / "0", target / "images"
    model.mkdir(parents=True)
    images.mkdir()
    copies = [_copy_upright(file, images / name) for file, name in zip(scene.files, scene.frames.names, strict=True)]
    write_colmap(model, copies, scene.frames, scene.cloud)


def export_depth(folder: Path, scene: Scene) -> None:
    """``<scene>/depth/<frame>.png``, 16 bits: depth = value * scale, 0 for none; and the scale in ``scale.json``."""
    target = folder / scene.name / "depth"
    target.mkdir(parents=True)
    scale = max(float(_finite(frame).max()) for frame in scene.frames) / DEPTH_LEVELS
    if scale == 0:
        raise ValueError("depth-png: no frame has a finite depth")
    for name, frame in zip(scene.frames.names, scene.frames, strict=True):
        depth = _finite(frame)
        levels = np.where(depth > 0, np.clip(np.rint(depth / scale), 1, DEPTH_LEVELS), 0).astype(np.uint16)
        Image.fromarray(levels).save(target / f"{name}.png")
    about = {
        "scale": scale,
        "meaning": "depth = value * scale, planar, in the unit of the scene's cameras and points; 0 = no depth",
        "frames": scene.frames.names,
    }
    (target / "scale.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")


def export_pictures(folder: Path, scene: Scene, kind: str, picture: Callable[[ReconstructedFrame], np.ndarray]) -> None:
    """``<scene>/<kind>/<frame>.png``, a picture [H, W, 3] uint8 of each frame."""
    target = folder / scene.name / kind
    target.mkdir(parents=True)
    for name, frame in zip(scene.frames.names, scene.frames, strict=True):
        Image.fromarray(picture(frame)).save(target / f"{name}.png")


EXPORTERS: dict[str, Exporter] = {
    "npz": export_predictions,
    "ply": export_ply,
    "glb": export_glb,
    "colmap": export_colmap,
    "depth-png": export_depth,
}


def _finite(frame: ReconstructedFrame) -> np.ndarray:
    """Depth in float64, 0 where there is none."""
    return np.where(np.isfinite(frame.depth) & (frame.depth > 0), frame.depth, 0).astype(np.float64)


def _copy_upright(file: Path, target: Path) -> str:
    """Copy an image as it is, or as PNG where it is no ordinary file or lies on its side; the name of the copy."""
    with open_image(file) as image:
        ordinary = image.format in ("JPEG", "PNG") and image.getexif().get(_EXIF_ORIENTATION, 1) == 1
    if ordinary:
        name = f"{target.name}{file.suffix.lower()}"
        shutil.copyfile(file, target.with_name(name))
    else:
        name = f"{target.name}.png"
        read_image(file).save(target.with_name(name))
    return name
