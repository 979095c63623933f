"""Images as VGGT's own loader prepares them, from anything that cameras and tools write."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

PATCH_SIZE = 14
WIDTH = 518  # VGGT's
MAX_PIXELS = 200_000_000
MAX_ASPECT = 10


class LoadedImages(NamedTuple):
    """Images ready for the model, and what was done to them."""

    images: Tensor
    """[S, 3, H, W] float32 in [0, 1], H and W multiples of 14."""
    notes: list[str]
    """Sentences for the user: which sizes were resized to which, and padded."""


def load_images(paths: Sequence[str | os.PathLike[str]], width: int = WIDTH) -> LoadedImages:
    """Load images as VGGT's ``load_and_preprocess_images`` does in its default mode.

    Each is prepared on its own (:func:`prepare_image`); where the sizes then differ, the smaller are centred on white.

    Args:
        paths: at least one image file.
        width: pixels, a multiple of 14.

    Raises:
        ValueError: no paths, or as :func:`read_image` and :func:`prepare_image`.
        OSError: a file is not there or may not be read.
    """
    if not paths:
        raise ValueError("paths must name at least one image, got none")
    prepared, notes = [], []
    for path in paths:
        image = read_image(path)
        try:
            prepared.append(prepare_image(image, width))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        notes.append(resize_note((image.height, image.width), prepared[-1].shape[1:]))
    height = max(image.shape[1] for image in prepared)
    if any(image.shape[1] != height for image in prepared):
        notes.append(f"sizes differ: padded with white to {height}x{width}")
    return LoadedImages(torch.stack([_pad(image, height) for image in prepared]), [*dict.fromkeys(filter(None, notes))])


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image as upright 8-bit RGB: grey, palette, 16-bit and EXIF-rotated ones, too; transparency becomes white.

    Raises:
        ValueError: not an image, a damaged one, or one beyond 200 megapixels.
        OSError: the file is not there or may not be read.
    """
    try:
        with _accept_pixels(MAX_PIXELS), Image.open(path) as image:
            return _to_rgb(ImageOps.exif_transpose(image))
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Image.DecompressionBombError:
        raise ValueError(f"{path} has more than {MAX_PIXELS // 10**6} megapixels, too many to be read safely") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image in a format that can be read") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise on damaged files
        raise ValueError(f"{path} is a damaged image ({error})") from error


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
    height = max(round(image.height * (width / image.width) / PATCH_SIZE), 1) * PATCH_SIZE
    resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    top = max(height - width, 0) // 2
    return torch.from_numpy(resized[top : top + width]).permute(2, 0, 1).contiguous()


def resize_note(before: Sequence[int], after: Sequence[int]) -> str:
    """A sentence about a change of size, both (height, width); empty if there was none."""
    if tuple(before) == tuple(after):
        return ""
    return f"{before[0]}x{before[1]} resized to {after[0]}x{after[1]}, multiples of {PATCH_SIZE}, as VGGT's loader does"


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
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _pad(image: Tensor, height: int) -> Tensor:
    missing = height - image.shape[1]
    return F.pad(image, (0, 0, missing // 2, missing - missing // 2), value=1.0)
