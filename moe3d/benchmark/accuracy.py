"""No speed of a wrong result: the float64 truth, written independently of every backend, and what may differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe3d.benchmark.case import Weights

# Plain PyTorch itself must be this close (relative RMS), or the truth and it compute different things.
PLAIN_LIMIT = {"ieee": 2e-4, "tf32": 5e-3, "bf16": 4e-2}


class Wrong(Exception):
    """A result is not right; the message says by how much."""


class Outputs(NamedTuple):
    prediction: Tensor  #       [B, O-1, H, W]
    confidence: Tensor  #       [B, H, W]
    entropy: Tensor | None  #   [B, H, W]; None of a plain head


class Error(NamedTuple):
    """The worst over the outputs: ||a - r|| / ||r||, and max |a - r| / max |r|."""

    rms: float
    worst: float


def truth(x: Tensor, weights: Weights, size: tuple[int, int], pos: tuple[Tensor, Tensor]) -> Outputs:
    """The tail in float64 with exact interpolation, frame by frame: temperature 1, exp and 1 + exp, the weighted sum.

    Differentiable. ``x`` and ``weights`` are taken as they are rounded; ``pos`` are the embedding's tables.
    """
    weights = weights.map(Tensor.double)
    rows, columns = (_interpolation(n, target, x) for n, target in zip(x.shape[-2:], size, strict=True))
    by_column, by_row = (table.double().T for table in pos)
    grid = (len(by_row), *size)
    position = torch.cat([by_column[:, None, :].expand(grid), by_row[:, :, None].expand(grid)])
    return join([_true_frame(rows @ frame.double() @ columns.T + position, weights) for frame in x])


def join(parts: Sequence[Outputs]) -> Outputs:
    """Outputs of several frames, or groups of them, as those of one call."""
    joined: Any = (None if tensors[0] is None else torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Outputs(*joined)


def _interpolation(source: int, target: int, like: Tensor) -> Tensor:
    """[target, source]; align_corners=True: a hat around i (source-1)/(target-1) weighs the neighbours of output i."""
    position = torch.linspace(0, source - 1, target, dtype=torch.float64, device=like.device)
    return (1 - (position[:, None] - torch.arange(source, device=like.device)).abs()).clamp(min=0)


def _true_frame(features: Tensor, w: Weights) -> Outputs:
    """Of one frame [C, H, W]; outputs with a batch of one."""
    blocks = [*w.experts, *([] if w.gate is None else [w.gate])]
    # One convolution for all: PyTorch's in float64 spends most of its time on unfolding the features.
    hidden = F.conv2d(features[None], torch.cat([b[0] for b in blocks]), torch.cat([b[1] for b in blocks]), padding=1)
    parts = hidden[0].relu().split([len(b[1]) for b in blocks])
    z = [torch.einsum("oc,chw->ohw", b[2], part) + b[3][:, None, None] for b, part in zip(blocks, parts, strict=True)]
    experts = torch.stack(z[: len(w.experts)])  # [K, O, H, W]
    prediction, confidence = experts[:, :-1].exp(), 1 + experts[:, -1].exp()
    if w.gate is None:
        return Outputs(prediction, confidence, None)
    log_weights = z[-1].log_softmax(0)
    mix = log_weights.exp()
    return Outputs(
        torch.einsum("khw,kohw->ohw", mix, prediction)[None],
        torch.einsum("khw,khw->hw", mix, confidence)[None],
        -(mix * log_weights).sum(0, keepdim=True),
    )


def error_of(results: Sequence[Tensor | None], truths: Sequence[Tensor | None]) -> Error:
    """The largest error over pairs of tensors.

    Raises:
        Wrong: a result is missing, has another shape, or is not finite.
    """
    errors = [_error(a, r) for a, r in zip(results, truths, strict=True) if r is not None]
    return Error(max(e.rms for e in errors), max(e.worst for e in errors))


def _error(result: Tensor | None, true: Tensor) -> Error:
    if result is None or result.shape != true.shape:
        raise Wrong(
            f"expected a result of shape {list(true.shape)}, got {None if result is None else list(result.shape)}"
        )
    if not result.isfinite().all():
        raise Wrong("the result is not finite")
    difference = result.double() - true
    tiny = torch.finfo(torch.float64).tiny
    rms = difference.norm() / true.norm().clamp(min=tiny)
    return Error(float(rms), float(difference.abs().max() / true.abs().max().clamp(min=tiny)))


class Judge:
    """Admits results whose error is at most 1.5 times (worst pixel: 4 times) plain PyTorch's at this precision."""

    def __init__(self, precision: str, slack: float = 1.0):
        """``slack``: by how much plain PyTorch itself may exceed ``PLAIN_LIMIT``."""
        self.plain_limit = slack * PLAIN_LIMIT[precision]
        self.admitted: dict[str, Error] = {}

    def __call__(
        self, name: str, plain: str | None, results: Sequence[Tensor | None], truths: Sequence[Tensor | None]
    ) -> Error:
        """The error of ``name``'s results, if it is admitted.

        Args:
            plain: the name of the plain PyTorch computation to compare with, judged before; None: this is it.

        Raises:
            Wrong: the error is larger, or not a number; or ``plain`` was itself not admitted.
        """
        error = error_of(results, truths)
        if plain is None:
            rms, worst = self.plain_limit, math.inf
        elif plain in self.admitted:
            rms, worst = 1.5 * self.admitted[plain].rms + 1e-6, 4 * self.admitted[plain].worst + 1e-5
        else:
            raise Wrong(f"{plain!r}, by which it is judged, is not right itself")
        if not (error.rms <= rms and error.worst <= worst):
            raise Wrong(
                f"wrong: relative RMS error {error.rms:.1e} (allowed {rms:.1e}), "
                f"worst pixel {error.worst:.1e} (allowed {worst:.1e})"
            )
        self.admitted[name] = error
        return error
