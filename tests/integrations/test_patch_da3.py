"""patch_da3, and patch and unpatch of any kind, on the real ``depth-anything-3`` package with random weights."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import moe3d
from moe3d.integrations import patched_heads
from moe3d.integrations.kinds import KINDS
from support import da3, models
from support.da3 import HEIGHT, SIZES, SMALL, WIDTH, predict, run
from support.models import assert_equal, assert_untouched, disturb, fingerprint, state

EXTRAS = {"depth_entropy", "depth_weights", "depth_hypotheses"}


@pytest.fixture
def head():
    return da3.head(**SMALL)


def error(found, expected):
    return (found.double() - expected).norm() / expected.double().norm()


def assert_close_to_stock(patched, stock):
    """op.md: 2e-5 relative RMS and 2e-4 at the worst pixel; the ray branch stays as it is."""
    assert [key for key in patched if key in stock] == list(stock)
    for key, value in stock.items():
        assert patched[key].shape == value.shape and patched[key].dtype == value.dtype
        assert error(patched[key], value) <= 2e-5, key
        assert (patched[key] - value).abs().max() <= 2e-4 * value.abs().max(), key
        assert not key.startswith("ray") or torch.equal(patched[key], value)


# --- equal to stock, and back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "channels"), list(zip(SIZES, (32, 64, 128, 128, 128), strict=True)))
def test_zero_noise_and_back_at_every_published_size(name, channels):
    head = da3.head(name)
    feats = da3.features(head, frames=2)
    kind, block, stock = type(head), head.scratch.output_conv2, predict(head, feats)
    moe3d.patch_da3(head, init_noise=0.0, precision="ieee")
    assert head.tail.in_channels == channels
    patched = predict(head, feats)
    assert_close_to_stock(patched, stock)
    assert patched.keys() - stock.keys() == {"depth_entropy"}
    assert (patched["depth_entropy"] - math.log(4)).abs().max() < 1e-6
    moe3d.unpatch_da3(head)
    assert type(head) is kind and head.scratch.output_conv2 is block
    assert_equal(predict(head, feats), stock)


def test_the_monocular_head_is_the_metric_one():
    assert da3.config("da3mono-large").head == da3.config("da3metric-large").head


@pytest.mark.parametrize("name", ["da3-small", "da3metric-large"])
def test_zero_noise_on_every_backend(name, runner):
    """As close to stock, and no further from the float64 truth than stock is; unpatching restores everything."""
    head = da3.head(name, dim_in=96, features=64, out_channels=[48, 96, 192, 384]).to(runner.device)
    before, stock = fingerprint(head), predict(head)
    exact = predict(copy.deepcopy(head).double(), [(tokens.double(), None) for tokens, _ in da3.features(head)])
    patched = predict(moe3d.patch_da3(head, init_noise=0.0, backend=runner.backend, precision="ieee"))
    assert_close_to_stock(patched, stock)
    slack = 1.01 if runner.backend == "reference" else 1.0
    for key, value in exact.items():
        assert error(patched[key], value) <= slack * error(stock[key], value) + 1e-7, key
    assert_untouched(moe3d.unpatch_da3(head), before)
    assert_equal(predict(head), stock)


@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize("mode", ["mean", "argmax"])
@pytest.mark.parametrize("name", ["da3-small", "da3metric-large"])
def test_zero_noise_on_the_reference_backend(name, mode, experts):
    head = da3.head(name, features=64, dim_in=96)
    stock = predict(head)
    patched = predict(moe3d.patch_da3(head, experts, init_noise=0.0, mode=mode, backend="reference"))
    for key, value in stock.items():
        assert (patched[key] - value).abs().max() <= 1e-5 * max(1.0, value.abs().max().item()), key


VARIANTS = {
    "a position embedding": ("da3metric-large", {"pos_embed": True}),
    "none": ("da3-small", {"pos_embed": False}),
    "lower resolution": ("da3-small", {"down_ratio": 2}),
    "no sky": ("da3metric-large", {"use_sky_head": False}),
    "a sky in logits": ("da3metric-large", {"sky_activation": "linear"}),
    "a sky in per cent": ("da3metric-large", {"sky_activation": "Sigmoid"}),
    "a confidence in DPT": ("da3metric-large", {"output_dim": 2}),
    "points": ("da3-small", {"output_dim": 4, "activation": "linear"}),
    "points in DPT": ("da3metric-large", {"output_dim": 4, "activation": "linear", "norm_type": "layer"}),
    "a confidence from zero": ("da3-small", {"conf_activation": "exp"}),
    "relu and sigmoid": ("da3-small", {"activation": "relu", "conf_activation": "sigmoid"}),
    "other names": ("da3-small", {"head_names": ("z", "rays")}),
    "in place": ("da3metric-large", {"fusion_block_inplace": True}),
}


@pytest.mark.parametrize("chunk_size", [8, 2, None])
@pytest.mark.parametrize("what", VARIANTS)
def test_every_option_of_the_heads(what, chunk_size):
    """The same keys, shapes and values as the stock head's, whole or in chunks."""
    name, options = VARIANTS[what]
    head = da3.head(name, **(SMALL | options))
    feats = da3.features(head)
    stock = predict(head, feats, chunk_size=chunk_size)
    moe3d.patch_da3(head, 3, gate_hidden=8, init_noise=0.0, return_experts=True)
    patched = predict(head, feats, chunk_size=chunk_size)
    for key, value in stock.items():
        assert patched[key].shape == value.shape, key
        assert (patched[key] - value).abs().max() <= 2e-5 * max(1.0, value.abs().max().item()), key
    main = head.head_main
    shape = stock[main].shape
    assert patched[f"{main}_entropy"].shape == shape[:4] == patched[f"{main}_weights"].sum(2).shape
    assert patched[f"{main}_hypotheses"].shape == (*shape[:2], 3, *shape[2:])


def test_batches(head):
    feats = [(torch.cat([tokens, -tokens]), None) for tokens, _ in da3.features(head)]
    moe3d.patch_da3(disturb(head), return_experts=True)
    both = predict(head, feats)
    one = predict(head, [(-tokens[:1], None) for tokens, _ in feats])
    assert both["depth_weights"].shape == (2, 3, 4, HEIGHT, WIDTH)
    for key, value in one.items():
        torch.testing.assert_close(both[key][1:], value, rtol=1e-5, atol=1e-5, msg=key)


# --- the networks around the head -------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """As the package's API wraps its networks."""

    def __init__(self, model):
        super().__init__()
        self.model = model


NETWORKS = {"small": da3.network, "metric": da3.metric_network, "nested": da3.nested_network}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", NETWORKS)
def test_whole_networks(kind, wrapped):
    """Equal to stock at zero noise, and the dictionary gains the entropy; the other heads stay."""
    network = NETWORKS[kind]()
    model = Wrapper(network) if wrapped else network
    before = fingerprint(model)
    with torch.no_grad():
        stock = network(da3.images())
        assert moe3d.patch(model, init_noise=0.0, return_experts=True) is model
        patched = network(da3.images())
    assert patched.keys() - stock.keys() == EXTRAS and stock.keys() <= patched.keys()
    for key in ("depth", "depth_conf", "extrinsics", "intrinsics"):
        if key in stock:
            torch.testing.assert_close(patched[key], stock[key], rtol=1e-4, atol=1e-5, msg=key)
    assert patched.depth_hypotheses.shape == (1, 3, 4, HEIGHT, WIDTH)
    assert sum(isinstance(m, moe3d.MoEHead) for m in model.modules()) == 1
    assert list(patched_heads(model)) == ["depth"]
    assert_untouched(moe3d.unpatch(model), before)


