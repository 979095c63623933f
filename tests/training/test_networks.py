"""Which part of a model learns, of MiniVGGT and of the real VGGT."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe3d.integrations import patch_vggt
from moe3d.losses import CONSTANT_ONE
from moe3d.training.networks import ImageNetwork, Supervised, set_trainable
from moe3d.training.recipes import BEST, PAPER
from support import models

LEARNING = {
    "head": ("depth_head.scratch.output_conv2.",),
    "decoder": ("depth_head.", "camera_head."),
    "all": ("depth_head.", "camera_head.", "aggregator."),
}
BUILDERS = ["mini", pytest.param("real", marks=pytest.mark.real_vggt)]


def scene(frames=2):
    generator = torch.Generator().manual_seed(0)
    depth = torch.rand(1, frames, models.HEIGHT, models.WIDTH, generator=generator) + 0.5
    pose = torch.tensor([0.1, 0, 0, 0, 0, 0, 1, 1, 1]).expand(1, frames, 9)
    return {"images": models.images(1, frames), "depth": depth, "valid": depth > 0.6, "pose_enc": pose}


def supervised(build, part, recipe=PAPER, bf16=False):
    model = getattr(models, build)()
    model = patch_vggt(model, **replace(recipe, gate_hidden=8).patch_options(0))
    set_trainable(model, part, cameras=True)
    recipe = replace(recipe, entropy_weight=CONSTANT_ONE)
    return Supervised(ImageNetwork(model, bf16), recipe.objective(train_cameras=part != "head"))


@pytest.mark.parametrize("part", LEARNING)
@pytest.mark.parametrize("build", BUILDERS)
def test_exactly_the_part_that_is_asked_for_learns(build, part):
    step = supervised(build, part)
    losses = step(scene(), 1.0)
    assert ("camera" in losses) == (part != "head")
    losses["total"].mean().backward()
    for name, parameter in step.network.model.named_parameters():
        # Of everything that learns some gradient arrives: distributed training waits for all of it.
        assert (parameter.grad is not None) == name.startswith(LEARNING[part]) == parameter.requires_grad, name
    assert step.network.model.aggregator.training == (part == "all")
    assert step.network.tail.training


@pytest.mark.parametrize("recipe", [PAPER, BEST])
def test_losses_are_float32_however_the_backbone_computes(recipe):
    """The backbone's 8 bits move the losses a little; the head's arithmetic stays float32."""
    whole, half = (supervised("mini", "head", recipe, bf16)(scene(), 0.5) for bf16 in (False, True))
    for name, value in whole.items():
        assert half[name].dtype == torch.float32
        assert (half[name] - value).abs().max() < 0.1 * value.abs().max() + 1e-3, name
    assert not torch.equal(half["depth"], whole["depth"])


def test_what_a_model_holds_fixed_stays_fixed():
    model = patch_vggt(models.mini())
    model.aggregator.register_token.requires_grad_(False)  # as VGGT does with DINOv2's mask token
    set_trainable(model, "all", cameras=True)
    assert not model.aggregator.register_token.requires_grad and model.aggregator.camera_token.requires_grad


def test_without_a_progress_the_predictions_come_back():
    predictions = supervised("mini", "head")(scene())
    assert {"depth", "depth_weights", "depth_hypotheses", "depth_entropy", "pose_enc_list"} <= set(predictions)
