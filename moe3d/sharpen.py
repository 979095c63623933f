"""Depth edges moved to the edges of the image: a median filter whose neighbours weigh by likeness of colour."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 5  # pixels
SIGMA = 0.1  # of colour, of a range of 1


def sharpen(
    depth: Tensor,
    image: Tensor,
    passes: int = 4,
    *,
    window: int = WINDOW,
    sigma: float = SIGMA,
    valid: Tensor | None = None,
) -> Tensor:
    """Replace each depth by the weighted median of those around it, ``passes`` times.

    A neighbour q of p weighs exp(-|image(p) - image(q)|^2 / (2 sigma^2)); the median is the least depth that, with all
    smaller ones, has half of the weight. So a ramp between two surfaces of different colours becomes a step where the
    colour changes, and every depth is one that was predicted nearby: nothing is averaged. At the border the window
    repeats the last pixels. The filter is that of Ma et al., "Constant Time Weighted Median Filtering for Stereo
    Matching and Beyond" (ICCV 2013).

    Args:
        depth: [B, H, W], in any unit.
        image: [B, 3, H, W] in [0, 1].
        passes: how often; 0 returns ``depth`` as it is.
        window: side of the square window, odd, in pixels.
        sigma: of colour.
        valid: [B, H, W] bool: other pixels weigh nothing, and stay as they are. None: all are valid.

    Returns:
        [B, H, W] of depth's type.

    Raises:
        ValueError: shapes that do not fit each other, ``passes`` below 0, an even ``window``, a ``sigma`` not above 0.
    """
    _check(depth, image, passes, window, sigma, valid)
    if passes == 0:
        return depth
    if valid is None:
        valid = torch.ones_like(depth, dtype=torch.bool)
    if torch.compiler.is_exporting():  # a loop would fix the number of frames
        return _sharpen(depth, image, valid, passes, window, sigma)
    frames = zip(depth.split(1), image.split(1), valid.split(1), strict=True)  # the windows are large
    return torch.cat([_sharpen(*frame, passes, window, sigma) for frame in frames])


def _sharpen(depth: Tensor, image: Tensor, valid: Tensor, passes: int, window: int, sigma: float) -> Tensor:
    """All frames together."""
    image = image.float()
    distance = (_windows(image, window) - image[..., None]).square().sum(1)
    weights = (distance * (-0.5 / sigma**2)).exp() * _windows(valid[:, None].float(), window)[:, 0]
    for _ in range(passes):
        depth = torch.where(valid, _weighted_median(_windows(depth[:, None], window)[:, 0], weights), depth)
    return depth


def _weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """Of the last dimension."""
    values, order = values.sort(dim=-1)
    below = weights.gather(-1, order).cumsum(-1)
    middle = (below < 0.5 * below[..., -1:]).sum(-1, keepdim=True)
    return values.gather(-1, middle).squeeze(-1)


def _windows(planes: Tensor, window: int) -> Tensor:
    """[B, C, H, W] to what lies around each pixel, [B, C, H, W, window^2]."""
    around = F.pad(planes, (window // 2,) * 4, mode="replicate")
    return around.unfold(2, window, 1).unfold(3, window, 1).flatten(-2)


def _check(depth: Tensor, image: Tensor, passes: int, window: int, sigma: float, valid: Tensor | None) -> None:
    if depth.ndim != 3:
        raise ValueError(f"depth must be [B, H, W], got {list(depth.shape)}")
    batch, height, width = depth.shape
    if image.shape != (batch, 3, height, width):
        raise ValueError(f"image must be {[batch, 3, height, width]} to fit depth, got {list(image.shape)}")
    if valid is not None and valid.shape != depth.shape:
        raise ValueError(f"valid must be {list(depth.shape)} to fit depth, got {list(valid.shape)}")
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 0:
        raise ValueError(f"passes must be an integer of at least 0, got {passes!r}")
    if isinstance(window, bool) or not isinstance(window, int) or window < 1 or window % 2 == 0:
        raise ValueError(f"window must be an odd number of pixels, got {window!r}")
    if not 0 < sigma < float("inf"):
        raise ValueError(f"sigma must be a finite number above 0, got {sigma!r}")
