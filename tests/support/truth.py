"""The operation's definition, written a second time: plain PyTorch and autograd, no line of the package.

In float64 it is the truth. In a lower precision it is "plain PyTorch at the same dtype", against which a backend's
error is measured: convolutions in ``conv``, everything per pixel (activations, softmax, sums over experts) in ``mix``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moe3d.ops.types import MoEOutput
from support.problems import Problem


def _inv_log(y: Tensor) -> Tensor:
    return y.sign() * torch.expm1(y.abs())


def _xy_inv_log(y: Tensor) -> Tensor:
    x, y, z = y.unbind(-3)
    z = _inv_log(z)
    return torch.stack([x * z, y * z, z], -3)


def _norm_exp(y: Tensor) -> Tensor:
    length = y.square().sum(-3, keepdim=True).sqrt()
    return y / length.clamp(min=1e-8) * torch.expm1(length.clamp(min=1e-8))


# VGGT's activations; the first dimension that they see is channels ([..., channels, H, W]).
PREDICTION = {
    "linear": lambda y: y,
    "exp": lambda y: y.exp(),
    "relu": lambda y: y.relu(),
    "sigmoid": lambda y: 1 / (1 + (-y).exp()),
    "inv_log": _inv_log,
    "norm": lambda y: F.normalize(y, dim=-3, eps=0.0),
    "norm_exp": _norm_exp,
    "xy_inv_log": _xy_inv_log,
}
CONFIDENCE = {
    "expp1": lambda y: y.exp() + 1,
    "expp0": lambda y: y.exp(),
    "sigmoid": lambda y: 1 / (1 + (-y).exp()),
}


def evaluate(problem: Problem, conv: torch.dtype = torch.float64, mix: torch.dtype = torch.float64) -> MoEOutput:
    """All five outputs, differentiable with respect to the problem's tensors."""
    features = _features(problem, conv)
    z, logits = _raw(problem, features, conv, mix)
    channels = problem.prediction_channels
    hypotheses = PREDICTION[problem.option("activation")](z[:, :, :channels])
    log_weights = F.log_softmax(logits / problem.option("temperature"), 1)
    weights = log_weights.exp()
    decode = _decode_weights(problem, logits, weights, hypotheses)
    confidence = None
    if problem.option("conf_activation") is not None:
        confidence = (decode * CONFIDENCE[problem.option("conf_activation")](z[:, :, channels:])[:, :, 0]).sum(1)
    return MoEOutput(
        prediction=(decode.unsqueeze(2) * hypotheses).sum(1),
        confidence=confidence,
        entropy=-(weights * log_weights).sum(1),
        weights=weights,
        hypotheses=hypotheses,
    )


def _features(problem: Problem, conv: torch.dtype) -> Tensor:
    features = problem.tensors["x"].to(conv)
    if tuple(features.shape[-2:]) != tuple(problem.size) and len(features):
        features = F.interpolate(features, size=problem.size, mode="bilinear", align_corners=True)
    elif not len(features):
        features = features.new_zeros(0, features.shape[1], *problem.size)
    if problem.pos is not None:
        columns, rows = (table.to(conv) for table in problem.pos)
        (height, width), half = problem.size, columns.shape[1]
        by_column = columns.T.reshape(half, 1, width).expand(half, height, width)
        by_row = rows.T.reshape(half, height, 1).expand(half, height, width)
        features = features + torch.cat([by_column, by_row])
    return features


def _raw(problem: Problem, features: Tensor, conv: torch.dtype, mix: torch.dtype) -> tuple[Tensor, Tensor]:
    """The experts' outputs [B, K, O, H, W] and the gate's logits [B, K, H, W], before any activation."""
    t = {name: value.to(conv) for name, value in problem.tensors.items()}

    def two_layers(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.conv2d(F.relu(F.conv2d(features, w1, b1, padding=1)), w2[:, :, None, None], b2).to(mix)

    experts = [
        two_layers(t["expert_w1"][k], t["expert_b1"][k], t["expert_w2"][k], t["expert_b2"][k])
        for k in range(problem.experts)
    ]
    z = torch.stack(experts, 1)
    logits = torch.zeros_like(z[:, :, 0])
    if "gate_w1" in t:
        logits = two_layers(t["gate_w1"], t["gate_b1"], t["gate_w2"], t["gate_b2"])
    if "gate_logits" in t:
        logits = logits + problem.tensors["gate_logits"].to(mix)
    return z, logits


def _decode_weights(problem: Problem, logits: Tensor, weights: Tensor, hypotheses: Tensor) -> Tensor:
    if problem.option("mode") == "mean":
        return weights
    best = F.one_hot(logits.argmax(1), problem.experts).movedim(-1, 1).to(weights.dtype)
    if problem.option("mode") == "argmax":
        return best
    return torch.where(_disagreement(problem, weights, hypotheses)[0], best, weights)


def _disagreement(problem: Problem, weights: Tensor, hypotheses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, 1, H, W]: whether the experts that are heard disagree, and by channel their largest and smallest value."""
    heard = (weights > 0.01).unsqueeze(2)
    largest = hypotheses.masked_fill(~heard, -math.inf).amax(1)
    smallest = hypotheses.masked_fill(~heard, math.inf).amin(1)
    return (largest > math.exp(problem.option("gap")) * smallest).any(1, keepdim=True), largest, smallest


@torch.no_grad()
def decided(problem: Problem) -> Tensor:
    """[B, H, W] bool: pixels at which rounding cannot turn a choice of expert ("argmax", "switch") into another."""
    x = problem.tensors["x"]
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.2}[x.dtype]
    z, logits = _raw(problem, _features(problem, torch.float64), torch.float64, torch.float64)
    clear = torch.ones_like(logits[:, 0], dtype=torch.bool)
    if problem.option("mode") == "mean" or problem.experts == 1:
        return clear
    first, second = logits.topk(2, dim=1).values.unbind(1)
    clear &= first - second > tolerance
    if problem.option("mode") == "switch":
        hypotheses = PREDICTION[problem.option("activation")](z[:, :, : problem.prediction_channels])
        weights = F.softmax(logits / problem.option("temperature"), 1)
        audible = (weights.log() - math.log(0.01)).abs() > 2 * tolerance / problem.option("temperature")
        _, largest, smallest = _disagreement(problem, weights, hypotheses)
        bar = math.exp(problem.option("gap")) * smallest
        clear &= audible.all(1) & ((largest - bar).abs() > tolerance * (largest + bar + 1)).all(1)
    return clear


@torch.no_grad()
def distance_to_kinks(problem: Problem) -> float:
    """The smallest |value| that a ReLU or a sign-dependent activation sees: near 0, rounding decides the derivative."""
    t = {name: value.double() for name, value in problem.tensors.items()}
    features = _features(problem, torch.float64)
    w1, b1 = t["expert_w1"].flatten(0, 1), t["expert_b1"].flatten()
    if "gate_w1" in t:
        w1, b1 = torch.cat([w1, t["gate_w1"]]), torch.cat([b1, t["gate_b1"]])
    seen = [F.conv2d(features, w1, b1, padding=1)]
    if problem.option("activation") not in ("linear", "exp", "sigmoid"):
        seen.append(_raw(problem, features, torch.float64, torch.float64)[0])
    return min((value.abs().min().item() for value in seen if value.numel()), default=math.inf)
