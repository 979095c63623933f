"""Training scenes: drawn from datasets by the number of the step alone, so that a run can go on from any step.

What a step sees depends on the seed, the step and the place in the step's global batch, and on nothing that happened
before. That is all the state a sampler needs: resumed runs, other numbers of processes and of loader workers see the
same scenes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moe3d.data import AllFramesSkipped, Sample, open_dataset
from moe3d.data import Dataset as SceneDataset
from moe3d.data.synthetic import SyntheticDataset
from moe3d.geometry import encode_pose
from moe3d.losses import normalise_scale
from moe3d.training.views import draw_frames, fit_to_size

DEFAULT_SIZES = {"hypersim": (378, 518), "vkitti2": (154, 518), "synthetic": (168, 224)}  # the first two: the paper's
SPLITS = {  # for training and for validation; where they are one, or there are none, places are held out
    "hypersim": ("train", "val"),
    "synthetic": ("train", "val"),
    "7scenes": ("train", "train"),
    "nyuv2": ("train", "train"),
    "vkitti2": ("train", "train"),
}
PHOTOGRAPHS = ("nyuv2",)  # whose frames show different places, so that they are not to be seen together
HELD_OUT = 10  # every tenth place, from the first on, is for validation
MIN_OVERLAP = 0.1
ATTEMPTS = 20  # at a scene, before a dataset is given up as unusable

Key = tuple[int, int]  # step, place in its global batch
Batch = dict[str, Any]


@dataclass(frozen=True)
class Corpus:
    """A dataset, the sequences of it that are used, and the size that it is trained at."""

    name: str
    dataset: SceneDataset
    sequences: tuple[str, ...]
    size: tuple[int, int]
    """(height, width), multiples of 14."""


def open_corpus(
    name: str, root: str | PathLike[str] | None, size: tuple[int, int] | None, frames: int, validation: bool = False
) -> Corpus:
    """Open a dataset for training, or the part of it that training leaves alone for ``validation``.

    Args:
        name, root: as for :func:`~moe3d.data.open_dataset`.
        size: (height, width); None for the dataset's own of ``DEFAULT_SIZES``.
        frames: that a sequence must have, at least.

    Raises:
        ValueError: as :func:`~moe3d.data.open_dataset`; no size for a dataset without a default one; several frames of
            a dataset whose frames show different places; no sequence with so many frames, or none for validation.
    """
    if frames > 1 and name in PHOTOGRAPHS:
        raise ValueError(f"frames must be 1 for the dataset '{name}', whose frames show different places, got {frames}")
    splits = SPLITS.get(name, (None, None))
    dataset = open_dataset(name, root, splits[validation])
    size = size or DEFAULT_SIZES.get(name)
    if size is None:
        raise ValueError(f"size must be given for the dataset '{name}', which has no default one")
    if isinstance(dataset, SyntheticDataset):
        dataset.size = size  # rendered as asked for, not shrunk
    sequences = list(dataset.sequences)
    if splits[0] == splits[1]:
        sequences = _places(sequences, validation)
    if validation and not sequences:
        raise ValueError(f"the dataset '{name}' has one place, so nothing to validate on: ask for 0 validation scenes")
    long_enough = tuple(sequence for sequence in sequences if len(dataset.sequences[sequence]) >= frames)
    if not long_enough:
        use = "validation" if validation else "training"
        raise ValueError(f"the dataset '{name}' has no sequence with {frames} frames or more for {use}")
    return Corpus(name, dataset, long_enough, size)


def _places(sequences: Sequence[str], validation: bool) -> list[str]:
    """The sequences of the places that are held out for validation, or of the others.

    A single place is for training.
    """
    places = sorted({_place(sequence) for sequence in sequences})
    held_out = set(places[::HELD_OUT]) if len(places) > 1 else set()
    return [sequence for sequence in sequences if (_place(sequence) in held_out) == validation]


def _place(sequence: str) -> str:
    """What a name begins with, up to the first underscore: Scene01_fog_Camera_0 shows what Scene01_rain_Camera_1 does.
    KITTI's drives begin with their date, and are a place each."""
    return sequence if re.match(r"\d{4}_\d\d_\d\d_drive_", sequence) else sequence.split("_")[0]


