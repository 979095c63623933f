"""Recipes: which head, which losses, which temperature. ``paper`` is MoE3D as published, ``best`` goes beyond it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe3d.losses import (
    CONSTANT_ONE,
    CONSTANT_ZERO,
    CameraLoss,
    EntropyLoss,
    ExpectedCostLoss,
    L1DepthLoss,
    LogDepthLoss,
    MixtureNLL,
    MoEDepthLoss,
    Schedule,
    Term,
    WeightedLoss,
)
from moe3d.nn import MoEHead

LOSSES = ("l2", "l1", "log-l1", "nll-gaussian", "nll-laplace")


@dataclass(frozen=True)
class Recipe:
    """All that decides what a head learns, beside the data and the optimiser."""

    loss: str = "l2"
    """Of depth, one of ``LOSSES``; nll-* are likelihoods of the mixture."""
    log_depth: bool = True
    """nll-*: the density is one of log depth."""
    scale: float = 0.1
    """nll-*: of the density."""
    window: int = 0
    """nll-*: of :func:`~moe3d.losses.at_local_level`, in pixels; 0 for the truth as it is."""
    learn_scale: bool = False
    """nll-*: each expert's scale is learned, from ``scale`` on."""
    entropy_weight: Schedule = CONSTANT_ZERO
    """Relative to the depth loss before training, so that it means the same for depths of any size."""
    camera_weight: float = 0.0
    """Of VGGT's camera loss, where the camera head is trained."""
    expected_cost_weight: float = 0.0
    """Of :func:`~moe3d.losses.expected_cost_loss`."""
    level_weight: float = 0.0
    """Of L1 in log depth on the mixed depth: what a likelihood at the local level leaves open."""
    temperature: Schedule = CONSTANT_ONE
    """Of the gate's softmax."""
    num_experts: int = 4
    """K."""
    gate_hidden: int = 128
    """Hidden channels of the gate."""
    image_gate: bool | str = False
    """See :class:`~moe3d.nn.MoEHead`."""
    init_noise: float = 0.3
    """Of the experts, relative to each tensor's standard deviation."""
    spread: float = 0.0
    """Experts begin apart: evenly between so much nearer and so much farther, in log depth."""
    mode: str = "mean"
    """How the trained head decodes."""
    decode_temperature: float = 1.0
    """The trained head's temperature is the last step's, times this: below 1 a mean keeps more to one expert."""
    gap: float = 0.3
    """Of the mode "switch", in log depth."""
    sharpen: int = 0
    """After decoding, so many passes of :func:`moe3d.sharpen.sharpen`."""

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale must be a finite number above 0, got {self.scale!r}")
        if self.loss.startswith("nll-") and self.num_experts < 2:
            raise ValueError(f"loss {self.loss!r} needs at least 2 experts, got {self.num_experts}")

    def patch_options(self, seed: int) -> dict[str, Any]:
        """What :func:`moe3d.patch_vggt` needs to begin."""
        return {
            "num_experts": self.num_experts,
            "gate_hidden": self.gate_hidden,
            "image_gate": self.image_gate if self.num_experts > 1 else False,
            "init_noise": self.init_noise,
            "temperature": self.temperature.at(0.0),
            "mode": "mean",  # a likelihood needs no decoding, and every other loss is one of the mean
            "gap": self.gap,
            "return_experts": True,
            "seed": seed,
        }

    def set_decode(self, tail: MoEHead) -> None:
        """Let a trained head decode as the recipe has it."""
        tail.mode, tail.sharpen = self.mode, self.sharpen
        tail.temperature = self.decode_temperature * self.temperature.at(1.0)

    @torch.no_grad()
    def spread_experts(self, tail: MoEHead) -> None:
        """Move the experts of a head whose activation is ``exp`` apart, as the recipe has it."""
        if self.num_experts > 1:
            tail.expert_b2[:, 0] += torch.linspace(-self.spread, self.spread, tail.num_experts).to(tail.expert_b2)

    def objective(self, train_cameras: bool = False) -> WeightedLoss:
        """The sum of losses; the camera's only where it can teach anything."""
        terms = {"depth": Term(self._depth_loss(), CONSTANT_ONE)}
        if self.expected_cost_weight > 0:
            terms["expected_cost"] = Term(ExpectedCostLoss(), Schedule(self.expected_cost_weight))
        if self.level_weight > 0:
            terms["level"] = Term(LogDepthLoss(), Schedule(self.level_weight))
        if self.num_experts > 1:
            terms["entropy"] = Term(EntropyLoss(), self.entropy_weight, relative=True)
        if train_cameras and self.camera_weight > 0:
            terms["camera"] = Term(CameraLoss(), Schedule(self.camera_weight))
        return WeightedLoss(terms)

    def _depth_loss(self) -> nn.Module:
        if self.loss.startswith("nll-"):
            experts = self.num_experts if self.learn_scale else 0
            return MixtureNLL(self.loss.removeprefix("nll-"), self.scale, self.log_depth, experts, self.window)
        return {"l2": MoEDepthLoss, "l1": L1DepthLoss, "log-l1": LogDepthLoss}[self.loss]()


# The paper gives the loss and that the temperature is annealed, but no numbers: K and the gate's width are inferred
# from its cost figures, and the weights, the noise and the annealing are chosen here (see moe3d/training/study.py).
PAPER = Recipe(
    loss="l2",
    entropy_weight=Schedule(0.0, 0.05, "linear", 0.5),
    camera_weight=1.0,
    temperature=Schedule(1.0, 0.5, "exponential"),
)
BEST = Recipe(
    loss="nll-laplace",
    scale=0.05,
    window=31,
    expected_cost_weight=2.0,
    level_weight=4.0,
    camera_weight=1.0,
    num_experts=2,
    image_gate="guided",
    init_noise=0.03,
    spread=0.1,
    decode_temperature=0.5,
    sharpen=4,
)
RECIPES = {"paper": PAPER, "best": BEST}
