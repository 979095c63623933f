"""The fused forward kernel: from a band of upsampled features to the head's outputs, a tile of pixels per program.

Convolution of all experts and the gate, bias, ReLU, 1x1 layers, softmax, activations, mixture and entropy stay in
registers; nothing but the outputs is written. With SKIP the gate (main section) comes first, and an expert (tail
section) is computed only in tiles where its weight reaches ``skip_below``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moe3d.kernels.activations import row_sum
from moe3d.kernels.columns import commuted_preactivations, first_source, strange_sources, strip_pixels
from moe3d.kernels.convolution import add_second_layer, confined, preactivations, tile_pixels
from moe3d.kernels.mixture import decode_weights, decoded, entropy_of, experts_in_reach, softmax, values_of
from moe3d.kernels.pack import Packed
from moe3d.kernels.plan import Band, Launch, Mixing, Precision
from moe3d.kernels.tables import Config


@triton.jit(do_not_specialize=["first_frame", "first_row", "band_rows", "padded_width", "height", "width",
                                "source_width", "strip", "field_row", "field_column"])  # fmt: skip
def _forward_kernel(features, w1, w1_tail, b1, w2, feeds, b2, gate_logits,
                    prediction, confidence, entropy, weights, hypotheses, flags, table,
                    first_frame, first_row, band_rows, padded_width, height, width,
                    source_width, strip, field_row, field_column,
                    temperature, log_experts, ratio, skip_below,
                    CHANNELS: tl.constexpr, EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr,
                    PREDICTED: tl.constexpr, OUTPUTS: tl.constexpr, OUTPUTS_PADDED: tl.constexpr,
                    MAIN_WIDTH: tl.constexpr, MAIN_COUNT: tl.constexpr,
                    TAIL_WIDTH: tl.constexpr, TAIL_COUNT: tl.constexpr,
                    ACT: tl.constexpr, CONF: tl.constexpr, MODE: tl.constexpr, HAS_GATE: tl.constexpr,
                    HAS_LOGITS: tl.constexpr, RETURN_EXPERTS: tl.constexpr, SKIP: tl.constexpr,
                    COMMUTED: tl.constexpr, TMA: tl.constexpr,
                    M: tl.constexpr, TILE_W: tl.constexpr, BLOCK_K: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
    # where this tile is: features in the band's frame of band_rows x padded_width pixels, outputs in whole frames
    frame = first_frame + tl.program_id(2)
    features += tl.program_id(2).to(tl.int64) * band_rows * padded_width * CHANNELS
    columns: tl.constexpr = OUTPUTS_PADDED * EXPERTS_PADDED
    strange = tl.zeros([M, columns], tl.float32)
    tile_rows: tl.constexpr = M // TILE_W
    top = first_row + tl.program_id(1) * tile_rows
    left = tl.program_id(0) * strip
    if COMMUTED:
        row, column, own = strip_pixels(tl.program_id(1), tl.program_id(0), strip, TILE_W, tile_rows)
        source_row, source_column, _ = strip_pixels(tl.program_id(1), 0, strip, TILE_W // 2, tile_rows)
        source_column += first_source(left, source_width, width) + 1
        corner = source_row * padded_width + source_column
        table += tl.program_id(0) * (3 * TILE_W * (TILE_W // 2))
        flags += tl.program_id(2).to(tl.int64) * band_rows * padded_width
        strange += strange_sources(flags, row, column, padded_width, source_width, width)[:, None]
    else:
        row, column, corner = tile_pixels(tl.program_id(1), tl.program_id(0), padded_width, M, TILE_W)
        own = row >= 0
    row += first_row
    inside = ((row < height) & (column < width) & own)[:, None]  # [M, 1]
    plane = height.to(tl.int64) * width
    pixel = (row.to(tl.int64) * width + column)[:, None]  # [M, 1]
    expert = tl.arange(0, EXPERTS_PADDED)[None, :]  # [1, KP]
    output = tl.arange(0, OUTPUTS_PADDED)[None, :, None]  # [1, OP, 1]

    z = tl.zeros([M, columns], tl.float32) + tl.load(b2 + tl.arange(0, columns))[None, :]
    for group in range(MAIN_COUNT):
        first = group * MAIN_WIDTH
        if COMMUTED:
            before = commuted_preactivations(features, corner, padded_width, w1, b1, top, field_row, field_column,
                                             first, left, table, width, height, CHANNELS, MAIN_WIDTH, TILE_W,
                                             tile_rows, BLOCK_K, PRECISION)  # fmt: skip
        else:
            before = preactivations(features, corner, padded_width, w1, b1, first, CHANNELS, MAIN_WIDTH, BLOCK_K,
                                    PRECISION, TMA)  # fmt: skip
        z, strange = add_second_layer(z, strange, before, w2, feeds, first, MAIN_WIDTH, columns, PRECISION)

    extra = tl.zeros([M, EXPERTS_PADDED], tl.float32)
    expert_pixel = (frame.to(tl.int64) * EXPERTS + expert) * plane + pixel  # [M, KP]
    real = inside & (expert < EXPERTS)
    if HAS_LOGITS:
        extra = tl.load(gate_logits + expert_pixel, real, other=0.0).to(tl.float32)
    reached = tl.full([EXPERTS_PADDED], 1, tl.int32)
    if SKIP:
        gate = tl.reshape(confined(z, strange), [M, OUTPUTS_PADDED, EXPERTS_PADDED])
        logits = extra + tl.sum(row_sum(gate, output == OUTPUTS), axis=1)
        share, _ = softmax(logits, expert, temperature, EXPERTS)
        reached = experts_in_reach(logits, share, expert, inside, skip_below, EXPERTS)
    for group in range(TAIL_COUNT):
        first = MAIN_COUNT * MAIN_WIDTH + group * TAIL_WIDTH
        wanted = 1
        if SKIP:
            here = tl.arange(0, EXPERTS_PADDED) == group // (TAIL_COUNT // EXPERTS)
            wanted = tl.sum(tl.where(here, reached, 0))
        if wanted > 0:
            if COMMUTED:
                before = commuted_preactivations(features, corner, padded_width, w1, b1, top, field_row, field_column,
                                                 first, left, table, width, height, CHANNELS, TAIL_WIDTH, TILE_W,
                                                 tile_rows, BLOCK_K, PRECISION)  # fmt: skip
            else:
                before = preactivations(features, corner, padded_width, w1_tail, b1, first, CHANNELS, TAIL_WIDTH,
                                        BLOCK_K, PRECISION, TMA)  # fmt: skip
            z, strange = add_second_layer(z, strange, before, w2, feeds, first, TAIL_WIDTH, columns, PRECISION)

    z = tl.reshape(confined(z, strange), [M, OUTPUTS_PADDED, EXPERTS_PADDED])
    values = values_of(z, output, expert, EXPERTS, PREDICTED, ACT, CONF)
    logits = extra
    if HAS_GATE:
        logits += tl.sum(row_sum(z, output == OUTPUTS), axis=1)
    share, log_share = softmax(logits, expert, temperature, EXPERTS)
    decode, chosen = decode_weights(logits, share, values, output, expert, ratio, EXPERTS, PREDICTED, MODE)
    if SKIP:  # the mean over the experts that were computed
        heard = tl.where(reached[None, :] > 0, decode, 0.0)
        decode = heard / tl.sum(heard, axis=1, keep_dims=True)
        values = tl.where(reached[None, None, :] > 0, values, 0.0)
    decoded_rows = decoded(values, decode, chosen)  # [M, OP]

    output = tl.arange(0, OUTPUTS_PADDED)[None, :]  # [1, OP]
    tl.store(prediction + (frame.to(tl.int64) * PREDICTED + output) * plane + pixel, decoded_rows,
             inside & (output < PREDICTED))  # fmt: skip
    frame_pixel = frame.to(tl.int64) * plane + pixel
    if CONF != "none":
        # every row but the confidence's is masked out, so they may share its address
        tl.store(confidence + frame_pixel + 0 * output, decoded_rows, inside & (output == PREDICTED))
    tl.store(entropy + frame_pixel, entropy_of(share, log_share, log_experts)[:, None], inside)
    if RETURN_EXPERTS:
        tl.store(weights + expert_pixel, share, real)
        rows = output[:, :, None]
        hypothesis = (frame.to(tl.int64) * EXPERTS + expert[:, None, :]) * PREDICTED + rows
        tl.store(hypotheses + hypothesis * plane + pixel[:, :, None], values,
                 real[:, None, :] & (rows < PREDICTED))  # fmt: skip


class Commuted(NamedTuple):
    """What the kernel needs to know beside a band whose columns are the source's."""

    field: torch.Tensor  #  [cases, W, N], or the biases [N] alone
    flags: torch.Tensor  #  like the band without channels, float32: 1 where a pixel is not finite
    table: torch.Tensor  #  [strips, 3, PX, PX/2] operands: see `column_table`
    source_width: int
    strip: int


