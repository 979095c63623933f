"""Depth maps of your own: a dataset in a module of yours, and every command of `moe3d` on it.

python own_dataset.py eval boundary --dataset mine --root DIR
python own_dataset.py train --dataset mine --root DIR --size 378x518 --frames 1 --model mini --out run
"""

import sys

from moe3d.cli import main
from moe3d.data import DATASETS
from moe3d.data.files import pinhole, read_depth_png, read_image
from moe3d.data.folder import FolderDataset, Frame


class Mine(FolderDataset):
    """Photographs, and depth in millimetres, 0 where it is unknown; of one camera, without poses."""

    name = "mine"
    layout = "<sequence>/image/0001.png and <sequence>/depth/0001.png"  # what a message about a wrong folder says
    has_poses = False
    max_depth = 20.0  # metres

    def _list(self):
        folders = sorted(self.root.glob("*/image"))
        return {folder.parent.name: sorted(file.stem for file in folder.glob("*.png")) for folder in folders}

    def _read(self, sequence, name):
        return Frame(
            image=read_image(self.root / sequence / "image" / f"{name}.png"),
            depth=read_depth_png(self.root / sequence / "depth" / f"{name}.png", unit=1e-3),
            intrinsics=pinhole(fx=525.0, fy=525.0, cx=319.5, cy=239.5),
            extrinsics=None,
        )


DATASETS["mine"] = f"{__name__}:Mine"

if __name__ == "__main__":
    sys.exit(main())
