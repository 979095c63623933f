"""Depth Anything 3 with VGGT's interface, against its own network; and through every command, from a file."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file, save_model

import moe3d
from moe3d.cli import main
from moe3d.cli import model as model_options
from moe3d.data.synthetic import SyntheticDataset
from moe3d.geometry import decode_pose
from moe3d.integrations import patched_heads
from moe3d.models import DepthAnything3, depth_anything, input_width, load_model
from moe3d.reconstruct import load_images
from moe3d.reconstruct.frames import find_scenes
from moe3d.training.features import FeatureNetwork, front_features
from moe3d.training.networks import set_trainable
from support import da3
from support.pictures import photo

SIZE = (28, 42)


@pytest.fixture(scope="module")
def network():
    """Small, with random weights: cameras 60 degrees wide, here and there and turned."""
    network = da3.network()
    torch.nn.init.constant_(network.cam_dec.fc_fov[0].bias, 1.0)
    with torch.no_grad():
        network.cam_dec.fc_qvec.weight.mul_(20)
    return network


@pytest.fixture
def model(network):
    return DepthAnything3(copy.deepcopy(network)).eval()


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    """As on the hub: a folder with the file that Depth Anything 3's own API writes, by huggingface_hub's mixin; what
    several layers share is in it once."""
    path = tmp_path_factory.mktemp("da3") / "model.safetensors"
    save_model(DepthAnything3(network), str(path))
    return path


@pytest.fixture(scope="module")
def head_file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    patched = moe3d.patch(DepthAnything3(copy.deepcopy(network)), 3, gate_hidden=8, init_noise=0.5)
    torch.nn.init.normal_(patched.depth_head.tail.gate_w2, generator=torch.Generator().manual_seed(0))
    moe3d.save_head(patched, path)
    return path


def images(*lead):
    return torch.rand(*lead, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def of_the_network(network, images):
    """What the network itself says of images as its own API prepares them."""
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return network((images - mean) / std)


@pytest.mark.parametrize("lead", [(1, 1), (1, 2), (1, 4), (2, 3), (1, 9)], ids=str)
def test_it_says_what_the_network_says(model, network, lead):
    expected = of_the_network(network, images(*lead))
    with torch.no_grad():
        found = model(images(*lead))
    torch.testing.assert_close(found["depth"], expected.depth[..., None])
    torch.testing.assert_close(found["depth_conf"], expected.depth_conf)
    extrinsics, intrinsics = decode_pose(found["pose_enc"], SIZE)
    bottom = torch.tensor([0.0, 0, 0, 1]).expand(*lead, 1, 4)
    cameras = torch.cat([expected.extrinsics[..., :3, :], bottom], dim=-2)
    torch.testing.assert_close(extrinsics, (cameras @ cameras[:, :1].inverse())[..., :3, :], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(intrinsics, expected.intrinsics)
    assert (found["pose_enc"][..., 6] >= 0).all()
    turned = (extrinsics[..., :3] - torch.eye(3)).abs().amax()
    assert lead[1] == 1 or turned > 0.05, "a test of cameras that all look the same way"
    assert torch.equal(found["pose_enc_list"][-1], found["pose_enc"]) and torch.equal(found["images"], images(*lead))


def test_images_without_a_batch_are_one_sequence_and_bad_ones_are_refused(model):
    with torch.no_grad():
        assert torch.equal(model(images(2))["depth"], model(images(1, 2))["depth"])
    with pytest.raises(ValueError, match="images must have height and width that are multiples of 14, got 28x40"):
        model(torch.rand(1, 3, 28, 40))


def test_patched_it_gains_the_same_keys_as_vggt_and_unpatched_it_is_as_before(model):
    with torch.no_grad():
        before = model(images(1, 3))
        patched = moe3d.patch(model, 4, gate_hidden=8, init_noise=0, return_experts=True)(images(1, 3))
        assert model.depth_head.tail is patched_heads(model)["depth"].tail
        after = moe3d.unpatch(model)(images(1, 3))
    assert patched.keys() - before.keys() == {"depth_entropy", "depth_weights", "depth_hypotheses"}
    assert patched["depth_weights"].shape == patched["depth_hypotheses"].shape == (1, 3, 4, *SIZE)
    torch.testing.assert_close(patched["depth"], before["depth"], rtol=1e-4, atol=1e-5)
    assert before.keys() == after.keys() and all(torch.equal(after[k], before[k]) for k in ("depth", "pose_enc"))
    assert model.depth_head.tail is None


def test_its_parameters_and_names_are_the_networks(model, network):
    assert [*model.state_dict()] == [f"model.{name}" for name in network.state_dict()]
    assert len([*model.parameters()]) == len([*network.parameters()])
    twin = copy.deepcopy(model)
    assert twin.aggregator.backbone is twin.model.backbone and twin.depth_head.head is twin.model.head


def test_cached_features_give_the_heads_own_depth(model):
    moe3d.patch(model, 3, gate_hidden=8)
    with torch.no_grad():
        expected = model(images(1, 2))
        batch = {"fused": front_features(model, images(1, 2))[None], "images": images(1, 2)}
        found = FeatureNetwork(model.depth_head.tail, patched_heads(model)["depth"].pos_embed)(batch)
    for key in ("depth", "depth_entropy"):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", ["file", "folder"])
def test_it_comes_from_disk(file, network, place):
    loaded = load_model(file if place == "file" else file.parent)
    assert isinstance(loaded, DepthAnything3) and not loaded.training and input_width(loaded) == 504
    found, expected = loaded.model.state_dict(), network.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_head_file_is_put_on_and_set(file, head_file):
    tail = patched_heads(load_model(file, head_file, mode="argmax", return_experts=True))["depth"].tail
    assert (tail.num_experts, tail.gate_hidden, tail.mode, tail.return_experts) == (3, 8, "argmax", True)


@torch.no_grad()
def test_its_head_is_shown_the_images(file, head_file):
    """Sharpened as its own depth is when it is sharpened afterwards; more frames than the head takes at a time."""
    model = load_model(file, head_file, sharpen=2)
    sharp = model(images(1, 9))["depth"][0, ..., 0]
    model.depth_head.tail.sharpen = 0
    plain = model(images(1, 9))["depth"][0, ..., 0]
    assert not torch.equal(sharp, plain)
    torch.testing.assert_close(sharp, moe3d.sharpen.sharpen(plain, images(9), 2), rtol=1e-4, atol=1e-4)


def test_the_gaussians_of_the_giant_are_left_out(file, tmp_path):
    weights = load_file(file) | {"model.gs_head.norm.weight": torch.ones(3), "model.gs_adapter.x": torch.ones(1)}
    save_file(weights, tmp_path / "giant.safetensors")
    assert not any("gs_" in name for name in load_model(tmp_path / "giant.safetensors").state_dict())


@pytest.mark.parametrize(("width", "blocks"), [(768, 12), (1024, 24), (1536, 40)])
def test_the_large_networks_are_built_without_gaussians(monkeypatch, width, blocks):
    """Without memory for their weights."""
    linspace = torch.linspace
    monkeypatch.setattr(torch, "linspace", lambda *args, **options: linspace(*args, **options | {"device": "cpu"}))
    state = {"model.backbone.pretrained.cls_token": torch.zeros(1, 1, width), "model.cam_dec.fc_t.bias": torch.zeros(3)}
    with torch.device("meta"):
        built, _ = depth_anything.build(state)
    assert len(built.aggregator.frame_blocks) == blocks
    assert built.model.gs_head is None and built.model.gs_adapter is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: {k: v for k, v in w.items() if "cam_dec" not in k}, "got one with 384 channels and no cameras"),
        (lambda w: {k.replace("model.", "model.da3.", 1): v for k, v in w.items()}, "got a nested network"),
        (
            lambda w: w | {"model.backbone.pretrained.cls_token": torch.zeros(1, 1, 100)},
            "must hold the weights of one of da3-small, da3-base, .*, got one with 100 channels and cameras",
        ),
        (
            lambda w: w | {"model.backbone.pretrained.cls_token": torch.zeros(())},
            r"got none of \[1, 1, channels\] for 'model.backbone.pretrained.cls_token'",
        ),
        (
            lambda w: {"model.backbone.conv_encoder.weight": torch.zeros(3)},
            "a VGGT or a Depth Anything 3, got none for",
        ),
        (
            lambda w: w | {"model.head.norm.weight": torch.zeros(5)},
            r"does not fit Depth Anything 3's architecture: 1 tensors differ, .* \[5\] in the file, \[768\] in",
        ),
    ],
    ids=["without cameras", "nested", "unknown size", "damaged", "another family", "another shape"],
)
def test_other_networks_are_refused(file, tmp_path, change, says):
    save_file(change(load_file(file)), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=says):
        load_model(tmp_path / "a.safetensors")


def test_without_its_package_the_message_says_what_to_install(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "depth_anything_3.cfg", None)
    with pytest.raises(RuntimeError, match=r"needs Depth Anything 3's own package \(.*\): pip install 'moe3d\[da3\]'"):
        load_model(file)


def test_reconstruct_writes_frames_and_points_and_nothing_but_its_summary(file, head_file, tmp_path):
    """In a process of its own: Depth Anything 3's package would tell standard output what it does."""
    for number in (1, 2, 3):
        Image.fromarray(photo(60, 80, number)).save(tmp_path / f"img{number}.png")
    inputs = [tmp_path / f"img{number}.png" for number in (1, 2, 3)]
    flags = ["--model", file, "--head", head_file, "--width", 56, "--out", tmp_path / "out", "--experts", "--json"]
    flags += ["--export", "ply,gate-png", "--frames-chunk", 2]
    environment = {key: value for key, value in os.environ.items() if key != "DA3_LOG_LEVEL"}
    command = [sys.executable, "-m", "moe3d", "reconstruct", *map(str, [*inputs, *flags])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    summary = json.loads(done.stdout)
    assert summary["frames"] == 3 and summary["points"] > 0

    scene = find_scenes(tmp_path / "out")["scene"]
    with torch.no_grad():
        expected = load_model(file, head_file, return_experts=True)(load_images(inputs, 56).images)
    for i, frame in enumerate(scene):
        for found, key in ((frame.depth, "depth"), (frame.confidence, "depth_conf"), (frame.weights, "depth_weights")):
            wanted = expected[key][0, i].numpy().reshape(found.shape)
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3 if key == "depth_weights" else 1e-5)


