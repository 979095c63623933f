"""The plain data that travels from the functional API to a backend: tensors, options, outputs."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class HeadTensors(NamedTuple):
    """The operation's tensors, in the operator's order; the same shape also holds one gradient, or one flag, for each.

    B images, C channels, K experts, Hd and Hg hidden channels of an expert and of the gate, O output channels.
    """

    x: Any  #            [B, C, h, w]
    expert_w1: Any  #    [K, Hd, C, 3, 3]
    expert_b1: Any  #    [K, Hd]
    expert_w2: Any  #    [K, O, Hd]
    expert_b2: Any  #    [K, O]
    gate_w1: Any  #      [Hg, C, 3, 3], or None (as the three below) where K = 1
    gate_b1: Any  #      [Hg]
    gate_w2: Any  #      [K, Hg]
    gate_b2: Any  #      [K]
    gate_logits: Any  #  [B, K, H, W] or None
    pos_x: Any  #        [W, C/2] or None; never differentiated
    pos_y: Any  #        [H, C/2] or None; never differentiated

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
    """What the head returns: float32 for 16-bit inputs, otherwise the dtype of ``x``."""

    prediction: Tensor  #         [B, O-1, H, W] (all O channels without a confidence)
    confidence: Tensor | None  #  [B, H, W]
    entropy: Tensor  #            [B, H, W], nats
    weights: Tensor | None  #     [B, K, H, W]
    hypotheses: Tensor | None  #  [B, K, O-1, H, W]
