"""The study: what it compares is comparable, what is finished stays, and its decodes are what they are called."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from moe3d.models import load_mini
from moe3d.nn import MoEHead
from moe3d.sharpen import sharpen
from moe3d.training import study
from moe3d.training.features import FeatureNetwork
from moe3d.training.heads import HeadBudget, mixture_head
from moe3d.training.recipes import BEST, PAPER
from moe3d.training.study import (
    MIXTURE_DECODES,
    SINGLE_DECODES,
    VARIANTS,
    Held,
    ImageBranchHead,
    Study,
    StudyOptions,
    decode_depth,
    image_depth,
    snap,
    table,
    wide_head,
    with_true_edges,
    write_study,
)
from moe3d.training.validate import METRICS
from moe3d.training.views import fit_to_size


@pytest.fixture(scope="module")
def options(tiny_weights):
    return StudyOptions(
        model=str(tiny_weights),
        size=(56, 84),
        budget=HeadBudget(steps=4, rates=(1e-3,)),
        seeds=2,
        train_scenes=2,
        validation_scenes=1,
        test_scenes=2,
    )


@pytest.fixture(scope="module")
def folder(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    small = fit_to_size(*study.motorcycle(), (126, 168))  # judging it at full size takes most of the time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "motorcycle", lambda: (small,))
        write_study(folder, options, ["single-l2", "best"])
    return folder


def test_it_writes_a_line_per_variant_and_seed_a_table_and_a_figure(folder):
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [(line["variant"], line["seed"]) for line in lines] == [
        ("single-l2", 0), ("single-l2", 1), ("best", 0), ("best", 1),
    ]  # fmt: skip
    assert set(lines[0]["test"]) == set(SINGLE_DECODES) and set(lines[2]["test"]) == set(MIXTURE_DECODES)
    assert all(set(line["motorcycle"]["mean"]) == set(METRICS) for line in lines)
    text = (folder / "table.md").read_text()
    for part in ("test", "motorcycle"):
        assert table(lines, part) in text
    mean = np.mean([line["test"]["mean"]["abs_rel"] for line in lines[:2]])
    assert f"| single head, L2 | mean | 2 | {mean:.4f} ± " in text and "| - | 1.00 | - | - |" in text  # its F1 is zero
    assert (folder / "figure.svg").stat().st_size > 1000


def test_what_is_finished_stays_and_what_was_cut_short_is_done_again(folder, options, monkeypatch):
    results = folder / "results.jsonl"
    before = results.read_text()
    lines = before.splitlines(keepends=True)
    results.write_text("".join(lines[:3]) + lines[3][:40] + "\n")
    trained = []
    monkeypatch.setattr(Study, "_result", lambda self, *what: trained.append(what) or json.loads(lines[3]))
    try:
        assert len(Study(folder, options).run(["single-l2", "best"])) == 4
        assert trained == [("best", 1)]
    finally:
        results.write_text(before)


def test_all_variants_fit_the_table_and_the_figure(folder, tmp_path):
    line = json.loads((folder / "results.jsonl").read_text().splitlines()[-1])
    lines = [{**line, "variant": name} for name in VARIANTS]
    study.figure(lines, tmp_path / "figure.svg")
    drawn, text = (tmp_path / "figure.svg").read_text(), table(lines, "test")
    for name, variant in VARIANTS.items():
        assert (f"<!-- {name} -->" in drawn) == variant.every_seed and f"| {variant.about} | mean | 1 |" in text


def test_a_head_that_diverges_gets_a_line_that_says_so(folder, options, monkeypatch, tmp_path):
    """So much noise sends depth beyond float32, whatever the rate."""
    shutil.copytree(folder, tmp_path / "study")
    wild = replace(VARIANTS["paper"], recipe=replace(PAPER, init_noise=30.0))
    monkeypatch.setitem(VARIANTS, "paper-noise-1", replace(wild, every_seed=False))
    write_study(tmp_path / "study", options, ["paper-noise-1"])
    lines = [json.loads(line) for line in (tmp_path / "study" / "results.jsonl").read_text().splitlines()]
    assert lines[4]["diverged"] == "training diverges at every learning rate that was tried: 0.001"
    text = (tmp_path / "study" / "table.md").read_text()
    assert text.count("| MoE3D as published: L2 and entropy | diverges | 1 | - |") == 2
    assert len(Study(tmp_path / "study", options).run(["paper-noise-1"])) == 5


def test_results_of_other_settings_are_not_mixed(folder, options):
    more_seeds = Study(folder, replace(options, seeds=3))
    assert len(more_seeds.results()) == 4
    with pytest.raises(ValueError, match="of a study with other settings"):
        Study(folder, replace(options, budget=HeadBudget(steps=5, rates=(1e-3,)))).results()


def test_test_scenes_are_of_the_test_split(folder):
    """Told by the splits' sizes."""
    manifests = [json.loads((folder / "cache" / part / "cache.json").read_text()) for part in ("train", "val", "test")]
    assert [manifest["datasets"][0][3] for manifest in manifests] == [10_000, 64, 128]


@pytest.fixture(scope="module")
def network():
    """A mixture with a gate that has something to say, on the shipped network's block."""
    block = load_mini().depth_head.scratch.output_conv2
    head = mixture_head(block, PAPER, 0)
    with torch.no_grad():
        head.gate_w2.normal_(generator=torch.Generator().manual_seed(0))
    return FeatureNetwork(head.eval())


