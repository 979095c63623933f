"""The DPT depth head of VGGT, written anew with the same attribute names, state-dict keys and arithmetic.

A state dict moves between this head and ``vggt.heads.dpt_head.DPTHead`` in either direction, and both give the same
output. Sources: Ranftl et al., "Vision Transformers for Dense Prediction" (arXiv 2103.13413); Wang et al., "VGGT:
Visual Geometry Grounded Transformer" (arXiv 2503.11651).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe3d.ops.activations import ACTIVATIONS, CONF_ACTIVATIONS
from moe3d.position import position_map, position_tables

# F.interpolate has addressed its output with 32-bit integers; larger outputs are computed part by part of the batch.
_MAX_INTERPOLATED_ELEMENTS = 1_610_612_736


class ResidualConvUnit(nn.Module):
    """relu(x) + conv2(relu(conv1(relu(x)))), [N, C, H, W] to the same shape; overwrites its input."""

    adds_relu = True  # whatever its activation does in place; read by moe3d.integrations.front_native

    def __init__(self, features: int, activation: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(features, features, kernel_size=3, padding=1)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        # VGGT's activation works in place, so that what its skip connection adds back is relu(x), not x.
        x = self.activation(x)
        return self.conv2(self.activation(self.conv1(x))) + x


class FeatureFusionBlock(nn.Module):
    """Adds a finer level to the fused coarser ones, refines the sum, and resamples it to ``size`` (default: twice)."""

    def __init__(self, features: int, has_residual: bool = True) -> None:
        super().__init__()
        activation = nn.ReLU(inplace=True)
        self.out_conv = nn.Conv2d(features, features, kernel_size=1)
        self.has_residual = has_residual
        if has_residual:
            self.resConfUnit1 = ResidualConvUnit(features, activation)
        self.resConfUnit2 = ResidualConvUnit(features, activation)

    def forward(self, x: Tensor, finer: Tensor | None = None, size: Sequence[int] | None = None) -> Tensor:
        if self.has_residual:
            x = x + self.resConfUnit1(finer)
        x = self.resConfUnit2(x)
        return self.out_conv(_interpolate(x, size or (2 * x.shape[2], 2 * x.shape[3])))


class DPTHead(nn.Module):
    """Dense prediction from the tokens of four transformer layers (VGGT's depth and point head).

    Args:
        dim_in: channels of the tokens.
        patch_size: pixels per token along each axis.
        output_dim: prediction channels plus one of confidence.
        activation: of the prediction; one of exp, inv_log, linear, norm, norm_exp, relu, sigmoid, xy_inv_log.
        conf_activation: of the confidence; one of expp0, expp1, sigmoid.
        features: channels of the fused features.
        out_channels: channels of the four layers' features before fusion.
        intermediate_layer_idx: which four layers to read.
        pos_embed: add the position embedding to the features.
        feature_only: return the features instead of predictions.
        down_ratio: output size is the image size divided by this.

    Raises:
        ValueError: an activation's name is unknown.
    """

    def __init__(
        self,
        dim_in: int,
        patch_size: int = 14,
        output_dim: int = 4,
        activation: str = "inv_log",
        conf_activation: str = "expp1",
        features: int = 256,
        out_channels: Sequence[int] = (256, 512, 1024, 1024),
        intermediate_layer_idx: Sequence[int] = (4, 11, 17, 23),
        pos_embed: bool = True,
        feature_only: bool = False,
        down_ratio: int = 1,
    ) -> None:
        super().__init__()
        _check_name("activation", activation, ACTIVATIONS)
        _check_name("conf_activation", conf_activation, CONF_ACTIVATIONS)
        self.patch_size = patch_size
        self.activation = activation
        self.conf_activation = conf_activation
        self.pos_embed = pos_embed
        self.feature_only = feature_only
        self.down_ratio = down_ratio
        self.intermediate_layer_idx = list(intermediate_layer_idx)

        c1, c2, _, c4 = out_channels
        self.norm = nn.LayerNorm(dim_in)
        self.projects = nn.ModuleList(nn.Conv2d(dim_in, channels, kernel_size=1) for channels in out_channels)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(c1, c1, kernel_size=4, stride=4),
                nn.ConvTranspose2d(c2, c2, kernel_size=2, stride=2),
                nn.Identity(),
                nn.Conv2d(c4, c4, kernel_size=3, stride=2, padding=1),
            ]
        )
        self.scratch = _scratch(out_channels, features, None if feature_only else output_dim)

    def forward(
        self,
        aggregated_tokens_list: Sequence[Tensor],
        images: Tensor,
        patch_start_idx: int,
        frames_chunk_size: int | None = 8,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Predict a dense map per frame.

        Args:
            aggregated_tokens_list: one [B, S, patch_start_idx + P, dim_in] tensor per layer of the backbone.
            images: [B, S, 3, H, W]; only the shape is used.
            patch_start_idx: number of camera and register tokens before the patch tokens.
            frames_chunk_size: frames computed at a time, to bound memory; None for all.

        Returns:
            Prediction [B, S, H, W, output_dim - 1] and confidence [B, S, H, W]; or, of a ``feature_only`` head,
            features [B, S, features, H / down_ratio, W / down_ratio].

        Raises:
            ValueError: ``frames_chunk_size`` is not positive.
        """
        frames = images.shape[1]
        if frames_chunk_size is None or frames_chunk_size >= frames:
            return self._forward_impl(aggregated_tokens_list, images, patch_start_idx)
        if frames_chunk_size < 1:
            raise ValueError(f"frames_chunk_size must be a positive integer or None, got {frames_chunk_size}")
        chunks: list[Any] = [
            self._forward_impl(aggregated_tokens_list, images, patch_start_idx, start, start + frames_chunk_size)
            for start in range(0, frames, frames_chunk_size)
        ]
        if self.feature_only:
            return torch.cat(chunks, dim=1)
        predictions, confidences = zip(*chunks, strict=True)
        return torch.cat(predictions, dim=1), torch.cat(confidences, dim=1)

    def _forward_impl(
        self,
        aggregated_tokens_list: Sequence[Tensor],
        images: Tensor,
        patch_start_idx: int,
        frames_start_idx: int | None = None,
        frames_end_idx: int | None = None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        chunk = slice(frames_start_idx, frames_end_idx)
        batch, frames, _, height, width = images[:, chunk].shape
        grid = (height // self.patch_size, width // self.patch_size)

        features = []
        for layer, project, resize in zip(self.intermediate_layer_idx, self.projects, self.resize_layers, strict=True):
            tokens = aggregated_tokens_list[layer][:, chunk, patch_start_idx:].flatten(0, 1)
            x = project(self.norm(tokens).transpose(1, 2).unflatten(2, grid))
            if self.pos_embed:
                x = self._apply_pos_embed(x, width, height)
            features.append(resize(x))

        x = self.scratch_forward(features)
        x = _interpolate(x, [int(n * self.patch_size / self.down_ratio) for n in grid])
        if self.pos_embed:
            x = self._apply_pos_embed(x, width, height)
        if self.feature_only:
            return x.unflatten(0, (batch, frames))

        scratch: Any = self.scratch
        y = scratch.output_conv2(x)
        prediction = ACTIVATIONS[self.activation].forward(y[:, :-1]).movedim(1, -1)
        confidence = CONF_ACTIVATIONS[self.conf_activation].forward(y[:, -1])
        return prediction.unflatten(0, (batch, frames)), confidence.unflatten(0, (batch, frames))

    def scratch_forward(self, features: Sequence[Tensor]) -> Tensor:
        """Fuse the four layers' features, finest first, into [N, features // 2, h, w] (``feature_only``: features)."""
        s: Any = self.scratch
        layers = (s.layer1_rn, s.layer2_rn, s.layer3_rn, s.layer4_rn)
        x1, x2, x3, x4 = (conv(x) for conv, x in zip(layers, features, strict=True))
        x = s.refinenet4(x4, size=x3.shape[2:])
        x = s.refinenet3(x, x3, size=x2.shape[2:])
        x = s.refinenet2(x, x2, size=x1.shape[2:])
        x = s.refinenet1(x, x1)
        return s.output_conv1(x)

    def _apply_pos_embed(self, x: Tensor, W: int, H: int) -> Tensor:
        return x + position_map(*position_tables((x.shape[2], x.shape[3]), x.shape[1], W / H, x))


def _scratch(in_channels: Sequence[int], features: int, output_dim: int | None) -> nn.Module:
    """The fusion and output layers; ``output_dim=None`` for a head that returns features."""
    scratch = nn.Module()
    for level, channels in enumerate(in_channels, start=1):
        scratch.add_module(f"layer{level}_rn", nn.Conv2d(channels, features, kernel_size=3, padding=1, bias=False))
    for level in (1, 2, 3, 4):
        scratch.add_module(f"refinenet{level}", FeatureFusionBlock(features, has_residual=level < 4))
    if output_dim is None:
        scratch.output_conv1 = nn.Conv2d(features, features, kernel_size=3, padding=1)
        return scratch
    scratch.output_conv1 = nn.Conv2d(features, features // 2, kernel_size=3, padding=1)
    scratch.output_conv2 = nn.Sequential(
        nn.Conv2d(features // 2, 32, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(32, output_dim, kernel_size=1),
    )
    return scratch


def _interpolate(x: Tensor, size: Sequence[int]) -> Tensor:
    elements = x.shape[0] * x.shape[1] * size[0] * size[1]
    parts = x.chunk(elements // _MAX_INTERPOLATED_ELEMENTS + 1) if elements > _MAX_INTERPOLATED_ELEMENTS else [x]
    resized = [F.interpolate(part, size=tuple(size), mode="bilinear", align_corners=True) for part in parts]
    return resized[0] if len(resized) == 1 else torch.cat(resized)


def _check_name(argument: str, name: str, known: Mapping[str, object]) -> None:
    if name not in known:
        raise ValueError(f"{argument} must be one of {', '.join(sorted(known))}, got {name!r}")
