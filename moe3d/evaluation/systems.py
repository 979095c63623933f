"""What is judged: a folder of prediction files, or a model that is run here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from moe3d.data import Sample
from moe3d.evaluation.predictions import Predictions, read_predictions
from moe3d.geometry import decode_pose

PATCH_SIZE = 14


class System(Protocol):
    """Anything that predicts the frames of a sample."""

    name: str

    def predict(self, sequence: str, sample: Sample) -> Predictions:
        """Predictions of at least the frames that the sample has ground truth for, in any order."""
        ...


class FileSystem:
    """Predictions from ``folder/<sequence>.npz``; the sequence that was read last stays in memory.

    Raises:
        NotADirectoryError: there is no such folder.
    """

    def __init__(self, name: str, folder: str | os.PathLike[str]) -> None:
        self.name, self.folder = name, Path(folder)
        if not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is not a folder: predictions are read from FOLDER/<sequence>.npz")
        self._last: tuple[str, Predictions] | None = None

    def predict(self, sequence: str, sample: Sample) -> Predictions:
        if self._last is None or self._last[0] != sequence:
            self._last = None  # before the next one comes
            self._last = sequence, read_predictions(self.folder, sequence)
        return self._last[1]


class ModelSystem:
    """A model with VGGT's interface, given all frames of a sample together.

    Each axis of an image is resized to a multiple of 14, nothing is cropped.

    Args:
        name: what the report calls it.
        model: in eval mode.
        width: pixels of the images' longer side, a multiple of 14.
        dtype: that the backbone computes in (autocast); VGGT's heads switch that off for themselves.
    """

    def __init__(self, name: str, model: nn.Module, width: int, dtype: torch.dtype = torch.float32) -> None:
        self.name, self.model, self.width, self.dtype = name, model, width, dtype
        self._device = next(model.parameters()).device

    def predict(self, sequence: str, sample: Sample) -> Predictions:
        images = resize_images(sample.images, self.width).to(self._device)
        autocast = torch.autocast(self._device.type, self.dtype, enabled=self.dtype != torch.float32)
        with torch.inference_mode(), autocast:
            output = self.model(images)
        extrinsics, intrinsics = decode_pose(output["pose_enc"][0].double().cpu(), (images.shape[2], images.shape[3]))
        points = output.get("world_points")
        return Predictions(
            frames=sample.names,
            depth=_array(output["depth"][0, ..., 0]),
            intrinsics=intrinsics.numpy(),
            extrinsics=extrinsics.numpy(),
            points=None if points is None else _array(points[0]),
        )


def resize_images(images: Tensor, width: int) -> Tensor:
    """[S, 3, H, W] in [0, 1] to [S, 3, h, w], bicubic as in VGGT's loader: the longer side becomes ``width``."""
    from PIL import Image

    scale = width / max(images.shape[-2:])
    height, width = (max(round(side * scale / PATCH_SIZE), 1) * PATCH_SIZE for side in images.shape[-2:])
    pixels = (images * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    resized = [Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC) for image in pixels]
    return torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2).float() / 255


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
