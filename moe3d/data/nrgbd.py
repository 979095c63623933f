"""Neural RGB-D: nine rendered rooms with exact depth and poses.

Source: D. Azinović et al., "Neural RGB-D Surface Reconstruction", CVPR 2022. Frames are numbered without padding, depth
is in millimetres, poses are camera-to-world with OpenGL axes, "nan" where unknown. The principal point is the image's
(W / 2, H / 2), as in every published evaluation: half a pixel beyond the exact centre. Copies of the dataset may lack
``focal.txt``; the focal length is then that of the published evaluations.
"""

from __future__ import annotations

from pathlib import Path

from moe3d.data.files import (
    OPENGL_TO_OPENCV,
    BrokenFrame,
    numbered,
    pinhole,
    read_depth_png,
    read_image,
    read_numbers,
    subfolders,
    world_to_camera,
)
from moe3d.data.folder import FolderDataset, Frame

FOCAL = 554.2562584220408


class NeuralRGBD(FolderDataset):
    """Sequences ``<scene>`` with frames ``img<number>``, in the order of the numbers."""

    name = "nrgbd"
    layout = "<scene>/images/img0.png, <scene>/depth/depth0.png and <scene>/poses.txt"
    max_depth = 10.0

    def _list(self) -> dict[str, list[str]]:
        sequences = {}
        for scene in subfolders(self.root):
            images = numbered(scene / "images", r"img(\d+)\.png")
            missing = [name for name in ("poses.txt", "depth") if not (scene / name).exists()]
            if images and missing:
                self._skip_sequence(scene.name, f"{missing[0]} is missing")
            elif images:
                sequences[scene.name] = [Path(name).stem for name in images.values()]
        return sequences

    def _read(self, sequence: str, name: str) -> Frame:
        scene, number = self.root / sequence, int(name.removeprefix("img"))
        poses = self._once(sequence, lambda: read_numbers(scene / "poses.txt", 16).reshape(-1, 4, 4))
        if number >= len(poses):
            raise BrokenFrame(f"poses.txt has only {len(poses)} poses")
        depth = read_depth_png(scene / "depth" / f"depth{number}.png", unit=1e-3)
        height, width = depth.shape
        focal_file = scene / "focal.txt"
        focal = read_numbers(focal_file, 1, rows=1)[0, 0] if focal_file.exists() else FOCAL
        pose = poses[number, :3].copy()
        pose[:, :3] = pose[:, :3] @ OPENGL_TO_OPENCV
        return Frame(
            image=read_image(scene / "images" / f"{name}.png"),
            depth=depth,
            intrinsics=pinhole(focal, focal, width / 2, height / 2),
            extrinsics=world_to_camera(pose),
        )
