"""Predictions as files, so that any system can be judged: ``FOLDER/<sequence>.npz``.

Each file holds one sequence's arrays ``frames`` (names), ``depth``, ``intrinsics``, ``extrinsics`` and, if there are
any, ``points`` and ``confidence``, as :class:`Predictions` describes them.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from moe3d.atomic import whole_file


@dataclass(frozen=True)
class Predictions:
    """What a system made of N frames of one sequence, in its own world frame and unit of length.

    Values may be non-finite, and depths not positive, where the system has no answer: metrics count such pixels.

    Raises:
        TypeError: an array of another kind.
        ValueError: shapes that do not fit each other, no frames, or a name twice.
    """

    frames: Sequence[str]
    """[N] frame names, each once."""
    depth: np.ndarray
    """[N, H, W] floating point, planar z, covering each frame's whole image at any resolution."""
    intrinsics: np.ndarray
    """[N, 3, 3] pinhole matrices in pixels of ``depth``'s grid, the centre of the top-left pixel at (0, 0)."""
    extrinsics: np.ndarray
    """[N, 3, 4] world-to-camera, OpenCV axes."""
    points: np.ndarray | None = None
    """[N, H, W, 3], a point head's answer in the world's frame."""
    confidence: np.ndarray | None = None
    """[N, H, W], in any scale; no metric reads it."""

    def __post_init__(self) -> None:
        frames = np.asarray(self.frames)
        if frames.dtype.kind != "U" or frames.ndim != 1 or not len(frames):
            raise TypeError(
                f"frames must be a non-empty list of names, got {frames.dtype} of shape {list(frames.shape)}"
            )
        if len(set(self.frames)) < len(frames):
            twice = next(name for name in frames if list(frames).count(name) > 1)
            raise ValueError(f"frames must name each frame once, got '{twice}' twice")
        object.__setattr__(self, "frames", [str(name) for name in frames])
        count, maps = len(frames), np.shape(self.depth)[1:]
        if np.ndim(self.depth) != 3 or 0 in maps:
            raise ValueError(f"depth must be [N, H, W], got shape {list(np.shape(self.depth))}")
        self._check("depth", (count, *maps))
        self._check("intrinsics", (count, 3, 3))
        self._check("extrinsics", (count, 3, 4))
        if self.points is not None:
            self._check("points", (count, *maps, 3))
        if self.confidence is not None:
            self._check("confidence", (count, *maps))

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        array = np.asarray(getattr(self, name))
        if array.dtype.kind != "f":
            raise TypeError(f"{name} must be floating point, got {array.dtype}")
        if array.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} for {shape[0]} frames, got {list(array.shape)}")
        object.__setattr__(self, name, array)

    def select(self, frames: Sequence[str]) -> Predictions:
        """The named frames, in the order asked for.

        Raises:
            ValueError: a frame that is not there.
        """
        position = {name: index for index, name in enumerate(self.frames)}
        missing = [name for name in frames if name not in position]
        if missing:
            raise ValueError(
                f"no prediction of frame '{missing[0]}' ({len(missing)} of {len(frames)} frames are missing)"
            )
        index = [position[name] for name in frames]
        if index == list(range(len(self.frames))):
            return self
        arrays = {name: array[index] for name, array in self._arrays().items()}
        return Predictions(list(frames), **arrays)

    def _arrays(self) -> dict[str, Any]:
        arrays = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "frames"}
        return {name: array for name, array in arrays.items() if array is not None}


def prediction_path(folder: str | os.PathLike[str], sequence: str) -> Path:
    """Where a sequence's predictions are in a folder.

    Raises:
        ValueError: the sequence's name cannot be a file's.
    """
    if not sequence or sequence in (".", "..") or Path(sequence).name != sequence:
        raise ValueError(f"sequence must be a name without folders, got '{sequence}'")
    return Path(folder) / f"{sequence}.npz"


def write_predictions(folder: str | os.PathLike[str], sequence: str, predictions: Predictions) -> Path:
    """Write one sequence's file into a folder that exists; it appears only when it is whole.

    Returns:
        The file's path.

    Raises:
        ValueError: as :func:`prediction_path`.
        OSError: the file cannot be written.
    """
    path = prediction_path(folder, sequence)
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, frames=np.array(predictions.frames), **predictions._arrays())
    return path


def read_predictions(folder: str | os.PathLike[str], sequence: str, frames: Sequence[str] | None = None) -> Predictions:
    """Read one sequence's predictions.

    Args:
        folder: with a file for each sequence.
        sequence: its name.
        frames: those to return, in this order; None for all. Others in the file are ignored.

    Raises:
        FileNotFoundError: there is no file for this sequence.
        ValueError: the file is damaged, lacks an array or a frame, or holds arrays that do not fit.
    """
    path = prediction_path(folder, sequence)
    if not path.is_file():
        raise FileNotFoundError(f"there are no predictions of sequence '{sequence}': expected the file {path}")
    try:
        predictions = Predictions(**_read_arrays(path))
        return predictions if frames is None else predictions.select(frames)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _read_arrays(path: Path) -> dict[str, Any]:
    names = [field.name for field in fields(Predictions)]
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in names if name in file}
    except (
        BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        ValueError,
        AttributeError,
        TypeError,
    ) as error:  # what NumPy raises on damaged files
        raise ValueError(f"not a whole .npz file of plain arrays ({error})") from None
    missing = [name for name in names[:4] if name not in arrays]
    if missing:
        raise ValueError(f"the array '{missing[0]}' is missing, expected {', '.join(names[:4])}")
    return arrays
