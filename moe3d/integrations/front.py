"""The front of VGGT's DPT head: tokens of four layers to the fused features that the tail upsamples.

Two ways to the same features. :func:`plain` calls the head's modules as the stock head does. :func:`reordered` keeps
every parameter's role but not the order: a 1x1 convolution and bilinear upsampling commute (both are linear, and the
upsampling weights sum to one), so the 1x1 goes first, at a quarter of the pixels; and features have their channels
last throughout, as tokens do. Both are differentiable in everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe3d.position import position_map, position_tables

# F.interpolate has addressed its output with 32-bit integers; larger outputs are computed part by part of the batch.
_MOST_INTERPOLATED = 2**31 - 1

_BLOCK_CHILDREN = {"out_conv", "resConfUnit1", "resConfUnit2", "skip_add"}


def plain(head: Any, tokens: Sequence[Tensor], grid: tuple[int, int], aspect: float) -> Tensor:
    """Patch tokens [N, P, dim] of four layers, finest first, to features [N, C, h, w]; as the stock head does it.

    Args:
        head: with the attributes of VGGT's DPT head.
        grid: patches per column and per row; P is their product.
        aspect: width / height of the images.
    """
    levels = []
    for level, patches in enumerate(tokens):
        x = head.projects[level](head.norm(patches).transpose(1, 2).unflatten(2, grid))
        levels.append(head.resize_layers[level](_positioned(head, x, aspect)))
    s = head.scratch
    first, second, third, fourth = (getattr(s, f"layer{i}_rn")(level) for i, level in enumerate(levels, start=1))
    x = s.refinenet4(fourth, size=third.shape[2:])
    x = s.refinenet3(x, third, size=second.shape[2:])
    x = s.refinenet2(x, second, size=first.shape[2:])
    return s.output_conv1(s.refinenet1(x, first))


def reordered(head: Any, tokens: Sequence[Tensor], grid: tuple[int, int], aspect: float) -> Tensor:
    """What :func:`plain` gives, with channels last, for a head that :func:`can_reorder`."""
    s = head.scratch
    levels = []
    for level, patches in enumerate(tokens):
        project = head.projects[level]
        x = F.linear(head.norm(patches), project.weight.flatten(1), project.bias)
        x = _positioned(head, x.mT.unflatten(2, grid), aspect)
        levels.append(getattr(s, f"layer{level + 1}_rn")(head.resize_layers[level](x)))
    first, second, third, fourth = levels
    x = _refine(s.refinenet4, fourth, None, third.shape[2:])
    x = _refine(s.refinenet3, x, third, second.shape[2:])
    x = _refine(s.refinenet2, x, second, first.shape[2:])
    return s.output_conv1(_refine(s.refinenet1, x, first, [2 * n for n in first.shape[2:]]))


def can_reorder(head: Any) -> bool:
    """Whether the front has VGGT's structure to the last module, and nobody watches those that would not be called."""
    blocks = [getattr(head.scratch, f"refinenet{i}") for i in (1, 2, 3, 4)]
    pointwise = [*head.projects, *(getattr(block, "out_conv", None) for block in blocks)]
    return (
        all(type(conv) is nn.Conv2d and conv.kernel_size == (1, 1) and _is_dense(conv) for conv in pointwise)
        and all({name for name, _ in block.named_children()} <= _BLOCK_CHILDREN for block in blocks)
        and all(getattr(block, "align_corners", True) and getattr(block, "size", None) is None for block in blocks)
        and [hasattr(block, "resConfUnit1") for block in blocks] == [True, True, True, False]
        and not is_watched(*pointwise, *blocks)
    )


def is_watched(*modules: nn.Module) -> bool:
    """Whether somebody waits for one of these modules' own calls, by a hook or by a ``forward`` of its own (as layers
    that Accelerate moves, or that are wrapped in place, have it)."""
    everywhere = nn.modules.module
    if any(getattr(everywhere, f"_global_{kind}_hooks") for kind in ("forward", "forward_pre", "backward")):
        return True
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules
    ) or any("forward" in m.__dict__ for m in modules)


def _is_dense(conv: nn.Conv2d) -> bool:
    return conv.stride == conv.dilation == (1, 1) and conv.groups == 1 and conv.padding == (0, 0)


def _positioned(head: Any, x: Tensor, aspect: float) -> Tensor:
    if not head.pos_embed:
        return x
    return x + position_map(*position_tables((x.shape[2], x.shape[3]), x.shape[1], aspect, x))


def _refine(block: Any, x: Tensor, finer: Tensor | None, size: Sequence[int]) -> Tensor:
    """A fusion block with its 1x1 convolution before the upsampling."""
    if finer is not None:
        x = x + block.resConfUnit1(finer)
    return _interpolate(block.out_conv(block.resConfUnit2(x)), size)


def _interpolate(x: Tensor, size: Sequence[int]) -> Tensor:
    most = max(1, _MOST_INTERPOLATED // (x.shape[1] * size[0] * size[1]))
    parts = [F.interpolate(part, size=tuple(size), mode="bilinear", align_corners=True) for part in x.split(most)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
