"""A pool of rendered training scenes on disk, filled by a background process while training reads from it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from moe3d.atomic import whole_file
from moe3d.data.sample import Sample
from moe3d.data.synthetic import SyntheticScenes

SCENES_PER_SHARD = 16
VIEWS = 2
# (height, width) by turns. Rendering and a step both cost by the pixel, so most shards are small; the large ones teach
# the network what the same world looks like at the resolutions at which it is used.
SIZES = (
    (112, 154), (126, 168), (140, 196), (112, 154), (154, 126), (112, 168),
    (126, 168), (168, 238), (112, 154), (140, 182), (126, 126), (196, 266),
)  # fmt: skip

Shard = dict[str, Tensor]


def render_pool(folder: Path, shards: int, sizes: tuple[tuple[int, int], ...] = SIZES) -> None:
    """Render the pool's missing shards; shard i holds the next ``SCENES_PER_SHARD`` scenes of the training split."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(shards):
        path = folder / f"shard-{index:05d}.safetensors"
        if not path.exists():
            _write(path, _render(index, sizes[index % len(sizes)]))


def as_shard(samples: Sequence[Sample]) -> Shard:
    """Samples of one size as a shard: images as uint8, depth as float16, the cameras as they are."""
    return {
        "images": torch.stack([(sample.images * 255).round().byte() for sample in samples]),
        "depth": torch.stack([sample.depth.half() for sample in samples]),
        "intrinsics": torch.stack([sample.intrinsics for sample in samples]),
        "extrinsics": torch.stack([cast(Tensor, sample.extrinsics) for sample in samples]),
    }


def _render(index: int, size: tuple[int, int]) -> Shard:
    scenes = SyntheticScenes("train", size, VIEWS)
    return as_shard([scenes[index * SCENES_PER_SHARD + i] for i in range(SCENES_PER_SHARD)])


def _write(path: Path, shard: Shard) -> None:
    from safetensors.torch import save_file

    with whole_file(path) as unfinished:
        save_file(shard, unfinished)


def _read(path: Path) -> Shard:
    from safetensors.torch import load_file

    return load_file(path)


def read_shards(folder: Path, count: int) -> list[Shard]:
    """The pool's first shards, in order."""
    return [_read(path) for path in sorted(folder.glob("shard-*.safetensors"))[:count]]


class Pool:
    """Batches from the shards that are there; :meth:`refresh` finds those that have appeared since."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: dict[tuple[int, int], list[Shard]] = {}
        self._loaded: set[str] = set()

    def __len__(self) -> int:
        """Shards loaded."""
        return len(self._loaded)

    def refresh(self) -> None:
        """Load the shards that have appeared."""
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            if path.name not in self._loaded:
                shard = _read(path)
                height, width = shard["depth"].shape[-2:]
                self._shards.setdefault((height, width), []).append(shard)
                self._loaded.add(path.name)

    def wait(self) -> None:
        """Return as soon as there is a shard."""
        self.refresh()
        while not self._loaded:
            time.sleep(0.5)
            self.refresh()

    def draw(self, rng: np.random.Generator, frames: int) -> Shard:
        """A batch of ``frames`` frames of one size, [B, S, ...]: single frames, or for a third of the batches pairs."""
        sizes = sorted(self._shards)
        counts = np.array([len(self._shards[size]) for size in sizes])
        size = sizes[rng.choice(len(sizes), p=counts / counts.sum())]
        views = VIEWS if rng.random() < 1 / 3 else 1
        scenes = [self._scene(rng, size, views) for _ in range(max(1, frames // views))]
        return {key: torch.stack([scene[key] for scene in scenes]) for key in scenes[0]}

    def _scene(self, rng: np.random.Generator, size: tuple[int, int], views: int) -> Shard:
        shards = self._shards[size]
        shard = shards[rng.integers(len(shards))]
        scene = rng.integers(len(shard["depth"]))
        order = rng.permutation(VIEWS)[:views]
        return {key: value[scene][order] for key, value in shard.items()}
