"""The 3x3 convolution as an implicit matrix product, and one group of hidden channels on top of it."""

import triton
import triton.language as tl

from moe3d.kernels.numerics import dot, relu, to_operand


@triton.jit
def tile_pixels(tile_row, tile_column, padded_width, M: tl.constexpr, TILE_W: tl.constexpr):
    """Rows and columns [M] of a tile, and the index of each pixel's upper left neighbour in a band with a border."""
    index = tl.arange(0, M)
    row = tile_row * (M // TILE_W) + index // TILE_W
    column = tile_column * TILE_W + index % TILE_W
    return row, column, row * padded_width + column


@triton.jit
def convolve(band, corner, padded_width, weights, first, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
             BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """sum over nine taps and all channels, [M, WIDTH] float32, for output channels from ``first`` on.

    ``band`` is [pixels, CHANNELS]; ``corner`` [M] the pixel under the first tap; ``weights`` [N, CHANNELS/BK, 9, BK].
    A block of channels meets all nine taps in turn, so eight of nine loads of activations find their lines in L1
    (".ca": the asynchronous copies would pass it by otherwise).
    """
    k = tl.arange(0, BLOCK_K)
    a = band + corner[:, None] * CHANNELS + k[None, :]  # [M, BK]
    b = weights + (first + tl.arange(0, WIDTH))[None, :] * (9 * CHANNELS) + k[:, None]  # [BK, WIDTH], k contiguous
    acc = tl.zeros([corner.shape[0], WIDTH], tl.float32)
    for step in range(9 * CHANNELS // BLOCK_K):
        tap = step % 9
        shift = (tap // 3 * padded_width + tap % 3) * CHANNELS + step // 9 * BLOCK_K
        activations = tl.load(a + shift, cache_modifier=".ca")
        acc = dot(activations, tl.load(b + step * BLOCK_K), acc, PRECISION)
    return acc


@triton.jit
def hidden_group(band, corner, padded_width, w1, b1, first, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
                 BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """relu(conv(F, W1) + b1) for WIDTH hidden channels, as operands [M, WIDTH]."""
    acc = convolve(band, corner, padded_width, w1, first, CHANNELS, WIDTH, BLOCK_K, PRECISION)
    acc += tl.load(b1 + first + tl.arange(0, WIDTH))[None, :]
    return to_operand(relu(acc), w1.dtype.element_ty, PRECISION)


@triton.jit
def add_second_layer(z, hidden, w2, first, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr):
    """z + hidden @ w2, [M, COLUMNS], for one group's rows of w2 [N, COLUMNS]."""
    rows = first + tl.arange(0, WIDTH)
    return dot(hidden, tl.load(w2 + rows[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]), z, PRECISION)
