"""Training losses: MoE3D's, VGGT's and MDA's, and those that teach the embedded model from scratch.

Functions take tensors. Modules take what a patched model predicts and a batch (see :class:`Term`), and can be summed
with weights that follow a :class:`Schedule`. Every depth loss is a mean over valid pixels, and zero with zero
gradients where there are none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe3d.geometry import invert_extrinsics, unproject

MIN_VALID_PIXELS = 100  # VGGT: a scene whose first frame has no more teaches no camera
DENSITIES = ("laplace", "gaussian")
SCHEDULES = ("constant", "linear", "cosine", "exponential")
DEAD_BELOW = 0.01  # mean weight under which an expert counts as dead


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


def l1_depth_loss(depth: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """The mean |depth - truth| over valid pixels, in their unit: the control of :func:`moe_depth_loss`.

    Args:
        depth, truth: [..., H, W] in one unit.
        valid: [..., H, W] bool.
    """
    return _mean_of_valid(torch.where(valid, depth - truth, 0.0).abs(), valid)


def mixture_nll(
    weights: Tensor,
    hypotheses: Tensor,
    truth: Tensor,
    valid: Tensor,
    scale: float | Tensor = 0.1,
    density: str = "laplace",
    log_depth: bool = True,
) -> Tensor:
    """Negative log-likelihood of the truth under the mixture p(d) = sum_k w_k f(d; d_k, scale), in nats.

    MoE3D's probabilistic reading (arXiv 2601.05208) made the loss, as MDA does (arXiv 2606.02552): an expert is not
    drawn to the mean of two surfaces. It is a density of log depth or of depth, so it may be below zero, and values of
    the two do not compare.

    Args:
        weights, hypotheses: [B, S, K, H, W], as a head with ``return_experts`` gives them.
        truth: [B, S, H, W] in the hypotheses' unit.
        valid: [B, S, H, W] bool.
        scale: of f: Laplace's b or the Gaussian's sigma, in nats of depth or in depth's unit; a number, or a tensor
            that broadcasts against ``hypotheses``.
        density: "laplace" or "gaussian".
        log_depth: f is a density of log depth.

    Returns:
        The mean over valid pixels.

    Raises:
        ValueError: an unknown density.
    """
    if density not in DENSITIES:
        raise ValueError(f"density must be one of {', '.join(DENSITIES)}, got {density!r}")
    seen = valid.unsqueeze(2)
    truth = torch.where(valid, truth, 1.0).unsqueeze(2)
    # Where nothing is valid an expert may be anything, infinite included: it must not reach the sum, nor its gradient.
    hypotheses = torch.where(seen, hypotheses, 1.0)
    error = hypotheses.log() - truth.log() if log_depth else hypotheses - truth
    scale = torch.as_tensor(scale, dtype=error.dtype, device=error.device)
    if density == "laplace":
        log_density = -error.abs() / scale - (2 * scale).log()
    else:
        log_density = -0.5 * (error / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)
    log_weights = weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
    return _mean_of_valid(-torch.logsumexp(log_weights + log_density, dim=2), valid)


def at_local_level(truth: Tensor, depth: Tensor, valid: Tensor, window: int) -> Tensor:
    """The truth moved to the prediction's own level: their ratio's mean over a window around each pixel taken away.

    How far away a whole object is cannot be told by the last block of a depth head, and is noise to it; on which side
    of an edge a pixel lies can. What is left is the latter.

    Args:
        truth, depth: [B, S, H, W], above 0 where valid; no gradient goes to ``depth``.
        valid: [B, S, H, W] bool.
        window: its side in pixels, odd; the mean is that of log depth over the window's valid pixels.

    Returns:
        [B, S, H, W]; 1 where not valid.
    """
    seen = valid.to(depth.dtype)
    ratio = torch.where(valid, depth.detach(), 1.0).log() - torch.where(valid, truth, 1.0).log()
    sums, counts = (_window_mean(m, window) for m in (ratio * seen, seen))
    level = sums / counts.clamp(min=torch.finfo(counts.dtype).eps)
    return torch.where(valid, truth * level.exp(), 1.0)


def _window_mean(values: Tensor, window: int) -> Tensor:
    """Around each pixel, with zeros beyond the border: along rows, then columns, as a square costs its area."""
    rows = F.avg_pool2d(values, (1, window), stride=1, padding=(0, window // 2))
    return F.avg_pool2d(rows, (window, 1), stride=1, padding=(window // 2, 0))


def expected_cost_loss(weights: Tensor, hypotheses: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """What it costs to pick an expert by the gate's odds: the mean of sum_k w_k |log d_k - log truth|, in nats.

    Unlike the likelihood it keeps on punishing weight on a wrong expert once the right one has most of it.

    Args:
        weights, hypotheses: [B, S, K, H, W].
        truth: [B, S, H, W], positive where valid, in the hypotheses' unit.
        valid: [B, S, H, W] bool.
    """
    seen = valid.unsqueeze(2)
    error = _log_error(hypotheses, truth.unsqueeze(2), seen.expand_as(hypotheses)).abs()
    return _mean_of_valid((weights * error).sum(2), valid)


class LoadBalance(NamedTuple):
    """How a gate shares the pixels out among K experts."""

    mean_weight: Tensor
    """[K], summing to 1."""
    chosen: Tensor
    """[K], the fraction of pixels where the expert has the largest weight, summing to 1."""

    @property
    def dead(self) -> Tensor:
        """[K] bool: mean weight below ``DEAD_BELOW``."""
        return self.mean_weight < DEAD_BELOW


@torch.no_grad()
def load_balance(weights: Tensor) -> LoadBalance:
    """The balance of a gate's weights [B, S, K, H, W] over all pixels."""
    experts = weights.shape[2]
    chosen = torch.bincount(weights.argmax(2).flatten(), minlength=experts) / (weights.numel() / experts)
    return LoadBalance(mean_weight(weights), chosen.to(weights.dtype))


