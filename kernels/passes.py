"""The passes over a batch: which kernel runs on which band, in which workspace.

Both passes are generators of launches, so that tests can compile what they cannot run. Workspaces are allocated once
per call and reused by every band; their size depends on the image's width and on the channels, not on the batch:
``FORWARD_BYTES`` for the forward pass (small enough to stay in the L2 cache of the GPUs it was made for).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moe3d.kernels.forward import forward
from moe3d.kernels.pack import Cache, Packed, Parameters, pack
from moe3d.kernels.plan import Band, Launch, Mixing, Precision, bands, round_up
from moe3d.kernels.tables import Config
from moe3d.kernels.upsample import upsample

FORWARD_BYTES = 32 << 20
BORDER = 1  # pixels of zeros around the image: the convolution's padding

_packed = Cache()


class Call(NamedTuple):
    """One call of the operation."""

    x: Tensor  #                   [B, C, h, w]
    parameters: Parameters
    gate_logits: Tensor | None  #  [B, K, H, W], contiguous
    pos_x: Tensor | None  #        [W, C/2], contiguous
    pos_y: Tensor | None  #        [H, C/2], contiguous
    size: tuple[int, int]
    mixing: Mixing
    return_experts: bool
    skip_below: float
    precision: Precision
    multiprocessors: int


class Outputs(NamedTuple):
    prediction: Tensor  #         [B, P, H, W]
    confidence: Tensor | None  #  [B, H, W]
    entropy: Tensor  #            [B, H, W]
    weights: Tensor | None  #     [B, K, H, W]
    hypotheses: Tensor | None  #  [B, K, P, H, W]


def new_outputs(call: Call) -> Outputs:
    batch, mixing = call.x.shape[0], call.mixing

    def new(*shape: int, present: bool = True) -> Tensor | None:
        return call.x.new_empty((*shape, *call.size), dtype=torch.float32) if present else None

    return Outputs(
        prediction=new(batch, mixing.predicted),
        confidence=new(batch, present=mixing.conf_activation is not None),
        entropy=new(batch),
        weights=new(batch, mixing.experts, present=call.return_experts),
        hypotheses=new(batch, mixing.experts, mixing.predicted, present=call.return_experts),
    )


def forward_pass(call: Call, outputs: Outputs, config: Config) -> Iterator[Launch]:
    """Fills ``outputs``."""
    height, width = call.size
    packed = packed_for_forward(call, config)
    padded_width = round_up(width, config.tile_width) + 2 * BORDER
    row_bytes = padded_width * packed.channels * call.precision.dtype.itemsize
    plan = list(
        bands(
            call.x.shape[0], height, FORWARD_BYTES // row_bytes, 2 * BORDER, config.tile_height,
            triton.cdiv(width, config.tile_width), call.multiprocessors,
        )
    )  # fmt: skip
    rows = [round_up(band.rows, config.tile_height) + 2 * BORDER for band in plan]
    workspace = call.x.new_empty(
        (max(b.frames for b in plan), max(rows), padded_width, packed.channels), dtype=call.precision.dtype
    )
    for band, band_rows, x in zip(plan, rows, _channels_last(call.x, plan), strict=True):
        features = workspace[: band.frames, :band_rows]
        yield upsample(x, call.pos_x, call.pos_y, features, band.first_row - BORDER, call.size, call.precision)
        yield forward(
            features, packed, call.gate_logits, outputs, band, call.mixing, call.skip_below, call.precision, config
        )


def packed_for_forward(call: Call, config: Config) -> Packed:
    skip = call.skip_below > 0
    key = ("forward", call.precision, config.max_width, config.block_k, skip, _stream(call.x))
    return _packed.get(
        call.parameters, key, lambda: pack(call.parameters, call.precision, config.max_width, config.block_k, skip)
    )


def _stream(x: Tensor) -> int:
    """Packed parameters are found again on the stream that made them: no other is ordered behind it."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def _channels_last(x: Tensor, plan: list[Band]) -> Iterator[Tensor]:
    """The frames of x that each band needs, with channel stride 1: as they are, or copied once for all their bands."""
    frames, copied = slice(0, 0), None
    for band in plan:
        if copied is None or frames.start != band.first_frame:
            frames = slice(band.first_frame, band.first_frame + band.frames)
            copied = x[frames]
            if x.stride(1) != 1:
                copied = copied.contiguous(memory_format=torch.channels_last)
        yield copied
