"""NYU Depth v2: indoor photographs with inpainted Kinect depth, no poses.

Source: N. Silberman et al., "Indoor Segmentation and Support Inference from RGBD Images", ECCV 2012. Two layouts: the
labelled set, one MATLAB v7.3 file with transposed axes, or a folder of HDF5 files with ``rgb`` and ``depth``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moe3d.data.files import BrokenFrame, import_h5py, pinhole, read_hdf5
from moe3d.data.folder import FolderDataset, Frame

# The toolbox's colour camera at 640x480; its principal point counts pixels from 1.
INTRINSICS = pinhole(518.85790117450188, 519.46961112127485, 325.58244941119034 - 1, 253.73616633400465 - 1)
LABELLED = "nyu_depth_v2_labeled.mat"


class NYUv2(FolderDataset):
    """One sequence, ``nyuv2``; frames are the 1-based image numbers in five digits, or the HDF5 files' stems."""

    name = "nyuv2"
    layout = f"{LABELLED} and splits.mat, or HDF5 files *.h5 with rgb and depth"
    splits = ("test", "train")
    has_poses = False
    max_depth = 10.0

    def _list(self) -> dict[str, list[str]]:
        import_h5py(self.name)
        self._files: dict[str, Path] = {}
        names = self._list_labelled() if (self.root / LABELLED).exists() else self._list_files()
        return {"nyuv2": names} if names else {}

    def _list_labelled(self) -> list[str]:
        from scipy.io import loadmat

        splits = self.root / "splits.mat"
        if not splits.exists():
            self._skip_sequence("nyuv2", "splits.mat is missing beside the labelled set")
            return []
        try:
            numbers = loadmat(splits)[f"{self.split}Ndxs"].ravel().tolist()
        except Exception as error:  # of SciPy's own kinds, too
            raise ValueError(f"{splits} is not the labelled set's list of splits ({error})") from error
        return [f"{number:05d}" for number in sorted(numbers)]

    def _list_files(self) -> list[str]:
        files = sorted(self.root.rglob("*.h5"))
        if files and self.split != "test":
            raise ValueError(
                f"a folder of HDF5 files has no split '{self.split}', expected 'test': name the folder as root"
            )
        for path in files:
            if path.stem in self._files:
                raise ValueError(
                    f"two frames are named {path.stem}, {self._files[path.stem]} and {path}: narrow the root"
                )
            self._files[path.stem] = path
        return list(self._files)

    def _read(self, sequence: str, name: str) -> Frame:
        if self._files:
            path = self._files[name]
            image, depth = _axes(path, read_hdf5(path, "rgb"), (1, 2, 0)), read_hdf5(path, "depth")
        else:
            path, index = self.root / LABELLED, int(name) - 1
            image, depth = _axes(path, read_hdf5(path, "images", index), (2, 1, 0)), read_hdf5(path, "depths", index).T
        return Frame(image=image, depth=depth, intrinsics=INTRINSICS, extrinsics=None)


def _axes(path: Path, image: np.ndarray, order: tuple[int, int, int]) -> np.ndarray:
    """The image with its axes in this order."""
    if image.ndim != 3:
        raise BrokenFrame(f"{path.name} holds an image of {image.ndim} axes, not 3")
    return image.transpose(order)
