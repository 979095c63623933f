"""One frame's reconstruction, and a folder of them: what a run leaves behind, and what exports and the viewer read."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from moe3d.atomic import whole_file
from moe3d.geometry import unproject


@dataclass(frozen=True)
class ReconstructedFrame:
    """What the model made of one image, on the model's H x W grid, in the unit of length of its scene."""

    image: np.ndarray
    """[H, W, 3] uint8, as the model saw it."""
    depth: np.ndarray
    """[H, W] float32, planar z; 0 where the grid does not show the image."""
    confidence: np.ndarray
    """[H, W] float32, in the model's own scale, the higher the better."""
    intrinsics: np.ndarray
    """[3, 3] float32 in pixels of the grid."""
    extrinsics: np.ndarray
    """[3, 4] float32 world-to-camera, OpenCV axes; the world is the first frame's camera."""
    original_size: np.ndarray
    """[2] (height, width) of the image as it was read, upright."""
    original_intrinsics: np.ndarray
    """[3, 3] float32 in pixels of the image as it was read, upright."""
    entropy: np.ndarray | None = None
    """[H, W] float16, the gate's, in nats; with a mixture-of-experts head."""
    weights: np.ndarray | None = None
    """[K, H, W] float16, the gate's."""
    stock_depth: np.ndarray | None = None
    """[H, W] float32: the depth of the stock head that the mixture-of-experts head was made from."""
    hypotheses: np.ndarray | None = None
    """[K, H, W] float32, each expert's depth, where asked for."""
    points: np.ndarray | None = None
    """[H, W, 3] float32 in the world, a point head's."""
    points_confidence: np.ndarray | None = None
    """[H, W] float32."""

    def unprojected(self, depth: np.ndarray | None = None) -> np.ndarray:
        """[H, W, 3] float32 points in the world: ``depth`` (this frame's own if None) through the predicted camera."""
        depth = self.depth if depth is None else depth
        return unproject(*(torch.from_numpy(a) for a in (depth, self.intrinsics, self.extrinsics))).numpy()


_REQUIRED = ("image", "depth", "confidence", "intrinsics", "extrinsics", "original_size", "original_intrinsics")


def save_frame(path: Path, frame: ReconstructedFrame) -> None:
    """Write a frame as an .npz file, which appears only when it is whole."""
    arrays = {field.name: getattr(frame, field.name) for field in fields(frame)}
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, **{name: array for name, array in arrays.items() if array is not None})


def load_frame(path: Path) -> ReconstructedFrame:
    """Read a frame; no code that a file may hold is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {field.name: file[field.name] for field in fields(ReconstructedFrame) if field.name in file}
    except FileNotFoundError:
        raise
    except (BadZipFile, zlib.error, EOFError, OSError, ValueError, TypeError, AttributeError) as error:  # damaged files
        raise ValueError(f"{path} is not a whole .npz file of plain arrays ({error})") from None
    wrong = _first_wrong(arrays)
    if wrong:
        raise ValueError(f"{path} does not hold a reconstructed frame: {wrong}")
    return ReconstructedFrame(**arrays)


def _first_wrong(arrays: dict[str, np.ndarray]) -> str | None:
    for name in _REQUIRED:
        if name not in arrays:
            return f"the array '{name}' is missing"
    size = arrays["depth"].shape
    experts = arrays["weights"].shape[:1] if "weights" in arrays else ()
    maps: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("depth", "confidence", "entropy", "stock_depth", "points_confidence"), size
    )
    maps |= {"image": (*size, 3), "points": (*size, 3), "weights": (*experts, *size), "hypotheses": (*experts, *size)}
    maps |= {"intrinsics": (3, 3), "extrinsics": (3, 4), "original_size": (2,), "original_intrinsics": (3, 3)}
    for name, array in arrays.items():
        kind = {"image": "u", "original_size": "iu"}.get(name, "f")
        if len(size) != 2 or array.shape != maps[name] or array.dtype.kind not in kind:
            return f"'{name}' is {array.dtype} of shape {list(array.shape)}"
    return None


class FrameFolder(Sequence[ReconstructedFrame]):
    """``FOLDER/run.json`` (the frames' names, and what they depend on) and ``FOLDER/frames/000000.npz``, each whole.

    Indexing and iterating read the files one at a time. Names never become paths.
    """

    def __init__(self, folder: Path, names: Sequence[str], settings: dict[str, Any]) -> None:
        self.folder, self.names, self.settings = folder, list(names), settings

    @classmethod
    def open(cls, folder: Path) -> FrameFolder:
        """The folder of an earlier run, whose frames need not all be there.

        Raises:
            FileNotFoundError: it holds no ``run.json``.
            ValueError: that file is damaged.
        """
        path = folder / "run.json"
        try:
            run = json.loads(path.read_text("utf-8"))
            names, settings = run["frames"], run["settings"]
            whole = isinstance(settings, dict) and names and all(isinstance(name, str) for name in names)
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise ValueError(f"{path} is damaged: it must hold the frames' names and settings of a reconstruction")
        return cls(folder, names, settings)

    def create(self) -> None:
        """Write ``run.json`` and make the folder of the frames."""
        (self.folder / "frames").mkdir(parents=True, exist_ok=True)
        run = {"frames": self.names, "settings": self.settings}
        with whole_file(self.folder / "run.json") as unfinished:
            unfinished.write_text(json.dumps(run, indent=1) + "\n", "utf-8")

    def path(self, index: int) -> Path:
        return self.folder / "frames" / f"{index:06d}.npz"

    def finished(self) -> set[int]:
        """The frames that are there."""
        return {index for index in range(len(self)) if self.path(index).is_file()}

    def save(self, index: int, frame: ReconstructedFrame) -> None:
        save_frame(self.path(index), frame)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index):
        return load_frame(self.path(range(len(self))[index]))

    def __iter__(self) -> Iterator[ReconstructedFrame]:
        return (self[index] for index in range(len(self)))


def find_scenes(folder: str | os.PathLike[str]) -> dict[str, FrameFolder]:
    """The finished reconstructions in a folder that ``moe3d reconstruct`` wrote to, by name.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder, or none with a reconstruction.
        ValueError: a damaged ``run.json``.
    """
    folder = Path(folder)
    if not folder.is_dir():
        kind = NotADirectoryError if folder.exists() else FileNotFoundError
        raise kind(f"{folder} must be a folder that moe3d reconstruct wrote")
    found = [path.parent for path in sorted(folder.glob("*/run.json")) if path.parent.suffix != PARTIAL]
    if not found:
        raise FileNotFoundError(f"{folder} holds no reconstruction: expected what moe3d reconstruct --out writes")
    return {path.name: FrameFolder.open(path) for path in found}


PARTIAL = ".partial"
"""Suffix of the folder of a run that is not finished."""
