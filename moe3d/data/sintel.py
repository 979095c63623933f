"""MPI Sintel: a short film rendered with depth and cameras.

Source: D. Butler et al., "A Naturalistic Open Source Movie for Optical Flow Evaluation", ECCV 2012, with the depth and
camera archive of 2015. Both ``.dpt`` and ``.cam`` files begin with the float32 202021.25. A ``.cam`` file holds the
intrinsics and a world-to-camera matrix with OpenCV axes, in float64.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moe3d.data.files import BrokenFrame, numbered, read_image
from moe3d.data.folder import FolderDataset, Frame

TAG = 202021.25
# The sequences of the usual evaluations (MonST3R, CUT3R, Pi3).
EVALUATED = (
    "alley_2", "ambush_4", "ambush_5", "ambush_6", "cave_2", "cave_4", "market_2", "market_5", "market_6", "shaman_3",
    "sleeping_1", "sleeping_2", "temple_2", "temple_3",
)  # fmt: skip


class Sintel(FolderDataset):
    """Sequences of the final pass, ``alley_2`` etc., with frames ``frame_0001``: the 14 usual ones, or all 23."""

    name = "sintel"
    layout = (
        "training/final/alley_2/frame_0001.png, training/depth/alley_2/frame_0001.dpt and "
        "training/camdata_left/alley_2/frame_0001.cam"
    )
    splits = ("test", "all")
    max_depth = 70.0

    def _list(self) -> dict[str, list[str]]:
        training = self.root / "training"
        sequences = {}
        for folder in sorted((training / "final").glob("*")):
            if self.split == "test" and folder.name not in EVALUATED:
                continue
            images = numbered(folder, r"frame_(\d+)\.png")
            missing = [kind for kind in ("depth", "camdata_left") if not (training / kind / folder.name).is_dir()]
            if images and missing:
                self._skip_sequence(folder.name, f"training/{missing[0]}/{folder.name} is missing")
            elif images:
                sequences[folder.name] = [Path(name).stem for name in images.values()]
        return sequences

    def _read(self, sequence: str, name: str) -> Frame:
        training = self.root / "training"
        intrinsics, extrinsics = _read_camera(training / "camdata_left" / sequence / f"{name}.cam")
        return Frame(
            image=read_image(training / "final" / sequence / f"{name}.png"),
            depth=_read_depth(training / "depth" / sequence / f"{name}.dpt"),
            intrinsics=intrinsics,
            extrinsics=extrinsics,
        )


def _read_depth(path: Path) -> np.ndarray:
    content = _tagged(path)
    width, height = np.frombuffer(content[:8], "<i4") if len(content) >= 8 else (0, 0)
    if len(content) != 8 + 4 * width * height or width * height == 0:
        raise BrokenFrame(f"{path.name} has {len(content) + 4} bytes, not those of a depth map of {height}x{width}")
    return np.frombuffer(content[8:], "<f4").reshape(height, width)


def _read_camera(path: Path) -> tuple[np.ndarray, np.ndarray]:
    content = _tagged(path)
    if len(content) != 21 * 8:
        raise BrokenFrame(f"{path.name} has {len(content) + 4} bytes, not the 172 of a camera")
    numbers = np.frombuffer(content, "<f8")
    return numbers[:9].reshape(3, 3), numbers[9:].reshape(3, 4)


def _tagged(path: Path) -> bytes:
    """What follows the tag."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise BrokenFrame(f"{path.name} is missing") from None
    except OSError as error:
        raise BrokenFrame(f"{path.name} cannot be read ({error})") from error
    if content[:4] != np.array(TAG, "<f4").tobytes():
        raise BrokenFrame(f"{path.name} does not begin with the number {TAG}")
    return content[4:]