def test_eval_judges_its_head_beside_the_stock_one(file, head_file, tmp_path, monkeypatch):
    monkeypatch.setattr(SyntheticDataset, "size", (42, 56))
    monkeypatch.setattr(model_options, "input_width", lambda model: 56)
    report = tmp_path / "report.json"
    flags = ["--model", file, "--head", head_file, "--limit", 1, "--out", report]
    assert main(["eval", "mv", "--dataset", "synthetic", *map(str, flags)]) == 0
    report = json.loads(report.read_text())
    assert list(report["protocol"]["systems"]) == ["moe", "stock"] and [*report["compare"]] == ["stock"]
    assert 0 < report["mean"]["acc_mean"] < float("inf") and report["mean"]["coverage"] == 1


@pytest.mark.parametrize(
    "how",
    [
        ["--train", "decoder"],
        ["--train", "all", "--precision", "bf16"],
        ["--recipe", "best"],
        ["--recipe", "best", "--image-gate", "none"],
        ["--recipe", "best", "--cache-features", "cache", "--cache-scenes", "2"],
    ],
    ids=str,
)
def test_a_head_is_trained_and_loads(file, tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    options = "--size 28x42 --frames 2 --steps 2 --workers 0 --lr 1e-3 --gate-hidden 8 --validation-scenes 1 --out out"
    assert main(["train", "--dataset", "synthetic", "--model", str(file), *options.split(), *how]) == 0
    if "--train" not in how:
        tail = patched_heads(load_model(file, "out/head.safetensors"))["depth"].tail
        assert (tail.image_gate is None, tail.sharpen) == ("none" in how, 4)
        return
    trained = load_model("out/model.safetensors", "out/head.safetensors")
    before = load_file(file)
    changed = {
        name.split(".")[1]
        for name, value in trained.state_dict().items()
        if name in before and not torch.equal(value, before[name])
    }
    assert changed == {"head", "cam_dec"} | ({"backbone"} if "all" in how else set())


@pytest.mark.parametrize("part", ["head", "decoder", "all"])
def test_what_learns_is_what_the_losses_reach(model, part):
    """Else processes that train together wait for gradients that never come."""
    moe3d.patch(model, 3, gate_hidden=8, return_experts=True)
    set_trainable(model, part, cameras=True)
    predictions = model(images(2, 3))
    losses = [predictions[key] for key in ("depth", "depth_entropy", "depth_weights", "depth_hypotheses", "pose_enc")]
    sum(loss.square().sum() for loss in losses).backward()
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, p in learning.items() if p.grad is None]
    parts = {name.split(".")[1] for name in learning}
    assert parts == {"head": {"head"}, "decoder": {"head", "cam_dec"}, "all": {"head", "cam_dec", "backbone"}}[part]


