"""A dataset in memory, and predictions of it, for tests of the evaluation."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from moe3d.data import AllFramesSkipped, Sample, Skipped
from moe3d.data.sample import check_frames
from moe3d.evaluation import Predictions
from moe3d.evaluation.points import Similarity
from moe3d.geometry import scale_intrinsics

SIZE = (12, 16)


class MemoryDataset:
    """Each sequence a sample of layered surfaces seen from a few cameras; ``broken`` frames are skipped."""

    has_poses = True
    max_depth = math.inf

    def __init__(self, frames: dict[str, int], size: tuple[int, int] = SIZE, broken=(), invalid=()) -> None:
        self.samples = {
            name: _sample(seed, count, size, name, invalid) for seed, (name, count) in enumerate(frames.items())
        }
        self.broken = set(broken)
        self.skipped: list[Skipped] = []

    @property
    def sequences(self):
        return {name: sample.names for name, sample in self.samples.items()}

    def load(self, sequence, frames):
        check_frames(self.sequences, sequence, frames)
        good = [name for name in frames if (sequence, name) not in self.broken]
        self.skipped += [Skipped(sequence, name, "broken") for name in frames if name not in good]
        if not good:
            raise AllFramesSkipped("none is left")
        sample = self.samples[sequence]
        index = [sample.names.index(name) for name in good]
        valid = sample.valid[index] & (sample.depth[index] < self.max_depth)
        parts = {key: getattr(sample, key)[index] for key in ("images", "depth", "intrinsics", "extrinsics")}
        return Sample(**parts, valid=valid, names=good)


def perfect(sample: Sample, size: tuple[int, int] | None = None) -> Predictions:
    """The truth as a prediction, on its own grid or read at the nearest pixels of another."""
    depth, intrinsics = sample.depth, sample.intrinsics
    if size is not None:
        (height, width), (h, w) = depth.shape[1:], size
        rows, columns = (np.arange(h) + 0.5) * height / h, (np.arange(w) + 0.5) * width / w
        depth = depth[:, rows.astype(int)][:, :, columns.astype(int)]
        intrinsics = scale_intrinsics(intrinsics, w / width, h / height)
    extrinsics = torch.eye(3, 4).expand(len(depth), 3, 4) if sample.extrinsics is None else sample.extrinsics
    arrays = (tensor.double().numpy().copy() for tensor in (depth, intrinsics, extrinsics))
    return Predictions(sample.names, *arrays)


def moved(predictions: Predictions, similarity: Similarity) -> Predictions:
    """The same reconstruction in another world frame and unit."""
    rotation = predictions.extrinsics[..., :3] @ similarity.rotation.T
    shift = similarity.scale * predictions.extrinsics[..., 3] - rotation @ similarity.translation
    return Predictions(
        predictions.frames,
        predictions.depth * similarity.scale,
        predictions.intrinsics,
        np.concatenate([rotation, shift[..., None]], axis=-1),
        None if predictions.points is None else similarity.apply(predictions.points),
    )


class MemorySystem:
    """Predicts by a function of the sample."""

    def __init__(self, name, function):
        self.name, self.function, self.asked_for = name, function, []

    def predict(self, sequence, sample):
        self.asked_for.append((sequence, sample.names))
        return self.function(sample)


def _sample(seed, count, size, sequence, invalid) -> Sample:
    rng = np.random.default_rng(seed)
    height, width = size
    depth = 3 + 0.05 * np.arange(width) + 0.03 * np.arange(height)[:, None] + np.zeros((count, 1, 1))
    for frame in depth:
        for _ in range(3):
            top, left = rng.integers(height - 4), rng.integers(width - 4)
            frame[top : top + 5, left : left + 6] = rng.uniform(1, 2.5)
    names = [f"frame-{i}" for i in range(count)]
    valid = rng.random(depth.shape) < 0.95
    for index, name in enumerate(names):
        valid[index] &= (sequence, name) not in invalid
    rotation = Rotation.from_rotvec(rng.normal(0, 0.2, (count, 3))).as_matrix()
    intrinsics = np.array([[width, 0, width / 2 - 0.4], [0, width * 1.1, height / 2 - 0.6], [0, 0, 1]])
    return Sample(
        images=torch.from_numpy(rng.random((count, 3, *size))).float(),
        depth=torch.from_numpy(np.where(valid, depth, 0)).float(),
        valid=torch.from_numpy(valid),
        intrinsics=torch.from_numpy(np.tile(intrinsics, (count, 1, 1))).float(),
        # In float64: rounded rotations are no rotations, which would limit what a test can ask for.
        extrinsics=torch.from_numpy(np.concatenate([rotation, rng.normal(0, 0.5, (count, 3, 1))], axis=-1)),
        names=names,
    )
