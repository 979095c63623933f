"""Metrics of a model's depth on held-out scenes and on Motorcycle, and of predictors that look at nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import nn

from moe3d.data import open_dataset
from moe3d.data.sample import Sample
from moe3d.data.synthetic import SyntheticScenes
from moe3d.evaluation import Frame, aggregate_boundary, aggregate_depth, boundary_report, depth_metrics
from moe3d.models.mini import PATCH_SIZE

SIZE = (168, 224)  # of the held-out scenes
MOTORCYCLE_WIDTH = 336
METRICS = ("abs_rel", "delta1", "si_f1", "flying_rate")


def validate(model: nn.Module, count: int = 16) -> dict[str, dict[str, float]]:
    """Metrics of the first validation scenes, from one frame and from two."""
    return {f"{frames} frame(s)": evaluate(model, scenes("val", count), frames) for frames in (1, 2)}


def evaluate(model: nn.Module, samples: Sequence[Sample], frames: int) -> dict[str, float]:
    """Metrics of the first frame's depth, predicted from each sample's first ``frames`` frames."""
    return _metrics(samples, lambda sample: predict_first(model, sample, frames))


def trivial_metrics(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """The best that can be had without looking: a constant depth, and the best vertical ramp.

    The ramp's depth or inverse depth is linear in the row; its slope is the one of the highest delta1 on these very
    samples, which favours it.
    """
    slopes = [(ratio, power) for ratio in np.geomspace(0.4, 6, 28) for power in (1, -1)]
    best = max(slopes, key=lambda slope: aggregate_depth([_depth(_ramp(s, *slope), s) for s in samples])["delta1"])
    return {
        "constant": _metrics(samples, lambda sample: _ramp(sample, 1.0, 1)),
        "ramp": _metrics(samples, lambda sample: _ramp(sample, *best)),
    }


@torch.no_grad()
def predict_first(model: nn.Module, sample: Sample, frames: int) -> np.ndarray:
    """The first frame's depth [h, w] from the sample's first ``frames`` frames; the training mode is put back."""
    training = model.training
    model.eval()
    depth = model(sample.images[:frames])["depth"][0, 0, ..., 0].numpy()
    model.train(training)
    return depth


@lru_cache
def scenes(split: str, count: int) -> tuple[Sample, ...]:
    """The first scenes of a split, two frames each."""
    dataset = SyntheticScenes(split, SIZE, frames=2)
    return tuple(dataset[i] for i in range(count))


@lru_cache
def motorcycle(width: int = MOTORCYCLE_WIDTH) -> tuple[Sample]:
    """The pair, its photographs resized to ``width`` and the nearest multiple of 14; the truth at full size."""
    sample = open_dataset("motorcycle").load("motorcycle", ["left", "right"])
    height = round(width * sample.images.shape[-2] / sample.images.shape[-1] / PATCH_SIZE) * PATCH_SIZE
    images = torch.nn.functional.interpolate(sample.images, (height, width), mode="bilinear", antialias=True)
    return (replace(sample, images=images),)


def _metrics(samples: Sequence[Sample], predict: Callable[[Sample], np.ndarray]) -> dict[str, float]:
    """Depth errors are median-aligned per image and weighted by pixels; the flying rate is total over total."""
    predictions = [predict(sample) for sample in samples]
    depth = [_depth(prediction, sample) for prediction, sample in zip(predictions, samples, strict=True)]
    boundary = [
        boundary_report(prediction, *_truth(sample)) for prediction, sample in zip(predictions, samples, strict=True)
    ]
    means = aggregate_depth(depth) | aggregate_boundary(boundary)
    return {key: round(means[key], 4) for key in METRICS}


def _depth(prediction: np.ndarray, sample: Sample) -> dict:
    return depth_metrics(Frame(prediction, *_truth(sample), resample="bilinear"))


def _truth(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    return sample.depth[0].numpy(), sample.valid[0].numpy()


def _ramp(sample: Sample, ratio: float, power: int) -> np.ndarray:
    """Depth whose ``power`` is linear in the row, ``ratio`` times as far at the top as at the bottom."""
    height, width = sample.depth.shape[-2:]
    column = np.linspace(ratio**power, 1.0, height) ** power
    return np.repeat(column[:, None], width, axis=1)
