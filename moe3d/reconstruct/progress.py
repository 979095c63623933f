"""Progress on standard error: what is done, how long the rest takes, and the most memory that was needed."""

from __future__ import annotations

import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from tqdm import tqdm

T = TypeVar("T")


class Progress:
    """Bars, which appear only on a terminal. ``device`` is whose memory is watched."""

    device = torch.device("cpu")

    @contextmanager
    def bar(self, description: str, total: int, done: int = 0) -> Iterator[Any]:
        """A bar to ``update()`` ``total`` times, ``done`` of them already."""
        with _Bar(self, desc=description, total=total, initial=done, disable=None, leave=False) as bar:
            yield bar

    def over(self, items: Iterable[T], description: str, total: int) -> Iterator[T]:
        with self.bar(description, total) as bar:
            for item in items:
                yield item
                bar.update()

    def peak_memory(self) -> int:
        """Bytes: of the GPU's memory what PyTorch took at most, of the CPU's what the process took at most."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


class _Bar(tqdm):
    def __init__(self, progress: Progress, **options: Any) -> None:
        self._progress = progress
        super().__init__(**options)

    def update(self, n: float | None = 1) -> bool | None:
        if not self.disable:
            self.set_postfix_str(f"peak {self._progress.peak_memory() / 2**30:.1f} GiB", refresh=False)
        return super().update(n)