def test_the_nested_networks_metric_head_may_be_patched_too():
    nested = moe3d.patch_da3(da3.nested_network())
    moe3d.patch_da3(nested.da3_metric)
    assert all(isinstance(n.head.tail, moe3d.MoEHead) for n in (nested.da3, nested.da3_metric))


def test_rays_for_the_camera_are_still_there():
    """With ``use_ray_pose`` the network takes its cameras from the ray branch."""
    network = da3.network()

    def run():
        torch.manual_seed(0)  # the network draws the rays from which it estimates a camera
        with torch.no_grad():
            return network(da3.images(), use_ray_pose=True)

    stock = run()
    moe3d.patch(network)
    patched = run()
    assert torch.equal(patched.intrinsics, stock.intrinsics) and torch.equal(patched.extrinsics, stock.extrinsics)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["da3-small", "da3metric-large"])
def test_gradients_reach_everything(name):
    head = disturb(moe3d.patch_da3(da3.head(name, **SMALL), 3, gate_hidden=8)).train()
    results = run(head)
    sum((value * torch.randn_like(value)).mean() for value in results.values()).backward()
    without = {key for key, p in head.named_parameters() if p.grad is None or not p.grad.any()}
    # What the stock head computes and throws away, and the residual unit that refinenet4 does not use.
    unused = ("output_conv1_aux.0", "output_conv1_aux.1", "output_conv1_aux.2")
    unused += ("output_conv2_aux.0", "output_conv2_aux.1", "output_conv2_aux.2", "refinenet4")
    assert not [key for key in without if not any(u in key for u in unused)]


def test_gradients_are_those_of_the_stock_head(head):
    """One expert: the same loss, the same gradients, in the front, the rays and the tail."""
    other = copy.deepcopy(head)
    moe3d.patch_da3(other, num_experts=1)
    for model in (head, other):
        results = run(model)
        (results.depth.log().mean() + results.depth_conf.mean() + results.ray.square().mean()).backward()
    ours, theirs = dict(other.named_parameters()), dict(head.named_parameters())
    for key, parameter in theirs.items():
        if parameter.grad is not None and key in ours:
            assert error(ours[key].grad, parameter.grad) < 1e-4, key
    tail, block = other.tail, head.scratch.output_conv2
    assert error(tail.expert_w1.grad[0], block[0].weight.grad) < 1e-4
    assert error(tail.expert_w2.grad[0], block[2].weight.grad.flatten(1)) < 1e-4


# --- checkpoints, copies, head files ----------------------------------------------------------------------------------


def test_a_stock_checkpoint_loads_and_comes_back(head):
    other = da3.head(seed=1, **SMALL)
    moe3d.patch_da3(head, init_noise=0.05)
    assert not any(head.load_state_dict(state(other), strict=True))
    assert_equal(predict(head), predict(moe3d.patch_da3(copy.deepcopy(other), init_noise=0.05)))
    assert_equal(state(moe3d.unpatch_da3(head)), state(other))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_whole(head, copied):
    stock = predict(head)
    disturb(moe3d.patch_da3(head))
    other = copied(head)
    assert_equal(predict(other), predict(head))
    assert_equal(predict(moe3d.unpatch_da3(other)), stock)
    assert "depth_entropy" in predict(head)


def test_head_files(tmp_path, head):
    options = {"num_experts": 3, "gate_hidden": 8, "temperature": 0.5, "mode": "argmax", "seed": 7}
    disturb(moe3d.patch(head, **options))
    moe3d.save_head(head, tmp_path / "h.safetensors")
    other = moe3d.load_head(da3.head(**SMALL), tmp_path / "h.safetensors")
    assert_equal(predict(other), predict(head))
    moe3d.load_head(moe3d.patch(da3.head(**SMALL), **options), tmp_path / "h.safetensors")
    assert {name: getattr(other.tail, name) for name in options} == options

    patched = moe3d.patch(da3.head(**SMALL), num_experts=2)
    before = fingerprint(patched)
    with pytest.raises(ValueError, match=r"but the model has .*: call unpatch_da3\(model\) first"):
        moe3d.load_head(patched, tmp_path / "h.safetensors")
    assert_untouched(patched, before)


