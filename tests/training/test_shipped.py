"""The weights that ship with the package."""

from __future__ import annotations

import pytest
import torch

from moe3d.models import load_mini
from moe3d.models.checkpoint import WEIGHTS
from moe3d.training.validate import evaluate, motorcycle, scenes, trivial_metrics


def test_the_weights_take_at_most_10_megabytes_and_have_a_card():
    files = list(WEIGHTS.glob("*.safetensors"))
    assert {file.name for file in files} == {"mini_single.safetensors", "mini_moe_head.safetensors"}
    assert sum(file.stat().st_size for file in files) <= 10 * 2**20
    assert (WEIGHTS / "MODEL_CARD.md").is_file()


@pytest.mark.parametrize("head", ["single", "moe"])
@torch.no_grad()
def test_they_give_finite_positive_depth_at_any_size(head):
    model = load_mini(head)
    for frames, height, width in ((1, 168, 224), (2, 126, 84), (1, 14, 28)):
        predictions = model(torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(0)))
        depth = predictions["depth"]
        assert depth.shape == (1, frames, height, width, 1)
        assert depth.isfinite().all() and (depth > 0).all()
        assert predictions["depth_conf"].isfinite().all() and predictions["pose_enc"].isfinite().all()


@pytest.mark.parametrize("head", ["single", "moe"])
def test_they_see_more_than_a_constant_depth_on_held_out_scenes(head):
    samples = scenes("test", 2)
    metrics, trivial = evaluate(load_mini(head), samples, frames=2), trivial_metrics(samples, samples)["constant"]
    assert metrics["abs_rel"] < trivial["abs_rel"]
    assert metrics["delta1"] > trivial["delta1"]


def test_a_photograph_looks_like_its_scene():
    """On Motorcycle: far beyond what can be had without looking, and beyond the ramp that fits this scene best."""
    trivial = {name: metrics["delta1"] for name, metrics in trivial_metrics(motorcycle(), scenes("val", 2)).items()}
    for head in ("single", "moe"):
        delta1 = evaluate(load_mini(head), motorcycle(), frames=1)["delta1"]
        assert delta1 > 0.3 + max(trivial["constant"], trivial["ramp"])
        assert delta1 > 0.12 + trivial["best_ramp"]


@torch.no_grad()
def test_the_experts_of_the_moe_head_differ():
    model = load_mini("moe")
    model.depth_head.tail.return_experts = True
    predictions = model(scenes("test", 1)[0].images[:1])
    assert predictions["depth_hypotheses"].std(dim=2).max() > 1e-3
