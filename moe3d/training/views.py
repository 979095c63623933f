"""Which frames of a sequence to show together, and how they come to the network's size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moe3d.data import AllFramesSkipped, Dataset, Sample
from moe3d.geometry import project, scale_intrinsics, unproject
from moe3d.losses import MIN_VALID_PIXELS

REACH = 8  # frames to either side of the first, per frame wanted
TRIES = 4  # candidates looked at, per frame wanted
OVERLAP_GRID = 48  # pixels along the longer side on which overlap is measured
SAME_SURFACE = 0.05  # relative difference of depth up to which two views see one surface


def draw_frames(dataset: Dataset, sequence: str, count: int, rng: np.random.Generator, min_overlap: float) -> Sample:
    """``count`` frames of a sequence, of which each sees at least ``min_overlap`` of what the first one sees.

    The first is drawn from the whole sequence, the others from its neighbourhood, broken frames and those without
    depth left out. Where too few overlap enough, the ones that overlap most are taken.

    Raises:
        AllFramesSkipped: the sequence has fewer frames that can be used, as far as was looked.
    """
    names = dataset.sequences[sequence]
    first, anchor = _draw_anchor(dataset, sequence, names, rng)
    near = [i for i in range(first - REACH * count, first + REACH * count + 1) if i != first and 0 <= i < len(names)]
    found: list[tuple[float, Sample]] = []
    for i in rng.permutation(near)[: TRIES * count]:
        if sum(overlap >= min_overlap for overlap, _ in found) >= count - 1:
            break
        candidate = _load(dataset, sequence, names[i])
        if candidate is not None and candidate.images.shape == anchor.images.shape:
            found.append((view_overlap(anchor, candidate), candidate))
    if len(found) < count - 1:
        raise AllFramesSkipped(f"'{sequence}' has fewer than {count} frames of one size near '{names[first]}'")
    found.sort(key=lambda entry: -min(entry[0], min_overlap))  # stable: among those that overlap enough, as drawn
    return _join([anchor, *(sample for _, sample in found[: count - 1])])


def view_overlap(a: Sample, b: Sample) -> float:
    """How much of the first frame of either sample the other one sees: the smaller of the two fractions.

    A valid point of one view is seen by the other if it falls into its image, in front of it, on a pixel whose depth
    agrees to 5%. Measured on a coarse grid; 0 without poses or valid depth.
    """
    if a.extrinsics is None or b.extrinsics is None:
        return 0.0
    return min(_seen_by(a, b), _seen_by(b, a))


def fit_to_size(sample: Sample, size: tuple[int, int]) -> Sample:
    """Resize to cover (height, width), then cut what sticks out on either side; the intrinsics follow.

    Images are averaged (bilinear, antialiased); depth is picked (nearest), since a mean of two surfaces lies on
    neither.
    """
    height, width = sample.depth.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    covering = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
    top, left = ((covering[axis] - size[axis]) // 2 for axis in (0, 1))
    rows, columns = slice(top, top + size[0]), slice(left, left + size[1])
    depth, valid = (
        F.interpolate(m[:, None].float(), covering, mode="nearest-exact")[:, 0, rows, columns]
        for m in (sample.depth, sample.valid)
    )
    images = sample.images
    if covering != (height, width):
        images = F.interpolate(images, covering, mode="bilinear", antialias=True).clamp(0, 1)
    intrinsics = scale_intrinsics(sample.intrinsics, covering[1] / width, covering[0] / height)
    intrinsics[:, 0, 2] -= left
    intrinsics[:, 1, 2] -= top
    return Sample(
        images=images[..., rows, columns].contiguous(),
        depth=depth.contiguous(),
        valid=valid.bool().contiguous(),
        intrinsics=intrinsics,
        extrinsics=sample.extrinsics,
        names=sample.names,
    )


def _draw_anchor(dataset: Dataset, sequence: str, names: Sequence[str], rng: np.random.Generator) -> tuple[int, Sample]:
    for i in rng.permutation(len(names))[: 2 * TRIES]:
        sample = _load(dataset, sequence, names[i])
        if sample is not None:
            return int(i), sample
    raise AllFramesSkipped(f"'{sequence}' has no frame with more than {MIN_VALID_PIXELS} valid pixels, as far as tried")


def _load(dataset: Dataset, sequence: str, name: str) -> Sample | None:
    """The frame, or None if it is broken or has too little depth."""
    try:
        sample = dataset.load(sequence, [name])
    except AllFramesSkipped:
        return None
    return sample if sample.valid.sum() > MIN_VALID_PIXELS else None


def _seen_by(a: Sample, b: Sample) -> float:
    step = max(1, max(a.depth.shape[-2:]) // OVERLAP_GRID)
    coarse = a.valid[0, ::step, ::step]
    if not coarse.any():
        return 0.0
    points = unproject(a.depth[0], a.intrinsics[0], a.extrinsics[0])[::step, ::step][coarse]  # type: ignore[index]
    pixels, depth = project(points, b.intrinsics[0], b.extrinsics[0])  # type: ignore[index]
    height, width = b.depth.shape[-2:]
    column, row = pixels.nan_to_num(-1).round().long().unbind(-1)
    inside = (depth > 0) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    there = b.depth[0][row.clamp(0, height - 1), column.clamp(0, width - 1)]
    same = (there - depth).abs() <= SAME_SURFACE * depth.abs()
    return float((inside & same).float().mean())


def _join(samples: Sequence[Sample]) -> Sample:
    def stack(key: str) -> Tensor:
        return torch.cat([getattr(sample, key) for sample in samples])

    return Sample(
        images=stack("images"),
        depth=stack("depth"),
        valid=stack("valid"),
        intrinsics=stack("intrinsics"),
        extrinsics=None if samples[0].extrinsics is None else stack("extrinsics"),
        names=[name for sample in samples for name in sample.names],
    )
