"""7-Scenes: seven rooms filmed by a Kinect, with depth rendered into the colour camera.

Source: J. Shotton et al., "Scene Coordinate Regression Forests", CVPR 2013. ``depth.proj.png`` is what SimpleRecon's
preprocessing writes, in millimetres with 65535 where unknown; the dataset's own ``depth.png`` is seen by another camera
and is not used. Poses are camera-to-world with OpenCV axes.
"""

from __future__ import annotations

import re
from pathlib import Path

from moe3d.data.files import (
    numbered,
    pinhole,
    read_depth_png,
    read_image,
    read_numbers,
    subfolders,
    world_to_camera,
)
from moe3d.data.folder import FolderDataset, Frame

INTRINSICS = pinhole(525.0, 525.0, 320.0, 240.0)  # of the published evaluations
UNKNOWN = 65535


class SevenScenes(FolderDataset):
    """Sequences ``<scene>_seq-XX`` with frames ``frame-000000``; the splits are those of ``TestSplit.txt`` etc."""

    name = "7scenes"
    layout = (
        "<scene>/TestSplit.txt and <scene>/seq-01/frame-000000.color.png, frame-000000.depth.proj.png (written by "
        "SimpleRecon's preprocessing) and frame-000000.pose.txt"
    )
    splits = ("test", "train")
    max_depth = 10.0

    def _list(self) -> dict[str, list[str]]:
        self._folders: dict[str, Path] = {}
        sequences = {}
        for scene in subfolders(self.root):
            for folder in self._of_split(scene):
                sequence = f"{scene.name}_{folder.name}"
                images = numbered(folder, r"frame-(\d+)\.color\.png")
                if images and not any(folder.glob("*.depth.proj.png")):
                    self._skip_sequence(sequence, "it has no frame-*.depth.proj.png")
                elif images:
                    self._folders[sequence] = folder
                    sequences[sequence] = [name.removesuffix(".color.png") for name in images.values()]
        return sequences

    def _of_split(self, scene: Path) -> list[Path]:
        """The folders of the split's sequences that are there; the list has lines like "sequence3"."""
        table = scene / f"{(self.split or '').capitalize()}Split.txt"
        if table.exists():
            folders = [
                scene / f"seq-{int(number):02d}" for number in re.findall(r"sequence\s*(\d+)", table.read_text())
            ]
            return [folder for folder in folders if folder.is_dir()]
        if any(scene.glob("seq-*")):
            self._skip_sequence(scene.name, f"{table.name} is missing")
        return []

    def _read(self, sequence: str, name: str) -> Frame:
        folder = self._folders[sequence]
        return Frame(
            image=read_image(folder / f"{name}.color.png"),
            depth=read_depth_png(folder / f"{name}.depth.proj.png", unit=1e-3, unknown=UNKNOWN),
            intrinsics=INTRINSICS,
            extrinsics=world_to_camera(read_numbers(folder / f"{name}.pose.txt", 4, rows=4)),
        )