def test_the_views_go_where_the_model_goes(model, network):
    views = [model.aggregator, model.camera_head, model.depth_head]
    assert [view.training for view in views] == [model.training] * 3 == [False] * 3
    model.train()
    assert [view.training for view in views] == [model.training] * 3 == [True] * 3
    model.model = copy.deepcopy(network)
    assert model.depth_head.head is model.model.head and model.aggregator.backbone is model.model.backbone


@torch.no_grad()
def test_under_autocast_it_says_what_the_network_says(model, network):
    """As on a GPU: the backbone in bfloat16, the heads in float32."""
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = of_the_network(network, images(1, 3)), model(images(1, 3))
    for name, value in (("depth", expected.depth[..., None]), ("depth_conf", expected.depth_conf)):
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], value)
    torch.testing.assert_close(decode_pose(found["pose_enc"], SIZE)[1], expected.intrinsics.float())


@torch.no_grad()
def test_a_field_of_view_of_nothing_is_what_the_network_makes_of_it(model):
    torch.nn.init.constant_(model.model.cam_dec.fc_fov[0].bias, -100.0)
    found, expected = model(images(1, 2)), of_the_network(model.model, images(1, 2))
    torch.testing.assert_close(decode_pose(found["pose_enc"], SIZE)[1], expected.intrinsics, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("make", "missing"), [(da3.metric_network, "cam_dec"), (da3.nested_network, "backbone, head, cam_dec")]
)
def test_networks_without_cameras_are_refused(make, missing):
    with pytest.raises(ValueError, match=f"that predicts cameras, got .*Net without {missing}$"):
        DepthAnything3(make())
