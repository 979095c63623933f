"""Heads from cached features, the shipped ones among them."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from moe3d.integrations import load_head, patched_heads
from moe3d.models import load_mini
from moe3d.training import heads, shipped
from moe3d.training.features import CachedScenes, read_batches
from moe3d.training.heads import HeadBudget, HeadTrainer, into_block, mixture_head
from moe3d.training.recipes import BEST, PAPER
from moe3d.training.shipped import FinetuneOptions
from moe3d.training.trainer import DivergedError, Trainer


@pytest.fixture
def head_trainer(tiny_model, cache):
    block = copy.deepcopy(tiny_model.depth_head.scratch.output_conv2)
    return HeadTrainer(block, cache, read_batches(CachedScenes(cache, 0))[:1], HeadBudget(steps=10, rates=(1e-3, 1e-2)))


def test_every_head_meets_the_same_scenes_in_the_same_order(head_trainer, monkeypatch):
    seen = []
    take_step = Trainer._take_step

    def remember(self, shares):
        seen.append([batch["names"] for batch in shares])
        return take_step(self, shares)

    monkeypatch.setattr(Trainer, "_take_step", remember)
    for recipe in (PAPER, BEST):
        head_trainer.train(mixture_head, recipe, 3, 1e-3)
    assert len(seen) == 20 and seen[:10] == seen[10:]
    head_trainer.train(mixture_head, BEST, 4, 1e-3)
    assert seen[20:] != seen[:10]


def test_rates_are_compared_by_the_loss_on_the_scenes_held_out(head_trainer):
    head_trainer = replace(head_trainer, budget=replace(head_trainer.budget, steps=30))
    losses = head_trainer.sweep(mixture_head, PAPER)
    assert set(losses) == {1e-3, 1e-2} and heads.best_rate({1: 0.3, 2: 0.1, 3: 0.2}) == 2
    supervised = head_trainer._train(mixture_head, PAPER, 0, 1e-2, steps=3)
    with torch.no_grad():
        assert losses[1e-2] == supervised(head_trainer.held_out[0], 1.0)["total"].item()


def test_a_rate_at_which_training_diverges_is_not_chosen(head_trainer, monkeypatch):
    def train(self, make, recipe, seed, rate, steps):
        if rate == 1e-2:
            raise DivergedError("the loss is not finite")
        return train_on(self, make, recipe, seed, rate, steps)

    train_on = heads.HeadTrainer._train
    monkeypatch.setattr(heads.HeadTrainer, "_train", train)
    losses = head_trainer.sweep(mixture_head, PAPER)
    assert losses[1e-2] == math.inf and heads.best_rate(losses) == 1e-3
    with pytest.raises(DivergedError, match=r"at every learning rate that was tried: 0\.001, 0\.01"):
        heads.best_rate({1e-3: math.inf, 1e-2: math.inf})


def test_one_expert_goes_back_into_the_plain_block(head_trainer):
    head = heads.trained_head(head_trainer.train(mixture_head, FinetuneOptions(recipe=PAPER).stock_recipe, 0, 1e-2))
    block = copy.deepcopy(head_trainer.block)
    into_block(head, block)
    again = mixture_head(block, FinetuneOptions().stock_recipe, 0)
    assert not torch.equal(head.expert_w1[0], head_trainer.block[0].weight)
    for name, value in head.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_the_shipped_stage_writes_two_files_that_share_everything_but_the_tail(tiny_weights, tmp_path):
    (tmp_path / "pretrained.safetensors").symlink_to(tiny_weights)
    budget = HeadBudget(steps=4, rates=(1e-3,))
    shipped.finetune(tmp_path, FinetuneOptions(budget=budget, size=(56, 84), scenes=2, validation_scenes=1))

    pretrained = load_mini(path=tmp_path / "pretrained.safetensors").state_dict()
    single = load_mini(path=tmp_path / "mini_single.safetensors").state_dict()
    changed = {name for name in single if not torch.equal(single[name], pretrained[name])}
    assert changed == {name for name in single if "output_conv2" in name}
    moe = load_head(load_mini(path=tmp_path / "mini_single.safetensors"), tmp_path / "mini_moe_head.safetensors")
    tail = patched_heads(moe)["depth"].tail
    decode = (BEST.num_experts, BEST.mode, BEST.decode_temperature * BEST.temperature.at(1.0), BEST.sharpen)
    assert (tail.num_experts, tail.mode, tail.temperature, tail.sharpen) == decode and tail.gate_w2.abs().sum() > 0


def test_experts_begin_apart_and_a_single_one_stays_where_it_is(head_trainer):
    recipe = replace(BEST, num_experts=3, spread=0.2, init_noise=0.0)
    head = mixture_head(head_trainer.block, recipe, 0)
    log_depth = head_trainer.block[2].bias[0]
    torch.testing.assert_close(head.expert_b2[:, 0], log_depth + torch.tensor([-0.2, 0.0, 0.2]))
    assert torch.equal(head.expert_b2[:, 1], head_trainer.block[2].bias[1].expand(3))
    alone = mixture_head(head_trainer.block, replace(recipe, loss="log-l1", num_experts=1), 0)
    assert torch.equal(alone.expert_b2[0], head_trainer.block[2].bias)
