"""MiniVGGT: a small feed-forward 3D reconstruction network with VGGT's interface.

Wang et al., "VGGT: Visual Geometry Grounded Transformer" (arXiv 2503.11651), describes the architecture that it
follows: alternating frame-wise and global attention over patch tokens, camera and register tokens per frame, an
iterative camera head and DPT heads. What differs is size, a convolutional encoder in place of DINOv2, whose finer maps
are the first two levels of the DPT heads, and positions that are normalised by the image's diagonal, because it is
trained on small images and run on large ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe3d.models.dpt import DPTHead
from moe3d.models.encoder import Encoder, InvertedResidual
from moe3d.models.layers import Block, rotary_table
from moe3d.position import position_map, position_tables

PATCH_SIZE = 14


class PatchEmbed(nn.Module):
    """Images [N, 3, 14 h, 14 w] in [0, 1] to patches [N, dim, h, w], and what is seen within each of them.

    The details are feature maps of 4 x 4 and 2 x 2 cells a patch, packed patch by patch, so that a DPT head can unpack
    them: its first two levels read them where others read early layers of a transformer, which a shallow one lacks.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.encoder = Encoder(dim)
        c2, c4, c8, c16, c32 = self.encoder.channels
        self.finest = nn.Conv2d(c2, c4, kernel_size=2, stride=2)
        self.fine = nn.Conv2d(c4, dim // 8, kernel_size=1)
        self.middle = nn.Conv2d(c8, dim // 2, kernel_size=1)
        self.proj = nn.Conv2d(c16 + c32, dim, kernel_size=1)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Patches [N, dim, h, w] and details, each [N, h * w, 2 * dim]."""
        h, w = images.shape[-2] // PATCH_SIZE, images.shape[-1] // PATCH_SIZE
        # From 14 to 16 pixels per patch, which strides can halve.
        x = F.interpolate(images, (16 * h, 16 * w), mode="bilinear", align_corners=False)
        s2, s4, s8, s16, s32 = self.encoder(x)
        s32 = F.interpolate(s32, (h, w), mode="bilinear", align_corners=False)
        details = [F.pixel_unshuffle(self.fine(s4 + self.finest(s2)), 4), F.pixel_unshuffle(self.middle(s8), 2)]
        return self.proj(torch.cat([s16, s32], dim=1)), [detail.flatten(2).mT for detail in details]


class Aggregator(nn.Module):
    """Images to tokens, through ``depth`` pairs of a frame-wise and a global attention block.

    Args:
        embed_dim: channels of a token.
        depth: pairs of blocks.
        num_heads: attention heads; ``embed_dim // num_heads`` must be a multiple of 4.
        num_register_tokens: register tokens per frame.
    """

    def __init__(self, embed_dim: int, depth: int, num_heads: int, num_register_tokens: int = 4) -> None:
        super().__init__()
        self.head_dim = embed_dim // num_heads
        self.patch_embed = PatchEmbed(embed_dim)
        self.frame_blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.global_blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        # Index 0 is for the first frame, whose camera is the world, index 1 for all others.
        self.camera_token = nn.Parameter(torch.empty(1, 2, 1, embed_dim))
        self.register_token = nn.Parameter(torch.empty(1, 2, num_register_tokens, embed_dim))
        self.patch_start_idx = 1 + num_register_tokens
        self.apply(_init_weights)
        nn.init.zeros_(self.patch_embed.finest.weight)  # begins as the encoder's own map
        nn.init.trunc_normal_(self.camera_token, std=0.02)
        nn.init.trunc_normal_(self.register_token, std=0.02)

    def forward(self, images: Tensor) -> tuple[list[Tensor], int]:
        """Images [B, S, 3, H, W] in [0, 1] to 2 + ``depth`` tensors [B, S, patch_start_idx + P, 2 * embed_dim] and
        ``patch_start_idx``: the details of :class:`PatchEmbed`, with nothing for the special tokens; then, of each
        pair, the channels of the frame-wise block and those of the global block."""
        batch, frames = images.shape[:2]
        tokens, rotation, details = self._embed(images)
        everywhere = rotation.repeat(1, frames, 1)

        padded = [F.pad(detail.to(tokens.dtype), (0, 0, self.patch_start_idx, 0)) for detail in details]
        outputs = [detail.unflatten(0, (batch, frames)) for detail in padded]
        for frame_block, global_block in zip(self.frame_blocks, self.global_blocks, strict=True):
            within = frame_block(tokens.flatten(0, 1), rotation).unflatten(0, (batch, frames))
            tokens = global_block(within.flatten(1, 2), everywhere).unflatten(1, (frames, -1))
            outputs.append(torch.cat([within, tokens], dim=-1))
        return outputs, self.patch_start_idx

    def _embed(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Tokens [B, S, N, embed_dim], the rotary table [2, N, head_dim] of one frame's tokens, and the details."""
        batch, frames, _, height, width = images.shape
        patches, details = self.patch_embed(images.flatten(0, 1))
        _, channels, h, w = patches.shape

        # The tables are the DPT head's, a tenth of a unit sinusoid; a stem that starts from nothing gets it in full.
        position = 10 * position_map(*position_tables((h, w), channels, width / height, patches))
        patches = (patches + position).flatten(2).mT.unflatten(0, (batch, frames))
        tokens = torch.cat([self._special_tokens(batch, frames), patches], dim=2)

        positions = _patch_positions(h, w, images.device)
        centre = positions.new_zeros(self.patch_start_idx, 2)  # where the special tokens sit
        return tokens, rotary_table(torch.cat([centre, positions]), self.head_dim), details

    def _special_tokens(self, batch: int, frames: int) -> Tensor:
        tokens = torch.cat([self.camera_token, self.register_token], dim=2)
        tokens = torch.cat([tokens[:, :1], tokens[:, 1:].expand(-1, frames - 1, -1, -1)], dim=1)
        return tokens.expand(batch, -1, -1, -1)


class CameraHead(nn.Module):
    """Refines each frame's pose encoding from its camera token, attending across frames.

    The pose encoding is VGGT's: translation (3), rotation as quaternion xyzw (4), vertical and horizontal field of view
    in radians (2), of the world-to-camera transformation in OpenCV axes.

    Args:
        dim_in: channels of the tokens.
        dim: channels inside the head.
        num_heads: attention heads.
        trunk_depth: attention blocks per iteration.
    """

    def __init__(self, dim_in: int, dim: int = 128, num_heads: int = 4, trunk_depth: int = 2) -> None:
        super().__init__()
        self.token_norm = nn.LayerNorm(dim_in)
        self.token_proj = nn.Linear(dim_in, dim)
        self.embed_pose = nn.Linear(9, dim)
        # Shift, scale and gate of adaptive layer normalisation (Peebles and Xie, arXiv 2212.09748).
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.adaptive_norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.trunk = nn.Sequential(*(Block(dim, num_heads) for _ in range(trunk_depth)))
        self.trunk_norm = nn.LayerNorm(dim)
        self.pose_branch = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 9))
        # Refinement starts from a camera at the origin, 57 degrees wide: the field of view is off its ReLU's kink.
        self.initial_pose = nn.Parameter(torch.tensor([0.0, 0, 0, 0, 0, 0, 1, 1, 1]))
        self.apply(_init_weights)

    def forward(self, aggregated_tokens_list: list[Tensor], num_iterations: int = 4) -> list[Tensor]:
        """The pose encodings [B, S, 9] after each iteration, the best one last."""
        tokens = self.token_proj(self.token_norm(aggregated_tokens_list[-1][:, :, 0]))
        pose = self.initial_pose.expand(*tokens.shape[:2], -1)
        encodings: list[Tensor] = []
        for _ in range(num_iterations):
            # Each iteration learns to correct what it is given; no gradient flows through the earlier ones.
            given = pose if not encodings else pose.detach()
            shift, scale, gate = self.modulation(self.embed_pose(given)).chunk(3, dim=-1)
            x = tokens + gate * (self.adaptive_norm(tokens) * (1 + scale) + shift)
            pose = given + self.pose_branch(self.trunk_norm(self.trunk(x)))
            encodings.append(torch.cat([pose[..., :7], pose[..., 7:].relu()], dim=-1))
        return encodings


