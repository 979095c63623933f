"""A training run on cached features, for tests and for the processes that they start."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import distributed

from moe3d.models import load_mini
from moe3d.nn import MoEHead
from moe3d.training.features import CachedScenes, FeatureNetwork
from moe3d.training.networks import Supervised
from moe3d.training.recipes import Recipe
from moe3d.training.trainer import Trainer, TrainOptions


def trainer(
    weights: Path, cache: Path, options: TrainOptions, recipe: Recipe, folder: Path | None = None, **more
) -> Trainer:
    """Of a small head on the model's output block."""
    block = load_mini(path=weights).depth_head.scratch.output_conv2
    patch = recipe.patch_options(seed=0)
    head = MoEHead.from_conv_block(block, patch.pop("num_experts"), patch.pop("gate_hidden"), **patch)
    supervised = Supervised(FeatureNetwork(head), recipe.objective())
    return Trainer(supervised, CachedScenes(cache, options.seed), options, folder, **more)


def process(rank: int, world: int, folder: str, arguments: tuple) -> None:
    """One of several that train together; leaves its first gradients and its last weights in ``folder``."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        run = trainer(*arguments)
        gradients = first_gradients(run)
        run.train()
        torch.save({"gradients": gradients, "weights": run.whole_weights()}, f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


def first_gradients(run: Trainer) -> dict[str, torch.Tensor]:
    """A dictionary that the first step will fill, with what the optimizer gets: after averaging and clipping."""
    gradients: dict[str, torch.Tensor] = {}

    def remember(*_) -> None:
        if not gradients:
            gradients.update({n: p.grad.clone() for n, p in run.supervised.named_parameters() if p.grad is not None})

    run.optimizer.optimizer.register_step_pre_hook(remember)
    return gradients
