"""A training run on cached features, for tests and for the processes that they start."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from moe3d.integrations import patch_vggt
from moe3d.models import load_mini
from moe3d.training.features import CachedScenes, FeatureNetwork
from moe3d.training.heads import mixture_head
from moe3d.training.networks import ImageNetwork, Supervised, set_trainable
from moe3d.training.recipes import Recipe
from moe3d.training.trainer import Trainer, TrainOptions


def trainer(
    weights: Path, cache: Path, options: TrainOptions, recipe: Recipe, folder: Path | None = None, **more
) -> Trainer:
    """Of a small head on the model's output block."""
    block = load_mini(path=weights).depth_head.scratch.output_conv2
    supervised = Supervised(FeatureNetwork(mixture_head(block, recipe, 0)), recipe.objective())
    return Trainer(supervised, CachedScenes(cache, options.seed), options, folder, **more)


def model_trainer(weights: Path, cache: Path, options: TrainOptions, recipe: Recipe, shard: bool = False) -> Trainer:
    """Of a whole model, on the images of the cached scenes."""
    model = patch_vggt(load_mini(path=weights), **recipe.patch_options(0))
    set_trainable(model, "all", cameras=True)
    supervised = Supervised(ImageNetwork(model), recipe.objective(train_cameras=True))
    return Trainer(supervised, CachedScenes(cache, options.seed), options, shard=shard)


def process(rank: int, world: int, folder: str, arguments: tuple) -> None:
    """One of several that train together; leaves its first gradients and its last weights in ``folder``."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        run = trainer(*arguments, Path(folder) / "whole")
        gradients = first_gradients(run)
        run.train()
        torch.save({"gradients": gradients, "weights": run.whole_weights()}, f"{folder}/{rank}.pt")
        _sharded(Path(folder), arguments, rank)
    finally:
        distributed.destroy_process_group()


def _sharded(folder: Path, arguments: tuple, rank: int) -> None:
    """The same with FSDP, once in full and once resumed after a step."""
    weights, cache, options, recipe = arguments
    with fully_sharded():
        run = trainer(weights, cache, options, recipe, folder / "sharded", shard=True)
        assert all(isinstance(p, DTensor) for p in run.supervised.parameters())
        run.train()
        whole = run.whole_weights()
        del run
        stop_after(trainer(weights, cache, options, recipe, folder / "stopped", shard=True), 1)
        resumed = trainer(weights, cache, options, recipe, folder / "stopped", resume=True, shard=True)
        assert resumed.step == 1
        resumed.train()
        again = resumed.whole_weights()
        model = model_trainer(weights, cache, options, recipe, shard=True)
        aggregator = model.supervised.network.model.aggregator
        assert all(isinstance(block, FSDPModule) for block in (*aggregator.frame_blocks, *aggregator.global_blocks))
        model.train()
        models = model.whole_weights()
    if rank == 0:
        torch.save({"weights": whole, "resumed": again, "model": models}, folder / "sharded.pt")


class Stopped(Exception):
    """In place of a kill."""


def stop_after(run: Trainer, steps: int) -> None:
    """Train, and stop before another step begins."""
    take_step = run._take_step

    def step(shares):
        if run.step == steps:
            raise Stopped
        return take_step(shares)

    run._take_step = step
    with suppress(Stopped):
        run.train()


@contextmanager
def fully_sharded() -> Iterator[None]:
    """Accelerate uses FSDP on accelerators only: its own code for it, on the CPU."""
    begin = Accelerator.__init__

    def remember(self, *arguments, fsdp_plugin, **more):
        begin(self, *arguments, **more)
        self.state.fsdp_plugin = fsdp_plugin

    def prepare(self, *arguments):
        return self._prepare_fsdp2(*arguments)

    with patch.object(Accelerator, "__init__", remember), patch.object(Accelerator, "prepare", prepare):
        yield


def first_gradients(run: Trainer) -> dict[str, torch.Tensor]:
    """A dictionary that the first step will fill, with what the optimizer gets: after averaging and clipping."""
    gradients: dict[str, torch.Tensor] = {}

    def remember(*_) -> None:
        if not gradients:
            gradients.update({n: p.grad.clone() for n, p in run.supervised.named_parameters() if p.grad is not None})

    run.optimizer.optimizer.register_step_pre_hook(remember)
    return gradients
