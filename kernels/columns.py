"""The convolution with columns commuted: both it and the interpolation are linear, so columns may be interpolated last.

A band holds rows blended to the output's but columns as in the source. The product over three rows and all channels
runs at source columns, once for each of the three horizontal taps; a small product with the two-tap weights then
interpolates what it gives. Where the width grows 1.75-fold, that is 1.75 times fewer multiply-adds, plus those of the
interpolation. A tile is ROWS output rows of PX columns (of which ``strip_width`` are kept) over PX/2 source columns.
Its pixels are ordered with the row fastest: [PX/2 * ROWS, WIDTH] is [PX/2, ROWS * WIDTH] without moving a value.

The weights of 0 that most source columns get would spread NaN over a strip, so the band holds 0 instead of what is not
finite, and a flag for each such pixel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe3d.kernels.numerics import dot, source_position, to_operand
from moe3d.kernels.plan import Launch, Precision


def strip_width(source: int, target: int, tile_width: int) -> int:
    """How many output columns tile_width/2 source columns suffice for, the convolution's halo included; at most
    ``tile_width``, and below 1 where the width shrinks too much."""
    if source == 1:
        return tile_width
    return min(tile_width, (tile_width // 2 - 2) * (target - 1) // (source - 1) - 1)


@triton.jit
def strip_pixels(tile_row, tile_column, strip, PX: tl.constexpr, ROWS: tl.constexpr):
    """Rows and columns [PX * ROWS] of a tile, and which of them are its own."""
    index = tl.arange(0, PX * ROWS)
    return tile_row * ROWS + index % ROWS, tile_column * strip + index // ROWS, index // ROWS < strip


@triton.jit
def first_source(first_column, source_width, width):
    """The leftmost source column that a strip needs."""
    return source_position(tl.maximum(first_column - 1, 0), source_width, width)[0]


@triton.jit(do_not_specialize=["strip", "source_width", "width"])
def _column_table_kernel(table, strip, source_width, width, PX: tl.constexpr, PRECISION: tl.constexpr):
    """One strip and horizontal tap: what source columns from `first_source` on weigh in shifted output columns."""
    first_column = tl.program_id(0) * strip
    index = tl.arange(0, PX)
    target = first_column + index + tl.program_id(1) - 1
    lower, weight = source_position(tl.maximum(target, 0), source_width, width)
    lower -= first_source(first_column, source_width, width)
    lower = tl.where((target >= 0) & (target < width), lower, -2)[:, None]  # the convolution's padding
    source = tl.arange(0, PX // 2)[None, :]
    weight = weight[:, None]
    weights = tl.where(source == lower, 1 - weight, tl.where(source == lower + 1, weight, 0.0))
    at = (tl.program_id(0) * 3 + tl.program_id(1)) * (PX * (PX // 2)) + index[:, None] * (PX // 2) + source
    tl.store(table + at, to_operand(weights, table.dtype.element_ty, PRECISION))


def column_table(table, strip: int, source_width: int, width: int, precision: Precision) -> Launch:
    """Fills ``table`` [strips, 3, PX, PX/2] with the two-tap weights of each strip's columns, left neighbours first."""
    strips, taps, pixels, _ = table.shape
    return Launch(
        kernel=_column_table_kernel,
        grid=(strips, taps),
        arguments=dict(
            table=table, strip=strip, source_width=source_width, width=width, PX=pixels, PRECISION=precision.dot
        ),
    )


@triton.jit
def strange_sources(flags, row, column, padded_width, source_width, width):
    """[M]: above 0 where an output pixel reads a source pixel whose flag is 1; rows are the band's."""
    count = tl.zeros(row.shape, tl.float32)
    for tap in tl.static_range(9):
        target = column + tap % 3 - 1
        inside = (target >= 0) & (target < width)
        source, weight = source_position(tl.maximum(target, 0), source_width, width)
        pixel = flags + (row + tap // 3) * padded_width + source + 1
        count += tl.load(pixel, inside, other=0.0) + tl.load(pixel + 1, inside & (weight > 0), other=0.0)
    return count


@triton.jit
def commuted_preactivations(band, corner, padded_width, w1, field, row, field_row, field_column, first, first_column,
                            table, width, height, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
                            PX: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
                            PRECISION: tl.constexpr):  # fmt: skip
    """conv(F, W1) + b1 for WIDTH hidden channels, [PX * ROWS, WIDTH] float32.

    ``corner`` [PX/2 * ROWS] is the source pixel under the upper tap; w1 [N, 3, C/BK, 3, BK] has horizontal taps first;
    ``field`` [cases, W, N] float32 is what does not depend on x: biases and the convolved column embedding, for the
    first row, those between, and the last; ``table`` [3, PX, PX/2] is the strip's.
    """
    k = tl.arange(0, BLOCK_K)
    channel = first + tl.arange(0, WIDTH)
    a = band + corner[:, None] * CHANNELS + k[None, :]  # [PX/2 * ROWS, BK]
    b = w1 + channel[None, :] * (9 * CHANNELS) + k[:, None]  # [BK, WIDTH]
    left = tl.zeros([PX // 2 * ROWS, WIDTH], tl.float32)
    middle = tl.zeros([PX // 2 * ROWS, WIDTH], tl.float32)
    right = tl.zeros([PX // 2 * ROWS, WIDTH], tl.float32)
    for step in range(3 * CHANNELS // BLOCK_K):
        activations = tl.load(a + (step % 3 * padded_width * CHANNELS + step // 3 * BLOCK_K), cache_modifier=".ca")
        weights = b + step * BLOCK_K
        left = dot(activations, tl.load(weights), left, PRECISION)
        middle = dot(activations, tl.load(weights + 3 * CHANNELS), middle, PRECISION)
        right = dot(activations, tl.load(weights + 6 * CHANNELS), right, PRECISION)

    rows = tl.arange(0, ROWS * WIDTH) // WIDTH + row
    case = tl.minimum(rows, 1) + tl.where((rows == height - 1) & (rows > 1), 1, 0)
    case = tl.where(rows < height, case, 0)
    columns = first_column + tl.arange(0, PX)[:, None]
    at = case[None, :] * field_row + columns * field_column + (first + tl.arange(0, ROWS * WIDTH) % WIDTH)[None, :]
    acc = tl.load(field + at, columns < width, other=0.0)
    acc = _interpolate(left, acc, table, 0, w1.dtype.element_ty, PX, PRECISION)
    acc = _interpolate(middle, acc, table, 1, w1.dtype.element_ty, PX, PRECISION)
    acc = _interpolate(right, acc, table, 2, w1.dtype.element_ty, PX, PRECISION)
    return tl.reshape(acc, [PX * ROWS, WIDTH])


@triton.jit
def _interpolate(product, acc, table, tap, DTYPE: tl.constexpr, PX: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """acc + the columns of a product, interpolated: [PX, ROWS * WIDTH]."""
    at = tap * PX * (PX // 2) + tl.arange(0, PX)[:, None] * (PX // 2) + tl.arange(0, PX // 2)[None, :]
    weights = tl.load(table + at)
    values = tl.reshape(to_operand(product, DTYPE, PRECISION), [PX // 2, acc.shape[1]])
    return dot(weights, values, acc, PRECISION)