class MiniVGGT(nn.Module):
    """A network of 4.5 million parameters with VGGT's attributes, calls and outputs.

    Args:
        embed_dim: channels of a token; at 128 the encoder is as wide as EfficientNet-Lite0.
        depth: pairs of a frame-wise and a global attention block.
        num_heads: attention heads; ``embed_dim // num_heads`` must be a multiple of 4.
        features: channels of the DPT heads' fused features, a multiple of 32.
        enable_point: add the head for world points.

    Raises:
        ValueError: a size does not fit the above.
    """

    def __init__(
        self, embed_dim: int = 128, depth: int = 3, num_heads: int = 4, features: int = 64, enable_point: bool = False
    ) -> None:
        super().__init__()
        _check_sizes(embed_dim, depth, num_heads, features)
        self.config = {
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "features": features,
            "enable_point": enable_point,
        }
        dpt: dict[str, Any] = {
            "dim_in": 2 * embed_dim,
            "patch_size": PATCH_SIZE,
            "features": features,
            "out_channels": (2 * features,) * 4,
            # The details of the patches, a pair of blocks in the middle, and the last one.
            "intermediate_layer_idx": [0, 1, 2 + (depth - 1) // 2, 1 + depth],
        }
        self.aggregator = Aggregator(embed_dim, depth, num_heads)
        self.camera_head = CameraHead(2 * embed_dim)
        self.point_head = DPTHead(output_dim=4, activation="inv_log", **dpt) if enable_point else None
        self.depth_head = DPTHead(output_dim=2, activation="exp", **dpt)
        self.track_head = None

    def forward(self, images: Tensor) -> dict[str, Tensor | list[Tensor]]:
        """Reconstruct a sequence of frames; the first frame's camera is the world.

        Args:
            images: [S, 3, H, W] or [B, S, 3, H, W] in [0, 1], H and W multiples of 14.

        Returns:
            ``pose_enc`` [B, S, 9] (see :class:`CameraHead`) and ``pose_enc_list``, that of every iteration; ``depth``
            [B, S, H, W, 1], planar, and ``depth_conf`` [B, S, H, W]; with a point head ``world_points``
            [B, S, H, W, 3] and ``world_points_conf`` [B, S, H, W]; in eval mode ``images`` [B, S, 3, H, W]. Lengths are
            in one unknown unit per sequence.

        Raises:
            ValueError: ``images`` has another shape.
            TypeError: ``images`` is not floating point.
        """
        images = check_images(images)
        tokens, patch_start_idx = self.aggregator(images)

        predictions: dict[str, Tensor | list[Tensor]] = {}
        with torch.autocast(images.device.type, enabled=False):
            pose_enc_list = self.camera_head(tokens)
            predictions["pose_enc"] = pose_enc_list[-1]
            predictions["pose_enc_list"] = pose_enc_list
            depth, depth_conf = self.depth_head(tokens, images=images, patch_start_idx=patch_start_idx)
            predictions["depth"] = depth
            predictions["depth_conf"] = depth_conf
            if self.point_head is not None:
                points, points_conf = self.point_head(tokens, images=images, patch_start_idx=patch_start_idx)
                predictions["world_points"] = points
                predictions["world_points_conf"] = points_conf
        if not self.training:
            predictions["images"] = images
        return predictions


def _patch_positions(h: int, w: int, device: torch.device) -> Tensor:
    """Patch centres [h * w, 2] as (y, x), in units of half the image's diagonal from its centre."""
    y = torch.arange(h, dtype=torch.float32, device=device) - (h - 1) / 2
    x = torch.arange(w, dtype=torch.float32, device=device) - (w - 1) / 2
    return torch.cartesian_prod(y, x) * 2 / (h**2 + w**2) ** 0.5


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        # PyTorch's default would shrink the image's content to a tenth of the position embedding that is added to it.
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, InvertedResidual):  # after its layers; nothing normalises what residuals add up to
        nn.init.normal_(module.project.weight, std=0.5 * module.project.in_channels**-0.5)