def test_head_files_of_another_kind(tmp_path, head):
    """C, Hd and O may agree, but the features are not the same."""
    moe3d.save_head(moe3d.patch(head), tmp_path / "da3.safetensors")
    moe3d.save_head(moe3d.patch(models.mini(features=64)), tmp_path / "vggt.safetensors")
    for name, model, kinds in (
        ("da3", models.mini(features=64), ("da3", "vggt")),
        ("vggt", da3.head(**SMALL), ("vggt", "da3")),
    ):
        before = fingerprint(model)
        with pytest.raises(ValueError, match="model of kind '{}', but the model is '{}'".format(*kinds)):
            moe3d.load_head(model, tmp_path / f"{name}.safetensors")
        assert_untouched(model, before)


def test_a_head_file_may_not_ask_for_another_head(head):
    kind = next(kind for kind in KINDS if kind.name == "da3")
    before = fingerprint(head)
    with pytest.raises(ValueError, match="Depth Anything 3 has no other head than that of depth, got 'point'"):
        kind.patch_head(head, "point")
    assert_untouched(head, before)


# --- heads that are shown the images ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("chunk_size", [None, 2, 8])
def test_a_head_that_looks_at_the_images(head, chunk_size):
    """Its gate's image branch, frame by frame, and the filter, after what the same head gives without it."""
    head = disturb(moe3d.patch(head, 3, gate_hidden=8, image_gate="guided", sharpen=2, return_experts=True)).eval()
    images = models.images(2, 3, size=(HEIGHT, WIDTH))
    feats = [(torch.cat([tokens, tokens.flip(1)]),) for tokens, _ in da3.features(head)]
    found = head(feats, HEIGHT, WIDTH, 0, chunk_size=chunk_size, images=images)

    tail = head.tail
    tail.sharpen = 0
    plain = head(feats, HEIGHT, WIDTH, 0, chunk_size=None, images=images)
    for key in EXTRAS | {"depth_conf", "ray", "ray_conf"}:
        torch.testing.assert_close(found[key], plain[key], rtol=1e-4, atol=1e-5)
    depths = plain["depth"].flatten(0, 1)
    sharp = moe3d.sharpen.sharpen(depths, images.flatten(0, 1), 2).unflatten(0, (2, 3))
    assert not torch.equal(sharp, plain["depth"])
    torch.testing.assert_close(found["depth"], sharp, rtol=1e-4, atol=1e-4)

    other = images.clone()
    other[1, 2] = 1 - other[1, 2]
    changed = head(feats, HEIGHT, WIDTH, 0, chunk_size=None, images=other)["depth_weights"] != plain["depth_weights"]
    assert changed[1, 2].any() and not changed[0].any() and not changed[1, :2].any()


def test_a_head_that_looks_at_the_images_must_be_given_them(head):
    moe3d.patch(head, 2, gate_hidden=8, image_gate=True)
    with pytest.raises(ValueError, match="image must be given to a head with image_gate or sharpen, got None"):
        run(head)


@pytest.mark.parametrize("option", [{"image_gate": True}, {"sharpen": 1}], ids=str)
def test_the_networks_show_their_head_no_image(option):
    network = da3.network()
    before = fingerprint(network)
    says = "need a model that gives its head the images, as moe3d.models.DepthAnything3 does, got DepthAnything3Net"
    with pytest.raises(ValueError, match=says):
        moe3d.patch(network, **option)
    assert_untouched(network, before)


def test_a_head_of_another_resolution_cannot_look_at_the_images():
    head = da3.head(**SMALL, down_ratio=2)
    before = fingerprint(head)
    with pytest.raises(ValueError, match="predictions at the image's own resolution, but model has down_ratio=2"):
        moe3d.patch(head, sharpen=1)
    assert_untouched(head, before)


