"""Depth edges moved to the edges of the image: a median filter whose neighbours weigh by likeness of colour."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe3d.ops.native_sharpen import can_sharpen, sharpen_once

WINDOW = 5  # pixels
SIGMA = 0.1  # of colour, of a range of 1
EDGE_RATIO = 1.1


def sharpen(
    depth: Tensor,
    image: Tensor,
    passes: int = 4,
    *,
    window: int = WINDOW,
    sigma: float = SIGMA,
    edge_ratio: float = EDGE_RATIO,
    valid: Tensor | None = None,
) -> Tensor:
    """Replace each depth near an edge by the weighted median of those around it, ``passes`` times.

    A neighbour q of p weighs exp(-|image(p) - image(q)|^2 / (2 sigma^2)); the median is the least depth that, with all
    smaller ones, has half of the weight. So a ramp between two surfaces of different colours becomes a step where the
    colour changes, and every depth is one that was predicted nearby: nothing is averaged. At the border the window
    repeats the last pixels. The filter is that of Ma et al., "Constant Time Weighted Median Filtering for Stereo
    Matching and Beyond" (ICCV 2013), here only where the window holds an edge of depth: surfaces stay as they are.
    Float32 on the CPU, without gradients, goes through the compiled module, where that is installed.

    Args:
        depth: [B, H, W], in any unit.
        image: [B, 3, H, W] in [0, 1].
        passes: how often; 0 returns ``depth`` as it is.
        window: side of the square window, odd, in pixels.
        sigma: of colour.
        edge_ratio: a window has an edge if its largest depth is more than so many times its least.
        valid: [B, H, W] bool: other pixels weigh nothing, and stay as they are. None: all are valid.

    Returns:
        [B, H, W] of depth's type.

    Raises:
        ValueError: shapes that do not fit each other, a ``valid`` that is not bool, ``passes`` below 0, an even
            ``window``, a ``sigma`` not above 0, an ``edge_ratio`` below 1.
    """
    _check(depth, image, passes, window, sigma, edge_ratio, valid)
    once = sharpen_once if can_sharpen(depth, image, valid, window) else sharpen_in_pytorch
    for _ in range(passes):
        depth = once(depth, image, valid, window, steepness_of(sigma), edge_ratio)
    return depth


def steepness_of(sigma: float) -> float:
    """1 / (2 sigma^2), as far as float32 goes: beyond it no other colour weighs anything."""
    return min(0.5 / sigma / sigma, torch.finfo(torch.float32).max)


def sharpen_in_pytorch(
    depth: Tensor, image: Tensor, valid: Tensor | None, window: int, steepness: float, edge_ratio: float
) -> Tensor:
    """One pass, with the arguments of :func:`sharpen`; a neighbour weighs exp(-steepness |image(p) - image(q)|^2)."""
    if valid is None:
        valid = torch.ones_like(depth, dtype=torch.bool)
    at = _near_edges(depth, valid, window, edge_ratio).nonzero()
    around, middle = _windows(at, depth.shape, window), window**2 // 2
    seen = _pick(image.float().movedim(1, 0).flatten(1), around)
    distance = (seen - seen[..., middle : middle + 1]).square().sum(0)
    weights = (distance * -steepness).exp() * _pick(valid.flatten().float(), around)
    medians = _weighted_median(_pick(depth.flatten(), around), weights)
    return depth.flatten().index_put((around[:, middle],), medians).view_as(depth)


def _near_edges(depth: Tensor, valid: Tensor, window: int, edge_ratio: float) -> Tensor:
    """[B, H, W] bool."""

    def largest(values: Tensor) -> Tensor:
        known = values.masked_fill(~valid, -torch.inf)
        return F.max_pool2d(known[:, None], window, stride=1, padding=window // 2)[:, 0]

    return valid & (largest(depth) > -edge_ratio * largest(-depth))


def _windows(at: Tensor, shape: torch.Size, window: int) -> Tensor:
    """Where N pixels (frame, row, column) [N, 3] have their windows: [N, window^2], counted through all frames."""
    frame, row, column = at.split(1, dim=1)
    steps = torch.arange(window, device=at.device) - window // 2
    rows = (row + steps.repeat_interleave(window)).clamp(0, shape[1] - 1)
    columns = (column + steps.repeat(window)).clamp(0, shape[2] - 1)
    return (frame * shape[1] + rows) * shape[2] + columns


def _pick(values: Tensor, at: Tensor) -> Tensor:
    """values[..., at]: much faster than by indexing."""
    return values.index_select(-1, at.flatten()).unflatten(-1, at.shape)


def _weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """[N] of [N, M]."""
    values, order = values.sort(dim=-1)
    below = weights.gather(-1, order).cumsum(-1)
    middle = (below < 0.5 * below[:, -1:]).sum(-1, keepdim=True)
    return values.gather(-1, middle).squeeze(-1)


def _check(
    depth: Tensor,
    image: Tensor,
    passes: int,
    window: int,
    sigma: float,
    edge_ratio: float,
    valid: Tensor | None,
) -> None:
    if depth.ndim != 3:
        raise ValueError(f"depth must be [B, H, W], got {list(depth.shape)}")
    batch, height, width = depth.shape
    if image.shape != (batch, 3, height, width):
        raise ValueError(f"image must be {[batch, 3, height, width]} to fit depth, got {list(image.shape)}")
    if valid is not None and valid.shape != depth.shape:
        raise ValueError(f"valid must be {list(depth.shape)} to fit depth, got {list(valid.shape)}")
    if valid is not None and valid.dtype != torch.bool:
        raise ValueError(f"valid must be bool, got {str(valid.dtype).removeprefix('torch.')}")
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 0:
        raise ValueError(f"passes must be an integer of at least 0, got {passes!r}")
    if isinstance(window, bool) or not isinstance(window, int) or window < 1 or window % 2 == 0:
        raise ValueError(f"window must be an odd number of pixels, got {window!r}")
    if not 0 < sigma < float("inf"):
        raise ValueError(f"sigma must be a finite number above 0, got {sigma!r}")
    if not 1 <= edge_ratio < float("inf"):
        raise ValueError(f"edge_ratio must be a finite number of at least 1, got {edge_ratio!r}")
