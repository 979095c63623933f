"""Cheap augmentation of whole scenes: what a camera or a mirror could have done to all frames alike."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moe3d.geometry import scale_intrinsics
from moe3d.models.mini import PATCH_SIZE

ZOOM = (0.6, 1.0)  # of the field of view's side


def augment(batch: dict[str, Tensor], rng: np.random.Generator) -> dict[str, Tensor]:
    """Mirror half of the scenes and change every scene's colours.

    Args:
        batch: ``images`` [B, S, 3, H, W] in [0, 1], ``depth`` [B, S, H, W], ``intrinsics`` [B, S, 3, 3] and
            ``extrinsics`` [B, S, 3, 4].
        rng: where the choices come from.
    """
    mirrored = torch.from_numpy(rng.random(len(batch["depth"])) < 0.5)
    flipped = {
        key: torch.where(_like(mirrored, value), mirror(key, value, batch), value) for key, value in batch.items()
    }
    return flipped | {"images": jitter_colours(flipped["images"], rng)}


def shrink(batch: dict[str, Tensor], rng: np.random.Generator, pixels: int) -> dict[str, Tensor]:
    """The batch at a smaller size of at most ``pixels`` pixels per frame, a multiple of the patch size along each axis.

    Images [B, S, 3, H, W] uint8 are averaged, depth [B, S, H, W] is picked: a mean of two surfaces lies on neither.
    """
    height, width = batch["depth"].shape[-2:]
    largest = min(1.0, (pixels / (height * width)) ** 0.5)
    factor = largest * rng.uniform(0.8, 1.0)
    size = tuple(max(4, round(factor * side / PATCH_SIZE)) * PATCH_SIZE for side in (height, width))
    if size == (height, width):
        return batch
    images = F.interpolate(batch["images"].flatten(0, 1).float(), size, mode="bilinear", antialias=True)
    depth = F.interpolate(batch["depth"].float(), size, mode="nearest-exact")
    return batch | {
        "images": images.unflatten(0, batch["images"].shape[:2]),
        "depth": depth,
        "intrinsics": scale_intrinsics(batch["intrinsics"], size[1] / width, size[0] / height),
    }


def zoom(batch: dict[str, Tensor], rng: np.random.Generator) -> dict[str, Tensor]:
    """For half of the batches, what a lens with a narrower field of view would have seen: the middle of every frame."""
    factor = rng.uniform(*ZOOM)
    if rng.random() < 0.5:
        return batch
    height, width = batch["depth"].shape[-2:]
    y, x = (round(side * (1 - factor) / 2) for side in (height, width))
    intrinsics = batch["intrinsics"].clone()
    intrinsics[..., :2, 2] -= intrinsics.new_tensor([x, y])
    middle = {key: batch[key][..., y : height - y, x : width - x] for key in ("images", "depth")}
    return batch | middle | {"intrinsics": intrinsics}


def mirror(key: str, value: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """One of the batch's tensors as in a mirror: the x axes of images, cameras and world are reversed."""
    if key == "intrinsics":
        value = value.clone()
        value[..., 0, 1] *= -1
        value[..., 0, 2] = batch["images"].shape[-1] - 1 - value[..., 0, 2]
        return value
    if key == "extrinsics":
        sign = value.new_tensor([-1, 1, 1])
        return value * sign[:, None] * torch.cat([sign, sign.new_ones(1)])
    return value.flip(-1)


def jitter_colours(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Exposure, contrast, saturation, tint and noise of images [B, S, 3, H, W], the same for all frames of a scene."""

    def draw(low: float, high: float, *more: int) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (len(images), 1, *(more or (1,)), 1, 1)).astype(np.float32))

    gamma, contrast, saturation = draw(-0.4, 0.4).exp(), draw(0.6, 1.3), draw(0.0, 1.5)
    images = images.clamp(min=1e-4) ** gamma
    grey = images.mean(dim=2, keepdim=True)
    images = grey + saturation * (images - grey)
    images = (images - 0.5) * contrast + 0.5 + draw(-0.1, 0.1)
    images = images * draw(0.85, 1.15, 3)
    noise = torch.from_numpy(rng.standard_normal(images.shape, dtype=np.float32))
    return (images + draw(0.0, 0.02) * noise).clamp(0, 1)


def _like(flags: Tensor, value: Tensor) -> Tensor:
    return flags.view(-1, *[1] * (value.ndim - 1))
