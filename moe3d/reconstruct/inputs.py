"""What the user names (images, folders, globs, videos) to a list of image files with a name for each frame."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from moe3d.reconstruct import video
from moe3d.reconstruct.frames import PARTIAL
from moe3d.reconstruct.images import HEIF_SUFFIXES
from moe3d.reconstruct.video import extract_frames

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2", ".gif",
    *HEIF_SUFFIXES,
)  # fmt: skip


def find_files(inputs: Sequence[str]) -> list[Path]:
    """The image and video files that ``inputs`` name, in their order.

    Args:
        inputs: files, folders (their images and videos, in natural order: img2 before img10, hidden ones left out) and
            globs that the shell has left alone ("**" goes into subfolders).

    Raises:
        FileNotFoundError: a name without a file, a glob without a match, a folder without images.
    """
    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = _in_order(file for file in path.iterdir() if _is_picture(file))
        elif path.exists():
            found = [path]
        elif not glob.has_magic(name):
            raise FileNotFoundError(f"{name}: no such file or folder")
        else:
            found = _in_order(file for match in glob.iglob(name, recursive=True) if _is_picture(file := Path(match)))
        if not found:
            raise FileNotFoundError(
                f"{name}: holds no image or video" if path.is_dir() else f"{name}: matches no image"
            )
        files += found
    return files


def left_out(inputs: Sequence[str]) -> str:
    """A sentence about the files in the folders that are no pictures by their names; empty without any."""
    files = [file for name in inputs if Path(name).is_dir() for file in Path(name).iterdir() if file.is_file()]
    others = [file for file in files if not file.name.startswith(".") and not _is_picture(file)]
    if not others:
        return ""
    suffixes = sorted({file.suffix.lower() or "without a suffix" for file in others})
    return f"{len(others)} file(s) are no images or videos by their names, and left out: {', '.join(suffixes)}"


def scene_name(inputs: Sequence[str]) -> str:
    """What the results are called: the name of the folder if ``inputs`` is a single one, else "scene".

    Names that end as those of unfinished runs do get another end.
    """
    name = Path(os.path.abspath(inputs[0])).name
    if name.endswith(PARTIAL):
        name = f"{name.removesuffix(PARTIAL)}_{PARTIAL[1:]}"
    return name if len(inputs) == 1 and Path(inputs[0]).is_dir() and name else "scene"


def is_video(path: Path) -> bool:
    """Judged by its name; its content is checked when it is decoded."""
    return path.suffix.lower() in video.SUFFIXES


def image_files(
    files: Iterable[Path], folder: Path, fps: float, skip_unreadable: bool = False
) -> tuple[list[Path], dict[str, str]]:
    """The files with each video replaced by its frames.

    Args:
        files: images and videos.
        folder: exists; each video's frames go to a folder of their own in it.
        fps: see :func:`~moe3d.reconstruct.video.extract_frames`.
        skip_unreadable: make do with the frames before a video's damage.

    Returns:
        The image files, and what is wrong with damaged videos, by their path.

    Raises:
        ValueError, OSError, RuntimeError: as :func:`~moe3d.reconstruct.video.extract_frames`.
    """
    images, damaged = [], {}
    for file in files:
        if not is_video(file):
            images.append(file)
            continue
        frames = folder / f"{file.stem}-{len(images):06d}"
        frames.mkdir(parents=True)
        try:
            for frame in extract_frames(file, frames, fps):
                images.append(frame)
        except ValueError as error:
            if not skip_unreadable:
                raise
            damaged[str(file)] = str(error)
    return images, damaged


def frame_names(files: Sequence[Path]) -> list[str]:
    """A unique name for each file: its stem; stems that occur twice get their folder's name in front, and what is then
    still twice a number behind it."""
    names = [file.stem for file in files]
    stems = Counter(names)
    names = [
        f"{Path(os.path.abspath(file)).parent.name}_{name}" if stems[name] > 1 else name
        for file, name in zip(files, names, strict=True)
    ]
    taken: set[str] = set()
    return [_unused(name, taken) for name in names]


def _unused(name: str, taken: set[str]) -> str:
    unique, number = name, 1
    while unique in taken:
        number += 1
        unique = f"{name}_{number}"
    taken.add(unique)
    return unique


def _is_picture(file: Path) -> bool:
    known = file.suffix.lower() in IMAGE_SUFFIXES or is_video(file)
    return known and not file.name.startswith(".") and not file.is_dir()


def _in_order(files: Iterable[Path]) -> list[Path]:
    return sorted(files, key=lambda file: [*map(_natural, file.parts)])


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts numbers by their value: [(2, "img"), ...] before [(10, "img"), ...]."""
    parts = re.split(r"(\d+)", text)
    return [(int(part), "") if part.isdecimal() and part.isascii() else (-1, part) for part in parts]