class LiveScenes(Dataset):
    """Scenes of one or more datasets, loaded, resized and normalised as they are asked for.

    Each step shows one dataset and one number of frames, so that all processes have the same shapes.

    Args:
        corpora: at least one.
        frames: the least and the largest number of frames per scene.
        seed: of the draws.
    """

    def __init__(self, corpora: Sequence[Corpus], frames: tuple[int, int], seed: int) -> None:
        self.corpora, self.frames, self.seed = tuple(corpora), frames, seed

    def __getitem__(self, key: Key) -> Batch:
        """One scene, as :func:`as_scene` makes it."""
        step, place = key
        of_step = np.random.default_rng([self.seed, step])
        corpus = self.corpora[of_step.integers(len(self.corpora))]
        frames = int(of_step.integers(self.frames[0], self.frames[1] + 1))
        return as_scene(self._draw(corpus, frames, np.random.default_rng([self.seed, step, place])))

    def _draw(self, corpus: Corpus, frames: int, rng: np.random.Generator) -> Sample:
        for _ in range(ATTEMPTS):
            sequence = corpus.sequences[rng.integers(len(corpus.sequences))]
            try:
                sample = draw_frames(corpus.dataset, sequence, frames, rng, MIN_OVERLAP)
            except AllFramesSkipped:
                continue
            return replace(
                fit_to_size(sample, corpus.size), names=[f"{corpus.name}/{sequence}/{name}" for name in sample.names]
            )
        raise ValueError(f"no {frames} usable frames were found in {ATTEMPTS} sequences of the dataset '{corpus.name}'")


def as_scene(sample: Sample) -> Batch:
    """A sample in VGGT's normalised unit and world; without poses every camera is taken for the first.

    Returns:
        images [S, 3, H, W] in [0, 1], depth and valid [S, H, W], pose_enc [S, 9], whether that is known [] (of a single
        frame it always is), the unit in metres [], the names.
    """
    extrinsics = sample.extrinsics
    if extrinsics is None:
        extrinsics = torch.eye(3, 4).repeat(len(sample.depth), 1, 1)
    depth, extrinsics = normalise_scale(
        sample.depth[None], sample.valid[None], sample.intrinsics[None], extrinsics[None]
    )
    size = (sample.depth.shape[-2], sample.depth.shape[-1])
    unit = sample.depth.sum() / depth.sum() if sample.valid.any() else torch.tensor(1.0)
    return {
        "images": sample.images,
        "depth": depth[0],
        "valid": sample.valid,
        "pose_enc": encode_pose(extrinsics[0], sample.intrinsics, size),
        "posed": torch.tensor(sample.extrinsics is not None or len(sample.depth) == 1),
        "unit": unit,
        "names": sample.names,
    }


def collate(scenes: Sequence[Batch]) -> Batch:
    """Scenes of one size as a batch [B, S, ...]; the names stay lists."""
    return {
        key: torch.stack([scene[key] for scene in scenes])
        if isinstance(value, Tensor)
        else [scene[key] for scene in scenes]
        for key, value in scenes[0].items()
    }


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors there."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in batch.items()
    }


@dataclass(frozen=True)
class Share:
    """What one process computes of a step: ``accumulate`` batches of ``batch`` scenes, of ``processes`` such shares."""

    batch: int
    accumulate: int = 1
    process: int = 0
    processes: int = 1

    def keys(self, step: int) -> Iterator[list[Key]]:
        """The keys of this process' batches in a step."""
        for turn in range(self.accumulate):
            first = (turn * self.processes + self.process) * self.batch
            yield [(step, place) for place in range(first, first + self.batch)]


def batches(scenes: Dataset, share: Share, first_step: int, steps: int, workers: int) -> Iterator[Batch]:
    """The batches of all steps from ``first_step`` on, loaded ahead by ``workers`` processes (0: when asked for)."""
    keys = [keys for step in range(first_step, steps) for keys in share.keys(step)]
    own = torch.Generator()  # a loader draws a seed for its workers, which no scene depends on
    return iter(DataLoader(scenes, batch_sampler=keys, collate_fn=collate, num_workers=workers, generator=own))
