"""Synthetic scenes as training and evaluation see them."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from moe3d import geometry
from moe3d.data import open_dataset
from moe3d.data.synthetic import SPLITS, SyntheticSample, SyntheticScenes, render_scene

SEEDS = list(range(10))


@pytest.fixture(scope="module")
def samples() -> list[SyntheticSample]:
    return [render_scene(seed, (96, 128), 3) for seed in SEEDS]


def assert_same_bytes(a: SyntheticSample, b: SyntheticSample) -> None:
    for name in ("images", "depth", "valid", "intrinsics", "extrinsics", "normals"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.names == b.names


def select(sample: SyntheticSample, frames: list[int]) -> SyntheticSample:
    names = ("images", "depth", "valid", "intrinsics", "extrinsics")
    chosen = {name: getattr(sample, name)[frames] for name in names}
    return SyntheticSample(**chosen, normals=sample.normals[frames], names=[sample.names[k] for k in frames])


def test_equal_seeds_give_equal_bytes(samples):
    assert_same_bytes(render_scene(SEEDS[0], (96, 128), 3), samples[0])
    assert not torch.equal(samples[0].depth, samples[1].depth)


# The mean and the spread of red, green and blue, and the depths at 10, 50 and 90%, of each seed's scene.
FIGURES = [
    [0.4831, 0.3722, 0.2680, 0.2898, 0.1905, 0.1434, 0.9346, 4.5264, 6.8404],
    [0.2800, 0.2379, 0.2115, 0.2416, 0.2393, 0.2428, 2.3443, 7.2745, 7.9266],
    [0.3107, 0.3409, 0.2637, 0.2022, 0.1812, 0.1961, 2.3529, 3.3995, 8.1878],
    [0.4887, 0.5425, 0.4653, 0.2003, 0.2393, 0.2344, 2.1190, 4.5393, 9.1197],
    [0.3799, 0.3370, 0.3098, 0.1697, 0.1753, 0.1752, 1.1299, 4.2664, 5.0836],
    [0.4437, 0.4752, 0.4513, 0.2102, 0.1941, 0.1862, 3.3000, 5.9946, 7.2027],
    [0.4978, 0.4312, 0.3622, 0.2588, 0.2536, 0.2369, 2.7039, 3.9581, 4.5494],
    [0.4146, 0.4458, 0.4296, 0.1981, 0.1642, 0.1710, 1.8467, 4.9803, 6.1882],
    [0.4314, 0.4333, 0.4316, 0.1572, 0.1667, 0.1813, 1.7498, 2.4704, 4.6709],
    [0.4555, 0.3287, 0.2323, 0.2069, 0.1496, 0.1395, 0.7972, 1.3231, 5.3410],
]


def test_scenes_are_those_of_the_published_figures(samples):
    """Whoever changes what is drawn must train the shipped weights and measure README's figures anew."""
    for sample, expected in zip(samples, FIGURES, strict=True):
        colors = [*sample.images.mean((0, 2, 3)), *sample.images.std((0, 2, 3))]
        depths = np.quantile(sample.depth[sample.valid].numpy(), [0.1, 0.5, 0.9])
        np.testing.assert_allclose([*map(float, colors), *depths], expected, rtol=2e-3)


def test_a_view_is_the_same_alone_and_among_others(samples):
    assert_same_bytes(render_scene(SEEDS[1], (96, 128), 2), select(samples[1], [0, 1]))
    assert_same_bytes(render_scene(SEEDS[1], (96, 128), [2, 0]), select(samples[1], [2, 0]))


def test_a_scene_is_the_same_at_every_size():
    """The centre of pixel i is the centre of pixel 3 i + 1 of an image three times as large."""
    small, large = render_scene(4, (30, 40), 2), render_scene(4, (90, 120), 2)
    torch.testing.assert_close(small.extrinsics, large.extrinsics)
    torch.testing.assert_close(geometry.scale_intrinsics(small.intrinsics, 3, 3), large.intrinsics)
    same = torch.isclose(small.depth, large.depth[:, 1::3, 1::3], rtol=1e-5)
    assert same.float().mean() > 0.999  # a ray along an edge may fall to either side


