"""Heads trained from cached features alone: the same scenes, steps and choice of learning rates for whatever head."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn

from moe3d.nn import MoEHead
from moe3d.training.features import CachedScenes, FeatureNetwork
from moe3d.training.networks import Supervised
from moe3d.training.recipes import Recipe
from moe3d.training.scenes import Batch
from moe3d.training.trainer import DivergedError, Trainer, TrainOptions

SWEEP_PART = 0.1  # of the steps, in which every rate is tried

MakeHead = Callable[[nn.Sequential, Recipe, int], nn.Module]
"""From the pretrained output block, a recipe and a seed."""


@dataclass(frozen=True)
class HeadBudget:
    """What every head gets."""

    steps: int = 1200
    batch: int = 4
    """Scenes per step."""
    rates: tuple[float, ...] = (1e-4, 5e-4, 2e-3)
    """Learning rates to choose from."""


@dataclass(frozen=True)
class HeadTrainer:
    """Trains heads on one cache (see :func:`~moe3d.training.features.cache_scenes`) within one budget."""

    block: nn.Sequential
    """The pretrained output block that heads begin as."""
    cache: Path
    held_out: Sequence[Batch]
    """Scenes by whose loss learning rates are chosen."""
    budget: HeadBudget

    def train(self, make: MakeHead, recipe: Recipe, seed: int, rate: float) -> Supervised:
        """A head after all steps, in eval mode, with its losses; scenes are drawn by the seed."""
        return self._train(make, recipe, seed, rate, self.budget.steps)

    def sweep(self, make: MakeHead, recipe: Recipe) -> dict[float, float]:
        """Loss on the scenes held out by learning rate, each after a short run of its own with seed 0; infinite where
        that run diverges."""
        return {rate: self._try(make, recipe, rate) for rate in self.budget.rates}

    def _try(self, make: MakeHead, recipe: Recipe, rate: float) -> float:
        try:
            return self._loss(self._train(make, recipe, 0, rate, max(1, round(SWEEP_PART * self.budget.steps))))
        except DivergedError:
            return math.inf

    def _train(self, make: MakeHead, recipe: Recipe, seed: int, rate: float, steps: int) -> Supervised:
        network = FeatureNetwork(make(self.block, recipe, seed))
        supervised = Supervised(network, recipe.objective()).train()
        options = TrainOptions(
            steps=steps, batch=self.budget.batch, learning_rate=rate, temperature=recipe.temperature, seed=seed
        )
        Trainer(supervised, CachedScenes(self.cache, seed), options).train()
        return supervised.eval()

    @torch.no_grad()
    def _loss(self, supervised: Supervised) -> float:
        return statistics.fmean(float(supervised(batch, 1.0)["total"]) for batch in self.held_out)


def best_rate(losses: dict[float, float]) -> float:
    """The learning rate of the least loss.

    Raises:
        DivergedError: all losses are infinite.
    """
    rate = min(losses, key=lambda rate: losses[rate])
    if math.isinf(losses[rate]):
        raise DivergedError(f"training diverges at every learning rate that was tried: {', '.join(map(str, losses))}")
    return rate


def mixture_head(block: nn.Sequential, recipe: Recipe, seed: int) -> MoEHead:
    """The head of a recipe; for one expert it is the block itself."""
    options = recipe.patch_options(seed)
    head = MoEHead.from_conv_block(block, options.pop("num_experts"), options.pop("gate_hidden"), **options)
    recipe.spread_experts(head)
    return head


def into_block(head: MoEHead, block: nn.Sequential) -> None:
    """Write a trained head of one expert back into the plain block that it was copied from."""
    block.load_state_dict(
        {
            "0.weight": head.expert_w1[0],
            "0.bias": head.expert_b1[0],
            "2.weight": head.expert_w2[0, :, :, None, None],
            "2.bias": head.expert_b2[0],
        }
    )


def trained_head(supervised: Supervised) -> MoEHead:
    """The head inside."""
    return cast(MoEHead, cast(FeatureNetwork, supervised.network).tail)
