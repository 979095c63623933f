"""Images as VGGT's own loader prepares them, from anything that cameras and tools write."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from moe3d.geometry import scale_intrinsics

PATCH_SIZE = 14
WIDTH = 518  # VGGT's
MAX_PIXELS = 200_000_000
MAX_ASPECT = 10
HEIF_SUFFIXES = (".heic", ".heif")


class Placement(NamedTuple):
    """Where an image lies on the grid that the model sees. All sizes are (height, width), of the upright image."""

    original: tuple[int, int]
    """The image as it was read."""
    resized: tuple[int, int]
    """What it was resized to: as wide as the grid."""
    top: int
    """Rows of white above it on the grid; negative: rows that were cut off from its top."""

    def rows(self, height: int) -> slice:
        """The rows of a grid of ``height`` that show the image."""
        return slice(max(self.top, 0), min(self.top + self.resized[0], height))

    def to_original(self, intrinsics: Tensor) -> Tensor:
        """Intrinsics [3, 3] in the grid's pixels to those in the original image's."""
        moved = intrinsics.clone()
        moved[1, 2] -= self.top
        (height, width), (resized_height, resized_width) = self.original, self.resized
        return scale_intrinsics(moved, width / resized_width, height / resized_height)


class LoadedImages(NamedTuple):
    """Images ready for the model, and what was done to them."""

    images: Tensor
    """[S, 3, H, W] float32 in [0, 1], H and W multiples of 14."""
    notes: list[str]
    """Sentences for the user: which sizes were resized to which, cropped and padded."""
    placements: list[Placement]
    """One for each image."""
    skipped: dict[int, str]
    """What is wrong with the images that were left out, by their position."""


def load_images(
    paths: Iterable[str | os.PathLike[str]], width: int = WIDTH, skip_unreadable: bool = False
) -> LoadedImages:
    """Load images as VGGT's ``load_and_preprocess_images`` does in its default mode.

    Each is prepared on its own (:func:`prepare_image`); where the sizes then differ, the smaller are centred on white.

    Args:
        paths: at least one image file.
        width: pixels, a multiple of 14.
        skip_unreadable: leave out what cannot be read or prepared, as long as one image remains.

    Raises:
        ValueError: no paths, or as :func:`read_image` and :func:`prepare_image`.
        OSError: a file is not there or may not be read.
    """
    prepared, placements, skipped = [], [], {}
    for position, path in enumerate(paths):
        try:
            image = read_image(path)
            prepared.append(_prepare(path, image, width))
        except (ValueError, OSError) as error:
            if not skip_unreadable:
                raise
            skipped[position] = str(error)
            continue
        size = (image.height, image.width)
        placements.append(Placement(size, (_resized_height(size, width), width), 0))
    if not prepared:
        what = next(iter(skipped.values()), "got none")
        raise ValueError(f"paths must name at least one image that can be read: {what}")
    height = max(image.shape[1] for image in prepared)
    placements = [place._replace(top=_top(place.resized[0], width, height)) for place in placements]
    images = torch.stack([_pad(image, height) for image in prepared])
    return LoadedImages(images, _notes(placements, height, width), placements, skipped)


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image as upright 8-bit RGB: grey, palette, 16-bit and EXIF-rotated ones, too; transparency becomes white.

    Raises:
        ValueError: not an image, a damaged one, or one beyond 200 megapixels.
        OSError: the file is not there or may not be read.
        RuntimeError: a HEIF image without what reads it.
    """
    try:
        with _accept_pixels(MAX_PIXELS), open_image(path) as image:
            return _to_rgb(ImageOps.exif_transpose(image))
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Image.DecompressionBombError:
        raise ValueError(f"{path} has more than {MAX_PIXELS // 10**6} megapixels, too many to be read safely") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image in a format that can be read") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise on damaged files
        raise ValueError(f"{path} is a damaged image ({error})") from error


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Pillow's, and HEIF images (as iPhones write them), which need pillow-heif."""
    if Path(path).suffix.lower() in HEIF_SUFFIXES:
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            raise RuntimeError(f"{path} needs pillow-heif to be read: pip install 'moe3d[heif]'") from None
        register_heif_opener()
    return Image.open(path)


def prepare_image(image: Image.Image, width: int = WIDTH) -> Tensor:
    """Resize an RGB image as VGGT's loader does: to ``width``, bicubic, the height to the nearest multiple of 14.

    An image that is then taller than ``width`` is cropped to its middle.

    Returns:
        [3, H, width] float32 in [0, 1], H <= width.

    Raises:
        ValueError: one pixel, a side ratio beyond 10:1, or a ``width`` that is no positive multiple of 14.
    """
    if width < PATCH_SIZE or width % PATCH_SIZE:
        raise ValueError(f"width must be a positive multiple of {PATCH_SIZE}, got {width}")
    if max(image.size) == 1 or max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(
            f"an image must have more than one pixel and a side ratio of at most {MAX_ASPECT}:1, "
            f"got {image.height}x{image.width}"
        )
    height = _resized_height((image.height, image.width), width)
    resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    top = max(height - width, 0) // 2
    return torch.from_numpy(resized[top : top + width]).permute(2, 0, 1).contiguous()


def resize_note(before: Sequence[int], after: Sequence[int]) -> str:
    """A sentence about a change of size, both (height, width); empty if there was none."""
    if tuple(before) == tuple(after):
        return ""
    return f"{before[0]}x{before[1]} resized to {after[0]}x{after[1]}, multiples of {PATCH_SIZE}, as VGGT's loader does"


def _prepare(path: str | os.PathLike[str], image: Image.Image, width: int) -> Tensor:
    try:
        return prepare_image(image, width)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _resized_height(size: tuple[int, int], width: int) -> int:
    """Of an image of ``size`` that is resized to ``width``, before it is cropped."""
    return max(round(size[0] * (width / size[1]) / PATCH_SIZE), 1) * PATCH_SIZE


def _top(resized: int, width: int, height: int) -> int:
    """Where a resized image's first row lies on a grid of ``height``: cropped to ``width`` rows, then padded."""
    cropped = max(resized - width, 0) // 2
    return (height - min(resized, width)) // 2 - cropped


def _notes(placements: list[Placement], height: int, width: int) -> list[str]:
    notes = []
    for place in placements:
        notes.append(resize_note(place.original, (min(place.resized[0], width), width)))
        if place.resized[0] > width:
            notes.append(f"{place.original[0]}x{place.original[1]} is taller than wide: cropped to its middle")
    if any(place.resized[0] < height for place in placements):
        notes.append(f"sizes differ: padded with white to {height}x{width}")
    return [*dict.fromkeys(filter(None, notes))]


@contextmanager
def _accept_pixels(limit: int) -> Iterator[None]:
    """Pillow refuses an image of more than twice its MAX_IMAGE_PIXELS and warns of one beyond half of that."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = limit // 2
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to 8 bits instead of scaling it
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":  # which Pillow would clip to 0 ... 255
        grey = np.asarray(image)
        if not (grey.min() >= 0 and grey.max() <= 1):
            raise ValueError(f"floating-point pixels must be from 0 to 1, got {grey.min():g} to {grey.max():g}")
        return Image.fromarray((grey * 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _pad(image: Tensor, height: int) -> Tensor:
    missing = height - image.shape[1]
    return F.pad(image, (0, 0, missing // 2, missing - missing // 2), value=1.0)