def forward(features, packed: Packed, gate_logits, outputs, band: Band, mixing: Mixing,
            skip_below: float, precision: Precision, config: Config,
            commuted: Commuted | None = None) -> Launch:  # fmt: skip
    """Computes a band's outputs; ``outputs`` are contiguous float32 tensors (None where absent)."""
    strip = config.tile_width if commuted is None else commuted.strip
    field = packed.b1 if commuted is None else commuted.field
    w1 = w1_tail = packed.w1
    if config.tma:
        rows = packed.w1.flatten(1)
        w1 = TensorDescriptor.from_tensor(rows, [packed.main.width, packed.block_k])
        w1_tail = TensorDescriptor.from_tensor(rows, [packed.tail.width, packed.block_k])
    prediction, confidence, entropy, weights, hypotheses = outputs
    height, width = entropy.shape[-2:]
    return Launch(
        kernel=_forward_kernel,
        grid=(triton.cdiv(width, strip), triton.cdiv(band.rows, config.tile_height), band.frames),
        arguments=dict(
            features=features, w1=w1, w1_tail=w1_tail, TMA=config.tma, b1=field,
            w2=packed.w2, feeds=packed.feeds, b2=packed.b2,
            gate_logits=entropy if gate_logits is None else gate_logits, prediction=prediction,
            confidence=entropy if confidence is None else confidence, entropy=entropy,
            weights=entropy if weights is None else weights, hypotheses=entropy if hypotheses is None else hypotheses,
            flags=field if commuted is None else commuted.flags, table=field if commuted is None else commuted.table,
            COMMUTED=commuted is not None,
            source_width=0 if commuted is None else commuted.source_width, strip=strip,
            field_row=field.stride(0) if field.dim() == 3 else 0,
            field_column=field.stride(1) if field.dim() == 3 else 0,
            first_frame=band.first_frame, first_row=band.first_row, band_rows=features.shape[1],
            padded_width=features.shape[2], height=height, width=width, skip_below=skip_below,
            **packed.arguments(), **mixing.arguments(), SKIP=skip_below > 0,
            RETURN_EXPERTS=weights is not None,
            HAS_LOGITS=gate_logits is not None,
            M=config.tile_height * config.tile_width, TILE_W=config.tile_width, PRECISION=precision.dot,
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
