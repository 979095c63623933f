"""Layers of MiniVGGT: attention with rotary positions, and the pre-norm blocks of its transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention with normalised queries and keys, [B, N, dim] to the same shape."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // num_heads)
        self.k_norm = nn.LayerNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        """``rotation``: [2, N, dim // num_heads] as :func:`rotary_table` gives, or None for no positions."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = _rotate(q, rotation), _rotate(k, rotation)
        # The rotation is fp32, and normalisation may be under autocast: attention wants one type.
        x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each on the normalised input and added back to it."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int = 2) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), rotation)
        return x + self.mlp(self.norm2(x))


def rotary_table(positions: Tensor, head_dim: int) -> Tensor:
    """Cosines and sines of 2D rotary position encoding (Su et al., arXiv 2104.09864; half of the channels per axis).

    Args:
        positions: [N, 2], fp32, in units of the image's diagonal half-length, so that a table trained at one resolution
            serves every other.
        head_dim: channels per attention head, a multiple of 4.

    Returns:
        [2, N, head_dim]: cosines, then sines, fp32.
    """
    bands = head_dim // 4
    # 16 rad per unit turns neighbouring patches of a 224-pixel image by about 1.4 rad: fine, and not yet aliased.
    frequencies = 16 * 100 ** (-torch.arange(bands, dtype=torch.float32, device=positions.device) / bands)
    angles = (positions[:, :, None] * frequencies).flatten(1)  # [N, head_dim // 2]: axis, then band
    return torch.stack([angles.cos(), angles.sin()]).repeat(1, 1, 2)


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine
