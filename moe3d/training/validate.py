"""Metrics of predicted depth on held-out scenes and on Motorcycle, and of predictors that look at nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from moe3d.data import Sample, open_dataset
from moe3d.data.synthetic import SyntheticScenes
from moe3d.evaluation import (
    Frame,
    aggregate_depth,
    depth_metrics,
    edge_overlap,
    errors_near_boundaries,
    flying_points,
    si_boundary_f1,
    sobel_edge_maps,
    sobel_f1,
)
from moe3d.losses import load_balance
from moe3d.models import MINI_WIDTH
from moe3d.models.mini import PATCH_SIZE
from moe3d.training.scenes import Batch, to_device
from moe3d.viz.pictures import depth_picture, depth_range, entropy_picture, gate_picture

SIZE = (168, 224)  # of the held-out scenes
METRICS = (
    "abs_rel", "delta1", "abs_rel_boundary", "delta1_boundary", "si_f1", "si_precision", "si_recall", "sobel_f1",
    "edge_miou", "flying_rate",
)  # fmt: skip
_MEANS = METRICS[2:-1]  # over images; depth errors weigh pixels, the flying rate is total over total


def judge(depth: np.ndarray, truth: np.ndarray, valid: np.ndarray, edge_filter: float | None = None) -> dict[str, Any]:
    """One image's part of :func:`summarise`: depth [h, w] in any unit, truth [H, W] in metres, valid [H, W]."""
    frame = Frame(depth, truth, valid, edge_filter=edge_filter)
    si, near, flying = si_boundary_f1(frame), errors_near_boundaries(frame), flying_points(frame)
    return {
        "depth": depth_metrics(Frame(depth, truth, valid, resample="bilinear", edge_filter=edge_filter)),
        "abs_rel_boundary": near["abs_rel"],
        "delta1_boundary": near["delta1"],
        "si_f1": si.f1,
        "si_precision": si.precision,
        "si_recall": si.recall,
        "sobel_f1": sobel_f1(frame).f1,
        "edge_miou": edge_overlap(*sobel_edge_maps(frame)).miou,
        "flying": int(flying.flying.sum()),
        "boundary": int(flying.boundary.sum()),
    }


