"""Bonn RGB-D Dynamic: people and things moving before a depth camera.

Source: E. Palazzolo et al., "ReFusion", IROS 2019, cut as in MonST3R's preprocessing: the 110 frames from number 30 in
``rgb_110`` and ``depth_110``. Files are named by their own times, so pairs are formed by order. Depth is in 1/5000
metres, 0 where unknown. ``groundtruth.txt`` follows the markers on the camera's case, not the camera, and is related to
it by a published matrix that is not a rigid motion; so there are no poses here.
"""

from __future__ import annotations

from pathlib import Path

from moe3d.data.files import pinhole, read_depth_png, read_image
from moe3d.data.folder import FolderDataset, Frame

INTRINSICS = pinhole(542.822841, 542.576870, 315.593520, 237.756098)  # published; the lens distortion is left in
EVALUATED = ("balloon2", "crowd2", "crowd3", "person_tracking2", "synchronous")


class Bonn(FolderDataset):
    """Sequences ``balloon2`` etc., frames named by the colour image's time: the five usual ones, or all there are."""

    name = "bonn"
    layout = "rgbd_bonn_balloon2/rgb_110/*.png and rgbd_bonn_balloon2/depth_110/*.png (MonST3R's preprocessing)"
    splits = ("test", "all")
    has_poses = False
    max_depth = 70.0

    def _list(self) -> dict[str, list[str]]:
        self._depth: dict[tuple[str, str], Path] = {}
        sequences = {}
        for folder in sorted(self.root.glob("rgbd_bonn_*")):
            sequence = folder.name.removeprefix("rgbd_bonn_")
            if self.split == "test" and sequence not in EVALUATED:
                continue
            images, depths = (sorted((folder / kind).glob("*.png")) for kind in ("rgb_110", "depth_110"))
            if len(images) != len(depths):
                self._skip_sequence(sequence, f"rgb_110 has {len(images)} images and depth_110 has {len(depths)}")
            elif images:
                sequences[sequence] = [path.stem for path in images]
                self._depth |= {(sequence, image.stem): depth for image, depth in zip(images, depths, strict=True)}
        return sequences

    def _read(self, sequence: str, name: str) -> Frame:
        return Frame(
            image=read_image(self.root / f"rgbd_bonn_{sequence}" / "rgb_110" / f"{name}.png"),
            depth=read_depth_png(self._depth[sequence, name], unit=1 / 5000),
            intrinsics=INTRINSICS,
            extrinsics=None,
        )
