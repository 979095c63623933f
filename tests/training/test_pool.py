"""The pool of training scenes, and what is done to a batch drawn from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe3d.data.synthetic import render_scene
from moe3d.geometry import project, unproject
from moe3d.training import pool
from moe3d.training.augment import jitter_colours, mirror, shrink, zoom
from moe3d.training.pool import Pool, read_shards, render_pool


def test_shards_hold_the_training_scenes_in_order(pool_folder):
    for index, shard in enumerate(read_shards(pool_folder, 2)):
        for i in range(3):
            scene = render_scene(3 * index + i, (84, 112), 2)
            assert (shard["images"][i] / 255 - scene.images).abs().max() <= 0.5 / 255 + 1e-6
            assert torch.equal(shard["depth"][i], scene.depth.half())
            assert torch.equal(shard["extrinsics"][i], scene.extrinsics)
            assert torch.equal(shard["intrinsics"][i], scene.intrinsics)


def test_only_missing_shards_are_rendered(pool_folder, monkeypatch):
    monkeypatch.setattr(pool, "_render", lambda *args: pytest.fail("rendered again"))
    render_pool(pool_folder, 2, sizes=((84, 112),))


def test_batches_depend_on_the_generator_alone(pool_folder):
    loaded = Pool(pool_folder)
    loaded.refresh()
    assert len(loaded) == 2
    once, again, other = (loaded.draw(np.random.default_rng(seed), 6) for seed in (1, 1, 2))
    assert all(torch.equal(once[key], again[key]) for key in once)
    assert not torch.equal(once["images"], other["images"])
    sizes = {tuple(loaded.draw(np.random.default_rng(seed), 6)["depth"].shape[:2]) for seed in range(20)}
    assert sizes == {(6, 1), (3, 2)}


def test_a_shard_that_appears_is_found(pool_folder, tmp_path):
    loaded = Pool(tmp_path)
    for count, path in enumerate(sorted(pool_folder.glob("shard-*")), start=1):
        (tmp_path / path.name).symlink_to(path)
        loaded.refresh()
        assert len(loaded) == count


def seen_from_the_other_view(batch):
    """Where view 0's pixels land in view 1, and how far they are there."""
    depth, intrinsics, extrinsics = (batch[key].double() for key in ("depth", "intrinsics", "extrinsics"))
    points = unproject(depth[:, 0], intrinsics[:, 0], extrinsics[:, 0])
    return project(points.flatten(1, 2), intrinsics[:, 1], extrinsics[:, 1])


def test_mirrored_cameras_see_the_mirrored_scene(pool_folder):
    batch = read_shards(pool_folder, 1)[0]
    mirrored = {key: mirror(key, value, batch) for key, value in batch.items()}
    assert torch.equal(mirrored["images"], batch["images"].flip(-1))
    assert torch.linalg.det(mirrored["extrinsics"][..., :3]).min() > 0.999

    pixels, depth = seen_from_the_other_view(batch)
    pixels_mirrored, depth_mirrored = seen_from_the_other_view(mirrored)
    size = batch["depth"].shape[-2:]
    in_front = depth.unflatten(1, size).flip(-1) > 0.1  # a point on the camera's plane is nowhere in its image
    flipped = depth.unflatten(1, size).flip(-1)
    torch.testing.assert_close(depth_mirrored.unflatten(1, size), flipped, rtol=1e-5, atol=1e-5)
    expected = pixels.unflatten(1, size).flip(2)
    expected[..., 0] = size[1] - 1 - expected[..., 0]
    torch.testing.assert_close(pixels_mirrored.unflatten(1, size)[in_front], expected[in_front], rtol=1e-4, atol=1e-2)


def test_a_shrunk_scene_has_the_cameras_of_the_scene_rendered_small(pool_folder):
    shard = read_shards(pool_folder, 1)[0]
    small = shrink(shard, np.random.default_rng(0), pixels=56 * 70)
    height, width = small["depth"].shape[-2:]
    assert height % 14 == width % 14 == 0 and height * width < 84 * 112
    assert small["images"].shape == (3, 2, 3, height, width)
    assert set(small["depth"].unique().tolist()) <= set(shard["depth"].float().unique().tolist())
    for i in range(3):
        scene = render_scene(i, (height, width), 2)
        # Rendering keeps square pixels; rounding to whole patches does not quite.
        torch.testing.assert_close(small["intrinsics"][i, :, 0, 2], scene.intrinsics[:, 0, 2])
        torch.testing.assert_close(small["intrinsics"][i, :, 1, 2], scene.intrinsics[:, 1, 2])
        torch.testing.assert_close(small["intrinsics"][i], scene.intrinsics, rtol=0.2, atol=0)


def test_a_small_enough_batch_is_not_enlarged(pool_folder):
    shard = read_shards(pool_folder, 1)[0]
    sizes = {tuple(shrink(shard, np.random.default_rng(s), pixels=10**6)["depth"].shape[-2:]) for s in range(20)}
    assert (84, 112) in sizes
    assert max(height for height, _ in sizes) == 84


def test_zooming_keeps_what_is_in_the_middle_where_it_is(pool_folder):
    shard = read_shards(pool_folder, 1)[0]
    height, width = shard["depth"].shape[-2:]
    zoomed = [zoom(shard, np.random.default_rng(seed)) for seed in range(20)]
    sizes = {tuple(batch["depth"].shape[-2:]) for batch in zoomed}
    assert (height, width) in sizes and len(sizes) > 5
    for batch in zoomed:
        h, w = batch["depth"].shape[-2:]
        y, x = (height - h) // 2, (width - w) // 2
        assert (height - h) % 2 == (width - w) % 2 == 0 and h >= 0.5 * height
        assert torch.equal(batch["depth"], shard["depth"][..., y : y + h, x : x + w])
        assert torch.equal(batch["images"], shard["images"][..., y : y + h, x : x + w])
        # A point in space is seen at the same place of the scene.
        shift = shard["intrinsics"] - batch["intrinsics"]
        assert torch.equal(shift[..., :2, 2], torch.tensor([x, y]).float().expand_as(shift[..., :2, 2]))
        assert not shift[..., :2, :2].any()


def test_colours_change_alike_in_all_frames_of_a_scene():
    images = torch.rand(3, 1, 3, 8, 8).expand(3, 2, 3, 8, 8)
    changed = jitter_colours(images, np.random.default_rng(0))
    assert changed.min() >= 0 and changed.max() <= 1
    assert (changed[:, 0] - changed[:, 1]).abs().max() < 0.2  # but for the noise
    assert ((changed - images).abs().mean(dim=(1, 2, 3, 4)) > 0.01).all()
