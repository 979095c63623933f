"""The plain data that travels from the functional API to a backend: tensors, options, outputs."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class HeadTensors(NamedTuple):
    """The operation's tensors, in the operator's order; the same shape also holds one gradient, or one flag, for each.

    B images, C channels, K experts, Hd and Hg hidden channels of an expert and of the gate, O output channels.

    Attributes:
        x: [B, C, h, w].
        expert_w1, expert_b1: [K, Hd, C, 3, 3] and [K, Hd].
        expert_w2, expert_b2: [K, O, Hd] and [K, O].
        gate_w1, gate_b1: [Hg, C, 3, 3] and [Hg]; None, as the two below, where K = 1.
        gate_w2, gate_b2: [K, Hg] and [K].
        gate_logits: [B, K, H, W] or None.
        pos_x, pos_y: [W, C/2] and [H, C/2], or None; never differentiated.
    """

    x: Any
    expert_w1: Any
    expert_b1: Any
    expert_w2: Any
    expert_b2: Any
    gate_w1: Any
    gate_b1: Any
    gate_w2: Any
    gate_b2: Any
    gate_logits: Any
    pos_x: Any
    pos_y: Any

    @property
    def has_gate(self) -> bool:
        return self.gate_w1 is not None


PARAMETERS = HeadTensors._fields[1:9]  # the tensors that are the head's own
PRECISIONS = ("auto", "ieee", "tf32", "bf16")


class HeadOptions(NamedTuple):
    """Everything about a call that is not a tensor (see :func:`moe3d.functional.moe_head` for the meanings)."""

    height: int
    width: int
    temperature: float
    activation: str
    conf_activation: str | None
    mode: str
    gap: float
    return_experts: bool
    skip_below: float
    precision: str

    def prediction_channels(self, out_channels: int) -> int:
        """How many of an expert's O output channels are prediction; the one after them, if any, is confidence."""
        return out_channels if self.conf_activation is None else out_channels - 1


class MoEOutput(NamedTuple):
    """What the head returns: float32 for 16-bit inputs, otherwise the dtype of ``x``.

    Attributes:
        prediction: [B, O-1, H, W] (all O channels without a confidence).
        confidence: [B, H, W], or None without one.
        entropy: [B, H, W], of the gate's weights, in nats.
        weights: [B, K, H, W], with ``return_experts``; else None.
        hypotheses: [B, K, O-1, H, W], each expert's prediction, with ``return_experts``; else None.
    """

    prediction: Tensor
    confidence: Tensor | None
    entropy: Tensor
    weights: Tensor | None
    hypotheses: Tensor | None
