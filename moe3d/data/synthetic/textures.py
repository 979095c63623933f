"""Procedural solid textures: albedo as a function of a point in its object's own frame, in metres."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch

PLAIN, CHECKER, STRIPES, CLOUDS, BRICKS, PLANKS, SPECKLE, TILES, PRINT = range(9)

NOISE_CELLS = 64  # cells along one period of the noise volume
Array = np.ndarray


@dataclass(frozen=True)
class Materials:
    """M materials, as arrays; colours are linear RGB."""

    pattern: Array
    """[M] int: PLAIN, CHECKER, ..."""
    first: Array
    """[M, 3] albedo."""
    second: Array
    """[M, 3] albedo the pattern mixes in (mortar, the other squares, ...)."""
    scale: Array
    """[M] metres: the pattern's period."""
    dirt: Array
    """[M] strength of the noise on top, 0 to 1."""
    specular: Array
    """[M] strength of the highlight."""
    gloss: Array
    """[M] exponent of the highlight."""
    seed: Array
    """[M] int: tells equal patterns apart."""

    def __getitem__(self, index: Array) -> Materials:
        return Materials(*(getattr(self, field.name)[index] for field in fields(self)))


def albedo(materials: Materials, points: Array, normals: Array, footprint: Array) -> Array:
    """Colour of surface points.

    Args:
        materials: one per point.
        points: [P, 3] float32 in the objects' own frames.
        normals: [P, 3] in the same frames; a flat pattern lies in the two axes across the normal's largest component.
        footprint: [P] metres between neighbouring samples; a pattern finer than that fades to its mean.

    Returns:
        [P, 3] float32 linear RGB.
    """
    shift = _hash(materials.seed, 1)[:, None] * np.float32([1.0, 7.3, 3.7])
    cloud = _noise(points / materials.scale[:, None] / 3 + shift)
    grain = _noise(points * np.float32(4.5) + shift)
    mix, shade = np.zeros(len(points), np.float32), np.ones(len(points), np.float32)
    print_colour = materials.second.copy()
    flat = _flat_coordinates(points, normals) / materials.scale[:, None]
    for pattern, evaluate in _PATTERNS.items():
        chosen = np.flatnonzero(materials.pattern == pattern)
        if len(chosen):
            evaluated = evaluate(flat[chosen], materials.seed[chosen], cloud[chosen], grain[chosen])
            mix[chosen], shade[chosen] = evaluated[:2]
            if pattern == PRINT:
                print_colour[chosen] = evaluated[2]
    visible = np.clip(materials.scale / (2 * footprint) - 0.5, 0, 1)
    mix = 0.4 + (mix - 0.4) * np.where(materials.pattern == PLAIN, 1, visible)
    shade *= 1 + materials.dirt * (1.2 * (grain - 0.5) * np.clip(0.05 / footprint, 0, 1) + 1.4 * (cloud - 0.5))
    colour = materials.first + (print_colour - materials.first) * mix[:, None]
    return np.clip(colour * shade[:, None], 0.004, 0.95)


def _flat_coordinates(points: Array, normals: Array) -> Array:
    """[P, 2]: the coordinates across the normal's dominant axis; heights stay second, so bricks lie flat on walls."""
    axis = np.abs(normals).argmax(1)
    return np.stack([np.where(axis == 0, points[:, 1], points[:, 0]), np.where(axis == 2, *points.T[1:])], 1)


def _checker(flat: Array, seed: Array, cloud: Array, grain: Array) -> tuple[Array, ...]:
    return np.floor(flat).sum(1) % 2, 1.0


def _stripes(flat: Array, seed: Array, cloud: Array, grain: Array) -> tuple[Array, ...]:
    upright = seed % 2 == 0
    across = np.where(upright, flat[:, 0], flat[:, 1])
    return (across % 1 < 0.25 + 0.5 * _hash(seed, 2)), 1.0


def _clouds(flat: Array, seed: Array, cloud: Array, grain: Array) -> tuple[Array, ...]:
    return np.clip(0.5 + 3 * (cloud - 0.5), 0, 1), 1.0


