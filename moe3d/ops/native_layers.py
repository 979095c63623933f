"""Layers of a DPT decoder in the compiled module: float32 maps on the CPU, channels last, no gradients.

Every map is a contiguous tensor [N, h, w, C], with C a multiple of 16. A layer packs its weights once, from float64; it
may be kept and called by several threads. The numbers are those of the convolutions that it stands for, with
interpolation at exact positions (see csrc/decoder.h).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe3d import _build
from moe3d.ops.native import check_status, isa

CHANNEL_STEP = 16

# The points of csrc/cpu/winograd.h, in its order; infinity is the last.
_WINOGRAD_POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)
_EDGE_KINDS = 4  # bit 0: the first row or column, bit 1: the last one


def can_run() -> bool:
    """Whether the compiled module is there and has the instruction set asked for."""
    module = _build.native().module
    return module is not None and module.weights_panel(isa()) > 0


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, align_corners=True."""
    y = _empty(x.shape[0], *size, x.shape[3])
    _run("Upsampling", "upsample", x, y, out_height=size[0], out_width=size[1])
    return y


class Winograd:
    """A 3x3 convolution with stride 1 and padding 1: weight [N, C, 3, 3], bias [N] or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        rows = [[1.0, p, p * p] for p in _WINOGRAD_POINTS]
        for i, p in enumerate(_WINOGRAD_POINTS):
            others = torch.tensor([p - q for q in _WINOGRAD_POINTS if q != p], dtype=torch.float64, device="cpu")
            rows[i] = [value / others.prod().item() for value in rows[i]]
        g = torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64, device="cpu")
        transformed = torch.einsum("ai,ncij,bj->abcn", g, weight.detach().double(), g)
        self._weights = _panels(transformed.flatten(0, 1))
        self._bias = None if bias is None else bias.detach().clone()
        self._out_channels = weight.shape[0]

    def __call__(
        self,
        x: Tensor,
        relu_input: bool = False,
        residual: Tensor | None = None,
        relu_residual: bool = False,
        added: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """conv(x) + residual + added, where asked for with relu(x) and relu(residual).

        ``out`` may be ``residual`` or ``added``, but not ``x``.
        """
        y = _empty(*x.shape[:3], self._out_channels) if out is None else out
        _run(
            "WinogradLayer",
            "winograd",
            x,
            y,
            weights=self._weights,
            bias=self._bias,
            residual=residual,
            added=added,
            relu_input=relu_input,
            relu_residual=relu_residual,
        )
        return y


class Cells:
    """A 3x3 convolution as a product with gathered pixels: at every ``stride``-th, or for ``scale`` squared each."""

    def __init__(self, taps: Tensor, bias: Tensor, stride: int, scale: int):
        """taps [scale, scale, 3, 3, N, C] of each phase, bias [kinds, kinds, N]; see csrc/decoder.h."""
        rows = []
        for p in range(scale):
            for q in range(scale):
                for tap in range(*_taps_of(p, scale)):
                    columns = taps[p, q, tap, slice(*_taps_of(q, scale))]  # [taps, N, C]
                    rows.append(_panels(columns.transpose(1, 2).flatten(0, 1)[None]).flatten())
        self._weights = torch.cat(rows)
        self._bias = bias.float().contiguous()
        self._stride, self._scale = stride, scale

    @classmethod
    def strided(cls, weight: Tensor, bias: Tensor, stride: int) -> Cells:
        """A 3x3 convolution, padding 1: weight [N, C, 3, 3], bias [N]."""
        taps = weight.detach().double().permute(2, 3, 0, 1)[None, None]
        return cls(taps, bias.detach().expand(_EDGE_KINDS, _EDGE_KINDS, -1), stride, scale=1)

    @classmethod
    def after_transposed(cls, spread: Tensor, spread_bias: Tensor, weight: Tensor) -> Cells:
        """A 3x3 convolution [N, M, 3, 3] without bias after a transposed one whose kernel is its stride, [C, M, s, s].

        Along an axis, the s pixels of a cell meet s + 2 cells in all, where the convolution alone has 3 s taps.
        """
        spread, weight = spread.detach().double(), weight.detach().double()
        scale = spread.shape[2]
        taps = spread.new_zeros(scale, scale, 3, 3, weight.shape[0], spread.shape[0])
        for p, row in _meetings(scale):
            for q, column in _meetings(scale):
                for a, (di, u) in enumerate(row):
                    for b, (dj, v) in enumerate(column):
                        taps[p, q, di, dj] += weight[:, :, a, b] @ spread[:, :, u, v].T
        return cls(taps, _edge_bias(weight, spread_bias), 1, scale)

    def __call__(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        rows, columns = (-(-n // self._stride) * self._scale for n in (height, width))
        y = _empty(batch, rows, columns, self._bias.shape[2])
        extra = {"stride": self._stride, "scale": self._scale}
        _run("CellLayer", "cells", x, y, weights=self._weights, bias=self._bias, **extra)
        return y


class Upsampled:
    """Bilinear upsampling (align_corners=True), a 1x1 convolution, then a 3x3 one with padding 1.

    Computed at low resolution, before the upsampling, with both convolutions as one.
    """

    def __init__(self, point: Tensor, point_bias: Tensor, weight: Tensor, bias: Tensor):
        """1x1 [M, C] and [M]; 3x3 [N, M, 3, 3] and [N]."""
        weight = weight.detach().double()
        self._weights = torch.einsum("nmij,mc->ncij", weight, point.detach().double()).float().contiguous()
        self._bias = (_edge_bias(weight, point_bias) + bias.detach().double()).float().contiguous()

    def __call__(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        y = _empty(x.shape[0], *size, self._weights.shape[0])
        extra = {"out_height": size[0], "out_width": size[1]}
        _run("UpsampledLayer", "upsampled", x, y, weights=self._weights, bias=self._bias, **extra)
        return y


def _module() -> Any:
    return _build.native().module  # there, or nobody would have made a layer


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _run(kind: str, function: str, x: Tensor, y: Tensor, **fields: Any) -> None:
    layer = getattr(_module(), kind)()
    layer.batch, layer.height, layer.width, layer.in_channels = x.shape
    layer.out_channels = y.shape[3]
    layer.x, layer.y, layer.isa, layer.threads = x.data_ptr(), y.data_ptr(), isa(), torch.get_num_threads()
    for name, value in fields.items():
        if value is not None:
            setattr(layer, name, value.data_ptr() if isinstance(value, Tensor) else value)
    if y.numel():
        check_status(getattr(_module(), function)(layer), f"the head's native {function} layer")


def _panels(matrices: Tensor) -> Tensor:
    """[count, rows, columns] as float32 [count, panel, rows, panel's columns], filled up with zeros."""
    panel = _module().weights_panel(isa())
    padded = F.pad(matrices.float(), (0, -matrices.shape[2] % panel))
    return padded.unflatten(2, (-1, panel)).transpose(1, 2).contiguous()


def _taps_of(phase: int, scale: int) -> tuple[int, int]:
    """The taps, in 0, 1, 2, of a cell's neighbourhood that one of its phases reads."""
    return (0 if phase == 0 else 1), (3 if phase == scale - 1 else 2)


def _meetings(scale: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """Per phase: for each tap of a 3x3 convolution the cell, in 0, 1, 2, and the phase there that it reads."""
    return [(p, [((p + a) // scale + 1, (p + a) % scale) for a in (-1, 0, 1)]) for p in range(scale)]


def _edge_bias(weight: Tensor, bias: Tensor) -> Tensor:
    """What a constant ``bias`` [M] before a zero-padded 3x3 convolution gives at each kind of row and column."""
    sums = torch.einsum("nmij,m->ijn", weight, bias.detach().double())
    kinds = [[(a > 0 or not kind & 1) and (a < 2 or not kind & 2) for a in range(3)] for kind in range(_EDGE_KINDS)]
    inside = torch.tensor(kinds, dtype=torch.float64, device="cpu")
    return torch.einsum("ri,sj,ijn->rsn", inside, inside, sums)
