"""First step of the backward pass: a band's hidden activations again, and the gradient to the second layer's outputs.

Hidden activations go to a workspace of one band as operands; the gradient to every raw output and to the gate's logits
follows in registers from the cotangents, as in :mod:`moe3d.kernels.mixture`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe3d.kernels.activations import row_sum
from moe3d.kernels.convolution import add_second_layer, confined, preactivations, tile_pixels
from moe3d.kernels.mixture import mixture_vjp
from moe3d.kernels.numerics import relu, to_operand
from moe3d.kernels.pack import Packed
from moe3d.kernels.plan import Launch, Mixing, Precision
from moe3d.kernels.tables import Config

_COTANGENTS = ("d_prediction", "d_confidence", "d_entropy", "d_weights", "d_hypotheses")


@triton.jit(do_not_specialize=["frame", "first_row", "padded_width", "height", "width", "own_first", "own_last"])
def _recompute_kernel(features, w1, b1, w2, feeds, b2, gate_logits,
                      d_prediction, d_confidence, d_entropy, d_weights, d_hypotheses,
                      hidden, grad_z, grad_logits,
                      frame, first_row, padded_width, height, width, own_first, own_last,
                      temperature, log_experts, ratio,
                      CHANNELS: tl.constexpr, EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr,
                      PREDICTED: tl.constexpr, OUTPUTS: tl.constexpr, OUTPUTS_PADDED: tl.constexpr,
                      MAIN_WIDTH: tl.constexpr, MAIN_COUNT: tl.constexpr,
                      TAIL_WIDTH: tl.constexpr, TAIL_COUNT: tl.constexpr,
                      ACT: tl.constexpr, CONF: tl.constexpr, MODE: tl.constexpr, HAS_GATE: tl.constexpr,
                      HAS_LOGITS: tl.constexpr, GRAD_LOGITS: tl.constexpr,
                      D_PREDICTION: tl.constexpr, D_CONFIDENCE: tl.constexpr, D_ENTROPY: tl.constexpr,
                      D_WEIGHTS: tl.constexpr, D_HYPOTHESES: tl.constexpr,
                      M: tl.constexpr, TILE_W: tl.constexpr, BLOCK_K: tl.constexpr,
                      PRECISION: tl.constexpr):  # fmt: skip
    row, column, corner = tile_pixels(tl.program_id(1), tl.program_id(0), padded_width, M, TILE_W)
    row += first_row
    inside = ((row >= 0) & (row < height) & (column < width))[:, None]  # [M, 1]
    plane = height.to(tl.int64) * width
    pixel = (row.to(tl.int64) * width + column)[:, None]  # [M, 1] in the frame
    in_band = (corner + 1).to(tl.int64)[:, None]  # [M, 1] in the workspaces, which have a border left and right
    frame = tl.zeros([1, 1], tl.int64) + frame
    expert = tl.arange(0, EXPERTS_PADDED)[None, :]  # [1, KP]
    output = tl.arange(0, OUTPUTS_PADDED)[None, :]  # [1, OP]
    rows = output[:, :, None]  # [1, OP, 1]
    columns: tl.constexpr = OUTPUTS_PADDED * EXPERTS_PADDED
    channels: tl.constexpr = MAIN_WIDTH * MAIN_COUNT + TAIL_WIDTH * TAIL_COUNT

    z = tl.zeros([M, columns], tl.float32) + tl.load(b2 + tl.arange(0, columns))[None, :]
    strange = tl.zeros([M, columns], tl.float32)
    for group in range(MAIN_COUNT):
        first = group * MAIN_WIDTH
        before = preactivations(features, corner, padded_width, w1, b1, first, CHANNELS, MAIN_WIDTH, BLOCK_K,
                                PRECISION)  # fmt: skip
        activated = to_operand(relu(before), hidden.dtype.element_ty, PRECISION)
        tl.store(hidden + in_band * channels + (first + tl.arange(0, MAIN_WIDTH))[None, :], activated, inside)
        z, strange = add_second_layer(z, strange, before, w2, feeds, first, MAIN_WIDTH, columns, PRECISION)
    for group in range(TAIL_COUNT):
        first = MAIN_COUNT * MAIN_WIDTH + group * TAIL_WIDTH
        before = preactivations(features, corner, padded_width, w1, b1, first, CHANNELS, TAIL_WIDTH, BLOCK_K,
                                PRECISION)  # fmt: skip
        activated = to_operand(relu(before), hidden.dtype.element_ty, PRECISION)
        tl.store(hidden + in_band * channels + (first + tl.arange(0, TAIL_WIDTH))[None, :], activated, inside)
        z, strange = add_second_layer(z, strange, before, w2, feeds, first, TAIL_WIDTH, columns, PRECISION)

    z = tl.reshape(confined(z, strange), [M, OUTPUTS_PADDED, EXPERTS_PADDED])
    expert_pixel = (frame * EXPERTS + expert) * plane + pixel  # [M, KP]
    real = inside & (expert < EXPERTS)
    logits = tl.zeros([M, EXPERTS_PADDED], tl.float32)
    if HAS_LOGITS:
        logits = tl.load(gate_logits + expert_pixel, real, other=0.0).to(tl.float32)
    if HAS_GATE:
        logits += tl.sum(row_sum(z, rows == OUTPUTS), axis=1)

    frame_pixel = frame * plane + pixel  # [M, 1]
    d_output = tl.zeros([M, OUTPUTS_PADDED], tl.float32)
    if D_PREDICTION:
        offset = (frame * PREDICTED + output) * plane + pixel
        d_output += tl.load(d_prediction + offset, inside & (output < PREDICTED), other=0.0)
    if D_CONFIDENCE:
        d_output += tl.load(d_confidence + frame_pixel + 0 * output, inside & (output == PREDICTED), other=0.0)
    d_h = tl.zeros([M, 1], tl.float32)
    if D_ENTROPY:
        d_h += tl.load(d_entropy + frame_pixel, inside, other=0.0)
    d_w = tl.zeros([M, EXPERTS_PADDED], tl.float32)
    if D_WEIGHTS:
        d_w += tl.load(d_weights + expert_pixel, real, other=0.0)
    d_values = tl.zeros([M, OUTPUTS_PADDED, EXPERTS_PADDED], tl.float32)
    if D_HYPOTHESES:
        offset = ((frame * EXPERTS + expert)[:, None, :] * PREDICTED + rows) * plane + pixel[:, :, None]
        d_values += tl.load(d_hypotheses + offset, real[:, None, :] & (rows < PREDICTED), other=0.0)

    grad = mixture_vjp(z, logits, rows, expert, d_output, d_w, d_values, d_h, temperature, log_experts, ratio,
                       EXPERTS, PREDICTED, OUTPUTS, ACT, CONF, MODE, HAS_GATE)  # fmt: skip
    grad = tl.where(inside[:, :, None], grad, 0.0)
    if GRAD_LOGITS:
        own = real & ((row >= own_first) & (row < own_last))[:, None]
        tl.store(grad_logits + expert_pixel, tl.sum(row_sum(grad, rows == OUTPUTS), axis=1), own)
    flat = tl.arange(0, columns)[None, :]
    tl.store(grad_z + in_band * columns + flat, tl.reshape(grad, [M, columns]))


def recompute(features, packed: Packed, gate_logits, cotangents, hidden, grad_z, grad_logits, frame: int,
              rows: range, own: range, size: tuple[int, int], mixing: Mixing, precision: Precision,
              config: Config) -> Launch:  # fmt: skip
    """Fills ``hidden`` and ``grad_z`` [rows, padded width, ...] for output rows ``rows`` of a frame, from ``features``
    with one more row above and below, and ``grad_logits`` (float32, or None) in the rows ``own``.

    ``cotangents`` are contiguous float32 tensors like the outputs, or None.
    """
    height, width = size
    pointers = [features if c is None else c for c in cotangents]
    return Launch(
        kernel=_recompute_kernel,
        grid=(triton.cdiv(width, config.tile_width), triton.cdiv(len(rows), config.tile_height)),
        arguments=dict(
            features=features, w1=packed.w1, b1=packed.b1, w2=packed.w2, feeds=packed.feeds, b2=packed.b2,
            gate_logits=features if gate_logits is None else gate_logits,
            **dict(zip(_COTANGENTS, pointers, strict=True)),
            **{name.upper(): c is not None for name, c in zip(_COTANGENTS, cotangents, strict=True)},
            hidden=hidden, grad_z=grad_z, grad_logits=grad_z if grad_logits is None else grad_logits,
            frame=frame, first_row=rows.start, padded_width=features.shape[1], height=height, width=width,
            own_first=own.start, own_last=own.stop,
            **packed.arguments(), **mixing.arguments(),
            HAS_LOGITS=gate_logits is not None, GRAD_LOGITS=grad_logits is not None,
            M=config.tile_height * config.tile_width, TILE_W=config.tile_width, PRECISION=precision.dot,
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
