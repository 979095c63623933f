"""VGGT's position embedding as two tables: against its formula, and against the real package's full map."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moe3d.position import position_map, position_tables

GRIDS = [(4, 6, 1.5), (7, 3, 0.4), (1, 1, 1.0), (1, 9, 9.0), (8, 1, 0.125), (37, 28, 28 / 37)]


def embedding(n, span, channels):
    """0.1 sin and cos of n coordinates in [-span (n-1)/n, span (n-1)/n], w_i = 100^(-2i/channels): [n, channels]."""
    table = np.zeros((n, channels))
    for i in range(n):
        coordinate = span * (n - 1) / n * (2 * i / (n - 1) - 1) if n > 1 else 0.0
        for j in range(channels // 2):
            phase = coordinate * 100 ** (-2 * j / channels)
            table[i, j], table[i, channels // 2 + j] = 0.1 * math.sin(phase), 0.1 * math.cos(phase)
    return table


@pytest.mark.parametrize(("height", "width", "aspect"), GRIDS)
@pytest.mark.parametrize("channels", [4, 12, 128])
def test_tables_are_the_formula(height, width, aspect, channels):
    diagonal = math.hypot(aspect, 1)
    columns, rows = position_tables((height, width), channels, aspect, torch.zeros(1))
    assert columns.shape == (width, channels // 2) and rows.shape == (height, channels // 2)
    np.testing.assert_allclose(columns.numpy(), embedding(width, aspect / diagonal, channels // 2), atol=2e-8)
    np.testing.assert_allclose(rows.numpy(), embedding(height, 1 / diagonal, channels // 2), atol=2e-8)


def test_the_map_puts_columns_before_rows():
    columns, rows = torch.rand(5, 3), torch.rand(4, 3)
    grid = position_map(columns, rows)
    assert grid.shape == (6, 4, 5)
    for y in range(4):
        for x in range(5):
            assert torch.equal(grid[:, y, x], torch.cat([columns[x], rows[y]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_tables_take_the_features_type(dtype):
    exact = position_tables((4, 6), 8, 1.5, torch.zeros(1))
    for table, reference in zip(position_tables((4, 6), 8, 1.5, torch.zeros(1, dtype=dtype)), exact, strict=True):
        assert table.dtype == dtype and torch.equal(table, reference.to(dtype))
    assert position_tables((4, 6), 8, 1.5, torch.zeros(1, device="meta"))[0].device.type == "meta"


def test_tables_are_kept_and_fit_every_later_call():
    with torch.inference_mode():
        made = position_tables((4, 11), 8, 1.5, torch.zeros(1))
    assert all(a is b for a, b in zip(made, position_tables((4, 11), 8, 1.5, torch.ones(2)), strict=True))
    x = torch.ones(11, 4, requires_grad=True)
    (x * made[0]).sum().backward()  # tables made for inference only could not be saved for this
    assert torch.equal(x.grad, made[0])
    assert position_tables((4, 11), 8, 1.25, torch.zeros(1))[0] is not made[0]


def test_nothing_is_kept_from_a_transformation():
    def total(x):
        return (x * position_tables((3, 5), 8, 0.75, x)[0]).sum()

    gradient = torch.func.grad(total)(torch.ones(5, 4))
    assert torch.equal(gradient, position_tables((3, 5), 8, 0.75, torch.zeros(1))[0])


@pytest.mark.real_vggt
@pytest.mark.parametrize(("height", "width", "aspect"), GRIDS)
def test_the_real_packages_map(height, width, aspect):
    from vggt.heads.utils import create_uv_grid, position_grid_to_embed

    grid = create_uv_grid(width, height, aspect_ratio=aspect, dtype=torch.float32, device=torch.device("cpu"))
    theirs = 0.1 * position_grid_to_embed(grid, 16).permute(2, 0, 1)
    ours = position_map(*position_tables((height, width), 16, aspect, theirs))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)