def _bricks(flat: Array, seed: Array, cloud: Array, grain: Array) -> tuple[Array, ...]:
    row = np.floor(3 * flat[:, 1])
    along = flat[:, 0] + 0.5 * (row % 2)
    mortar = (along % 1 < 0.05) | (3 * flat[:, 1] % 1 < 0.14)
    return mortar, 0.75 + 0.5 * _hash_cells(np.floor(along), row, seed)


def _planks(flat: Array, seed: Array, cloud: Array, grain: Array) -> tuple[Array, ...]:
    """Boards one unit wide with a fine grain along them."""
    across, along = np.where((seed % 2 == 0)[:, None], flat, flat[:, ::-1]).T
    board = np.floor(across)
    fibre = _noise(np.stack([2.0 * across, 0.12 * along, 0.37 * board], 1).astype(np.float32))
    gap = across % 1 < 0.04
    return np.where(gap, 1, np.clip(1.6 * (fibre - 0.35), 0, 0.8)), 0.7 + 0.5 * _hash_cells(board, 0 * board, seed)


def _speckle(flat: Array, seed: Array, cloud: Array, grain: Array) -> tuple[Array, ...]:
    cell = np.floor(6 * flat + 3 * grain[:, None])
    return _hash_cells(*cell.T, seed) < 0.3, 1.0


def _tiles(flat: Array, seed: Array, cloud: Array, grain: Array) -> tuple[Array, ...]:
    joint = (flat % 1 < 0.035).any(1)
    return joint, 0.85 + 0.3 * _hash_cells(*np.floor(flat).T, seed)


def _print(flat: Array, seed: Array, cloud: Array, grain: Array) -> tuple[Array, ...]:
    """Labels, posters, lettering: blocks of colour on the first colour, in rows of different widths."""
    row = np.floor(5 * flat[:, 1])
    width = 1 + np.floor(5 * _hash_cells(row, 0 * row, seed))
    column = np.floor(flat[:, 0] * width)
    colour = np.stack([_hash_cells(column, row, seed + channel) for channel in (1, 2, 3)], 1)
    grey = _hash_cells(column, row, seed + 4)[:, None]
    inked = _hash_cells(column, row, seed + 5) < 0.6
    return inked, 1.0, np.where(grey < 0.5, 2 * grey**2, colour**2)


_PATTERNS = {
    CHECKER: _checker,
    STRIPES: _stripes,
    CLOUDS: _clouds,
    BRICKS: _bricks,
    PLANKS: _planks,
    SPECKLE: _speckle,
    TILES: _tiles,
    PRINT: _print,
}


def _hash_cells(x: Array, y: Array, seed: Array) -> Array:
    """[P] in [0, 1): the same for equal integer cells."""
    return _hash(x.astype(np.int64) * 73856093 + y.astype(np.int64) * 19349663 + seed.astype(np.int64) * 83492791, 3)


def _hash(value: Array, salt: int) -> Array:
    bits = (value + salt * 2654435769).astype(np.uint32)
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):
        bits = (bits ^ (bits >> np.uint32(15))) * np.uint32(multiplier)
    return (bits >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


@lru_cache(maxsize=1)
def _noise_volume() -> torch.Tensor:
    """One period of fractal value noise in [0, 1], with its first planes repeated at the end for interpolation."""
    rng = np.random.default_rng(20250605)
    volume = torch.zeros(1, 1, NOISE_CELLS + 1, NOISE_CELLS + 1, NOISE_CELLS + 1)
    amplitude = 1.0
    for cells in (4, 8, 16, 32, 64):
        lattice = torch.from_numpy(rng.random((cells, cells, cells), dtype=np.float32))[None, None]
        lattice = torch.nn.functional.pad(lattice, (0, 1) * 3, mode="circular")
        volume += amplitude * torch.nn.functional.interpolate(
            lattice, size=volume.shape[2:], mode="trilinear", align_corners=True
        )
        amplitude *= 0.65
    low, high = volume.min(), volume.max()
    return (volume - low) / (high - low)


def _noise(points: Array) -> Array:
    """[P] fractal noise in [0, 1] of period 1 in each coordinate of ``points`` [P, 3]."""
    grid = torch.from_numpy(2 * (points % 1) - 1).view(1, -1, 1, 1, 3)
    sampled = torch.nn.functional.grid_sample(_noise_volume(), grid, align_corners=True, padding_mode="border")
    return sampled.view(-1).numpy()
