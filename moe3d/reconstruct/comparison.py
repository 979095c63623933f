"""One scene through a stock model and through its patched twin: depth, points and metrics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from moe3d.data import Sample
from moe3d.evaluation import FlyingPoints, Frame, depth_metrics, fit_alignment, flying_points, si_boundary_f1
from moe3d.geometry import decode_pose, unproject
from moe3d.reconstruct.images import WIDTH, prepare_image

METRICS = ("abs_rel", "delta1", "si_f1", "flying_rate")


@dataclass(frozen=True)
class HeadResult:
    """What one head made of a scene's first view."""

    depth: np.ndarray
    """[h, w] planar depth on the model's grid, brought to metres by the ratio of medians to the ground truth."""
    on_truth: Frame
    """The same on the ground truth's grid (nearest), in metres."""
    points: np.ndarray
    """[h, w, 3] metres, in the first camera's frame: depth unprojected with the camera that the model predicts."""
    flying: FlyingPoints
    metrics: dict[str, float | None]
    """``METRICS``, AbsRel and delta1 after median alignment; None where undefined."""


@dataclass(frozen=True)
class SceneComparison:
    """A scene's first view, with stock and MoE head."""

    image: np.ndarray
    """[H, W, 3] uint8, as the dataset has it."""
    model_image: np.ndarray
    """[h, w, 3] uint8, as the model saw it."""
    truth: np.ndarray
    """[H, W] metres."""
    valid: np.ndarray
    """[H, W] bool."""
    stock: HeadResult
    moe: HeadResult
    weights: np.ndarray
    """[K, h, w], the gate's."""
    entropy: np.ndarray
    """[h, w] nats."""


def prepare_views(sample: Sample, width: int = WIDTH) -> Tensor:
    """A sample's images as the model takes them, [S, 3, h, w]: resized as VGGT's loader does."""
    return torch.stack([prepare_image(Image.fromarray(_to_bytes(image)), width) for image in sample.images])


def compare_heads(sample: Sample, images: Tensor, stock: nn.Module, moe: nn.Module) -> SceneComparison:
    """Run both models on a sample's views and judge their first view.

    Args:
        sample: views with ground truth, at least for the first.
        images: [S, 3, h, w] of :func:`prepare_views`; must cover the sample's images whole, as it does unless they are
            taller than wide.
        stock, moe: models with VGGT's interface; ``moe`` is patched with ``return_experts=True``.
    """
    truth, valid = sample.depth[0].numpy(), sample.valid[0].numpy()
    single, mixture = (_predict(model, images) for model in (stock, moe))
    return SceneComparison(
        image=_to_bytes(sample.images[0]),
        model_image=_to_bytes(images[0].cpu()),
        truth=truth,
        valid=valid,
        stock=_judge(single, truth, valid),
        moe=_judge(mixture, truth, valid),
        weights=mixture["depth_weights"][0, 0].float().cpu().numpy(),
        entropy=mixture["depth_entropy"][0, 0].float().cpu().numpy(),
    )


def _predict(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    with torch.inference_mode():
        return model(images)


def _judge(predictions: dict[str, Tensor], truth: np.ndarray, valid: np.ndarray) -> HeadResult:
    depth = predictions["depth"][0, 0, ..., 0].float().cpu()
    smooth = Frame(depth.numpy(), truth, valid, resample="bilinear")
    scale = 1.0
    if smooth.kept.any():
        scale = fit_alignment(smooth.prediction[smooth.kept], smooth.truth[smooth.kept], "median").scale
    metric = depth * scale
    on_truth = Frame(metric.numpy(), truth, valid)
    flying = flying_points(on_truth)
    errors = depth_metrics(smooth)
    height, width = depth.shape
    _, intrinsics = decode_pose(predictions["pose_enc"][0, 0].float().cpu(), (height, width))
    return HeadResult(
        depth=metric.numpy(),
        on_truth=on_truth,
        points=unproject(metric, intrinsics).numpy(),
        flying=flying,
        metrics={
            "abs_rel": errors["abs_rel"],
            "delta1": errors["delta1"],
            "si_f1": si_boundary_f1(on_truth).f1,
            "flying_rate": flying.rate,
        },
    )


def _to_bytes(image: Tensor) -> np.ndarray:
    """[3, H, W] in [0, 1] to [H, W, 3] uint8."""
    return (image * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
