"""The filter of :mod:`moe3d.sharpen` in the compiled module: float32 maps on the CPU, no gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe3d import _build
from moe3d.eager import runs_eagerly
from moe3d.ops.native import check_status, isa
from moe3d.ops.native_layers import can_run

# The kernel compares all pixels of a window with each other, which pays as long as they are few.
_LARGEST_WINDOW = 9


def can_sharpen(depth: Tensor, image: Tensor, valid: Tensor | None, window: int) -> bool:
    """False for another device or type, gradients, a graph in the making, a large window, without the module."""
    tensors = [depth, image] if valid is None else [depth, image, valid]
    if window > _LARGEST_WINDOW or depth.dtype != torch.float32 or not runs_eagerly(*tensors) or not can_run():
        return False
    return all(t.device.type == "cpu" for t in tensors) and not (torch.is_grad_enabled() and depth.requires_grad)


def sharpen_once(
    depth: Tensor, image: Tensor, valid: Tensor | None, window: int, steepness: float, edge_ratio: float
) -> Tensor:
    """One pass over what :func:`can_sharpen`, with the arguments of :func:`moe3d.sharpen.sharpen_in_pytorch`."""
    module: Any = _build.native().module
    depth, image = depth.detach().contiguous(), image.detach().float().contiguous()
    sharp, call = torch.empty_like(depth), module.Sharpening()
    call.batch, call.height, call.width = depth.shape
    call.window, call.steepness, call.edge_ratio = window, steepness, edge_ratio
    call.depth, call.image, call.sharp = depth.data_ptr(), image.data_ptr(), sharp.data_ptr()
    if valid is not None:
        valid = valid.bool().contiguous()
        call.valid = valid.data_ptr()
    call.isa, call.threads = isa(), torch.get_num_threads()
    if depth.numel():
        check_status(module.sharpen(call), "sharpen")
    return sharp
