"""What the datasets on disk share: the root, the splits, broken frames, and frames stacked to a sample."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from moe3d.data.files import BrokenFrame
from moe3d.data.sample import AllFramesSkipped, Sample, Skipped, check_frames

log = logging.getLogger("moe3d.data")


@dataclass(frozen=True)
class Frame:
    """One frame as its files give it."""

    image: np.ndarray
    """[H, W, 3] uint8, or floating point in [0, 1]."""
    depth: np.ndarray
    """[H, W] planar z in metres; not finite or not positive where unknown."""
    intrinsics: np.ndarray
    """[3, 3]; the centre of the top-left pixel is (0, 0)."""
    extrinsics: np.ndarray | None
    """[3, 4] world-to-camera, OpenCV axes, metres; ``None`` in a dataset without poses."""


class FolderDataset(ABC):
    """A dataset in a folder. Opening it lists names only; images and depth are read by :meth:`load`.

    A subclass lists its sequences and reads one frame, raising :class:`~moe3d.data.files.BrokenFrame` for one that
    cannot be used. Such a frame is left out of the sample, logged once on the logger ``moe3d.data``, and kept in
    ``skipped``; so are sequences that lack what all their frames need, with one line for all that have one reason.

    Args:
        root: the folder.
        split: one of ``splits``; ``None`` is the first.

    Raises:
        ValueError: for a root without the expected files, which the message names, or an unknown split.
    """

    name: ClassVar[str]
    layout: ClassVar[str]
    """The files expected under the root, for error messages."""
    splits: ClassVar[tuple[str, ...]] = ()
    has_poses: bool = True
    max_depth: float = math.inf

    def __init__(self, root: str | PathLike[str] | None = None, split: str | None = None) -> None:
        if root is None:
            raise ValueError(f"the {self.name} dataset needs a root, a folder with {self.layout}")
        if split is not None and split not in self.splits:
            known = f"expected one of {', '.join(self.splits)}" if self.splits else "it has no splits"
            raise ValueError(f"the {self.name} dataset has no split '{split}', {known}")
        self.root = Path(root)
        self.split = split or next(iter(self.splits), None)
        self.skipped: list[Skipped] = []
        self._memory: dict[Any, Any] = {}
        self.sequences = self._list() if self.root.is_dir() else {}
        for reason, count in Counter(record.reason for record in self.skipped).items():
            first = next(record.sequence for record in self.skipped if record.reason == reason)
            log.warning("%s: left out %d sequence(s), the first %s: %s", self.name, count, first, reason)
        if not self.sequences:
            raise ValueError(f"no frames of the {self.name} dataset in '{root}', expected {self._expected()}")

    @abstractmethod
    def _list(self) -> dict[str, list[str]]:
        """Sequence name -> frame names, in order, without decoding an image."""

    @abstractmethod
    def _read(self, sequence: str, name: str) -> Frame:
        """One frame; BrokenFrame if it cannot be used."""

    def load(self, sequence: str, frames: Sequence[str]) -> Sample:
        """The named frames, in the order asked for, without those that are broken.

        Raises:
            ValueError: for names that do not exist, or frames of different sizes.
            AllFramesSkipped: if every one of them is broken (a ValueError too).
        """
        check_frames(self.sequences, sequence, frames)
        good: list[Frame] = []
        names: list[str] = []
        for name in frames:
            try:
                good.append(_checked(self._read(sequence, name)))
                names.append(name)
            except BrokenFrame as error:
                self._skip_frame(sequence, name, str(error))
        if not good:
            raise AllFramesSkipped(f"{self.name}: none of the {len(frames)} frames asked of '{sequence}' can be used")
        return self._stack(sequence, names, good)

    def _skip_sequence(self, sequence: str, reason: str) -> None:
        """For :meth:`_list`."""
        self.skipped.append(Skipped(sequence, None, reason))

    def _skip_frame(self, sequence: str, frame: str, reason: str) -> None:
        record = Skipped(sequence, frame, reason)
        if record not in self.skipped:
            self.skipped.append(record)
            log.warning("%s: skipped %s %s: %s", self.name, sequence, frame, reason)

    def _once(self, key: Any, read: Callable[[], Any]) -> Any:
        """What ``read`` returns, kept: for files that many frames share."""
        if key not in self._memory:
            self._memory[key] = read()
        return self._memory[key]

    def _expected(self) -> str:
        """The layout, and why what was found does not count."""
        return self.layout + (f" (skipped: {self.skipped[0].reason})" if self.skipped else "")

    def _stack(self, sequence: str, names: list[str], frames: list[Frame]) -> Sample:
        sizes = {frame.depth.shape for frame in frames}
        if len(sizes) > 1:
            found = " and ".join(f"{height}x{width}" for height, width in sorted(sizes))
            raise ValueError(f"frames of '{sequence}' differ in size ({found}): load those of one size together")
        depth = torch.from_numpy(np.stack([frame.depth for frame in frames]).astype(np.float32))
        valid = (depth > 0) & (depth < self.max_depth)  # neither holds for NaN
        return Sample(
            images=torch.stack([_image_tensor(frame.image) for frame in frames]),
            depth=torch.where(valid, depth, 0),
            valid=valid,
            intrinsics=_float32([frame.intrinsics for frame in frames]),
            extrinsics=_float32([frame.extrinsics for frame in frames]) if self.has_poses else None,
            names=names,
        )


def _checked(frame: Frame) -> Frame:
    if frame.depth.ndim != 2 or frame.image.shape != (*frame.depth.shape, 3):
        image, depth = ("x".join(map(str, array.shape)) for array in (frame.image, frame.depth))
        raise BrokenFrame(f"the image is {image}, the depth {depth}")
    if not np.isfinite(frame.intrinsics).all():
        raise BrokenFrame("the intrinsics are not finite")
    if frame.extrinsics is not None and not np.isfinite(frame.extrinsics).all():
        raise BrokenFrame("the pose is not finite")
    if frame.extrinsics is not None and not _is_rotation(frame.extrinsics[:, :3]):
        raise BrokenFrame("the pose is not a rigid motion")
    return frame


def _is_rotation(matrix: np.ndarray) -> bool:
    return bool(np.allclose(matrix @ matrix.T, np.eye(3), atol=1e-2) and np.linalg.det(matrix) > 0)


def _float32(matrices: list[Any]) -> torch.Tensor:
    return torch.from_numpy(np.stack(matrices)).float()


def _image_tensor(image: np.ndarray) -> torch.Tensor:
    """[3, H, W] float32 in [0, 1]."""
    tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float()
    return tensor / 255 if image.dtype == np.uint8 else tensor
