"""The per-pixel half of the operation: gate softmax, activations, decode modes, entropy; and its derivative.

Equations: MoE3D (arXiv 2601.05208), w = softmax(g / tau), D = sum_k w_k D_k, H = -sum_k w_k log w_k; "argmax" is the
decoding of MDA (arXiv 2606.02552). Shapes: ``z`` [B, K, O, H, W], ``logits`` [B, K, H, W] or None where K = 1.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe3d.ops.activations import ACTIVATIONS, CHANNELS, CONF_ACTIVATIONS, Activation
from moe3d.ops.types import HeadOptions, MoEOutput

MODES = ("mean", "argmax", "switch")
SWITCH_MIN_WEIGHT = 0.01  # experts at or below it have no say in whether the hypotheses disagree

_FLOAT32_TINY = torch.finfo(torch.float32).tiny
_LARGEST_GAP = math.log(torch.finfo(torch.float32).max)  # a larger one would overflow, and means the same


class _Mixture(NamedTuple):
    """Everything both directions need."""

    weights: Tensor  #           [B, K, H, W]
    log_weights: Tensor  #       [B, K, H, W]
    entropy: Tensor  #           [B, H, W]
    hypotheses: Tensor  #        [B, K, O-1, H, W]
    confidences: Any  #          [B, K, 1, H, W], or None without a confidence
    decode: Tensor  #            [B, K, 1, H, W], the weights of the decoded value: ``weights``, or one-hot where chosen
    chosen: Tensor | None  #     [B, 1, 1, H, W] bool, where one expert was chosen; None = nowhere


def _evaluate(z: Tensor, logits: Tensor | None, options: HeadOptions) -> _Mixture:
    channels = options.prediction_channels(z.shape[2])
    hypotheses = ACTIVATIONS[options.activation].forward(z[:, :, :channels])
    confidences = None
    if options.conf_activation is not None:
        confidences = CONF_ACTIVATIONS[options.conf_activation].forward(z[:, :, channels:])
    if logits is None:
        weights, log_weights = torch.ones_like(z[:, :, 0]), torch.zeros_like(z[:, :, 0])
    else:
        scaled = _scale_logits(logits, options.temperature)
        weights, log_weights = torch.softmax(scaled, 1), torch.log_softmax(scaled, 1)
    decode, chosen = weights.unsqueeze(2), None
    if options.mode != "mean" and logits is not None:
        chosen = _where_to_choose(weights, hypotheses, options)
        decode = torch.where(chosen, _one_hot(logits, weights).unsqueeze(2), decode)
    return _Mixture(weights, log_weights, _entropy(weights, log_weights), hypotheses, confidences, decode, chosen)


def _scale_logits(logits: Tensor, temperature: float) -> Tensor:
    """(g - max g) / T: the shift comes first, so that a small temperature overflows towards weight 0, not to NaN."""
    return (logits - logits.amax(1, keepdim=True)) / max(temperature, _FLOAT32_TINY)


def _times_log(weights: Tensor, log_weights: Tensor) -> Tensor:
    """w log w with 0 log 0 = 0; NaN stays NaN."""
    return torch.where(weights == 0, 0, weights * log_weights)


def _entropy(weights: Tensor, log_weights: Tensor) -> Tensor:
    return _times_log(weights, log_weights).sum(1).neg().clamp(0.0, math.log(weights.shape[1]))


def _one_hot(logits: Tensor, weights: Tensor) -> Tensor:
    """1 at the most probable expert (the first of equals), 0 elsewhere; a NaN gate must not look like a choice."""
    one_hot = torch.zeros_like(weights).scatter(1, logits.argmax(1, keepdim=True), 1.0)
    return torch.where(weights.isnan(), weights, one_hot)


def _where_to_choose(weights: Tensor, hypotheses: Tensor, options: HeadOptions) -> Tensor:
    """Everywhere ("argmax"), or ("switch") where max_k d_k > exp(gap) min_k d_k over the experts with w_k > 0.01."""
    if options.mode == "argmax":
        return torch.ones_like(weights[:, :1], dtype=torch.bool).unsqueeze(2)
    heard = (weights > SWITCH_MIN_WEIGHT).unsqueeze(2)
    largest = torch.where(heard, hypotheses, -torch.inf).amax(1, keepdim=True)
    smallest = torch.where(heard, hypotheses, torch.inf).amin(1, keepdim=True)
    return (largest > math.exp(min(options.gap, _LARGEST_GAP)) * smallest).any(2, keepdim=True)  # in any channel


def _decoded(mixture: _Mixture, values: Tensor) -> Tensor:
    """sum_k w_k v_k over experts, [B, K, c, H, W] -> [B, c, H, W]; what was not chosen may overflow unnoticed."""
    terms = mixture.decode * values
    if mixture.chosen is not None:
        terms = torch.where(mixture.chosen & (mixture.decode == 0), 0, terms)
    return terms.sum(1)


def mix(z: Tensor, logits: Tensor | None, options: HeadOptions) -> MoEOutput:
    """From the experts' raw outputs and the gate's logits to the head's outputs."""
    m = _evaluate(z, logits, options)
    return MoEOutput(
        prediction=_decoded(m, m.hypotheses),
        confidence=None if m.confidences is None else _decoded(m, m.confidences).squeeze(1),
        entropy=m.entropy,
        weights=m.weights if options.return_experts else None,
        hypotheses=m.hypotheses if options.return_experts else None,
    )


