"""KITTI's depth benchmark: driving photographs with accumulated lidar depth, no poses.

Source: J. Uhrig et al., "Sparsity Invariant CNNs", 3DV 2017. Depth is in 1/256 metres, 0 where unknown. Two layouts:
drives with ``proj_depth/groundtruth/image_02``, whose photographs are the raw dataset's; or ``val_selection_cropped``.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from moe3d.data.files import pinhole, read_depth_png, read_image, read_numbers
from moe3d.data.folder import FolderDataset, Frame

GROUND_TRUTH = Path("proj_depth", "groundtruth", "image_02")
CROPPED = "val_selection_cropped"
# Focal length and principal point of the rectified left colour camera (P_rect_02) by the day of recording.
CALIBRATION = {
    "2011_09_26": (721.5377, 609.5593, 172.8540),
    "2011_09_28": (707.0493, 604.0814, 180.5066),
    "2011_09_29": (718.3351, 600.3891, 181.5122),
    "2011_09_30": (707.0912, 601.8873, 183.1104),
    "2011_10_03": (718.8560, 607.1928, 185.2157),
}


class KITTI(FolderDataset):
    """Sequences ``<drive>`` with frames ``0000000005``, or one, ``kitti``, with the names of the cropped images.

    A drive's photographs are looked for in ``<drive>/image_02/data`` beside its ground truth, then in
    ``ROOT/<date>/<drive>/image_02/data``, where the raw dataset's archives put them.

    Raises:
        ValueError: also for a root with both layouts.
    """

    name = "kitti"
    layout = (
        "<drive>/proj_depth/groundtruth/image_02/0000000005.png with <drive>/image_02/data/0000000005.png, "
        f"or {CROPPED}/image, {CROPPED}/groundtruth_depth and {CROPPED}/intrinsics"
    )
    has_poses = False
    max_depth = 80.0

    def _list(self) -> dict[str, list[str]]:
        drives, self._cropped = _find(self.root)
        if drives and self._cropped:
            raise ValueError(
                f"'{self.root}' holds both drives ({drives[0]}) and {self._cropped}: name one of them as root"
            )
        if self._cropped:
            names = sorted(path.stem for path in (self._cropped / "image").glob("*.png"))
            return {"kitti": names} if names else {}
        self._images: dict[str, tuple[Path, Path]] = {}
        sequences = {}
        for drive in drives:
            frames = sorted(path.stem for path in (drive / GROUND_TRUTH).glob("*.png"))
            images = self._photographs(drive)
            if images and frames:
                self._images[drive.name] = images, drive / GROUND_TRUTH
                sequences[drive.name] = frames
        return sequences

    def _photographs(self, drive: Path) -> Path | None:
        date = drive.name[:10]
        if date not in CALIBRATION:
            self._skip_sequence(drive.name, f"no calibration is known for '{date}'")
            return None
        for folder in (drive, self.root / date / drive.name):
            if (folder / "image_02" / "data").is_dir():
                return folder / "image_02" / "data"
        self._skip_sequence(drive.name, f"image_02/data is missing, both beside proj_depth and in {date}/{drive.name}")
        return None

    def _read(self, sequence: str, name: str) -> Frame:
        if self._cropped:
            image = self._cropped / "image" / f"{name}.png"
            depth = self._cropped / "groundtruth_depth" / f"{name.replace('_image_', '_groundtruth_depth_', 1)}.png"
            intrinsics: np.ndarray = read_numbers(self._cropped / "intrinsics" / f"{name}.txt", 3, rows=3)
        else:
            image, depth = (folder / f"{name}.png" for folder in self._images[sequence])
            focal, cx, cy = CALIBRATION[sequence[:10]]
            intrinsics = pinhole(focal, focal, cx, cy)
        return Frame(
            image=read_image(image),
            depth=read_depth_png(depth, unit=1 / 256),
            intrinsics=intrinsics,
            extrinsics=None,
        )


def _find(root: Path) -> tuple[list[Path], Path | None]:
    """The drives with ground truth under the root, by name, and the folder of the cropped selection."""
    drives: list[Path] = []
    cropped, seen = None, set()
    for folder, children, _ in os.walk(os.path.abspath(root), followlinks=True):
        path, place = Path(folder), os.path.realpath(folder)
        if place in seen:  # a link, back to the root perhaps
            children.clear()
            continue
        seen.add(place)
        if path.name == CROPPED:
            cropped = path
            children.clear()
        elif (path / GROUND_TRUTH).is_dir():
            twin = next((drive for drive in drives if drive.name == path.name), None)
            if twin is not None:
                raise ValueError(f"two drives are named {path.name}, {twin} and {path}: narrow the root")
            drives.append(path)
            children.clear()
    return sorted(drives, key=lambda drive: drive.name), cropped
