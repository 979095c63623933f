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
    """[3, M] albedo."""
    second: Array
    """[3, M] albedo the pattern mixes in (mortar, the other squares, ...)."""
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
        return Materials(*(np.take(getattr(self, field.name), index, axis=-1) for field in fields(self)))


def albedo(materials: Materials, points: Array, normals: Array, footprint: Array) -> Array:
    """Colour of surface points.

    Args:
        materials: one per point.
        points: [3, P] float32 in the objects' own frames.
        normals: [3, P] in the same frames; a flat pattern lies in the two axes across the normal's largest component.
        footprint: [P] metres between neighbouring samples; a pattern finer than that fades to its mean.

    Returns:
        [3, P] float32 linear RGB.
    """
    shift = _hash(materials.seed, 1) * np.array([[1.0], [7.3], [3.7]], np.float32)
    cloud = _noise(points / (3 * materials.scale) + shift)
    grain = _noise(points * np.float32(4.5) + shift)
    mix, shade = np.zeros_like(footprint), np.ones_like(footprint)
    second = materials.second.copy()
    flat = _flat_coordinates(points, normals) / materials.scale
    for pattern, evaluate in _PATTERNS.items():
        chosen = np.flatnonzero(materials.pattern == pattern)
        if len(chosen):
            seed = materials.seed[chosen]
            mix[chosen], shade[chosen] = evaluate(flat[:, chosen], seed, cloud[chosen], grain[chosen])
            if pattern == PRINT:
                second[:, chosen] = _ink(flat[:, chosen], seed)
    visible = np.clip(materials.scale / (2 * footprint) - 0.5, 0, 1)
    mix = np.where(materials.pattern == PLAIN, 0, 0.4 + (mix - 0.4) * visible)
    fine, coarse = 1.2 * (grain - 0.5) * np.clip(0.05 / footprint, 0, 1), 1.4 * (cloud - 0.5)
    shade *= 1 + materials.dirt * (fine + coarse)
    colour = materials.first + (second - materials.first) * mix
    return np.clip(colour * shade, 0.004, 0.95)


def _flat_coordinates(points: Array, normals: Array) -> Array:
    """[2, P]: the coordinates across the normal's dominant axis; heights stay second, so bricks lie flat on walls."""
    axis = np.abs(normals).argmax(0)
    x, y, z = points
    return np.stack([np.where(axis == 0, y, x), np.where(axis == 2, y, z)])


# A pattern maps flat coordinates [2, P] in periods, seeds, and two noises [P] to a mix of the material's two colours
# and a factor on the brightness.


def _checker(flat: Array, seed: Array, cloud: Array, grain: Array) -> tuple[Array, Array | float]:
    return np.floor(flat).sum(0) % 2, 1.0


def _stripes(flat: Array, seed: Array, cloud: Array, grain: Array) -> tuple[Array, Array | float]:
    across = np.where(seed % 2 == 0, flat[0], flat[1])
    return (across % 1 < 0.25 + 0.5 * _hash(seed, 2)), 1.0


def _clouds(flat: Array, seed: Array, cloud: Array, grain: Array) -> tuple[Array, Array | float]:
    return np.clip(0.5 + 3 * (cloud - 0.5), 0, 1), 1.0


def _bricks(flat: Array, seed: Array, cloud: Array, grain: Array) -> tuple[Array, Array | float]:
    height = 3 * flat[1]
    row = np.floor(height)
    along = flat[0] + 0.5 * (row % 2)
    mortar = (along % 1 < 0.05) | (height - row < 0.14)
    return mortar, 0.75 + 0.5 * _hash_cells(np.floor(along), row, seed)


def _planks(flat: Array, seed: Array, cloud: Array, grain: Array) -> tuple[Array, Array | float]:
    """Boards one unit wide with a fine grain along them."""
    upright = seed % 2 == 0
    across, along = np.where(upright, flat, flat[::-1])
    board = np.floor(across)
    fibre = _noise(np.stack([2 * across, np.float32(0.12) * along, np.float32(0.37) * board]))
    gap = across - board < 0.04
    return np.where(gap, 1, np.clip(1.6 * (fibre - 0.35), 0, 0.8)), 0.7 + 0.5 * _hash_cells(board, 0 * board, seed)


def _speckle(flat: Array, seed: Array, cloud: Array, grain: Array) -> tuple[Array, Array | float]:
    column, row = np.floor(6 * flat + 3 * grain)
    return _hash_cells(column, row, seed) < 0.3, 1.0


def _tiles(flat: Array, seed: Array, cloud: Array, grain: Array) -> tuple[Array, Array | float]:
    column, row = np.floor(flat)
    joint = np.any(flat % 1 < 0.035, axis=0)
    return joint, 0.85 + 0.3 * _hash_cells(column, row, seed)


def _print(flat: Array, seed: Array, cloud: Array, grain: Array) -> tuple[Array, Array | float]:
    """Labels, posters, lettering: blocks of ink, whose colour is :func:`_ink`, on the first colour."""
    return _hash_cells(*_print_cells(flat, seed), seed + 5) < 0.6, 1.0


def _ink(flat: Array, seed: Array) -> Array:
    """[3, P] the colour of the print's block under each point; most are grey."""
    column, row = _print_cells(flat, seed)
    grey = _hash_cells(column, row, seed + 4)
    colour = np.stack([_hash_cells(column, row, seed + channel) for channel in (1, 2, 3)])
    return np.where(grey < 0.7, 1.5 * grey**2, colour**2)


def _print_cells(flat: Array, seed: Array) -> tuple[Array, Array]:
    """Columns and rows of blocks, whose width differs from row to row."""
    row = np.floor(5 * flat[1])
    per_period = 1 + np.floor(5 * _hash_cells(row, 0 * row, seed))
    return np.floor(flat[0] * per_period), row


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
    """[P] fractal noise in [0, 1] of period 1 in each coordinate of ``points`` [3, P]."""
    grid = torch.from_numpy(np.ascontiguousarray((2 * (points - np.floor(points)) - 1).T)).view(1, -1, 1, 1, 3)
    sampled = torch.nn.functional.grid_sample(_noise_volume(), grid, align_corners=True, padding_mode="border")
    return sampled.view(-1).numpy()
