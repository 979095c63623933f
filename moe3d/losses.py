"""Training losses: MoE3D's and VGGT's, and those that teach the embedded model from scratch.

Every depth loss is a mean over valid pixels, and zero with zero gradients where there are none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe3d.geometry import invert_extrinsics, unproject

MIN_VALID_PIXELS = 100  # VGGT: a scene whose first frame has no more teaches no camera


def normalise_scale(depth: Tensor, valid: Tensor, intrinsics: Tensor, extrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """VGGT's normalisation of a scene (arXiv 2503.11651, section 3.4): one unit is the points' mean distance.

    The world becomes the first frame's camera; depths and translations are divided by the mean distance of the valid
    points of all frames to its origin.

    Args:
        depth: [B, S, H, W] planar, in any unit.
        valid: [B, S, H, W] bool.
        intrinsics: [B, S, 3, 3] in pixels.
        extrinsics: [B, S, 3, 4] world-to-camera, in depth's unit.

    Returns:
        Depth [B, S, H, W] and extrinsics [B, S, 3, 4] in the new unit and world.
    """
    extrinsics = _relative_to_first(extrinsics)
    distance = unproject(depth, intrinsics, extrinsics).norm(dim=-1)
    total = (distance * valid).sum(dim=(1, 2, 3))
    scale = (total / (valid.sum(dim=(1, 2, 3)) + 1e-3)).clamp(1e-6, 1e6)
    rotation, translation = extrinsics[..., :3], extrinsics[..., 3:]
    return depth / scale[:, None, None, None], torch.cat([rotation, translation / scale[:, None, None, None]], dim=-1)


def moe_depth_loss(depth: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """MoE3D's depth loss (arXiv 2601.05208): plain L2 on the mixed depth.

    Args:
        depth, truth: [..., H, W] in one unit, VGGT's normalised one in training.
        valid: [..., H, W] bool.

    Returns:
        The mean squared error over all valid pixels, in that unit squared.
    """
    return _mean_of_valid(torch.where(valid, depth - truth, 0.0) ** 2, valid)


def entropy_loss(entropy: Tensor) -> Tensor:
    """MoE3D's entropy loss (arXiv 2601.05208): the mean of -sum_k w_k log w_k over all pixels, in nats.

    Args:
        entropy: [..., H, W], as the head returns it (``depth_entropy``).
    """
    return entropy.mean()


def camera_loss(pose_enc_list: Sequence[Tensor], truth: Tensor, counts: Tensor, gamma: float = 0.6) -> Tensor:
    """VGGT's camera loss: L1 on every iteration's pose encoding, the later the heavier.

    Per iteration k of n: the mean |error| of the translation (each number's error at most 100), of the quaternion, and
    half that of the fields of view; weighted gamma^(n-1-k), and the sum divided by n.

    Args:
        pose_enc_list: n tensors [B, S, 9] (see :func:`moe3d.geometry.encode_pose`).
        truth: [B, S, 9] in VGGT's normalised unit and world.
        counts: [B] bool, the scenes that count: VGGT takes those whose first frame has more than 100 valid pixels.
        gamma: 0.6 in VGGT.
    """
    if not counts.any():
        return sum((pose.sum() * 0 for pose in pose_enc_list), truth.new_zeros(()))
    loss = truth.new_zeros(())
    for remaining, pose in enumerate(reversed(pose_enc_list)):
        error = (pose - truth)[counts].abs()
        translation, rotation, view = error[..., :3].clamp(max=100), error[..., 3:7], error[..., 7:]
        loss = loss + gamma**remaining * (translation.mean() + rotation.mean() + 0.5 * view.mean())
    return loss / len(pose_enc_list)


def log_depth_loss(depth: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """The mean |log depth - log truth| over valid pixels, in nats: a relative error that sees near and far alike.

    Args:
        depth, truth: [..., H, W], positive where valid, in one unit.
        valid: [..., H, W] bool.
    """
    return _mean_of_valid(_log_error(depth, truth, valid).abs(), valid)


def log_gradient_loss(depth: Tensor, truth: Tensor, valid: Tensor, scales: int = 4) -> Tensor:
    """Multi-scale gradient matching of log depth (Li and Snavely, "MegaDepth", arXiv 1804.00607), in nats.

    The log error's horizontal and vertical differences between neighbours 1, 2, 4, ... pixels apart on a grid of that
    spacing, their absolute values averaged over pairs of valid pixels, then over the scales.

    Args:
        depth, truth: [..., H, W], positive where valid, in one unit.
        valid: [..., H, W] bool.
        scales: number of spacings.
    """
    error = _log_error(depth, truth, valid)
    loss = error.new_zeros(())
    for step in (2**scale for scale in range(scales)):
        e, v = error[..., ::step, ::step], valid[..., ::step, ::step]
        loss = loss + _mean_of_valid(e.diff(dim=-1).abs(), v[..., 1:] & v[..., :-1])
        loss = loss + _mean_of_valid(e.diff(dim=-2).abs(), v[..., 1:, :] & v[..., :-1, :])
    return loss / scales


def confidence_loss(confidence: Tensor, depth: Tensor, truth: Tensor, valid: Tensor, alpha: float = 0.2) -> Tensor:
    """Teaches the confidence c alone to be alpha / e, e = |log depth - log truth|: the mean of c e - alpha log c.

    VGGT's confidence-weighted loss (arXiv 2503.11651, equation 2) with the error detached, so that the depth is not
    drawn to where it is easy.

    Args:
        confidence: [..., H, W], at least 1.
        depth, truth: [..., H, W], positive where valid, in one unit.
        valid: [..., H, W] bool.
        alpha: the relative error at which the confidence is 1.
    """
    error = _log_error(depth.detach(), truth, valid).abs()
    return _mean_of_valid(confidence * error - alpha * confidence.log(), valid)


def _relative_to_first(extrinsics: Tensor) -> Tensor:
    """[B, S, 3, 4] with the first camera as the world."""
    bottom = extrinsics.new_tensor([0, 0, 0, 1]).expand(*extrinsics.shape[:-2], 1, 4)
    to_world = invert_extrinsics(extrinsics[:, :1])
    return extrinsics @ torch.cat([to_world, bottom[:, :1]], dim=-2)


def _log_error(depth: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """log depth - log truth, 0 (and no gradient) where not valid."""
    return torch.where(valid, depth, 1.0).log() - torch.where(valid, truth, 1.0).log()


def _mean_of_valid(values: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp(min=1)
