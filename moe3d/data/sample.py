"""The one sample type of all datasets, and what a dataset offers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """S frames of one sequence with ground truth; the centre of the top-left pixel is (0, 0)."""

    images: Tensor
    """[S, 3, H, W] float32 sRGB in [0, 1]."""
    depth: Tensor
    """[S, H, W] float32 planar z in metres; 0 where not valid."""
    valid: Tensor
    """[S, H, W] bool."""
    intrinsics: Tensor
    """[S, 3, 3] float32 in pixels."""
    extrinsics: Tensor | None
    """[S, 3, 4] float32 world-to-camera, OpenCV axes, metres; ``None`` for a dataset without poses."""
    names: list[str]
    """The S frame names."""


@dataclass(frozen=True)
class Skipped:
    """A frame, or a whole sequence, that a dataset leaves out."""

    sequence: str
    """Its name."""
    frame: str | None
    """Its name; ``None``: the whole sequence."""
    reason: str
    """One sentence."""


class AllFramesSkipped(ValueError):
    """Every frame that was asked for is broken."""


class Dataset(Protocol):
    """What :func:`moe3d.data.open_dataset` returns."""

    has_poses: bool
    """Whether samples have extrinsics; without them frames can only be judged one by one."""
    max_depth: float
    """Metres; depth is valid strictly below it. The default is the dataset's usual protocol; it may be set."""
    skipped: list[Skipped]
    """What has been left out so far, each with its reason; grows as broken frames are met."""

    @property
    def sequences(self) -> dict[str, list[str]]:
        """Sequence name -> its frame names, in order, among them frames that turn out to be broken."""
        ...

    def load(self, sequence: str, frames: Sequence[str]) -> Sample:
        """The named frames of one sequence, in the order asked for; broken ones are left out (see ``skipped``)."""
        ...


def check_frames(sequences: dict[str, list[str]], sequence: str, frames: Sequence[str]) -> None:
    """Raise a ValueError that names the sequence or the first frame that does not exist."""
    if sequence not in sequences:
        first = ", ".join(list(sequences)[:3])
        raise ValueError(f"unknown sequence '{sequence}', expected one of {len(sequences)}, the first being {first}")
    if isinstance(frames, str) or not frames:
        raise ValueError(f"frames must be a non-empty list of frame names, got {frames!r}")
    missing = [name for name in frames if name not in sequences[sequence]]
    if missing:
        known = sequences[sequence]
        raise ValueError(f"sequence '{sequence}' has no frame '{missing[0]}'; it has {known[0]} ... {known[-1]}")
