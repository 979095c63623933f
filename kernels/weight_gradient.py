"""Gradient to the 3x3 weights: for each tap, features transposed times hidden gradients, summed over pixels.

Rows of the image are dealt to a fixed number of splits; a program owns its split's slot and adds to it band after band.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe3d.kernels.numerics import dot
from moe3d.kernels.plan import Launch, Precision
from moe3d.kernels.tables import Config


@triton.jit(do_not_specialize=["rows", "padded_width"])
def _weight_gradient_kernel(features, hidden, sums, rows, padded_width,
                            CHANNELS: tl.constexpr, N: tl.constexpr, SPLIT_COUNT: tl.constexpr,
                            BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
                            PRECISION: tl.constexpr):  # fmt: skip
    """BLOCK_C input channels of one tap x BLOCK_N hidden channels, over the rows of one split."""
    channel_blocks: tl.constexpr = CHANNELS // BLOCK_C
    tap = tl.program_id(0) // channel_blocks
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)  # [C]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    split = tl.program_id(2)
    slot = sums + ((split * 9 + tap) * CHANNELS + channel[:, None]) * N + n[None, :]
    blocks = (padded_width - 2) // BLOCK_P
    pixel = tl.arange(0, BLOCK_P)[:, None]
    shift = tap // 3 * padded_width + tap % 3
    # the band's first row of hidden gradients belongs to the band above
    a = features + (pixel + shift) * CHANNELS + channel[None, :]  # [P, C], row above the pixel's
    b = hidden + (pixel + 1) * N + n[None, :]  # [P, N]
    acc = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    for step in range((rows - split + SPLIT_COUNT - 1) // SPLIT_COUNT * blocks):
        row = 1 + split + step // blocks * SPLIT_COUNT
        start = row * padded_width + step % blocks * BLOCK_P
        acc = dot(tl.trans(tl.load(a + start * CHANNELS)), tl.load(b + start * N), acc, PRECISION)
    tl.store(slot, tl.load(slot) + acc)


def weight_gradient(features, hidden, sums, rows: int, precision: Precision, config: Config) -> Launch:
    """Adds to ``sums`` [splits, 9, C, N] float32 the ``rows`` rows of a band that are its own."""
    channels, n = features.shape[2], hidden.shape[2]
    block_c, block_n = min(channels & -channels, 128), min(n & -n, config.max_width)
    return Launch(
        kernel=_weight_gradient_kernel,
        grid=(9 * channels // block_c, n // block_n, sums.shape[0]),
        arguments=dict(
            features=features, hidden=hidden, sums=sums, rows=rows, padded_width=features.shape[1],
            CHANNELS=channels, N=n, SPLIT_COUNT=sums.shape[0],
            BLOCK_C=block_c, BLOCK_N=block_n, BLOCK_P=config.block_k, PRECISION=precision.dot,
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