def summarise(judged: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """``METRICS`` of at least one image's :func:`judge`; None where undefined."""
    depth = aggregate_depth([one["depth"] for one in judged])
    means = {key: _mean([one[key] for one in judged]) for key in _MEANS}
    boundary = sum(one["boundary"] for one in judged)
    rate = sum(one["flying"] for one in judged) / boundary if boundary else None
    values: dict[str, Any] = {"abs_rel": depth["abs_rel"], "delta1": depth["delta1"], **means, "flying_rate": rate}
    return {key: None if values[key] is None else round(values[key], 4) for key in METRICS}


@dataclass(frozen=True)
class ValidationReport:
    """What a validation found."""

    metrics: dict[str, float | None]
    """``METRICS`` of the first frames, and of a mixture its gate's ``entropy`` (nats), each expert's ``mean_weight/k``
    and ``chosen/k``, and the number of ``dead_experts``."""
    pictures: dict[str, np.ndarray]
    """Of the first scene: image, depth, truth, gate and entropy, [H, W, 3] uint8."""


class Validation:
    """The same held-out scenes, again and again.

    Args:
        batches: of one scene each, read when they are first needed.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = iter(batches)
        self._held: list[Batch] = []

    @torch.no_grad()
    def run(self, network: nn.Module, device: torch.device | str = "cpu") -> ValidationReport:
        """Judge the first frame of every scene; the network's training flags are put back.

        Every process of a distributed run computes all of it: a sharded network needs them all for its forward.
        """
        self._held.extend(self._batches)
        flags = {module: module.training for module in network.modules()}
        network.eval()
        try:
            seen = [first_frame(network(to_device(batch, torch.device(device)))) for batch in self._held]
        finally:
            for module, training in flags.items():
                module.training = training
        truths = [first_truth(batch) for batch in self._held]
        judged = [judge(one["depth"].numpy(), *truth) for one, truth in zip(seen, truths, strict=True)]
        return ValidationReport(
            metrics=summarise(judged) | gate_summary(seen),
            pictures=_pictures(self._held[0]["images"][0, 0].numpy(), seen[0], *truths[0]),
        )


def gate_summary(seen: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float | None]:
    """Of first frames' ``weights`` [K, H, W] and ``entropy`` [H, W]; nothing of a head without a mixture."""
    if "weights" not in seen[0] or len(seen[0]["weights"]) < 2:
        return {}
    balances = [load_balance(one["weights"][None, None]) for one in seen]
    weight, chosen = (torch.stack(values).mean(0) for values in zip(*balances, strict=True))
    numbers: dict[str, float | None] = {
        "entropy": float(torch.stack([one["entropy"].mean() for one in seen]).mean()),
        "dead_experts": float(balances[0]._replace(mean_weight=weight, chosen=chosen).dead.sum()),
    }
    for expert in range(len(weight)):
        numbers |= {f"mean_weight/{expert}": float(weight[expert]), f"chosen/{expert}": float(chosen[expert])}
    return {key: None if value is None else round(value, 4) for key, value in numbers.items()}


def validate(model: nn.Module, count: int = 16) -> dict[str, dict[str, float | None]]:
    """Metrics of the first synthetic validation scenes, from one frame and from two."""
    return {f"{frames} frame(s)": evaluate(model, scenes("val", count), frames) for frames in (1, 2)}


def evaluate(model: nn.Module, samples: Sequence[Sample], frames: int) -> dict[str, float | None]:
    """Metrics of the first frame's depth, predicted from each sample's first ``frames`` frames."""
    return _metrics(samples, lambda sample: predict_first(model, sample, frames))


def trivial_metrics(samples: Sequence[Sample], known: Sequence[Sample]) -> dict[str, dict[str, float | None]]:
    """What can be had without looking at the image: a constant depth, and vertical ramps.

    A ramp's depth or inverse depth is linear in the row. The slope of ``ramp`` is the one of the highest delta1 on
    the ``known`` samples; that of ``best_ramp`` the best on ``samples`` itself, whose truth no predictor knows.
    """
    slopes = _best_slope(known), _best_slope(samples)
    return {
        "constant": _metrics(samples, lambda sample: _ramp(sample, 1.0, 1)),
        "ramp": _metrics(samples, lambda sample: _ramp(sample, *slopes[0])),
        "best_ramp": _metrics(samples, lambda sample: _ramp(sample, *slopes[1])),
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
    """The first scenes of a split of the synthetic dataset, two frames each."""
    dataset = SyntheticScenes(split, SIZE, frames=2)
    return tuple(dataset[i] for i in range(count))


@lru_cache
def motorcycle(width: int = MINI_WIDTH) -> tuple[Sample]:
    """The pair, its photographs resized to ``width`` and the nearest multiple of 14; the truth at full size."""
    sample = open_dataset("motorcycle").load("motorcycle", ["left", "right"])
    height = round(width * sample.images.shape[-2] / sample.images.shape[-1] / PATCH_SIZE) * PATCH_SIZE
    images = torch.nn.functional.interpolate(sample.images, (height, width), mode="bilinear", antialias=True)
    return (replace(sample, images=images),)


def _metrics(samples: Sequence[Sample], predict: Callable[[Sample], np.ndarray]) -> dict[str, float | None]:
    return summarise([judge(predict(sample), *_truth(sample)) for sample in samples])


def _best_slope(samples: Sequence[Sample]) -> tuple[float, int]:
    slopes = [(float(ratio), power) for ratio in np.geomspace(0.4, 6, 28) for power in (1, -1)]
    return max(slopes, key=lambda slope: _delta1(samples, *slope))


def _delta1(samples: Sequence[Sample], ratio: float, power: int) -> float:
    frames = [Frame(_ramp(sample, ratio, power), *_truth(sample), resample="bilinear") for sample in samples]
    return aggregate_depth([depth_metrics(frame) for frame in frames])["delta1"] or 0.0


def _truth(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    return sample.depth[0].numpy(), sample.valid[0].numpy()


def _ramp(sample: Sample, ratio: float, power: int) -> np.ndarray:
    """Depth whose ``power`` is linear in the row, ``ratio`` times as far at the top as at the bottom."""
    height, width = sample.depth.shape[-2:]
    column = np.linspace(ratio**power, 1.0, height) ** power
    return np.repeat(column[:, None], width, axis=1)


def first_frame(predictions: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """depth and entropy [H, W] and, of a mixture, weights and hypotheses [K, H, W] of the first scene's first frame."""
    names = ("entropy", "weights", "hypotheses")
    found = {name: predictions[f"depth_{name}"] for name in names if f"depth_{name}" in predictions}
    return {name: value[0, 0].cpu() for name, value in {"depth": predictions["depth"].squeeze(-1), **found}.items()}


def first_truth(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Depth in metres and validity [H, W] of the first scene's first frame."""
    return (batch["depth"][0, 0] * batch["unit"][0]).numpy(), batch["valid"][0, 0].numpy()


def _pictures(image: np.ndarray, seen: Mapping[str, torch.Tensor], truth: np.ndarray, valid: np.ndarray) -> dict:
    near, far = depth_range(truth, valid)
    depth = seen["depth"].numpy()
    scale = np.median(truth[valid]) / np.median(depth[valid])
    pictures = {
        "image": (image.transpose(1, 2, 0) * 255).round().astype(np.uint8),
        "truth": depth_picture(np.where(valid, truth, np.nan), near, far),
        "depth": depth_picture(depth * scale, near, far),
    }
    if "weights" in seen and len(seen["weights"]) > 1:
        pictures["gate"] = gate_picture(seen["weights"].numpy())
        pictures["entropy"] = entropy_picture(seen["entropy"].numpy(), len(seen["weights"]))
    return pictures


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None
