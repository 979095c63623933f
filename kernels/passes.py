"""The passes over a batch: which kernel runs on which band, in which workspace.

Both passes are generators of launches, so that tests can compile what they cannot run. Workspaces are allocated once
per call and reused by every band; their size depends on the image's width and on the channels, not on the batch:
``FORWARD_BYTES`` for the forward pass (half a frame of VGGT's in bfloat16: large enough to hide launches; commuted
columns add a float32 flag a pixel, and a table of three rows of hidden channels), and
``BACKWARD_BYTES`` for the backward pass, beside the gradients themselves and partial sums of ``splits`` (16) times the
3x3 weights. An image so wide that one row of tiles needs more gets that row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moe3d.kernels.columns import column_table, strip_width
from moe3d.kernels.feature_gradient import downsample, feature_gradient
from moe3d.kernels.forward import Commuted, forward
from moe3d.kernels.hidden_gradient import hidden_gradient
from moe3d.kernels.pack import Cache, Packed, Parameters, columns_first, operand, pack, pack_transposed
from moe3d.kernels.plan import Band, Launch, Mixing, Precision, bands, round_up
from moe3d.kernels.recompute import recompute
from moe3d.kernels.tables import Config
from moe3d.kernels.upsample import upsample
from moe3d.kernels.weight_gradient import weight_gradient

FORWARD_BYTES = 64 << 20
BACKWARD_BYTES = 96 << 20
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

    @property
    def shape_class(self) -> str:
        """What the best launch configuration depends on: channels in, hidden channels, whether the width grows, and
        whether experts are skipped."""
        w1, gate = self.parameters.expert_w1, self.parameters.gate_w1
        n = w1.shape[0] * w1.shape[1] + (0 if gate is None else gate.shape[0])
        return f"C{w1.shape[2]}-N{n}" + "-wider" * self.wider + "-skip" * (self.skip_below > 0)

    @property
    def columns(self) -> int:
        """Of the second layer's product: what all experts and the gate put out, padded."""
        return math.prod(self.parameters.padded)

    @property
    def wider(self) -> bool:
        """Whether the width grows so much (1.5-fold) that it can pay to interpolate columns last."""
        return 2 * (self.size[1] - 1) >= 3 * (self.x.shape[3] - 1) and self.size[1] > 1


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
    """Fills ``outputs``, by the formulation that ``config`` names."""
    commuted = config.formulation == "columns"
    height, width = call.size
    packed = packed_for_forward(call, config)
    if commuted:
        source_width = call.x.shape[3]
        strip = strip_width(source_width, width, config.tile_width)
        padded_width = source_width + config.tile_width // 2 + BORDER
        table_shape = (triton.cdiv(width, strip), 3, config.tile_width, config.tile_width // 2)
        table = call.x.new_empty(table_shape, dtype=call.precision.dtype)
        yield column_table(table, strip, source_width, width, call.precision)
        field = yield from _field(call, packed, config)
        target, pos_x = (height, source_width), _zeros_like_rows(call.pos_x, source_width)
    else:
        strip = config.tile_width
        padded_width = round_up(width, config.tile_width) + 2 * BORDER
        target, pos_x = call.size, call.pos_x
    row_bytes = padded_width * packed.channels * call.precision.dtype.itemsize
    plan = list(
        bands(
            call.x.shape[0], height, FORWARD_BYTES // row_bytes, 2 * BORDER, config.tile_height,
            triton.cdiv(width, strip), call.multiprocessors,
        )
    )  # fmt: skip
    rows = [round_up(band.rows, config.tile_height) + 2 * BORDER for band in plan]
    most = (max(b.frames for b in plan), max(rows), padded_width)
    workspace = call.x.new_empty((*most, packed.channels), dtype=call.precision.dtype)
    flags = call.x.new_empty(most, dtype=torch.float32) if commuted else None
    for band, band_rows, x in zip(plan, rows, _channels_last(call.x, plan), strict=True):
        features = workspace.flatten()[: band.frames * band_rows * padded_width * packed.channels]
        features = features.view(band.frames, band_rows, padded_width, packed.channels)
        how = None
        if commuted:
            flagged = flags.flatten()[: features[..., 0].numel()].view(features.shape[:3]).zero_()
            how = Commuted(field, flagged, table, source_width, strip)
        yield upsample(
            x, pos_x, call.pos_y, features, band.first_row - BORDER, target, call.precision, how and how.flags
        )
        yield forward(
            features, packed, call.gate_logits, outputs, band, call.mixing, call.skip_below, call.precision, config, how
        )


def _field(call: Call, packed: Packed, config: Config) -> Generator[Launch, None, Tensor]:
    """What the column embedding and the biases give before the ReLU: [cases, W, N] for the first row, those between and
    the last, or [N] where there is no embedding."""
    if call.pos_x is None:
        return packed.b1
    direct = packed_for_forward(call, config._replace(formulation="direct"))
    config = config._replace(tile_height=8, tile_width=16, max_width=64)
    width, half = call.pos_x.shape
    cases = min(call.size[0], 3)
    shape = (round_up(cases, config.tile_height) + 2 * BORDER, round_up(width, config.tile_width) + 2 * BORDER)
    band = call.x.new_zeros((*shape, packed.channels), dtype=call.precision.dtype)
    band[BORDER : cases + BORDER, BORDER : width + BORDER, :half] = operand(call.pos_x.float(), call.precision)
    field = call.x.new_empty((cases, width, packed.b1.shape[0]), dtype=torch.float32)
    yield feature_gradient(band, direct.w1, field, cases, call.precision, config)
    return field.add_(packed.b1)


def _zeros_like_rows(table: Tensor | None, rows: int) -> Tensor | None:
    return None if table is None else table.new_zeros(rows, table.shape[1])


class Gradients(NamedTuple):
    """Float32 tensors in the shapes of the inputs (x's in its own dtype), None where not wanted."""

    x: Tensor | None
    expert_w1: Tensor | None
    expert_b1: Tensor | None
    expert_w2: Tensor | None
    expert_b2: Tensor | None
    gate_w1: Tensor | None
    gate_b1: Tensor | None
    gate_w2: Tensor | None
    gate_b2: Tensor | None
    gate_logits: Tensor | None


class Backward:
    """The backward pass: iterate over ``launches`` and run them, then ask for ``gradients``.

    A band of rows is worked on with one more row above and below, because the convolution's adjoint reaches there.
    """

    def __init__(self, call: Call, cotangents: Outputs, needs: Gradients, configs: Callable[[str], Config]):
        self.call, self.cotangents, self.needs, self.configs = call, cotangents, needs, configs
        config = configs("recompute")
        self.packed, self.transposed = _packed_for_backward(call, config, configs("feature_gradient"))
        height, width = call.size
        batch, channels, *source = call.x.shape
        n, columns = self.packed.b1.shape[0], self.packed.b2.shape[0]
        self.pixels = configs("weight_gradient").block_k  # a block of pixels, where sums run over them
        self.padded_width = round_up(width, max(config.tile_width, self.pixels)) + 2 * BORDER
        item = call.precision.dtype.itemsize
        row_bytes = self.padded_width * ((self.packed.channels + n) * item + (columns + self.packed.channels) * 4)
        self.plan = list(
            bands(
                1, height, BACKWARD_BYTES // row_bytes, 4 * BORDER, config.tile_height,
                triton.cdiv(width, config.tile_width), call.multiprocessors,
            )
        )  # fmt: skip
        self.rows = round_up(max(b.rows for b in self.plan) + 2 * BORDER, config.tile_height) + 2 * BORDER

        def empty(*shape: int, wanted: bool = True, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return call.x.new_empty(shape, dtype=dtype) if wanted else None

        def zeros(*shape: int, wanted: bool = True, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return call.x.new_zeros(shape, dtype=dtype) if wanted else None

        first_layer = needs.expert_w1 or needs.gate_w1
        others = any((needs.expert_b1, needs.expert_w2, needs.expert_b2, needs.gate_b1, needs.gate_w2, needs.gate_b2))
        operand, c = call.precision.dtype, self.packed.channels
        self.features = empty(self.rows + 2 * BORDER, self.padded_width, c, dtype=operand)
        self.hidden = zeros(self.rows, self.padded_width, n, dtype=operand)  # its border is never written
        self.grad_z = empty(self.rows, self.padded_width, columns)
        self.grad_features = empty(self.rows, width, c, wanted=needs.x)
        self.grad_source = zeros(*source, c, wanted=needs.x)
        self.grad_x = empty(batch, *source, channels, wanted=needs.x, dtype=call.x.dtype)
        self.grad_logits = empty(batch, call.mixing.experts, height, width, wanted=needs.gate_logits)
        self.sum_w1 = zeros(configs("weight_gradient").splits, 9, c, n, wanted=first_layer)
        self.sum_w2 = zeros(self.rows, n, columns, wanted=others)
        self.sum_b1 = zeros(self.rows, n, wanted=others)
        self.sum_b2 = zeros(self.rows, columns, wanted=others)

    def launches(self) -> Iterator[Launch]:
        frames = [Band(b, 1, 0, 0) for b in range(self.call.x.shape[0])]
        for frame, x in enumerate(_channels_last(self.call.x, frames)):
            for band in self.plan:
                yield from self._band(x, frame, range(band.first_row, band.first_row + band.rows))
            if self.needs.x:
                self.grad_x[frame] = self.grad_source[..., : self.call.x.shape[1]]
                self.grad_source.zero_()

    def _band(self, x: Tensor, frame: int, own: range) -> Iterator[Launch]:
        call, config, precision = self.call, self.configs("recompute"), self.call.precision
        rows = range(own.start - BORDER, own.stop + BORDER)
        tiled = round_up(len(rows), config.tile_height)
        features = self.features[None, : tiled + 2 * BORDER]
        yield upsample(x, call.pos_x, call.pos_y, features, rows.start - BORDER, call.size, precision)
        yield recompute(
            features[0], self.packed, call.gate_logits, self.cotangents, self.hidden, self.grad_z, self.grad_logits,
            frame, rows, own, call.size, call.mixing, precision, config,
        )  # fmt: skip
        sums = None if self.sum_w2 is None else (self.sum_w2, self.sum_b1, self.sum_b2)
        if sums is None and self.sum_w1 is None and not self.needs.x:
            return
        yield hidden_gradient(
            self.hidden, self.grad_z, self.packed, sums, rows, own, call.size, precision, self.pixels, num_warps=8
        )
        if self.sum_w1 is not None:
            yield weight_gradient(
                features[0], self.hidden, self.sum_w1, len(own), precision, self.configs("weight_gradient")
            )
        if self.needs.x:
            grad_features = self.grad_features[: len(own)]
            yield feature_gradient(
                self.hidden, self.transposed, grad_features, len(own), precision, self.configs("feature_gradient")
            )
            yield downsample(grad_features, self.grad_source, own.start, call.size)

    def gradients(self) -> Gradients:
        """The partial sums, added up in a fixed order and put back into the parameters' shapes."""
        p, packed = self.call.parameters, self.packed
        experts, hidden, channels = p.expert_w1.shape[:3]
        outputs, split = p.expert_w2.shape[1], experts * hidden
        found: dict[str, Tensor] = {}
        if self.sum_w1 is not None:
            w1 = self.sum_w1.sum(0)[:, :channels].permute(2, 1, 0)[packed.position].unflatten(2, (3, 3))
            found["expert_w1"], found["gate_w1"] = w1[:split].unflatten(0, (experts, hidden)), w1[split:]
        if self.sum_w2 is not None:
            b1 = self.sum_b1.sum(0)[packed.position]
            found["expert_b1"], found["gate_b1"] = b1[:split].unflatten(0, (experts, hidden)), b1[split:]
            shape = (packed.outputs_padded, packed.experts_padded)
            w2 = self.sum_w2.sum(0)[packed.position].unflatten(1, shape)  # [K*Hd + Hg, OP, KP]
            by_expert = w2[:split, :outputs, :experts].unflatten(0, (experts, hidden))
            found["expert_w2"] = by_expert.diagonal(dim1=0, dim2=3).permute(2, 1, 0)
            b2 = self.sum_b2.sum(0).unflatten(0, shape)
            found["expert_b2"] = b2[:outputs, :experts].T
            if p.gate_w1 is not None:
                found["gate_w2"], found["gate_b2"] = w2[split:, outputs, :experts].T, b2[outputs, :experts]
        if self.needs.x:
            found["x"] = self.grad_x.permute(0, 3, 1, 2)
        found["gate_logits"] = self.grad_logits
        return Gradients(*(found[name] if getattr(self.needs, name) else None for name in Gradients._fields))


def _packed_for_backward(call: Call, config: Config, transposed: Config) -> tuple[Packed, Tensor]:
    """The forward's parameters without groups for skipping, and the 3x3 weights for the transposed convolution."""
    precision = call.precision
    key = ("backward", precision, config.max_width, config.block_k, transposed.block_k, _stream(call.x))

    def make() -> tuple[Packed, Tensor]:
        packed = pack(call.parameters, precision, config.max_width, config.block_k)
        return packed, pack_transposed(call.parameters, packed, precision, transposed.block_k)

    return _packed.get(call.parameters, key, make)


def packed_for_forward(call: Call, config: Config) -> Packed:
    skip = call.skip_below > 0
    key = ("forward", call.precision, config.max_width, config.block_k, config.formulation, skip, _stream(call.x))

    def make() -> Packed:
        packed = pack(call.parameters, call.precision, config.max_width, config.block_k, skip)
        return columns_first(packed) if config.formulation == "columns" else packed

    return _packed.get(call.parameters, key, make)


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
