"""What a run reports while it runs: numbers and pictures for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np


class Logbook:
    """Writes event files to ``folder/tensorboard``.

    Args:
        folder: None for a logbook that keeps nothing.
        step: where the run begins; what a run that was interrupted has logged beyond it is hidden.
    """

    def __init__(self, folder: Path | None, step: int = 0) -> None:
        self._writer = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def numbers(self, group: str, values: Mapping[str, float | None], step: int) -> None:
        """Scalars, those that are undefined left out."""
        if self._writer is None:
            return
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"{group}/{name}", value, step)
        self._writer.flush()

    def pictures(self, pictures: Mapping[str, np.ndarray], step: int) -> None:
        """[H, W, 3] uint8 images by name."""
        if self._writer is None:
            return
        for name, picture in pictures.items():
            self._writer.add_image(name, picture, step, dataformats="HWC")
        self._writer.flush()
