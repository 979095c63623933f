"""MiniVGGT: VGGT's interface, and the symmetries that its architecture promises."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moe3d.models import DPTHead, MiniVGGT
from moe3d.models.layers import Attention, rotary_table
from moe3d.models.mini import _patch_positions

TINY = {"embed_dim": 32, "depth": 4, "num_heads": 2, "features": 32}


@pytest.fixture
def model():
    """An untrained network whose output layers are loud enough that every input matters visibly."""
    torch.manual_seed(0)
    model = MiniVGGT(**TINY).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and ".encoder." not in name:  # which has no normalisation that would hold it
                parameter.mul_(2)
    return model


def frames(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("enable_point", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("lead", [(3,), (2, 3)], ids=["S", "BS"])
def test_predicts_what_vggt_predicts(enable_point, training, lead):
    model = MiniVGGT(**TINY, enable_point=enable_point).train(training)
    images = frames(*lead, 3, 42, 70)
    batch = lead[:-1] or (1,)
    shapes = {"pose_enc": (9,), "depth": (42, 70, 1), "depth_conf": (42, 70)}
    if enable_point:
        shapes |= {"world_points": (42, 70, 3), "world_points_conf": (42, 70)}
    if not training:
        shapes["images"] = (3, 42, 70)

    predictions = model(images)
    poses = predictions.pop("pose_enc_list")
    assert {name: tuple(value.shape) for name, value in predictions.items()} == {
        name: (*batch, 3, *shape) for name, shape in shapes.items()
    }
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in predictions.values())
    assert len(poses) == 4 and all(pose.shape == predictions["pose_enc"].shape for pose in poses)
    assert torch.equal(poses[-1], predictions["pose_enc"])
    assert (predictions["depth"] > 0).all() and (predictions["depth_conf"] > 1).all()
    assert (predictions["pose_enc"][..., 7:] >= 0).all()
    if not training:
        assert torch.equal(predictions["images"], images.reshape(*batch, *images.shape[-4:]))


def test_has_vggts_parts():
    model = MiniVGGT()
    assert 4e6 < sum(parameter.numel() for parameter in model.parameters()) < 4.6e6
    assert model.point_head is None and model.track_head is None
    assert isinstance(model.depth_head, DPTHead)
    conv3, relu, conv1 = model.depth_head.scratch.output_conv2
    assert (conv3.kernel_size, conv1.kernel_size, type(relu)) == ((3, 3), (1, 1), nn.ReLU)
    assert conv3.in_channels % 16 == 0 and conv1.out_channels == 2
    tokens, start = model.aggregator(frames(1, 2, 3, 28, 42))
    assert start == 5 and len(tokens) == 5
    assert {tuple(t.shape) for t in tokens} == {(1, 2, 5 + 2 * 3, 2 * 128)}


def test_heads_are_called_as_vggt_calls_them(model):
    """In full precision with fp32 tokens, also under autocast, so that a replaced head meets what it meets in VGGT."""
    calls = []

    def record(module, args, kwargs):
        tokens = args[0]
        calls.append((len(args), sorted(kwargs), tokens[0].dtype, torch.is_autocast_enabled("cpu")))

    model.depth_head.register_forward_pre_hook(record, with_kwargs=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(frames(2, 3, 28, 28))
    assert calls == [(1, ["images", "patch_start_idx"], torch.float32, False)]


@torch.no_grad()
def test_autocast_changes_little(model):
    images = frames(2, 3, 42, 56)
    exact = model(images)["depth"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(images)["depth"]
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0)


def test_cameras_come_from_the_camera_token_alone(model):
    tokens = frames(1, 2, 7, 64)
    expected = model.camera_head([tokens])[-1]
    tokens[:, :, 1:] = torch.nan
    assert torch.equal(model.camera_head([tokens])[-1], expected)
    tokens[:, 1, 0] += frames(64)
    assert not torch.isclose(model.camera_head([tokens])[-1][:, 0], expected[:, 0]).all()  # frames attend to each other


def test_camera_refinement_does_not_backpropagate_through_iterations(model):
    first, *later = model.camera_head([frames(1, 2, 7, 64)])
    start = model.camera_head.initial_pose
    assert torch.autograd.grad(first.sum(), start, retain_graph=True)[0].any()
    assert torch.autograd.grad(sum(pose.sum() for pose in later), start, allow_unused=True) == (None,)


@torch.no_grad()
def test_depth_does_not_depend_on_chunking(model):
    images = frames(1, 5, 3, 42, 56)
    tokens, start = model.aggregator(images)
    whole = model.depth_head(tokens, images=images, patch_start_idx=start, frames_chunk_size=None)
    for chunk in (1, 2, 8):
        for a, b in zip(whole, model.depth_head(tokens, images, start, chunk), strict=True):
            assert_close(a, b)


@torch.no_grad()
def test_other_frames_may_come_in_any_order_but_the_first_is_special(model):
    images = frames(1, 4, 3, 28, 42)
    straight = model(images)
    order = [0, 3, 1, 2]
    permuted = model(images[:, order])
    for name in ("pose_enc", "depth", "depth_conf"):
        assert_close(permuted[name], straight[name][:, order])
    swapped = model(images[:, [1, 0, 2, 3]])["depth"][:, [1, 0, 2, 3]]
    assert (swapped - straight["depth"]).abs().max() > 1e-3


@torch.no_grad()
def test_frames_of_a_sequence_inform_each_other_and_sequences_do_not(model):
    images = frames(2, 2, 3, 28, 42)
    together = model(images)
    for i in range(2):
        alone = model(images[i])
        for name in ("pose_enc", "depth", "depth_conf"):
            assert_close(together[name][i], alone[name][0])
    changed = images[0].clone()
    changed[1] = 1 - changed[1]
    assert (model(changed)["depth"][0, 0] - together["depth"][0, 0]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("size", [(14, 14), (14, 154), (126, 28), (98, 112)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_any_resolution(model, size):
    depth = model(frames(1, 3, *size))["depth"]
    assert depth.shape == (1, 1, *size, 1) and depth.isfinite().all()


@torch.no_grad()
def test_is_deterministic(model):
    images = frames(2, 3, 42, 42)
    assert torch.equal(model(images)["depth"], model(images)["depth"])
    torch.manual_seed(7)
    first = MiniVGGT(**TINY)
    torch.manual_seed(7)
    second = MiniVGGT(**TINY)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@torch.no_grad()
def test_compiles_without_graph_breaks(model):
    images = frames(2, 3, 28, 42)
    # The graph is what is checked here; aot_eager runs it functionalised, without minutes of C++ compilation.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
    for name, value in model(images).items():
        for a, b in zip(compiled[name], value, strict=True):
            assert_close(a, b)


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = MiniVGGT(**TINY, enable_point=True)
    predictions = model(frames(2, 3, 28, 42))
    poses = predictions.pop("pose_enc_list")
    loss = sum(value.square().mean() for value in [*predictions.values(), *poses])
    loss.backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert idle == []


def test_a_few_steps_fit_one_scene():
    torch.manual_seed(0)
    model = MiniVGGT(**TINY)
    images = F.interpolate(frames(2, 3, 7, 7), size=(56, 56))
    log_depth = images.mean(1)[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(80):
        loss = (model(images)["depth"][..., 0].log() - log_depth).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    constant = (log_depth - log_depth.median()).abs().mean()
    assert losses[-1] < 0.8 * constant < losses[0]


def test_attention_is_softmax_attention_of_rotated_normalised_queries_and_keys():
    torch.manual_seed(0)
    attention = Attention(dim=16, num_heads=2).double()
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    rotation = rotary_table(_patch_positions(2, 3, x.device), 8).double()
    q, k, v = attention.qkv(x)[0].reshape(6, 3, 2, 8).permute(1, 2, 0, 3)

    def turn(y):  # channels i and i + 4 are a complex number
        y = F.layer_norm(y, (8,))
        z = torch.complex(y[..., :4], y[..., 4:]) * torch.complex(*rotation[..., :4])
        return torch.cat([z.real, z.imag], -1)

    weights = (turn(q) @ turn(k).mT / 8**0.5).softmax(-1)
    expected = attention.proj((weights @ v).transpose(0, 1).reshape(1, 6, 16))
    torch.testing.assert_close(attention(x, rotation), expected)


@settings(max_examples=25, deadline=None)
@given(shift=st.tuples(st.floats(-1, 1), st.floats(-1, 1)), seed=st.integers(0, 100))
def test_rotated_scores_depend_on_offsets_only(shift, seed):
    torch.manual_seed(seed)
    positions = torch.rand(5, 2) * 2 - 1
    q, k = torch.randn(2, 5, 8)

    def scores(positions):
        cosine, sine = rotary_table(positions, 8)
        qr, kr = (x * cosine + torch.cat([-x[:, 4:], x[:, :4]], 1) * sine for x in (q, k))
        return qr @ kr.T

    torch.testing.assert_close(scores(positions), scores(positions + torch.tensor(shift)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grid", [(1, 1), (2, 5), (7, 3)])
def test_a_position_means_the_same_at_every_resolution(grid):
    h, w = grid
    coarse = _patch_positions(h, w, torch.device("cpu"))
    fine = _patch_positions(2 * h, 2 * w, torch.device("cpu")).reshape(h, 2, w, 2, 2)
    torch.testing.assert_close(fine.mean((1, 3)).reshape(-1, 2), coarse)
    assert coarse.norm(dim=1).max() < 1


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 28, 30), "images must have height and width that are multiples of 14, got 28x30"),
        ((2, 3, 0, 28), "images must have height and width that are multiples of 14, got 0x28"),
        ((2, 1, 28, 28), "images must have shape .* got \\[2, 1, 28, 28\\]"),
        ((3, 28, 28), "images must have shape .* got \\[3, 28, 28\\]"),
        ((1, 0, 3, 28, 28), "images must have shape .* with at least one frame, got \\[1, 0, 3, 28, 28\\]"),
    ],
)
def test_unsuitable_images_are_refused(model, shape, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        model(torch.zeros(shape))


def test_integer_images_are_refused(model):
    with pytest.raises(TypeError, match=r"images must be floating point in \[0, 1\], got torch.uint8"):
        model(torch.zeros(1, 3, 28, 28, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("sizes", "argument"),
    [
        ({"embed_dim": 36}, "embed_dim"),
        ({"depth": 0}, "depth"),
        ({"num_heads": 0}, "num_heads"),
        ({"features": 48}, "features"),
    ],
)
def test_unsuitable_sizes_are_refused(sizes, argument):
    with pytest.raises(ValueError, match=f"^{argument} must be "):
        MiniVGGT(**(TINY | sizes))
