"""Fine-tuning: both heads meet the same data, only they change, and what is written is what was trained."""

from __future__ import annotations

import copy

import pytest
import torch

from moe3d.integrations import patch_vggt
from moe3d.integrations.vggt import patched_heads
from moe3d.models import MiniVGGT, load_mini, save_mini
from moe3d.nn import MoEHead
from moe3d.training import finetune, shipped
from moe3d.training.finetune import Arm, FinetuneOptions, apply_tail, cache_features, draw, fit, measure, stock_block
from moe3d.training.pool import read_shards

OPTIONS = FinetuneOptions(steps=6, sweep_steps=2, learning_rates=(1e-3, 3e-3), pixels=84 * 112, gate_hidden=16)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MiniVGGT(embed_dim=32, num_heads=2, features=32).eval()


@pytest.fixture(scope="module")
def features(model, pool_folder):
    return cache_features(model, read_shards(pool_folder, 2))


def block(model):
    return model.depth_head.scratch.output_conv2


@torch.no_grad()
def test_the_tail_on_cached_features_is_the_patched_model(model, features, pool_folder):
    patched = patch_vggt(copy.deepcopy(model), init_noise=0.3)
    tail = patched_heads(patched)["depth"].tail
    shard = read_shards(pool_folder, 2)[1]  # the shard whose views are sequences
    expected = patched(shard["images"] / 255)["depth"][..., 0].flatten(0, 1)
    actual = apply_tail(tail, features[1].fused.float(), features[1].size).prediction[:, 0]
    torch.testing.assert_close(actual, expected, rtol=5e-3, atol=5e-3)  # the cache is fp16


def test_every_second_shard_is_cached_as_single_frames(model, features, pool_folder):
    """So that a frame's features do not depend on the other view."""
    shard = read_shards(pool_folder, 1)[0]
    alone = cache_features(model, [{key: value[:, 1:] for key, value in shard.items()}])[0]
    assert torch.equal(features[0].fused[1::2], alone.fused)


def test_one_expert_is_the_stock_block_and_goes_back_into_it(model, features):
    tail = MoEHead.from_conv_block(block(model), 1)
    fit(tail, features, 1e-3, 2, OPTIONS)
    single = copy.deepcopy(model)
    assert not torch.equal(tail.expert_w1[0], block(single)[0].weight)
    stock_block(tail, block(single))
    again = MoEHead.from_conv_block(block(single), 1)
    for name, value in tail.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_both_arms_see_the_same_batches(model, features, monkeypatch):
    batches = {"stock": [], "moe": []}
    for name, experts in (("stock", 1), ("moe", 4)):

        def remember(train, step, options, seen=batches[name]):
            seen.append(draw(train, step, options))
            return seen[-1]

        monkeypatch.setattr(finetune, "draw", remember)
        Arm(name, block(model), experts, OPTIONS).run(features, features, lambda entry: None)
    assert len(batches["stock"]) == len(batches["moe"]) == 2 * 2 + 6
    for stock, moe in zip(*batches.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(stock, moe, strict=True))


@pytest.mark.parametrize("experts", [1, 4])
def test_fitting_reduces_the_loss(model, features, experts):
    tail = MoEHead.from_conv_block(block(model), experts, 16, init_noise=0.3)
    before = measure(tail, features)["depth_loss"]
    fit(tail, features, 1e-2, 40, OPTIONS)
    assert measure(tail, features)["depth_loss"] < 0.9 * before


def test_the_entropy_loss_sharpens_the_gate(model, features):
    entropies = []
    for weight in (0.0, 10.0):
        tail = MoEHead.from_conv_block(block(model), 4, 16, init_noise=0.3)
        options = FinetuneOptions(**{**vars(OPTIONS), "entropy_weight": weight})
        fit(tail, features, 1e-2, 30, options)
        entropies.append(measure(tail, features)["entropy"])
    assert entropies[1] < entropies[0] - 0.01


def test_the_best_learning_rate_on_validation_is_used(model, features, monkeypatch):
    tried = []
    monkeypatch.setattr(finetune, "fit", lambda tail, train, rate, steps, *args: tried.append((rate, steps)))
    losses = iter([{"depth_loss": 2.0}, {"depth_loss": 1.0}, {}])
    monkeypatch.setattr(finetune, "measure", lambda *args: next(losses))
    Arm("stock", block(model), 1, OPTIONS).run(features, features, lambda entry: None)
    assert tried == [(1e-3, 2), (3e-3, 2), (3e-3, 6)]


def test_the_stage_writes_two_files_that_share_everything_but_the_tail(model, pool_folder, tmp_path, monkeypatch):
    (tmp_path / "pool").symlink_to(pool_folder)
    save_mini(model, tmp_path / "pretrained.safetensors")
    monkeypatch.setattr(shipped, "VALIDATION_SCENES", 1)
    shipped.finetune(tmp_path, OPTIONS, shards=2)

    pretrained = load_mini(path=tmp_path / "pretrained.safetensors").state_dict()
    single = load_mini(path=tmp_path / "mini_single.safetensors").state_dict()
    changed = {name for name in single if not torch.equal(single[name], pretrained[name])}
    assert changed == {name for name in single if "output_conv2" in name}

    from moe3d.integrations import load_head

    moe = load_head(load_mini(path=tmp_path / "mini_single.safetensors"), tmp_path / "mini_moe_head.safetensors")
    tail = patched_heads(moe)["depth"].tail
    assert tail.num_experts == 4 and tail.gate_w2.abs().sum() > 0
