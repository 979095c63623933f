"""Gradient to the features: the convolution's adjoint as an implicit product over a band of hidden gradients, then the
upsampling's adjoint, which gathers for each source pixel the outputs it took part in."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from moe3d.kernels.convolution import convolve, tile_pixels
from moe3d.kernels.numerics import first_target, source_weight
from moe3d.kernels.plan import Launch, Precision
from moe3d.kernels.tables import Config


@triton.jit(do_not_specialize=["rows", "padded_width", "width"])
def _feature_gradient_kernel(hidden, weights, grad_features, rows, padded_width, width,
                             CHANNELS: tl.constexpr, N: tl.constexpr, BLOCK_C: tl.constexpr,
                             M: tl.constexpr, TILE_W: tl.constexpr, BLOCK_K: tl.constexpr,
                             PRECISION: tl.constexpr):  # fmt: skip
    row, column, corner = tile_pixels(tl.program_id(1), tl.program_id(0), padded_width, M, TILE_W)
    first = tl.program_id(2) * BLOCK_C
    acc = convolve(hidden, corner, padded_width, weights, first, N, BLOCK_C, BLOCK_K, PRECISION)  # [M, C]
    pixel = (row * width + column)[:, None] * CHANNELS
    inside = ((row < rows) & (column < width))[:, None]
    tl.store(grad_features + pixel + (first + tl.arange(0, BLOCK_C))[None, :], acc, inside)


def feature_gradient(hidden, weights, grad_features, rows: int, precision: Precision, config: Config) -> Launch:
    """Fills ``grad_features`` [rows, W, C] float32 from ``hidden`` [rows + 2 or more, padded width, N] and the flipped,
    transposed ``weights`` [C, N/BK, 9, BK]."""
    n, block_k = hidden.shape[2], weights.shape[3]
    width, channels = grad_features.shape[1:]
    block_c = min(channels & -channels, config.max_width)
    return Launch(
        kernel=_feature_gradient_kernel,
        grid=(triton.cdiv(width, config.tile_width), triton.cdiv(rows, config.tile_height), channels // block_c),
        arguments=dict(
            hidden=hidden, weights=weights, grad_features=grad_features, rows=rows, padded_width=hidden.shape[1],
            width=width, CHANNELS=channels, N=n, BLOCK_C=block_c,
            M=config.tile_height * config.tile_width, TILE_W=config.tile_width, BLOCK_K=block_k,
            PRECISION=precision.dot,
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "first_row",
        "rows",
        "source_height",
        "source_width",
        "height",
        "width",
        "most_rows",
        "most_columns",
    ]
)
def _downsample_kernel(grad_features, grad_x, first_row, rows, source_height, source_width, height, width,
                       most_rows, most_columns, CHANNELS: tl.constexpr, BLOCK_W: tl.constexpr,
                       BLOCK_C: tl.constexpr):  # fmt: skip
    """BLOCK_W pixels of one row of x x BLOCK_C channels: sum_Y sum_X Uy[Y, row] Ux[X, column] grad[Y, X]."""
    source_row = tl.program_id(1)
    source_column = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)  # [W]
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]  # [1, C]
    top = tl.maximum(first_target(source_row, source_height, height), first_row)
    left = first_target(source_column, source_width, width)
    acc = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    for step in range(most_rows * most_columns):
        row = top + step // most_columns
        column = left + step % most_columns
        row_weight = tl.where(row < first_row + rows, source_weight(source_row, row, source_height, height), 0.0)
        column_weight = tl.where(column < width, source_weight(source_column, column, source_width, width), 0.0)
        weight = (row_weight * column_weight)[:, None]  # [W, 1]
        pixel = ((row - first_row) * width + column)[:, None] * CHANNELS
        grad = tl.load(grad_features + pixel + channel, (weight > 0) & (channel < CHANNELS), other=0.0)
        acc += weight * grad
    out = grad_x + (source_row.to(tl.int64) * source_width + source_column)[:, None] * CHANNELS + channel
    mask = (source_column < source_width)[:, None] & (channel < CHANNELS)
    tl.store(out, tl.load(out, mask, other=0.0) + acc, mask)


def downsample(grad_features, grad_x, first_row: int, size: tuple[int, int]) -> Launch:
    """Adds to ``grad_x`` [h, w, C] float32 what the rows of ``grad_features`` [rows, W, C] contribute."""
    source_height, source_width, channels = grad_x.shape
    rows, width = grad_features.shape[:2]
    block_c = min(128, triton.next_power_of_2(channels))
    block_w = 16
    return Launch(
        kernel=_downsample_kernel,
        grid=(triton.cdiv(source_width, block_w), source_height, triton.cdiv(channels, block_c)),
        arguments=dict(
            grad_features=grad_features, grad_x=grad_x, first_row=first_row, rows=rows,
            source_height=source_height, source_width=source_width, height=size[0], width=width,
            most_rows=min(_reach(source_height, size[0]), rows), most_columns=_reach(source_width, width),
            CHANNELS=channels, BLOCK_W=block_w, BLOCK_C=block_c,
        ),
        num_warps=4,
    )  # fmt: skip


def _reach(source: int, target: int) -> int:
    """How many target indices, from the first one on, a source index may have weight in."""
    return target if source == 1 else min(target, math.ceil(2 * (target - 1) / (source - 1)) + 1)