def mean_weight(weights: Tensor) -> Tensor:
    """Each expert's mean weight [K] over all pixels of weights [B, S, K, H, W]."""
    return weights.mean(dim=(0, 1, 3, 4))


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


@dataclass(frozen=True)
class Schedule:
    """A number that changes over a run: from ``start`` to ``end`` over the first ``part`` of it, then constant.

    Args:
        start, end: the values; ``end=None`` means ``start``.
        kind: constant, linear, cosine (half a wave) or exponential (equal factors in equal times).
        part: of the run, above 0 and at most 1.

    Raises:
        ValueError: an unknown kind, a part out of range, a constant with two values, an exponential through zero.
    """

    start: float
    end: float | None = None
    kind: str = "constant"
    part: float = 1.0

    def __post_init__(self) -> None:
        end = self.start if self.end is None else self.end
        if self.kind not in SCHEDULES:
            raise ValueError(f"a schedule's kind must be one of {', '.join(SCHEDULES)}, got {self.kind!r}")
        if not (math.isfinite(self.start) and math.isfinite(end)):
            raise ValueError(f"a schedule's values must be finite, got {self.start} and {end}")
        if not 0 < self.part <= 1:
            raise ValueError(f"a schedule's part must be above 0 and at most 1, got {self.part}")
        if self.kind == "constant" and end != self.start:
            raise ValueError(f"a constant schedule has one value, got {self.start} and {end}")
        if self.kind == "exponential" and not self.start * end > 0:
            raise ValueError(f"an exponential schedule needs two values of one sign, got {self.start} and {end}")

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """From "VALUE" or "START:END:KIND" or "START:END:KIND:PART", as "0:0.05:linear:0.5"."""
        fields = text.split(":")
        try:
            if len(fields) == 1:
                return cls(float(fields[0]))
            if len(fields) in (3, 4):
                return cls(float(fields[0]), float(fields[1]), fields[2], *map(float, fields[3:]))
        except ValueError as error:
            raise ValueError(f"{text!r} is no schedule: {error}") from None
        raise ValueError(f"a schedule is VALUE or START:END:KIND[:PART], as 0:0.05:linear:0.5, got {text!r}")

    def at(self, progress: float) -> float:
        """The value at a progress from 0 to 1."""
        if self.end is None:
            return self.start
        x = min(1.0, progress / self.part)
        if self.kind == "exponential":
            return self.start * (self.end / self.start) ** x
        if self.kind == "cosine":
            x = 0.5 - 0.5 * math.cos(math.pi * x)
        return self.start + (self.end - self.start) * x


CONSTANT_ZERO, CONSTANT_ONE = Schedule(0.0), Schedule(1.0)


class _DepthLoss(nn.Module):
    """Adapts a function of depth, truth and valid."""

    function: Any

    def forward(self, predictions: Mapping[str, Any], batch: Mapping[str, Any]) -> Tensor:
        return self.function(predictions["depth"].squeeze(-1), batch["depth"], batch["valid"])


class MoEDepthLoss(_DepthLoss):
    """:func:`moe_depth_loss` of ``depth`` [B, S, H, W, 1]."""

    function = staticmethod(moe_depth_loss)


class L1DepthLoss(_DepthLoss):
    """:func:`l1_depth_loss` of ``depth`` [B, S, H, W, 1]."""

    function = staticmethod(l1_depth_loss)


class LogDepthLoss(_DepthLoss):
    """:func:`log_depth_loss` of ``depth`` [B, S, H, W, 1]."""

    function = staticmethod(log_depth_loss)