def _check_sizes(embed_dim: int, depth: int, num_heads: int, features: int) -> None:
    if num_heads < 1:
        raise ValueError(f"num_heads must be positive, got {num_heads}")
    if embed_dim < 1 or embed_dim % (4 * num_heads):
        raise ValueError(f"embed_dim must be a positive multiple of 4 * num_heads = {4 * num_heads}, got {embed_dim}")
    if depth < 1:
        raise ValueError(f"depth must be positive, got {depth}")
    if features < 1 or features % 32:
        raise ValueError(f"features must be a positive multiple of 32, got {features}")


def check_images(images: Tensor) -> Tensor:
    """[S, 3, H, W] or [B, S, 3, H, W] as [B, S, 3, H, W]; what else it is, is refused."""
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point in [0, 1], got {images.dtype}")
    if images.ndim not in (4, 5) or images.shape[-3] != 3 or images.shape[-4] < 1:
        expected = "[S, 3, H, W] or [B, S, 3, H, W] with at least one frame"
        raise ValueError(f"images must have shape {expected}, got {list(images.shape)}")
    h, w = images.shape[-2:]
    if h < 1 or w < 1 or h % PATCH_SIZE or w % PATCH_SIZE:
        raise ValueError(f"images must have height and width that are multiples of {PATCH_SIZE}, got {h}x{w}")
    return images if images.ndim == 5 else images[None]
