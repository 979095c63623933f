"""One process of a distributed training step; a module of its own, because spawned processes import it anew."""

from __future__ import annotations

import torch
from torch import distributed, nn

import moe3d
from support.models import images, mini


def patched() -> nn.Module:
    """A frozen MiniVGGT with a trainable MoE depth head."""
    model = mini(enable_point=False).requires_grad_(False).train()
    return moe3d.patch_vggt(model, 3, gate_hidden=8, init_noise=0.1)


def loss_of(model: nn.Module, rank: int) -> torch.Tensor:
    predictions = model(images(2, seed=rank))
    return predictions["depth"].mean() + predictions["depth_conf"].mean() - predictions["depth_entropy"].mean()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step(rank: int, world: int, folder: str) -> None:
    """Joins the group, takes one step, and leaves its gradients in ``folder``."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        model = nn.parallel.DistributedDataParallel(patched())
        loss_of(model, rank).backward()
        torch.save(gradients(model.module), f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()