def test_global_random_state_is_untouched():
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = render_scene(5, (16, 16), 1)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    torch.manual_seed(99)
    np.random.seed(99)
    assert_same_bytes(render_scene(5, (16, 16), 1), first)


def test_samples_are_whole(samples):
    for sample in samples:
        assert sample.images.shape == sample.normals.shape == (3, 3, 96, 128)
        assert torch.equal(sample.valid, sample.depth > 0)
        assert torch.isfinite(sample.images).all()
        steps = sample.images * 255
        torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
        length = sample.normals.norm(dim=1)
        torch.testing.assert_close(length, sample.valid.float(), atol=1e-5, rtol=0)


def test_scenes_are_full_of_depth_and_of_edges(samples):
    for sample in samples:
        depth = sample.depth[0]
        assert sample.valid.float().mean() > 0.6
        assert 0.3 < depth[sample.valid[0]].min()
        assert depth.max() < 40
        near, far = (torch.quantile(depth[sample.valid[0]], q) for q in (0.05, 0.95))
        assert far > 1.25 * near
        log = depth.clamp(min=1e-3).log()
        jumps = (log[:, 1:] - log[:, :-1]).abs() > 0.1
        assert jumps.float().mean() > 0.005
        assert sample.images[0].std() > 0.08


def rays_towards(sample: SyntheticSample, frame: int) -> torch.Tensor:
    """[H, W, 3] unit vectors from each pixel's surface to the camera, in the camera's frame."""
    points = geometry.unproject(torch.ones_like(sample.depth[frame]), sample.intrinsics[frame])
    return -points / points.norm(dim=-1, keepdim=True)


def test_normals_face_the_camera(samples):
    for sample in samples:
        facing = (sample.normals[0].permute(1, 2, 0) * rays_towards(sample, 0)).sum(-1)
        assert (facing[sample.valid[0]] > -1e-5).all()


def test_normals_agree_with_depth_on_planes(samples):
    """Where inverse depth is affine in the pixel, the surface is a plane, and neighbours span it across the normal."""
    for sample in samples:
        depth, normal = sample.depth[0].double(), sample.normals[0].permute(1, 2, 0).double()
        points = geometry.unproject(depth, sample.intrinsics[0].double())
        inverse = 1 / depth.clamp(min=1e-3)
        bends = [
            inverse[1 - r : -1 - r or None, 1 - c : -1 - c or None]
            + inverse[1 + r : -1 + r or None, 1 + c : -1 + c or None]
            for r, c in ((0, 1), (1, 0), (1, 1), (1, -1))
        ]
        centre = inverse[1:-1, 1:-1]
        plane = (
            torch.stack([(bend / (2 * centre) - 1).abs() < 1e-6 for bend in bends]).all(0) & sample.valid[0][1:-1, 1:-1]
        )
        spanned = torch.linalg.cross(points[2:, 1:-1] - points[:-2, 1:-1], points[1:-1, 2:] - points[1:-1, :-2])
        cosine = (spanned * normal[1:-1, 1:-1]).sum(-1) / spanned.norm(dim=-1).clamp(min=1e-12)
        assert plane.float().mean() > 0.03
        assert (cosine[plane] > 0.9999).float().mean() > 0.999