def mix_vjp(z: Tensor, logits: Tensor | None, options: HeadOptions, cotangents: MoEOutput) -> tuple[Tensor, Any]:
    """Gradients to ``z`` and ``logits`` (None without a gate); a cotangent is None where its output was not used."""
    m = _evaluate(z, logits, options)
    channels = options.prediction_channels(z.shape[2])
    grad_z = torch.zeros_like(z)
    grad_d = torch.zeros_like(m.hypotheses)
    grad_decode = torch.zeros_like(m.weights)
    if cotangents.prediction is not None:
        grad = cotangents.prediction.unsqueeze(1)
        grad_d += m.decode * grad
        grad_decode += (m.hypotheses * grad).sum(2)
    if cotangents.confidence is not None and options.conf_activation is not None:
        grad = cotangents.confidence[:, None, None]
        grad_z[:, :, channels:] = _vjp(CONF_ACTIVATIONS[options.conf_activation], z[:, :, channels:], m.decode * grad)
        grad_decode += (m.confidences * grad).squeeze(2)
    if cotangents.hypotheses is not None:
        grad_d += cotangents.hypotheses
    grad_z[:, :, :channels] = _vjp(ACTIVATIONS[options.activation], z[:, :, :channels], grad_d)
    if logits is None:
        return grad_z, None
    if m.chosen is not None:  # the choice has no slope: there the gate learns from entropy and weights alone
        grad_decode = torch.where(m.chosen.squeeze(2), 0, grad_decode)
    if cotangents.weights is not None:
        grad_decode += cotangents.weights
    return grad_z, _softmax_vjp(m, grad_decode, cotangents.entropy) / max(options.temperature, _FLOAT32_TINY)


def _vjp(activation: Activation, y: Tensor, grad: Tensor) -> Tensor:
    """No gradient in, none out: an expert that overflows where another one was chosen must not turn 0 into NaN."""
    return torch.where((grad == 0).all(CHANNELS, keepdim=True), 0, activation.vjp(y, grad))


def _softmax_vjp(m: _Mixture, grad_w: Tensor, grad_entropy: Tensor | None) -> Tensor:
    """Through softmax and entropy; dH/ds_k = -w_k (log w_k + H), finite where w_k underflows."""
    grad = m.weights * (grad_w - (m.weights * grad_w).sum(1, keepdim=True))
    if grad_entropy is not None:
        slope = _times_log(m.weights, m.log_weights) + m.weights * m.entropy.unsqueeze(1)
        grad -= slope * grad_entropy.unsqueeze(1)
    return grad