# --- what cannot be patched -------------------------------------------------------------------------------------------


def test_patching_twice_and_unpatching_twice():
    network = da3.network()
    before = fingerprint(network)
    moe3d.unpatch_da3(network)
    assert_untouched(network, before)
    patched = fingerprint(moe3d.patch_da3(network))
    with pytest.raises(ValueError, match=r"model\.head is already patched: call unpatch_da3\(model\) first"):
        moe3d.patch(network)
    assert_untouched(network, patched)
    assert_untouched(moe3d.unpatch(moe3d.unpatch(network)), before)


@pytest.mark.parametrize("function", [moe3d.patch, moe3d.unpatch])
@pytest.mark.parametrize("model", [None, 3, nn.Linear(2, 2)], ids=str)
def test_a_model_of_no_kind(function, model):
    wanted = "model must have a depth_head or point_head like VGGT's, or a head with head_main like Depth Anything 3's"
    with pytest.raises(ValueError, match=f"{wanted}.*, got {type(model).__name__} with neither"):
        function(model)


def test_patch_knows_vggt():
    model = models.mini()
    before = fingerprint(model)
    moe3d.patch(model, heads=("point",), image_gate=True)
    assert list(patched_heads(model)) == ["point"]
    assert_untouched(moe3d.unpatch(model), before)
    with pytest.raises(ValueError, match=r"model must be a DualDPT or DPT head of Depth Anything 3 .* got MiniVGGT"):
        moe3d.patch_da3(model)


def test_a_gaussian_head_predicts_no_depth():
    da3.package()
    from depth_anything_3.model.gsdpt import GSDPT

    head = GSDPT(output_dim=38, **SMALL)
    with pytest.raises(ValueError, match="model must predict depth, got GSDPT, which merges images"):
        moe3d.patch_da3(head)


def without(path):
    def change(head):
        *parents, name = path.split(".")
        delattr(head.get_submodule(".".join(parents)), name)

    return change


UNSUITABLE = {
    "no pyramid": (without("scratch.refinenet2"), {}, r"model must have .* DualDPT without scratch\.refinenet2"),
    "no rays": (without("scratch.refinenet1_aux"), {}, r"DualDPT without scratch\.refinenet1_aux"),
    "no norm": (without("norm"), {}, "DualDPT without norm"),
    "layer norm": (None, {"use_ln_for_heads": True}, r"model\.scratch\.output_conv2: block must be Sequential"),
    "another activation": (None, {"activation": "softplus"}, r"model\.activation must be one of .*, got 'softplus'"),
    "one that means linear": (None, {"activation": "inv_log"}, r"model\.activation must be one of .*, got 'inv_log'"),
    "another confidence": (None, {"output_dim": 2, "conf_activation": "tanh"}, r"model\.conf_activation must be"),
}


@pytest.mark.parametrize("what", UNSUITABLE)
def test_unsuitable_heads_say_why_and_stay_as_they_are(what):
    change, options, message = UNSUITABLE[what]
    head = da3.head("da3metric-large" if options else "da3-small", **(SMALL | options))
    if change:
        change(head)
    before = fingerprint(head)
    with pytest.raises(ValueError, match=message):
        moe3d.patch_da3(head)
    assert_untouched(head, before)


def test_wrong_arguments_leave_the_head_as_it_was(head):
    before = fingerprint(head)
    for error_, options in (
        (ValueError, {"num_experts": 0}),
        (ValueError, {"mode": "best"}),
        (TypeError, {"heads": ("point",)}),
        (ValueError, {"image_gate": "seen"}),
        (ValueError, {"backend": "cudnn"}),
    ):
        with pytest.raises(error_, match=next(iter(options))):
            moe3d.patch(head, **options)
        assert_untouched(head, before)
