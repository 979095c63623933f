"""A training run on cached features, for tests and for the processes that they start."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from moe3d.models import load_mini
from moe3d.training.features import CachedScenes, FeatureNetwork
from moe3d.training.heads import mixture_head
from moe3d.training.networks import Supervised
from moe3d.training.recipes import Recipe
from moe3d.training.trainer import Trainer, TrainOptions


def trainer(
    weights: Path, cache: Path, options: TrainOptions, recipe: Recipe, folder: Path | None = None, **more
) -> Trainer:
    """Of a small head on the model's output block."""
    block = load_mini(path=weights).depth_head.scratch.output_conv2
    supervised = Supervised(FeatureNetwork(mixture_head(block, recipe, 0)), recipe.objective())
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
        _sharded(Path(folder), arguments, rank)
    finally:
        distributed.destroy_process_group()


def _sharded(folder: Path, arguments: tuple, rank: int) -> None:
    """The same with FSDP, once in full and once resumed after a step."""
    weights, cache, options, recipe = arguments
    with fully_sharded():
        run = trainer(weights, cache, options, recipe, folder / "sharded")
        assert all(isinstance(p, DTensor) for p in run.supervised.parameters())
        run.train()
        whole = run.whole_weights()
        del run
        stop_after(trainer(weights, cache, options, recipe, folder / "stopped"), 1)
        resumed = trainer(weights, cache, options, recipe, folder / "stopped", resume=True)
        assert resumed.step == 1
        resumed.train()
        again = resumed.whole_weights()
    if rank == 0:
        torch.save({"weights": whole, "resumed": again}, folder / "sharded.pt")


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
    """Accelerate knows FSDP on accelerators only: what it does there, on the CPU."""

    def prepare(self, model, optimizer):
        fully_shard(model, mesh=init_device_mesh("cpu", (self.num_processes,)))
        group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        learning = [p for p in model.parameters() if p.requires_grad]
        return model, AcceleratedOptimizer(torch.optim.AdamW([{"params": learning, **group}]), scaler=None)

    with patch.object(Accelerator, "prepare", prepare):
        yield


def first_gradients(run: Trainer) -> dict[str, torch.Tensor]:
    """A dictionary that the first step will fill, with what the optimizer gets: after averaging and clipping."""
    gradients: dict[str, torch.Tensor] = {}

    def remember(*_) -> None:
        if not gradients:
            gradients.update({n: p.grad.clone() for n, p in run.supervised.named_parameters() if p.grad is not None})

    run.optimizer.optimizer.register_step_pre_hook(remember)
    return gradients
