"""Colour maps, judged by scikit-image's CIELAB and CIEDE2000."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from skimage.color import deltaE_ciede2000, rgb2lab, rgb2xyz

from moe3d.viz import apply_colormap, colormap, expert_colors
from moe3d.viz.colors import INVALID, decode_srgb, encode_srgb, oklab_to_linear

MAPS = ("depth", "error", "entropy")


@pytest.mark.parametrize(("name", "sign"), [("depth", -1), ("entropy", 1)])
def test_lightness_runs_one_way_so_that_the_map_reads_in_grey(name, sign):
    lightness = sign * rgb2lab(colormap(name))[:, 0]
    assert np.all(np.diff(lightness) > -0.15)  # the step of one 8-bit level
    assert lightness[-1] - lightness[0] > 70


def test_the_error_map_is_white_in_the_middle_and_as_dark_at_both_ends():
    lightness, chroma = rgb2lab(colormap("error"))[:, 0], np.linalg.norm(rgb2lab(colormap("error"))[:, 1:], axis=1)
    assert lightness[127] > 95 and chroma[127] < 3
    assert np.all(np.diff(lightness[:128]) > -0.15) and np.all(np.diff(lightness[127:]) < 0.15)
    np.testing.assert_allclose(lightness, lightness[::-1], atol=6)


@pytest.mark.parametrize("name", MAPS)
def test_equal_steps_look_about_equal(name):
    lab = rgb2lab(colormap(name)[::15])
    steps = deltaE_ciede2000(lab[:-1], lab[1:])
    assert steps.min() > 0.35 * np.median(steps) and steps.max() < 2.5 * np.median(steps)


@pytest.mark.parametrize("name", MAPS)
def test_no_color_of_a_map_is_the_grey_of_what_is_invalid(name):
    assert deltaE_ciede2000(rgb2lab(colormap(name)), rgb2lab(INVALID[None])).min() > 10


def test_values_are_clipped_and_non_finite_ones_are_grey():
    table = colormap("depth")
    colors = apply_colormap(np.array([[-3.0, 0.0, 1.0, 7.0], [np.nan, np.inf, -np.inf, 0.5]]), "depth")
    expected = [[table[0], table[0], table[-1], table[-1]], [INVALID, INVALID, INVALID, table[127]]]
    np.testing.assert_array_equal(colors, expected)
    assert colors.dtype == np.uint8


@pytest.mark.parametrize("count", range(2, 9))
def test_experts_look_different(count):
    lab = rgb2lab(expert_colors(count))
    assert min(deltaE_ciede2000(a, b) for a, b in itertools.combinations(lab, 2)) > 12


def test_experts_differ_up_to_16():
    colors = {tuple(color) for color in expert_colors(16)}
    assert len(colors) == 16
    assert expert_colors(1).shape == (1, 3)


def test_srgb_encoding_inverts_decoding_and_agrees_with_scikit_image():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(encode_srgb(decode_srgb(levels)), levels)
    grey = np.repeat(levels[:, None], 3, axis=1)
    np.testing.assert_allclose(rgb2xyz(grey)[:, 1], decode_srgb(levels), atol=1e-6)


def test_oklab_of_white_black_and_ottossons_example():
    np.testing.assert_allclose(oklab_to_linear(np.array([1.0, 0, 0])), [1, 1, 1], atol=1e-6)
    np.testing.assert_allclose(oklab_to_linear(np.zeros(3)), [0, 0, 0], atol=1e-12)
    # sRGB red, as published with the colour space: L 0.628, a 0.225, b 0.126
    np.testing.assert_allclose(oklab_to_linear(np.array([0.62796, 0.22486, 0.12585])), [1, 0, 0], atol=1e-3)


def test_tables_cannot_be_changed_by_accident():
    for table in (colormap("depth"), expert_colors(4)):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 0
