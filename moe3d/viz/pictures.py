"""Pictures of depth, gates and errors: pure functions from arrays to [H, W, 3] uint8 sRGB."""

from __future__ import annotations

import numpy as np

from moe3d.viz.colors import INVALID, apply_colormap, decode_srgb, encode_srgb, expert_colors

ERROR_LIMIT = 1.25
"""The ratio of predicted to true depth at which the error's colour is full: delta1's limit."""
FLYING = np.array([255, 45, 110], dtype=np.uint8)
LANDED = np.array([70, 190, 235], dtype=np.uint8)
EMPTY = np.array([24, 26, 30], dtype=np.uint8)
"""Where a picture of points shows none."""


def depth_range(depth: np.ndarray, valid: np.ndarray) -> tuple[float, float]:
    """(near, far) for :func:`depth_picture`: the 1st and 99th percentile of the valid depths.

    Raises:
        ValueError: there is no valid depth.
    """
    if not valid.any():
        raise ValueError("valid must hold at least one pixel, got none")
    near, far = np.percentile(depth[valid], [1, 99])
    return float(near), float(far)


def depth_picture(depth: np.ndarray, near: float, far: float) -> np.ndarray:
    """Depth in the map "depth" by its logarithm, so that equal ratios are equal steps.

    Args:
        depth: [H, W] planar depth; what is not finite and positive becomes grey.
        near, far: the depths of the map's two ends, 0 < near <= far, in depth's unit.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        position = np.log(depth / near) / max(np.log(far / near), 1e-6)
    return apply_colormap(np.where(depth > 0, position, np.nan), "depth")


def error_picture(prediction: np.ndarray, truth: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The ratio of predicted to true depth in the map "error", full colour from ``ERROR_LIMIT`` and its inverse.

    Args:
        prediction, truth: [H, W] positive depths of one scale.
        known: [H, W] bool, where both may be read; the rest is grey.
    """
    ratio = np.log(prediction / truth, where=known, out=np.full(truth.shape, np.nan))
    return apply_colormap(0.5 + 0.5 * ratio / np.log(ERROR_LIMIT), "error")


def gate_picture(weights: np.ndarray) -> np.ndarray:
    """Each expert's colour (:func:`~moe3d.viz.colors.expert_colors`), mixed by its weight as light mixes.

    Args:
        weights: [K, H, W], summing to 1 over K; grey where not finite.
    """
    finite = np.isfinite(weights).all(axis=0)
    light = np.einsum("khw,kc->hwc", np.where(finite, weights, 0), decode_srgb(expert_colors(len(weights))))
    return np.where(finite[..., None], encode_srgb(light), INVALID)


def entropy_picture(entropy: np.ndarray, num_experts: int) -> np.ndarray:
    """The gate's entropy [H, W], in nats, in the map "entropy" from 0 to log K."""
    return apply_colormap(entropy / max(np.log(num_experts), 1e-6), "entropy")


def flying_picture(image: np.ndarray, flying: np.ndarray, boundary: np.ndarray) -> np.ndarray:
    """Boundary pixels marked on a darkened grey image: ``FLYING`` where the prediction flies, ``LANDED`` elsewhere.

    Args:
        image: [H, W, 3] uint8.
        flying, boundary: [H, W] bool, as in :class:`~moe3d.evaluation.FlyingPoints`.
    """
    grey = np.rint(image @ np.array([0.299, 0.587, 0.114]) * 0.55).astype(np.uint8)
    picture = np.repeat(grey[..., None], 3, axis=2)
    picture[boundary] = LANDED
    picture[flying] = FLYING
    return picture


def point_picture(points: np.ndarray, colors: np.ndarray, size: tuple[int, int], focal: float) -> np.ndarray:
    """Points seen by a pinhole camera, 2x2 pixels each, the nearest in front, on dark grey.

    Args:
        points: [N, 3] in the camera's frame (x right, y down, z forward); what is not in front of it is left out.
        colors: [N, 3] uint8.
        size: (height, width) in pixels.
        focal: in pixels; the principal point is the picture's centre.
    """
    height, width = size
    seen = points[:, 2] > 0
    order = np.argsort(-points[seen, 2], kind="stable")  # the nearest is painted last
    points, colors = points[seen][order], colors[seen][order]
    corner = np.floor(points[:, :2] * (focal / points[:, 2:]) + [width / 2, height / 2]).astype(int)
    pixel = (corner[:, None] + [[0, 0], [1, 0], [0, 1], [1, 1]]).reshape(-1, 2)
    inside = ((pixel >= 0) & (pixel < [width, height])).all(axis=1)
    picture = np.full((height, width, 3), EMPTY, dtype=np.uint8)
    picture[pixel[inside, 1], pixel[inside, 0]] = np.repeat(colors, 4, axis=0)[inside]
    return picture
