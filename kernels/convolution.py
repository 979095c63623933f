"""The 3x3 convolution as an implicit matrix product, and one group of hidden channels on top of it."""

import triton
import triton.language as tl

from moe3d.kernels.numerics import dot, largest, relu, to_operand


@triton.jit
def tile_pixels(tile_row, tile_column, padded_width, M: tl.constexpr, TILE_W: tl.constexpr):
    """Rows and columns [M] of a tile, and the index of each pixel's upper left neighbour in a band with a border."""
    index = tl.arange(0, M)
    row = tile_row * (M // TILE_W) + index // TILE_W
    column = tile_column * TILE_W + index % TILE_W
    return row, column, row * padded_width + column


@triton.jit
def convolve(band, corner, padded_width, weights, first, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
             BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr = False):  # fmt: skip
    """sum over nine taps and all channels, [M, WIDTH] float32, for output channels from ``first`` on.

    ``band`` is [pixels, CHANNELS]; ``corner`` [M] the pixel under the first tap; ``weights`` [N, CHANNELS/BK, 9, BK],
    or with TMA a descriptor of them as [N, 9 * CHANNELS] in blocks [WIDTH, BK].
    A block of channels meets all nine taps in turn, so eight of nine loads of activations find their lines in L1
    (".ca": the asynchronous copies would pass it by otherwise).
    """
    k = tl.arange(0, BLOCK_K)
    a = band + corner[:, None] * CHANNELS + k[None, :]  # [M, BK]
    if not TMA:
        b = weights + (first + tl.arange(0, WIDTH))[None, :] * (9 * CHANNELS) + k[:, None]  # [BK, WIDTH], k contiguous
    acc = tl.zeros([corner.shape[0], WIDTH], tl.float32)
    for step in range(9 * CHANNELS // BLOCK_K):
        tap = step % 9
        shift = (tap // 3 * padded_width + tap % 3) * CHANNELS + step // 9 * BLOCK_K
        activations = tl.load(a + shift, cache_modifier=".ca")
        if TMA:
            block = tl.trans(weights.load([first, step * BLOCK_K]))
        else:
            block = tl.load(b + step * BLOCK_K)
        acc = dot(activations, block, acc, PRECISION)
    return acc


@triton.jit
def preactivations(band, corner, padded_width, w1, b1, first, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
                   BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr = False):  # fmt: skip
    """conv(F, W1) + b1 for WIDTH hidden channels, [M, WIDTH] float32."""
    acc = convolve(band, corner, padded_width, w1, first, CHANNELS, WIDTH, BLOCK_K, PRECISION, TMA)
    return acc + tl.load(b1 + first + tl.arange(0, WIDTH))[None, :]


@triton.jit
def add_second_layer(z, strange, before, w2, feeds, first, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
                     PRECISION: tl.constexpr):  # fmt: skip
    """z + relu(before) @ w2, [M, COLUMNS], for one group's rows of w2 and ``feeds`` [N, COLUMNS].

    The zeros of w2 between experts would make NaN of NaN or an overflow in any of them. Such a hidden value counts as 0
    here; ``strange`` counts, for every entry of z, those to which ``feeds`` (0 or 1) connects it: see `confined`.
    """
    entry = (first + tl.arange(0, WIDTH))[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    finite = before < largest(w2.dtype.element_ty)
    strange = tl.dot(tl.where(finite, 0.0, 1.0).to(tl.float16), tl.load(feeds + entry), strange)
    hidden = to_operand(relu(tl.where(finite, before, 0.0)), w2.dtype.element_ty, PRECISION)
    return dot(hidden, tl.load(w2 + entry), z, PRECISION), strange


@triton.jit
def confined(z, strange):
    """NaN where a hidden value that is not finite belongs, and nowhere else."""
    return tl.where(strange > 0, float("nan"), z)
