"""Shapes of the work: precision, groups of hidden channels, bands of rows, and one prepared kernel launch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton

_FLOAT32_TINY = torch.finfo(torch.float32).tiny
_FLOAT32_MAX_EXPONENT = 88.0


@dataclass(frozen=True)
class Launch:
    """A kernel with everything it needs; tests compile it ahead of time instead of running it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any] = field(repr=False)
    num_warps: int = 4
    num_stages: int = 1

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages)


class Precision(NamedTuple):
    """How products are taken: the operands' dtype in memory, and the PRECISION of :mod:`moe3d.kernels.numerics`."""

    dtype: torch.dtype
    dot: str

    @property
    def kind(self) -> str:
        """The row of the launch tables: "half", "tf32" or "ieee"."""
        return "half" if self.dtype.itemsize == 2 else self.dot


class Mixing(NamedTuple):
    """What happens behind the hidden layer; ``activation`` and the rest as in :class:`moe3d.ops.types.HeadOptions`."""

    experts: int
    outputs: int
    activation: str
    conf_activation: str | None
    mode: str
    temperature: float
    gap: float
    has_gate: bool

    @property
    def predicted(self) -> int:
        """How many of the outputs are prediction."""
        return self.outputs - (self.conf_activation is not None)

    def arguments(self) -> dict[str, Any]:
        return dict(
            EXPERTS=self.experts,
            OUTPUTS=self.outputs,
            PREDICTED=self.predicted,
            ACT=self.activation,
            CONF=self.conf_activation or "none",
            MODE=self.mode if self.has_gate else "mean",
            HAS_GATE=self.has_gate,
            temperature=max(self.temperature, _FLOAT32_TINY),
            log_experts=math.log(self.experts),
            ratio=math.exp(min(self.gap, _FLOAT32_MAX_EXPONENT)),
        )


class Band(NamedTuple):
    """A piece of the output that is worked on at once: whole frames, or some rows of one frame."""

    first_frame: int
    frames: int
    first_row: int
    rows: int


def bands(
    frames: int, height: int, max_rows: int, border: int, tile_rows: int, tile_columns: int, wave: int
) -> Iterator[Band]:
    """Cuts the output into bands that fit into a workspace of ``max_rows`` rows (never less than a row of tiles).

    A band keeps ``border`` more rows than it computes, for each of its frames. Rows come in multiples of
    ``tile_rows``, on a grid fixed to the image. Where a frame must be cut, it is cut so that the fewest waves of
    ``wave`` tiles run, where a band more (to launch and to drain) counts for half a wave.
    """
    whole = round_up(height, tile_rows) + border
    if whole <= max_rows:
        step = max_rows // whole
        yield from (Band(b, min(step, frames - b), 0, height) for b in range(0, frames, step))
        return
    tile_row_count = triton.cdiv(height, tile_rows)

    def cost(n: int) -> float:
        full, rest = divmod(tile_row_count, n)
        waves = full * triton.cdiv(n * tile_columns, wave) + triton.cdiv(rest * tile_columns, wave)
        return waves + 0.5 * triton.cdiv(tile_row_count, n)

    most = min(max((max_rows - border) // tile_rows, 1), tile_row_count)
    rows = min(range(1, most + 1), key=cost) * tile_rows
    for b in range(frames):
        yield from (Band(b, 1, y, min(rows, height - y)) for y in range(0, height, rows))


class Section(NamedTuple):
    """``count`` groups of ``width`` hidden channels; the kernels compute one group at a time."""

    width: int
    count: int

    @property
    def channels(self) -> int:
        return self.width * self.count


# What a hidden channel costs in a group of this width: narrow groups starve the matrix units.
_WIDTH_COST = {256: 1.0, 128: 1.05, 64: 1.25, 32: 1.8, 16: 3.2}


def sections(channels: int, max_width: int) -> tuple[Section, Section]:
    """Groups that cover ``channels`` hidden channels at the least cost: equal ones, then at most one narrower."""

    def options() -> Iterator[tuple[Section, Section]]:
        for width in (w for w in _WIDTH_COST if w <= max_width):
            yield Section(width, triton.cdiv(channels, width)), Section(16, 0)
            rest = channels % width
            if rest and channels > width:
                tail = max(16, triton.next_power_of_2(rest))
                yield Section(width, channels // width), Section(tail, 1)

    return min(options(), key=lambda pair: sum(s.channels * _WIDTH_COST[s.width] for s in pair))


def expert_section(hidden: int, max_width: int) -> Section:
    """Groups that cover one expert's hidden channels alone, so that it can be left out."""
    width = min(max_width, max(16, triton.next_power_of_2(hidden)))
    return Section(width, triton.cdiv(hidden, width))


def block_of(channels: int, largest: int) -> int:
    """The block in which a product runs along ``channels``: a power of two from 16 on, no wider than needed."""
    return min(largest, max(16, triton.next_power_of_2(channels)))


def round_up(value: int, multiple: int) -> int:
    return triton.cdiv(value, multiple) * multiple
