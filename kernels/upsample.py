"""A band of upsampled features: F = upsample(x) + pos, channels last, inside a border of zeros.

The border is the convolution's padding, so the kernels that read a band need no masks. Interpolation runs in float32
with exact positions; its result is rounded once, to the operand type.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe3d.kernels.numerics import largest, source_position, to_operand
from moe3d.kernels.plan import Launch, Precision


@triton.jit(do_not_specialize=["first_row", "rows", "padded_width", "source_height", "source_width", "height",
                                "width", "channels"])  # fmt: skip
def _upsample_kernel(x, stride_frame, stride_row, stride_column, pos_x, pos_y, features, flags,
                     first_row, rows, padded_width, source_height, source_width, height, width, channels,
                     PADDED_CHANNELS: tl.constexpr, HAS_POS: tl.constexpr, FLAG: tl.constexpr, PRECISION: tl.constexpr,
                     BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """One row of BLOCK_W pixels x BLOCK_C channels of one frame."""
    row_in_band = tl.program_id(1)
    channel_blocks: tl.constexpr = (PADDED_CHANNELS + BLOCK_C - 1) // BLOCK_C
    frame = tl.program_id(2) // channel_blocks
    column_in_band = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)  # [W]
    channel = (tl.program_id(2) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)  # [C]
    row = first_row + row_in_band
    column = column_in_band - 1
    visible_width = tl.where((row >= 0) & (row < height), width, 0)
    inside = (column >= 0) & (column < visible_width)

    upper, row_weight = source_position(tl.maximum(row, 0), source_height, height)
    left, column_weight = source_position(tl.maximum(column, 0), source_width, width)
    x += frame.to(tl.int64) * stride_frame + upper.to(tl.int64) * stride_row
    corner = x + left[:, None].to(tl.int64) * stride_column + channel[None, :]
    mask = inside[:, None] & (channel < channels)[None, :]
    # a neighbour of weight 0 is not read: it may lie outside, or be NaN
    right_mask = mask & (column_weight > 0)[:, None]
    lower = tl.zeros([BLOCK_W, 1], tl.float32) + row_weight > 0
    top = _blend(corner, stride_column, column_weight[:, None], mask, right_mask)
    bottom = _blend(corner + stride_row, stride_column, column_weight[:, None], mask & lower, right_mask & lower)
    value = top * (1 - row_weight) + bottom * row_weight
    if HAS_POS:
        half = channels // 2
        of_column = mask & (channel < half)[None, :]
        of_row = mask & (channel >= half)[None, :]
        value += tl.load(pos_x + column[:, None] * half + channel[None, :], of_column, other=0.0).to(tl.float32)
        value += tl.load(pos_y + row * half + channel[None, :] - half, of_row, other=0.0).to(tl.float32)

    pixel = ((frame * rows + row_in_band) * padded_width + column_in_band) * PADDED_CHANNELS
    stored = (column_in_band < padded_width)[:, None] & (channel < PADDED_CHANNELS)[None, :]
    if FLAG:  # for a kernel in which columns with weight 0 are multiplied
        finite = tl.abs(value) < largest(features.dtype.element_ty)
        strange = tl.max(tl.where(finite, 0, 1), axis=1)
        at = (frame * rows + row_in_band) * padded_width + column_in_band
        tl.store(flags + at, tl.full([BLOCK_W], 1.0, tl.float32), (column_in_band < padded_width) & (strange > 0))
        value = tl.where(finite, value, 0.0)
    operand = to_operand(value, features.dtype.element_ty, PRECISION)
    tl.store(features + pixel[:, None] + channel[None, :], operand, stored)


@triton.jit
def _blend(left, stride, weight, mask, right_mask):
    """Two horizontal neighbours, [W, C]."""
    a = tl.load(left, mask, other=0.0).to(tl.float32)
    b = tl.load(left + stride, right_mask, other=0.0).to(tl.float32)
    return a * (1 - weight) + b * weight


def upsample(x, pos_x, pos_y, features, first_row: int, size: tuple[int, int], precision: Precision,
             flags=None) -> Launch:  # fmt: skip
    """Fills ``features`` [frames, rows, padded width, padded channels] from x [frames, C, h, w], channel stride 1.

    Row 0 of ``features`` is output row ``first_row``, column 0 the border left of the image. With ``flags`` (zeros
    [frames, rows, padded width]) what is not finite becomes 0, and its pixel's flag 1.
    """
    frames, rows, padded_width, padded_channels = features.shape
    block_c = min(128, triton.next_power_of_2(padded_channels))
    block_w = 32
    has_pos = pos_x is not None
    return Launch(
        kernel=_upsample_kernel,
        grid=(triton.cdiv(padded_width, block_w), rows, frames * triton.cdiv(padded_channels, block_c)),
        arguments=dict(
            x=x, stride_frame=x.stride(0), stride_row=x.stride(2), stride_column=x.stride(3),
            pos_x=pos_x if has_pos else x, pos_y=pos_y if has_pos else x, features=features,
            flags=features if flags is None else flags, FLAG=flags is not None,
            first_row=first_row, rows=rows, padded_width=padded_width,
            source_height=x.shape[2], source_width=x.shape[3], height=size[0], width=size[1], channels=x.shape[1],
            PADDED_CHANNELS=padded_channels, HAS_POS=has_pos, PRECISION=precision.dot, BLOCK_W=block_w, BLOCK_C=block_c,
        ),
        num_warps=4,
    )  # fmt: skip
