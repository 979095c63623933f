"""Virtual KITTI 2: five driving scenes rendered in ten variations with a stereo pair.

Source: Y. Cabon, N. Murray, M. Humenberger, "Virtual KITTI 2", 2020. Depth is planar, in centimetres, and 65535 in the
sky. ``extrinsic.txt`` holds world-to-camera matrices with OpenCV axes, as its authors document; some loaders take them
for camera-to-world.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moe3d.data.files import (
    BrokenFrame,
    numbered,
    pinhole,
    read_depth_png,
    read_image,
    read_numbers,
    subfolders,
)
from moe3d.data.folder import FolderDataset, Frame

SKY = 65535


class VirtualKITTI2(FolderDataset):
    """Sequences ``<Scene>_<variation>_Camera_<n>`` with frames ``rgb_00000``; there is no official split."""

    name = "vkitti2"
    layout = (
        "Scene01/clone/frames/rgb/Camera_0/rgb_00000.jpg, Scene01/clone/frames/depth/Camera_0/depth_00000.png, "
        "Scene01/clone/extrinsic.txt and Scene01/clone/intrinsic.txt"
    )
    splits = ("train",)
    max_depth = 80.0

    def _list(self) -> dict[str, list[str]]:
        self._folders: dict[str, tuple[Path, int]] = {}
        sequences = {}
        variations = [folder for scene in self.root.glob("Scene*") if scene.is_dir() for folder in subfolders(scene)]
        for folder in sorted(variations):
            for camera in (0, 1):
                sequence = f"{folder.parent.name}_{folder.name}_Camera_{camera}"
                images = numbered(folder / "frames" / "rgb" / f"Camera_{camera}", r"rgb_(\d+)\.jpg")
                missing = [name for name in ("extrinsic.txt", "intrinsic.txt") if not (folder / name).exists()]
                if images and missing:
                    self._skip_sequence(sequence, f"{missing[0]} is missing")
                elif images:
                    self._folders[sequence] = folder, camera
                    sequences[sequence] = [Path(name).stem for name in images.values()]
        return sequences

    def _read(self, sequence: str, name: str) -> Frame:
        folder, camera = self._folders[sequence]
        number = name.removeprefix("rgb_")
        frames = folder / "frames"
        return Frame(
            image=read_image(frames / "rgb" / f"Camera_{camera}" / f"{name}.jpg"),
            depth=read_depth_png(frames / "depth" / f"Camera_{camera}" / f"depth_{number}.png", 1e-2, unknown=SKY),
            intrinsics=pinhole(*self._row(folder / "intrinsic.txt", 6, int(number), camera)),
            extrinsics=self._row(folder / "extrinsic.txt", 18, int(number), camera).reshape(4, 4)[:3],
        )

    def _row(self, path: Path, columns: int, frame: int, camera: int) -> np.ndarray:
        """The numbers after "frame cameraID" in the row of one frame and camera."""
        table = self._once(path, lambda: read_numbers(path, columns, header=1))
        rows = np.flatnonzero((table[:, 0] == frame) & (table[:, 1] == camera))
        if not len(rows):
            raise BrokenFrame(f"{path.name} has no row for frame {frame} of camera {camera}")
        return table[rows[0], 2:]
