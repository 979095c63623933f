"""Reading the files that datasets are made of; whatever is wrong with one is a :class:`BrokenFrame` that says so."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image


class BrokenFrame(Exception):
    """A frame that cannot be used; the message is the reason."""


def read_image(path: Path) -> np.ndarray:
    """[H, W, 3] uint8."""
    with _decoded(path) as image:
        return np.array(image.convert("RGB"))


def read_depth_png(path: Path, unit: float, unknown: int = 0) -> np.ndarray:
    """[H, W] float32 metres of a 16-bit PNG in ``unit`` metres; 0 where its value is ``unknown``.

    Pillow and not OpenCV, which returns half an image for a truncated file and says so on standard error only.
    """
    with _decoded(path) as image:
        if image.mode not in ("I;16", "I;16B", "I"):
            raise BrokenFrame(f"{path.name} is not a 16-bit grey PNG but has the mode {image.mode}")
        values = np.array(image)
    return np.where(values == unknown, 0, values * np.float64(unit)).astype(np.float32)


@contextmanager
def _decoded(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            image.load()
            yield image
    except FileNotFoundError:
        raise BrokenFrame(f"{path.name} is missing") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise BrokenFrame(f"{path.name} cannot be read ({error})") from error


def import_h5py(dataset: str) -> ModuleType:
    """The library, or one sentence on how to get it."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"the {dataset} dataset needs h5py, install it with: pip install 'moe3d[eval]'") from error
    return h5py


def read_hdf5(path: Path, key: str = "dataset", index: Any = ()) -> np.ndarray:
    """``file[key][index]`` of an HDF5 file, MATLAB's v7.3 among them; the default is all of it."""
    import h5py

    if not path.exists():
        raise BrokenFrame(f"{path.name} is missing")
    try:
        with h5py.File(path, "r") as file:
            return np.asarray(file[key][index])
    except (OSError, KeyError, RuntimeError, ValueError, IndexError, TypeError) as error:
        raise BrokenFrame(f"{path.name} cannot be read ({error})") from error


def read_numbers(path: Path, columns: int, rows: int = -1, header: int = 0) -> np.ndarray:
    """[rows, columns] float64 of a text file of numbers separated by white space, "nan" among them.

    By default there may be any number of rows. ``header`` lines are left out; line breaks have no meaning otherwise.
    """
    try:
        words = " ".join(path.read_text().splitlines()[header:]).split()
        return np.array(words, dtype=np.float64).reshape(rows, columns)
    except FileNotFoundError:
        raise BrokenFrame(f"{path.name} is missing") from None
    except (OSError, ValueError) as error:
        size = f"{columns} columns" if rows < 0 else f"{rows}x{columns}"
        raise BrokenFrame(f"{path.name} is not a table of {size} numbers ({error})") from error


def numbered(folder: Path, pattern: str) -> dict[int, str]:
    """Number -> file name of the folder's files that match ``pattern``, whose group is the number; in its order."""
    if not folder.is_dir():
        return {}
    matches = (re.fullmatch(pattern, entry.name) for entry in folder.iterdir())
    return dict(sorted((int(match[1]), match[0]) for match in matches if match))


def subfolders(folder: Path) -> list[Path]:
    """In alphabetical order."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir())


def pinhole(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    """[3, 3] float64."""
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])


def world_to_camera(camera_to_world: np.ndarray) -> np.ndarray:
    """[3, 4] inverse of a rigid motion given as [3, 4] or [4, 4]."""
    rotation, position = camera_to_world[:3, :3], camera_to_world[:3, 3:]
    with np.errstate(invalid="ignore"):  # a pose that is not finite stays so, for the caller to see
        return np.concatenate([rotation.T, -rotation.T @ position], 1)


OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0])
"""Between axes x right, y up, z backward and axes x right, y down, z forward, either way."""
