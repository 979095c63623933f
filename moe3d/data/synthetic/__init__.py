"""Procedural scenes with exact depth, normals and cameras, deterministic by seed.

Rooms, yards and table tops full of composed objects - racks, fences, wheels with spokes, pipes, perforated plates -
are ray-cast from several nearby cameras, at 0.4 to some 20 metres. Equal arguments give equal bytes, a scene is the
same at every image size, and no global random state is read or advanced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike

import numpy as np
import torch
from torch import Tensor

from moe3d.data.sample import Sample, Skipped, check_frames
from moe3d.data.synthetic.render import Renderer, Sensor, expose
from moe3d.data.synthetic.scenes import MAX_VIEWS, draw_scene

# First seed and number of scenes of each split; the ranges do not meet.
SPLITS = {"train": (0, 1_000_000), "val": (1_000_000, 64), "test": (2_000_000, 128)}
_SALT = 0x6D6F6533  # keeps the streams apart from those of other users of small seeds


@dataclass(frozen=True)
class SyntheticSample(Sample):
    """A :class:`~moe3d.data.sample.Sample` with surface normals."""

    normals: Tensor
    """[S, 3, H, W] float32 unit normals in each camera's frame, towards the camera; 0 where not valid."""


def render_scene(seed: int, size: tuple[int, int] = (168, 168), frames: int | Sequence[int] = 4) -> SyntheticSample:
    """Render views of the scene that ``seed`` stands for.

    Args:
        seed: a non-negative integer.
        size: (height, width) in pixels, each at least 2.
        frames: how many views, or the indices of the views wanted; a scene has 8. View k is the same in either form.

    Returns:
        Frames named ``frame-0000`` ...; pixels that see the sky have depth 0 and are not valid.

    Raises:
        ValueError: for a negative seed, an image smaller than 2x2, or views beyond 0..7.
    """
    views = [int(k) for k in frames] if isinstance(frames, Sequence) else list(range(frames))
    if not views or min(views) < 0 or max(views) >= MAX_VIEWS:
        raise ValueError(f"frames must be 1 to {MAX_VIEWS}, or indices from 0 to {MAX_VIEWS - 1}, got {frames!r}")
    if seed < 0:
        raise ValueError(f"seed must be a non-negative integer, got {seed}")
    if len(size) != 2 or min(size) < 2:
        raise ValueError(f"size must be (height, width) with both at least 2, got {tuple(size)}")
    scene = draw_scene(_generator(seed, 0))
    renderer = Renderer(scene)
    sensor = _draw_sensor(_generator(seed, 1))
    images, depths, normals = [], [], []
    for k in views:
        view = renderer.view(scene.cameras[k], size)
        images.append(expose(view.radiance, sensor, _generator(seed, 2, k)))
        depths.append(view.depth)
        normals.append(view.normals)
    depth = torch.from_numpy(np.stack(depths))
    return SyntheticSample(
        images=_channels_first(images),
        depth=depth,
        valid=depth > 0,
        intrinsics=_float32([scene.cameras[k].intrinsics(size) for k in views]),
        extrinsics=_float32([scene.cameras[k].extrinsics() for k in views]),
        names=[_frame_name(k) for k in views],
        normals=_channels_first(normals),
    )


class SyntheticScenes:
    """A split of the synthetic scenes as a sequence: ``scenes[i]`` renders the i-th.

    Args:
        split: "train" (1,000,000 scenes), "val" (64) or "test" (128); no scene is in two.
        size: (height, width) in pixels.
        frames: views per scene, 1 to 8.

    Raises:
        ValueError: for an unknown split.
    """

    def __init__(self, split: str = "train", size: tuple[int, int] = (168, 168), frames: int = 4) -> None:
        if split not in SPLITS:
            raise ValueError(f"unknown split '{split}' of the synthetic scenes, expected one of {', '.join(SPLITS)}")
        self.split, self.size, self.frames = split, size, frames
        self._first, self._count = SPLITS[split]

    def __len__(self) -> int:
        return self._count

    def seed(self, index: int) -> int:
        """The seed of the split's scene ``index``; IndexError beyond its end."""
        if not 0 <= index < self._count:
            raise IndexError(f"scene index must be 0 to {self._count - 1} in split '{self.split}', got {index}")
        return self._first + index

    def __getitem__(self, index: int) -> SyntheticSample:
        return render_scene(self.seed(index), self.size, self.frames)


class SyntheticDataset:
    """The synthetic scenes behind :func:`moe3d.data.open_dataset`: ``scene-000000`` ... with eight frames each.

    Frames are 378x504. The training split lists its first 10,000 scenes; :class:`SyntheticScenes` reaches them all.
    """

    size = (378, 504)
    listed = 10_000
    has_poses = True
    max_depth = math.inf

    def __init__(self, root: str | PathLike[str] | None = None, split: str | None = None) -> None:
        if root is not None:
            raise ValueError(f"the synthetic dataset is generated and takes no root, got '{root}'")
        self._scenes = SyntheticScenes(split or "test")
        names = [_frame_name(k) for k in range(MAX_VIEWS)]
        count = min(len(self._scenes), self.listed)
        self.sequences = {f"scene-{i:06d}": names for i in range(count)}
        self.skipped: list[Skipped] = []

    def load(self, sequence: str, frames: Sequence[str]) -> SyntheticSample:
        """Render the named frames."""
        check_frames(self.sequences, sequence, frames)
        names = self.sequences[sequence]
        seed = self._scenes.seed(int(sequence.removeprefix("scene-")))
        sample = render_scene(seed, self.size, [names.index(name) for name in frames])
        valid = sample.valid & (sample.depth < self.max_depth)
        return replace(sample, valid=valid, depth=torch.where(valid, sample.depth, 0))


def _generator(*key: int) -> np.random.Generator:
    return np.random.default_rng([_SALT, *key])


def _draw_sensor(rng: np.random.Generator) -> Sensor:
    warmth, green = rng.normal(0, 0.06), rng.normal(0, 0.02)
    return Sensor(
        brightness=np.exp(rng.uniform(np.log(0.12), np.log(0.35))),
        contrast=rng.uniform(1.0, 1.5),
        white_balance=np.array([1 + warmth, 1 + green, 1 - warmth]),
        blur=rng.choice([0.0, rng.uniform(0.2, 0.8)]),
        noise=np.exp(rng.uniform(np.log(0.003), np.log(0.03))),
        vignetting=rng.uniform(0, 0.3),
    )


def _frame_name(index: int) -> str:
    return f"frame-{index:04d}"


def _channels_first(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _float32(matrices: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(matrices)).float()
