"""Pictures: which pixel has which colour."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moe3d.viz import (
    colormap,
    depth_picture,
    depth_range,
    entropy_picture,
    error_picture,
    expert_colors,
    flying_picture,
    gate_picture,
)
from moe3d.viz.colors import INVALID
from moe3d.viz.comparison import encode_picture
from moe3d.viz.pictures import EMPTY, FLYING, LANDED, point_picture


def test_depth_is_coloured_by_its_logarithm_and_in_its_range():
    picture = depth_picture(np.array([[1.0, 2.0, 4.0, 0.5, 9.0]]), near=1.0, far=4.0)
    table = colormap("depth")
    np.testing.assert_array_equal(picture[0], table[[0, 127, 254, 0, 254]])


def test_unusable_depth_is_grey():
    picture = depth_picture(np.array([[np.nan, np.inf, 0.0, -1.0]]), near=1.0, far=4.0)
    np.testing.assert_array_equal(picture[0], [INVALID] * 4)


def test_one_depth_everywhere_makes_a_picture():
    assert depth_picture(np.full((2, 3), 5.0), 5.0, 5.0).shape == (2, 3, 3)


@settings(deadline=None, max_examples=30)
@given(st.floats(1e-3, 1e3), st.integers(0, 2**32 - 1))
def test_depth_looks_the_same_in_every_unit(unit, seed):
    depth = np.random.default_rng(seed).uniform(1, 8, (4, 5))
    pictures = [depth_picture(depth * s, 1.5 * s, 6 * s).astype(int) for s in (1, unit)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 8  # rounding may move a pixel to the map's next colour


def test_the_range_leaves_out_the_outermost_percent_and_what_is_invalid():
    depth = np.concatenate([np.linspace(1, 2, 1000), [1e-9, 1e9]])[None]
    valid = np.concatenate([np.ones(1000, bool), [False, False]])[None]
    assert depth_range(depth, valid) == pytest.approx((1.01, 1.99), abs=1e-3)
    with pytest.raises(ValueError, match="valid must hold at least one pixel"):
        depth_range(depth, np.zeros_like(valid))


def test_error_is_blue_where_too_near_white_where_right_orange_where_too_far():
    truth = np.full((1, 5), 2.0)
    picture = error_picture(truth * [[0.5, 0.8, 1.0, 1.25, 3.0]], truth, np.ones((1, 5), bool))
    table = colormap("error")
    np.testing.assert_array_equal(picture[0], table[[0, 0, 127, 254, 254]])
    assert table[0, 2] > table[0, 0] and table[254, 0] > table[254, 2]


def test_error_is_grey_where_unknown():
    known = np.array([[True, False]])
    picture = error_picture(np.ones((1, 2)), np.ones((1, 2)), known)
    assert np.array_equal(picture[0, 1], INVALID) and not np.array_equal(picture[0, 0], INVALID)


@pytest.mark.parametrize("count", [1, 2, 4, 16])
def test_a_sure_gate_shows_its_experts_color(count):
    weights = np.eye(count)[:, None, :]  # column k belongs to expert k
    np.testing.assert_array_equal(gate_picture(weights)[0], expert_colors(count))


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 8), st.integers(0, 2**32 - 1))
def test_permuting_experts_with_their_colors_is_the_only_way_to_change_a_mixture(count, seed):
    weights = np.random.default_rng(seed).dirichlet(np.ones(count), size=6).T.reshape(count, 2, 3)
    picture, colors = gate_picture(weights).astype(int), expert_colors(count).astype(int)
    assert np.all(picture >= colors.min(axis=0) - 1) and np.all(picture <= colors.max(axis=0) + 1)


def test_a_gate_that_is_nan_is_grey():
    weights = np.full((3, 1, 2), 1 / 3)
    weights[0, 0, 1] = np.nan
    assert np.array_equal(gate_picture(weights)[0, 1], INVALID)


def test_entropy_runs_from_0_to_log_k():
    picture = entropy_picture(np.log([[1.0, 2.0, 4.0]]), num_experts=4)
    np.testing.assert_array_equal(picture[0], colormap("entropy")[[0, 127, 254]])
    assert entropy_picture(np.zeros((2, 2)), num_experts=1).shape == (2, 2, 3)


def test_flying_points_and_other_boundary_pixels_are_marked_on_grey():
    image = np.full((1, 3, 3), 200, np.uint8)
    picture = flying_picture(image, np.array([[True, False, False]]), np.array([[True, True, False]]))
    np.testing.assert_array_equal(picture[0, :2], [FLYING, LANDED])
    assert len(set(picture[0, 2])) == 1 and picture[0, 2, 0] < 200


def test_points_land_where_the_camera_sees_them_the_nearest_in_front():
    points = np.array([[0, 0, 2.0], [0, 0, 1.0], [1.0, -0.5, 1.0], [0, 0, -1.0]])
    colors = np.array([[1, 1, 1], [2, 2, 2], [3, 3, 3], [4, 4, 4]], np.uint8)
    picture = point_picture(points, colors, (20, 30), focal=10)
    np.testing.assert_array_equal(picture[10:12, 15:17], np.full((2, 2, 3), 2))
    np.testing.assert_array_equal(picture[5:7, 25:27], np.full((2, 2, 3), 3))  # right of the centre, and above it
    assert (picture == EMPTY).all(axis=2).sum() == 20 * 30 - 8


def test_points_outside_the_picture_are_left_out():
    points = np.array([[50.0, 0, 1], [-50.0, 0, 1], [0, np.nan, 1]])
    with np.errstate(invalid="ignore"):
        picture = point_picture(points, np.zeros((3, 3), np.uint8), (8, 8), focal=8)
    assert (picture == EMPTY).all()


def _decode(file):
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


@pytest.mark.parametrize("colors", [1, 2, 256, 257, 5000])
def test_maps_are_saved_without_loss_with_a_palette_where_it_is_enough(colors):
    rng = np.random.default_rng(0)
    table = rng.permutation(np.unique(rng.integers(2**24, size=2 * colors)))[:colors]
    pixels = np.concatenate([table, rng.choice(table, 90 * 80 - colors)]).reshape(90, 80)
    picture = np.stack([pixels >> 16, pixels >> 8 & 255, pixels & 255], axis=2).astype(np.uint8)
    name, file = encode_picture("gate", picture)
    assert name == "gate.png"
    np.testing.assert_array_equal(_decode(file), picture)
    assert Image.open(io.BytesIO(file)).mode == ("P" if colors <= 256 else "RGB")


def test_photographs_are_saved_as_good_jpeg():
    y, x = np.mgrid[:60, :80]
    photo = np.stack([x * 3, y * 4, 255 - x - y], axis=2).astype(np.uint8)
    name, file = encode_picture("input", photo)
    assert name == "input.jpg"
    assert np.abs(_decode(file).astype(int) - photo).mean() < 2
