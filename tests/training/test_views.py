"""Views that overlap, and cameras that follow their images."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe3d.data import AllFramesSkipped, Sample
from moe3d.data.synthetic import render_scene
from moe3d.geometry import project, unproject
from moe3d.training.views import draw_frames, fit_to_size, view_overlap


def wall(size=(30, 40), distance=2.0, shift=0.0, yaw=0.0):
    """A camera in front of an endless wall, moved sideways by ``shift`` metres, turned by ``yaw`` radians."""
    height, width = size
    focal = width / 2
    intrinsics = torch.tensor([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])[None]
    cos, sin = np.cos(yaw), np.sin(yaw)
    rotation = torch.tensor([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]], dtype=torch.float32)
    centre = torch.tensor([shift, 0.0, 0.0])
    extrinsics = torch.cat([rotation, -(rotation @ centre)[:, None]], dim=1)[None]
    # The plane z = distance in the world, seen along each pixel's ray.
    rays = unproject(torch.ones(1, height, width), intrinsics) @ rotation
    depth = distance / rays[..., 2]
    valid = (depth > 0) & (depth < 50)
    return Sample(
        images=torch.rand(1, 3, height, width),
        depth=torch.where(valid, depth, 0),
        valid=valid,
        intrinsics=intrinsics,
        extrinsics=extrinsics,
        names=[f"{shift}/{yaw}"],
    )


@pytest.mark.parametrize(("shift", "expected"), [(0, 1.0), (1, 0.75), (2, 0.5), (4, 0.0)])
def test_overlap_of_cameras_before_a_wall_is_what_their_images_share(shift, expected):
    """The view is 4 m wide: a camera that moves by one metre loses a quarter of it."""
    assert view_overlap(wall(), wall(shift=shift)) == pytest.approx(expected, abs=0.03)


def test_cameras_that_look_away_or_have_no_pose_do_not_overlap():
    assert view_overlap(wall(), wall(yaw=np.pi)) == 0
    assert view_overlap(wall(), replace(wall(), extrinsics=None)) == 0


def test_what_is_hidden_does_not_count():
    """Two cameras at one place, but the second one sees a nearer wall."""
    assert view_overlap(wall(distance=2), wall(distance=1)) == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(20, 90), st.integers(20, 90), st.sampled_from([(28, 42), (42, 28), (56, 56), (14, 70)]))
def test_intrinsics_follow_resizing_and_cropping(height, width, size):
    """The wall that is seen afterwards is the same wall: every pixel's point lies on it."""
    sample = wall((height, width), yaw=0.3)
    fitted = fit_to_size(sample, size)
    assert fitted.images.shape[-2:] == fitted.depth.shape[-2:] == fitted.valid.shape[-2:] == size
    assert set(fitted.depth.unique().tolist()) <= set(sample.depth.unique().tolist())  # picked, never averaged
    points = unproject(fitted.depth, fitted.intrinsics, fitted.extrinsics)[fitted.valid]
    pixels, _ = project(points, sample.intrinsics[0], sample.extrinsics[0])
    assert (points[:, 2] - 2).abs().median() < 0.1  # but for where in its pixel the depth was picked
    inside = (pixels > -1) & (pixels < torch.tensor([width, height]))
    assert inside.all()


def test_the_papers_sizes_keep_the_whole_width():
    """Hypersim's 1024x768 at 518x378: width 518, and 10.5 rows of 388.5 are cut off."""
    sample = wall((768, 1024))
    fitted = fit_to_size(sample, (378, 518))
    assert fitted.intrinsics[0, 0, 0] == pytest.approx(512 * 518 / 1024)
    assert fitted.intrinsics[0, 0, 2] == pytest.approx(258.5)
    assert fitted.intrinsics[0, 1, 2] == pytest.approx(188.5, abs=0.6)


class Walls:
    """A camera that moves along the wall by half a metre per frame; frames 3 and 5 are broken, 4 shows nothing."""

    has_poses, max_depth, skipped = True, float("inf"), ()
    sequences: ClassVar = {"wall": [str(i) for i in range(12)]}

    def load(self, sequence, frames):
        assert sequence == "wall" and len(frames) == 1
        if frames[0] in ("3", "5"):
            raise AllFramesSkipped("broken")
        sample = wall(shift=0.5 * int(frames[0]))
        valid = sample.valid & (frames[0] != "4")
        return replace(sample, valid=valid, depth=sample.depth * valid, names=list(frames))


@pytest.mark.parametrize("seed", range(8))
def test_frames_that_are_drawn_overlap_with_the_first_and_can_be_used(seed):
    sample = draw_frames(Walls(), "wall", 3, np.random.default_rng(seed), min_overlap=0.6)
    assert len(set(sample.names)) == 3 and not {"3", "4", "5"} & set(sample.names)
    numbers = [int(name) for name in sample.names]
    # 0.6 of 4 m is a distance of 1.6 m, three frames; beside a gap there may be nothing nearer.
    reachable = sum(i not in (3, 4, 5) and 0 < abs(i - numbers[0]) <= 3 for i in range(12))
    assert sum(abs(i - numbers[0]) <= 3 for i in numbers[1:]) == min(2, reachable)
    assert sample.images.shape[0] == sample.extrinsics.shape[0] == 3


def test_a_sequence_without_enough_frames_says_so():
    class Two(Walls):
        sequences: ClassVar = {"wall": ["0", "3"]}

    with pytest.raises(AllFramesSkipped, match="fewer than 2 frames"):
        draw_frames(Two(), "wall", 2, np.random.default_rng(0), 0.1)


def test_neighbouring_views_of_a_rendered_scene_overlap():
    views = render_scene(3, (56, 84), 2)
    first, second = (
        Sample(
            *(getattr(views, key)[i : i + 1] for key in ("images", "depth", "valid", "intrinsics", "extrinsics")), [""]
        )
        for i in range(2)
    )
    assert 0.1 < view_overlap(first, second) < 1
    assert view_overlap(first, first) == 1