class MixtureNLL(nn.Module):
    """:func:`mixture_nll` of ``depth_weights`` and ``depth_hypotheses`` [B, S, K, H, W].

    Args:
        density, log_depth: as there.
        scale: of the density, fixed; or where every expert's learned scale starts.
        learned_experts: K, to learn one scale per expert; 0 keeps ``scale`` fixed.
        window: of :func:`at_local_level`, by the mixed depth; 0 for the truth as it is.

    Raises:
        ValueError: an unknown density, a scale that is not above 0, a window that is neither odd nor 0.
    """

    def __init__(
        self,
        density: str = "laplace",
        scale: float = 0.1,
        log_depth: bool = True,
        learned_experts: int = 0,
        window: int = 0,
    ) -> None:
        super().__init__()
        if density not in DENSITIES:
            raise ValueError(f"density must be one of {', '.join(DENSITIES)}, got {density!r}")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be a finite number above 0, got {scale!r}")
        if window and (window < 0 or window % 2 == 0):
            raise ValueError(f"window must be 0 or an odd number of pixels, got {window!r}")
        self.density, self.scale, self.log_depth, self.window = density, scale, log_depth, window
        self.log_scale = nn.Parameter(torch.full((learned_experts,), math.log(scale))) if learned_experts else None

    def forward(self, predictions: Mapping[str, Any], batch: Mapping[str, Any]) -> Tensor:
        scale = self.scale if self.log_scale is None else self.log_scale.exp()[:, None, None]
        weights, hypotheses = predictions["depth_weights"], predictions["depth_hypotheses"]
        truth, valid = batch["depth"], batch["valid"]
        if self.window:
            truth = at_local_level(truth, predictions["depth"].squeeze(-1), valid, self.window)
        return mixture_nll(weights, hypotheses, truth, valid, scale, self.density, self.log_depth)


class ExpectedCostLoss(nn.Module):
    """:func:`expected_cost_loss` of ``depth_weights`` and ``depth_hypotheses`` [B, S, K, H, W]."""

    def forward(self, predictions: Mapping[str, Any], batch: Mapping[str, Any]) -> Tensor:
        weights, hypotheses = predictions["depth_weights"], predictions["depth_hypotheses"]
        return expected_cost_loss(weights, hypotheses, batch["depth"], batch["valid"])


class EntropyLoss(nn.Module):
    """:func:`entropy_loss` of ``depth_entropy`` [B, S, H, W]."""

    def forward(self, predictions: Mapping[str, Any], batch: Mapping[str, Any]) -> Tensor:
        return entropy_loss(predictions["depth_entropy"])


class CameraLoss(nn.Module):
    """:func:`camera_loss` of ``pose_enc_list``; a scene counts by its first frame's valid pixels, and if the batch says
    which scenes' poses are known (``posed`` [B]), only if they are."""

    def forward(self, predictions: Mapping[str, Any], batch: Mapping[str, Any]) -> Tensor:
        counts = batch["valid"][:, 0].sum(dim=(1, 2)) > MIN_VALID_PIXELS
        if "posed" in batch:
            counts = counts & batch["posed"]
        return camera_loss(predictions["pose_enc_list"], batch["pose_enc"], counts)


@dataclass(frozen=True)
class Term:
    """One loss of a sum.

    ``loss(predictions, batch)`` takes a patched model's dictionary and a batch with ``depth`` [B, S, H, W], ``valid``
    [B, S, H, W] and ``pose_enc`` [B, S, 9] in one unit, VGGT's normalised one in training.
    """

    loss: nn.Module
    weight: Schedule
    relative: bool = False
    """The weight is in units of :attr:`WeightedLoss.unit`, so that it means the same for depths of any size."""


class WeightedLoss(nn.Module):
    """A weighted sum of losses, scene by scene: MoE3D's L = l_d L_MoE + l_c L_camera + l_e L_entropy and its like.

    A scene weighs the same however many of its pixels are valid, so that N processes with B scenes each compute what
    one process with N B scenes does.
    """

    def __init__(self, terms: Mapping[str, Term]) -> None:
        super().__init__()
        self.terms = dict(terms)
        self.losses = nn.ModuleDict({name: term.loss for name, term in terms.items()})
        self.unit = 1.0
        """What relative weights are relative to: a trainer puts the first term's value before training here."""

    def forward(
        self, predictions: Mapping[str, Any], batch: Mapping[str, Any], progress: float = 0.0
    ) -> dict[str, Tensor]:
        """Every term [B], unweighted, and their weighted sum ``total`` [B], at a progress from 0 to 1."""
        scenes = [(_scene(predictions, b), _scene(batch, b)) for b in range(len(batch["depth"]))]
        values = {name: torch.stack([loss(p, s) for p, s in scenes]) for name, loss in self.losses.items()}
        total = torch.stack([self._weight(name, progress) * value for name, value in values.items()]).sum(0)
        return values | {"total": total}

    def _weight(self, name: str, progress: float) -> float:
        term = self.terms[name]
        return term.weight.at(progress) * (self.unit if term.relative else 1.0)


def _scene(values: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Scene ``index`` of a batch, as a batch of one."""

    def pick(value: Any) -> Any:
        return [pick(v) for v in value] if isinstance(value, list) else value[index : index + 1]

    return {key: pick(value) for key, value in values.items() if isinstance(value, (Tensor, list)) and key != "names"}
