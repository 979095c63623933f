"""VGGT's sinusoidal position embedding of an image grid: separable, so kept as one table per axis."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moe3d.eager import runs_eagerly

_KEPT_TABLES = 64  # pairs; a DPT head needs five for each image size, of some 100 KB each
_SCALE = 0.1  # VGGT adds a tenth of the embedding


def position_tables(size: tuple[int, int], channels: int, aspect: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """The embedding of an H x W grid as its column part [W, channels/2] and its row part [H, channels/2].

    Coordinates are normalised by the image's diagonal, so they mean the same at every resolution: they run over
    [-span (n-1)/n, span (n-1)/n] with span_x = r / sqrt(r^2 + 1), span_y = 1 / sqrt(r^2 + 1). Each table holds
    sin(p w_i), then cos(p w_i), with w_i = 100^(-i / (channels/4)), times 0.1. Source: VGGT (arXiv 2503.11651).

    Args:
        size: grid height and width.
        channels: of the features that it is added to; a multiple of 4.
        aspect: r, width / height of the image (not of the grid).
        like: a tensor whose device and dtype the tables take.

    The tables are kept for later calls: they are not to be written to.
    """
    if runs_eagerly(like):
        return _kept_tables(*size, channels, aspect, like.dtype, like.device)
    return _tables(*size, channels, aspect, like.dtype, like.device)


@functools.lru_cache(_KEPT_TABLES)
def _kept_tables(
    height: int, width: int, channels: int, aspect: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Outlives the call, so it must fit any other: neither made for inference only nor still on its way to a device."""
    with torch.inference_mode(False), torch.no_grad():
        columns, rows = _tables(height, width, channels, aspect, dtype, torch.device("cpu"))
        return columns.to(device), rows.to(device)


def _tables(
    height: int, width: int, channels: int, aspect: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    diagonal = (aspect**2 + 1) ** 0.5
    columns = _axis(width, aspect / diagonal, channels // 2, device)
    return columns.to(dtype), _axis(height, 1 / diagonal, channels // 2, device).to(dtype)


def position_map(columns: Tensor, rows: Tensor) -> Tensor:
    """Both tables spread over the grid: [channels, H, W]."""
    size = (columns.shape[1], rows.shape[0], columns.shape[0])
    return torch.cat([columns.T[:, None, :].expand(size), rows.T[:, :, None].expand(size)])


def _axis(n: int, span: float, channels: int, device: torch.device) -> Tensor:
    """[n, channels], float32."""
    edge = span * (n - 1) / n
    exact = torch.float32 if device.type == "mps" else torch.float64
    # As in VGGT the coordinates are rounded to float32, but not the phases.
    coordinates = torch.linspace(-edge, edge, n, dtype=torch.float32, device=device).to(exact)
    exponents = torch.arange(channels // 2, dtype=exact, device=device) / (channels / 2)
    phases = coordinates[:, None] * (1.0 / 100**exponents)
    return torch.cat([phases.sin(), phases.cos()], dim=1).float() * _SCALE
