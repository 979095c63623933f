"""Cached features: the tail on them is the model on images, and a cache is never taken for another one."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from moe3d.integrations import patch_vggt, patched_heads
from moe3d.training.features import CachedScenes, FeatureNetwork, cache_scenes, front_features, read_scene
from moe3d.training.scenes import LiveScenes, collate


@pytest.mark.parametrize("image_gate", [False, True])
@torch.no_grad()
def test_the_tail_on_cached_features_is_the_patched_model_on_images(tiny_model, cache, image_gate):
    patched = patch_vggt(copy.deepcopy(tiny_model), init_noise=0.3, image_gate=image_gate, return_experts=True)
    tail = patched_heads(patched)["depth"].tail
    for parameter in tail.parameters():  # so that the gate has something to say
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    for file in sorted(cache.glob("*.safetensors")):
        batch = collate([read_scene(file)])
        expected, actual = patched(batch["images"]), FeatureNetwork(tail)(batch)
        for key, value in actual.items():
            torch.testing.assert_close(value, expected[key], rtol=5e-3, atol=5e-3)  # the cache is fp16


def test_cached_scenes_are_the_live_ones(live, cache):
    for i, file in enumerate(sorted(cache.glob("*.safetensors"))):
        cached, scene = read_scene(file), live[i, 0]
        assert cached["names"] == scene["names"]
        assert (cached["images"] - scene["images"]).abs().max() <= 0.5 / 255 + 1e-6
        assert all(torch.equal(cached[key], scene[key]) for key in ("depth", "valid", "pose_enc", "posed", "unit"))


def test_a_step_draws_scenes_of_one_shape_by_seed_step_and_place(cache):
    scenes = CachedScenes(cache, seed=3)
    drawn = {(step, place): scenes[step, place]["names"] for step in range(12) for place in range(2)}
    again = CachedScenes(cache, seed=3)
    assert all(again[key]["names"] == names for key, names in drawn.items())
    assert len({tuple(names) for names in drawn.values()}) == 4  # all of them, sooner or later
    assert all(len(drawn[step, 0]) == len(drawn[step, 1]) for step in range(12))
    assert any(CachedScenes(cache, seed=4)[key]["names"] != names for key, names in drawn.items())


def test_an_interrupted_cache_goes_on_and_processes_share_the_work(tiny_model, live, cache, tmp_path):
    cache_scenes(tiny_model, live, 3, tmp_path, process=1, processes=2)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["scene-000001.safetensors"]
    before = (tmp_path / "scene-000001.safetensors").stat().st_mtime_ns
    cache_scenes(tiny_model, live, 3, tmp_path)
    assert (tmp_path / "scene-000001.safetensors").stat().st_mtime_ns == before
    for name in ("scene-000000", "scene-000001", "scene-000002"):
        ours, theirs = (read_scene(folder / f"{name}.safetensors") for folder in (tmp_path, cache))
        assert torch.equal(ours["fused"], theirs["fused"])


def test_a_cache_of_another_model_or_of_other_scenes_is_refused(tiny_model, live, cache):
    other = copy.deepcopy(tiny_model)
    with torch.no_grad():
        other.aggregator.camera_token.add_(1e-3)
    with pytest.raises(ValueError, match="caches the features of other weights"):
        cache_scenes(other, live, 4, cache)
    with pytest.raises(ValueError, match="caches the features of other seed"):
        cache_scenes(tiny_model, LiveScenes(live.corpora, live.frames, seed=2), 4, cache)
    with pytest.raises(ValueError, match="caches the features of other precision"):
        cache_scenes(tiny_model, live, 4, cache, bf16=True)
    fewer = replace(live.corpora[0], sequences=("scene-000001", *live.corpora[0].sequences[2:]))
    with pytest.raises(ValueError, match="caches the features of other datasets"):
        cache_scenes(tiny_model, LiveScenes([fewer], live.frames, live.seed), 4, cache)


@torch.no_grad()
def test_features_in_bfloat16_are_those_of_a_backbone_in_bfloat16(tiny_model, live, cache, tmp_path):
    cache_scenes(tiny_model, live, 1, tmp_path, bf16=True)
    images = live[0, 0]["images"][None]
    with torch.autocast("cpu", torch.bfloat16):
        expected = front_features(tiny_model, images)
    name = "scene-000000.safetensors"
    ours, exact = (read_scene(folder / name)["fused"] for folder in (tmp_path, cache))
    torch.testing.assert_close(ours, expected.half().float(), rtol=0, atol=0)
    assert not torch.equal(ours, exact)


def test_what_comes_after_the_features_does_not_matter_to_the_cache(tiny_model, live, cache):
    patched = patch_vggt(copy.deepcopy(tiny_model), init_noise=0.5)
    cache_scenes(patched, live, 4, cache)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no cached scenes"):
        CachedScenes(tmp_path, 0)