def tangent_plane_errors(sample: SyntheticSample, depth: torch.Tensor, a: int, b: int) -> tuple[torch.Tensor, float]:
    """Carry view a's points to view b: their distances to the planes that b's depth and normals put under them.

    Returns the distances relative to depth where b sees the same surface, and the share of a's points that land in b's
    image and lie in front of what b sees there, which no surface can.
    """
    intrinsics, extrinsics = sample.intrinsics.double(), sample.extrinsics.double()
    height, width = depth.shape[1:]
    points = geometry.unproject(depth[a], intrinsics[a], extrinsics[a])[sample.valid[a]]
    pixel, z = geometry.project(points, intrinsics[b], extrinsics[b])
    column, row = pixel.round().long().unbind(-1)
    inside = (z > 0.05) & (column >= 0) & (row >= 0) & (column < width) & (row < height)
    points, z, column, row = points[inside], z[inside], column[inside], row[inside]
    inside = sample.valid[b][row, column]
    points, z, column, row = points[inside], z[inside], column[inside], row[inside]
    surface = geometry.unproject(depth[b], intrinsics[b])[row, column]
    in_b = points @ extrinsics[b, :, :3].mT + extrinsics[b, :, 3]
    distance = ((in_b - surface) * sample.normals[b].double()[:, row, column].T).sum(-1) / z
    ratio = z / depth[b][row, column]
    return distance.abs()[(ratio - 1).abs() < 0.03], float((ratio < 0.97).float().mean())


def test_depth_carried_from_view_to_view_lies_on_the_same_surfaces(samples):
    """Pins planar depth, normals, intrinsics and extrinsics against each other."""
    for sample in samples:
        errors, in_front = tangent_plane_errors(sample, sample.depth.double(), 0, 1)
        assert len(errors) > 0.15 * sample.depth[0].numel()
        assert errors.median() < 1e-5
        assert in_front < 0.06  # pixels at edges, where rounding to the nearest one picks the other surface


def test_ray_distance_would_not_pass_for_planar_depth(samples):
    sample = samples[0]
    stretch = rays_towards(sample, 0)[..., 2].abs().double()
    errors, _ = tangent_plane_errors(sample, sample.depth.double() / stretch, 0, 1)
    assert errors.median() > 1e-4


def test_splits_share_no_scene():
    ranges = sorted((first, first + count) for first, count in SPLITS.values())
    for (_, end), (start, _) in pairwise(ranges):
        assert end <= start
    for split, (first, count) in SPLITS.items():
        scenes = SyntheticScenes(split, (16, 24), 2)
        assert len(scenes) == count
        assert scenes.seed(0) == first
        assert scenes.seed(count - 1) == first + count - 1
        with pytest.raises(IndexError, match=f"scene index must be 0 to {count - 1} in split '{split}', got {count}"):
            scenes[count]


def test_a_split_is_a_sequence_of_rendered_scenes():
    scenes = SyntheticScenes("val", (16, 24), 2)
    assert_same_bytes(scenes[3], render_scene(SPLITS["val"][0] + 3, (16, 24), 2))


def test_the_dataset_renders_the_named_frames(monkeypatch):
    dataset = open_dataset("synthetic", split="val")
    monkeypatch.setattr(type(dataset), "size", (16, 24))
    assert list(dataset.sequences)[:2] == ["scene-000000", "scene-000001"]
    assert dataset.sequences["scene-000001"] == [f"frame-{k:04d}" for k in range(8)]
    loaded = dataset.load("scene-000001", ["frame-0005", "frame-0000"])
    assert_same_bytes(loaded, render_scene(SPLITS["val"][0] + 1, (16, 24), [5, 0]))
    assert open_dataset("synthetic").sequences.keys() == open_dataset("synthetic", split="test").sequences.keys()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: render_scene(-1), "seed must be a non-negative integer, got -1"),
        (lambda: render_scene(0, frames=0), "frames must be 1 to 8, or indices from 0 to 7, got 0"),
        (lambda: render_scene(0, frames=9), "frames must be 1 to 8, .* got 9"),
        (lambda: render_scene(0, frames=[0, 8]), r"frames must be .* got \[0, 8\]"),
        (lambda: render_scene(0, size=(1, 5)), r"size must be \(height, width\) with both at least 2, got \(1, 5\)"),
        (lambda: SyntheticScenes("dev"), "unknown split 'dev' .* expected one of train, val, test"),
        (lambda: open_dataset("synthetic", "/data"), "takes no root, got '/data'"),
        (lambda: open_dataset("synthetic", split="dev"), "unknown split 'dev'"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