@pytest.fixture(scope="module")
def held():
    generator = torch.Generator().manual_seed(0)
    batch = {
        "images": torch.rand(1, 1, 3, 28, 42, generator=generator),
        "fused": torch.randn(1, 1, 32, 16, 24, generator=generator),
    }
    truth = np.random.default_rng(0).uniform(1, 3, (56, 84))
    return Held(batch, truth, np.ones_like(truth, dtype=bool))


HALF = {"tempered": 0.5, "sharpened": 0.5, "edge-oracle": 0.5}


@torch.no_grad()
def test_decodes_are_the_heads_own_modes_and_leave_the_head_alone(network, held):
    predicted = network(held.batch)
    hypotheses, weights = predicted["depth_hypotheses"][0, 0], predicted["depth_weights"][0, 0]
    chosen = hypotheses.gather(0, weights.argmax(0, keepdim=True))[0]
    np.testing.assert_allclose(decode_depth(network, "argmax", held, HALF, 0.3), chosen)
    tempered = (weights.log() / 0.5).softmax(0)
    np.testing.assert_allclose(
        decode_depth(network, "tempered", held, HALF, 0.3), (tempered * hypotheses).sum(0), rtol=1e-4
    )
    mean = decode_depth(network, "mean", held, HALF, 0.3)
    np.testing.assert_allclose(mean, predicted["depth"][0, 0, ..., 0])
    edges = with_true_edges(((tempered * hypotheses).sum(0)).numpy(), *held.on_grid())
    np.testing.assert_allclose(decode_depth(network, "edge-oracle", held, HALF, 0.3), edges, rtol=1e-4)
    sharp = sharpen((tempered * hypotheses).sum(0)[None], held.batch["images"][:, 0])[0]
    np.testing.assert_allclose(decode_depth(network, "sharpened", held, HALF, 0.3), sharp, rtol=1e-4)
    assert (network.tail.mode, network.tail.temperature) == ("mean", 1.0)


def test_no_choice_of_expert_is_nearer_to_the_truth_than_the_oracles(network, held):
    truth, _ = held.on_grid()
    mean = decode_depth(network, "mean", held, {}, 0.3)
    scale = np.median(truth) / np.median(mean)

    def error(decode):
        return np.abs(np.log(decode_depth(network, decode, held, {}, 0.3) * scale / truth))

    assert (error("oracle") <= error("argmax") + 1e-6).all()
    assert error("oracle").mean() < error("image-oracle").mean() < error("argmax").mean() * 1.5


def test_the_image_moves_an_edge_to_where_it_sees_it():
    """Truth has its edge at column 6, the image at column 7: the depth of column 6 becomes its neighbours'."""
    truth = np.where(np.arange(12) < 6, 1.0, 2.0) * np.ones((8, 1))
    image = np.where(np.arange(12) < 7, 0.2, 0.8) * np.ones((3, 8, 1))
    expected = np.where(np.arange(12) < 7, 1.0, 2.0) * np.ones((8, 1))
    valid = np.ones_like(truth, dtype=bool)
    np.testing.assert_array_equal(image_depth(truth, valid, image), expected)
    np.testing.assert_array_equal(image_depth(truth, valid, np.zeros((3, 8, 12))), truth)  # a flat image knows nothing


def test_true_edges_turn_a_ramp_into_the_truths_step():
    truth = np.where(np.arange(24) < 10, 1.0, 2.0) * np.ones((9, 1))
    valid = np.ones_like(truth, dtype=bool)
    valid[:, 3] = False
    ramp = np.interp(np.arange(24), [8, 16], [1.2, 1.8]) * np.ones((9, 1))  # half-way at 12, and flatter than the truth
    sharp = with_true_edges(ramp, truth, valid)
    assert sharp[:, :10].max() < 1.35 and sharp[:, 10:].min() > 1.5 and np.isin(sharp, ramp).all()
    assert (sharp[:, 3] == ramp[:, 3]).all()


def test_snapping_moves_depths_between_two_surfaces_onto_one_of_them():
    ramp = np.array([1, 1, 1.1, 1.9, 2, 2.0]) * np.ones((3, 1))
    np.testing.assert_allclose(snap(ramp)[1], [1, 1, 1, 2, 2, 2])
    smooth = np.linspace(1, 1.5, 20) * np.ones((3, 1))
    np.testing.assert_array_equal(snap(smooth), smooth)


@torch.no_grad()
def test_controls_begin_as_the_pretrained_block_and_have_their_size(network, held):
    block = load_mini().depth_head.scratch.output_conv2
    plain = FeatureNetwork(mixture_head(block, VARIANTS["single-l2"].recipe, 0))(held.batch)["depth"]
    for make in (wide_head, ImageBranchHead):
        torch.testing.assert_close(FeatureNetwork(make(block, PAPER, 0))(held.batch)["depth"], plain)
    wide, mixture = (study._count(head) for head in (wide_head(block, PAPER, 0), mixture_head(block, PAPER, 0)))
    assert abs(wide - mixture) / mixture < 0.005


def test_variants_are_what_the_study_is_about():
    assert VARIANTS["paper"].recipe == PAPER and VARIANTS["best"].recipe == BEST
    assert all(isinstance(v.head(load_mini().depth_head.scratch.output_conv2, v.recipe, 0), (MoEHead, ImageBranchHead))
               for v in VARIANTS.values())  # fmt: skip
    experts = {VARIANTS[name].recipe.num_experts for name in ("single-l2", "paper-k2", "paper", "paper-k8")}
    assert experts == {1, 2, 4, 8}
