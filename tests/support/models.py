"""Small VGGT-like models, and the real one where the ``vggt`` package can be imported."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from moe3d.models import MiniVGGT

HEIGHT, WIDTH = 28, 42


def mini(seed: int = 0, **options) -> MiniVGGT:
    """An untrained MiniVGGT with both heads, a thousandth of VGGT's size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        small = {"embed_dim": 32, "depth": 4, "num_heads": 2, "features": 32, "enable_point": True}
        return _loud(MiniVGGT(**(small | options)))


def real(seed: int = 0, **options) -> nn.Module:
    """The ``vggt`` package's own class: heads of full size, a narrow backbone with a convolutional patch embedding."""
    from vggt.models import vggt

    aggregator = vggt.Aggregator
    vggt.Aggregator = functools.partial(aggregator, patch_embed="conv", num_heads=4)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _loud(vggt.VGGT(img_size=112, embed_dim=64, **({"enable_track": False} | options)))
    finally:
        vggt.Aggregator = aggregator


def images(*lead: int, seed: int = 1) -> Tensor:
    """Noise with a bright square, [*lead, 3, H, W] in [0, 1]."""
    noise = torch.rand(*lead, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))
    noise[..., 5:20, 10:30] *= 0.3
    return noise


@torch.no_grad()
def _loud(model: nn.Module) -> nn.Module:
    """An untrained network predicts nearly the same everywhere; this one varies by tens of per cent."""
    for head in (model.depth_head, model.point_head):
        if head is not None:
            head.scratch.output_conv2[2].weight.mul_(30)
            head.norm.weight.mul_(3)
    return model.eval()
