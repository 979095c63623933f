"""The Motorcycle pair of Middlebury 2014: two photographs and dense metric ground truth for the left one.

Source: D. Scharstein et al., "High-resolution stereo datasets with subpixel-accurate ground truth", GCPR 2014. The
files are scikit-image's (``skimage.data.stereo_motorcycle``), the benchmark's averaged over 4x4 pixels to 500x741.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike

import numpy as np
import torch

from moe3d.data.sample import Sample, Skipped, check_frames
from moe3d.geometry import scale_intrinsics

# The benchmark's calibration of Motorcycle at its full size, 2000x2964, in pixels and metres.
FOCAL = 3979.911
PRINCIPAL_POINT_LEFT = (1244.772, 1019.507)
PRINCIPAL_POINT_RIGHT = (1369.115, 1019.507)
BASELINE = 0.193001
REDUCTION = 4  # from there to scikit-image's files


class Motorcycle:
    """One sequence, ``motorcycle``, with the frames ``left`` and ``right``; the world is the left camera's frame.

    Depth is baseline * focal / (disparity + offset), the offset being the distance between the two principal points;
    the right view has no ground truth, so nothing of it is valid. The principal points are the benchmark's, taken to
    have the centre of the top-left pixel at (0, 0), moved by :func:`~moe3d.geometry.scale_intrinsics`.

    Raises:
        ValueError: if a root or a split is given: the pair ships with scikit-image and has one part.
    """

    has_poses = True
    max_depth = math.inf

    def __init__(self, root: str | PathLike[str] | None = None, split: str | None = None) -> None:
        if root is not None:
            raise ValueError(f"the motorcycle dataset ships with scikit-image and takes no root, got '{root}'")
        if split is not None:
            raise ValueError(f"the motorcycle dataset has no splits, got '{split}'")
        self.sequences = {"motorcycle": ["left", "right"]}
        self.skipped: list[Skipped] = []

    def load(self, sequence: str, frames: Sequence[str]) -> Sample:
        """The named frames."""
        check_frames(self.sequences, sequence, frames)
        chosen = [self.sequences[sequence].index(name) for name in frames]
        images, disparity = _read()
        intrinsics = _intrinsics()
        offset = intrinsics[1, 0, 2] - intrinsics[0, 0, 2]
        depth = (BASELINE * intrinsics[0, 0, 0] / (disparity + offset)).float()
        valid = torch.isfinite(disparity) & (depth > 0) & (depth < self.max_depth)
        depth = torch.where(valid, depth, 0)
        extrinsics = torch.eye(3, 4).repeat(2, 1, 1)
        extrinsics[1, 0, 3] = -BASELINE
        return Sample(
            images=images[chosen],
            depth=torch.stack([depth, torch.zeros_like(depth)])[chosen],
            valid=torch.stack([valid, torch.zeros_like(valid)])[chosen],
            intrinsics=intrinsics[chosen].float(),
            extrinsics=extrinsics[chosen],
            names=list(frames),
        )


def _read() -> tuple[torch.Tensor, torch.Tensor]:
    """The images [2, 3, H, W] in [0, 1], left first, and the left one's disparity [H, W] in float64."""
    from skimage.data import stereo_motorcycle

    left, right, disparity = stereo_motorcycle()
    images = torch.from_numpy(np.stack([left, right])).permute(0, 3, 1, 2).float() / 255
    return images.contiguous(), torch.from_numpy(disparity.astype(np.float64))


def _intrinsics() -> torch.Tensor:
    """[2, 3, 3] float64, of the left and the right camera."""
    matrices = [[[FOCAL, 0, cx], [0, FOCAL, cy], [0, 0, 1]] for cx, cy in (PRINCIPAL_POINT_LEFT, PRINCIPAL_POINT_RIGHT)]
    return scale_intrinsics(torch.tensor(matrices, dtype=torch.float64), 1 / REDUCTION, 1 / REDUCTION)
