"""The DPT head: against the real ``vggt`` head where it can be imported, against its definition everywhere."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from moe3d.models import dpt
from moe3d.models.dpt import DPTHead, FeatureFusionBlock, ResidualConvUnit
from moe3d.ops.activations import ACTIVATIONS, CONF_ACTIVATIONS

DIM, SPECIAL = 24, 5
SMALL = {"dim_in": DIM, "features": 32, "out_channels": [8, 12, 16, 20], "intermediate_layer_idx": [0, 1, 3, 4]}
# Height and width in patches: odd, a single patch, one row, one column, and a plain size.
GRIDS = [(5, 7), (1, 1), (1, 6), (9, 1), (4, 6)]


def backbone(grid, batch=2, frames=3, dtype=torch.float32):
    """Tokens of five layers and the images they would come from."""
    generator = torch.Generator().manual_seed(sum(grid))
    shape = (batch, frames, SPECIAL + grid[0] * grid[1], DIM)
    tokens = [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(5)]
    return tokens, torch.zeros(batch, frames, 3, 14 * grid[0], 14 * grid[1], dtype=dtype)


def make_head(seed=0, **overrides):
    torch.manual_seed(seed)
    return DPTHead(**(SMALL | overrides)).eval()


@pytest.fixture(scope="module")
def real():
    return pytest.importorskip("vggt.heads.dpt_head", reason="needs the real `vggt` package").DPTHead


def both(real, **overrides):
    torch.manual_seed(0)
    theirs = real(**(SMALL | overrides)).eval()
    ours = make_head(seed=1, **overrides)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def assert_same(ours, theirs, rms=1e-6, largest=1e-5):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    error, scale = (ours - theirs).double(), theirs.double()
    assert error.norm() <= rms * scale.norm()
    assert error.abs().max() <= largest * scale.abs().max()


@pytest.mark.real_vggt
@pytest.mark.parametrize("feature_only", [False, True])
def test_has_the_real_heads_arguments_and_state(real, feature_only):
    def arguments(cls):
        parameters = inspect.signature(cls).parameters.values()
        return [(p.name, list(p.default) if isinstance(p.default, (list, tuple)) else p.default) for p in parameters]

    def state(cls):
        with torch.device("meta"):
            return [(k, v.shape) for k, v in cls(2048, feature_only=feature_only).state_dict().items()]

    assert arguments(DPTHead) == arguments(real)
    assert state(DPTHead) == state(real)


@pytest.mark.real_vggt
def test_state_dict_moves_in_both_directions(real):
    _, theirs = both(real)
    ours = make_head(seed=2)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    tokens, images = backbone((4, 6))
    with torch.no_grad():
        for a, b in zip(ours(tokens, images, SPECIAL), theirs(tokens, images, SPECIAL), strict=True):
            assert_same(a, b)


@pytest.mark.real_vggt
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g[0]}x{g[1]}")
@pytest.mark.parametrize("output", [{"output_dim": 2, "activation": "exp"}, {"output_dim": 4}], ids=["depth", "point"])
def test_equals_the_real_head(real, grid, output):
    ours, theirs = both(real, **output)
    tokens, images = backbone(grid)
    with torch.no_grad():
        for a, b in zip(ours(tokens, images, SPECIAL), theirs(tokens, images, SPECIAL), strict=True):
            assert_same(a, b)


@pytest.mark.real_vggt
@pytest.mark.parametrize("chunk", [1, 2, 3, None])
def test_chunks_frames_like_the_real_head(real, chunk):
    ours, theirs = both(real, output_dim=2)
    tokens, images = backbone((3, 5))
    with torch.no_grad():
        a = ours(tokens, images=images, patch_start_idx=SPECIAL, frames_chunk_size=chunk)
        b = theirs(tokens, images=images, patch_start_idx=SPECIAL, frames_chunk_size=chunk)
    for x, y in zip(a, b, strict=True):
        assert_same(x, y)


@pytest.mark.real_vggt
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("conf_activation", sorted(CONF_ACTIVATIONS))
def test_activations_equal_the_real_heads(real, activation, conf_activation):
    ours, theirs = both(real, activation=activation, conf_activation=conf_activation)
    tokens, images = backbone((2, 3), batch=1, frames=1)
    with torch.no_grad():
        for a, b in zip(ours(tokens, images, SPECIAL), theirs(tokens, images, SPECIAL), strict=True):
            assert_same(a, b)


@pytest.mark.real_vggt
@pytest.mark.parametrize("chunk", [2, None])
@pytest.mark.parametrize("options", [{"pos_embed": False}, {"down_ratio": 2}, {"pos_embed": False, "down_ratio": 2}])
@pytest.mark.parametrize("feature_only", [False, True])
def test_options_equal_the_real_heads(real, options, feature_only, chunk):
    ours, theirs = both(real, feature_only=feature_only, **options)
    tokens, images = backbone((3, 4))
    with torch.no_grad():
        a, b = (head(tokens, images, SPECIAL, chunk) for head in (ours, theirs))
    for x, y in zip([a], [b], strict=True) if feature_only else zip(a, b, strict=True):
        assert_same(x, y)


@pytest.mark.real_vggt
def test_gradients_equal_the_real_heads(real):
    gradients = []
    for head in both(real, output_dim=2):
        tokens, images = backbone((3, 4), dtype=torch.float64)
        tokens = [t.requires_grad_() for t in tokens]
        depth, confidence = head.double().train()(tokens, images, SPECIAL)
        (depth.log().sum() + confidence.square().sum()).backward()
        read = [tokens[i].grad for i in head.intermediate_layer_idx]
        gradients.append(read + [parameter.grad for parameter in head.parameters()])
        assert tokens[2].grad is None
    for a, b in zip(*gradients, strict=True):
        assert_same(a, b)


def test_position_embedding_is_a_tenth_of_a_separable_sinusoid():
    channels, (h, w), (H, W) = 12, (3, 5), (28, 42)
    got = make_head()._apply_pos_embed(torch.zeros(2, channels, h, w), W, H)
    omega = 100.0 ** (-np.arange(3) / 3)

    def axis(n, pixels):
        edge = pixels / np.hypot(H, W) * (n - 1) / n
        phases = omega[:, None] * np.linspace(-edge, edge, n)
        return 0.1 * np.concatenate([np.sin(phases), np.cos(phases)])

    columns = np.broadcast_to(axis(w, W)[:, None, :], (6, h, w))
    rows = np.broadcast_to(axis(h, H)[:, :, None], (6, h, w))
    np.testing.assert_allclose(got, np.broadcast_to(np.concatenate([columns, rows]), got.shape), atol=1e-8)


def test_residual_unit_adds_back_the_rectified_input():
    unit = ResidualConvUnit(4, torch.nn.ReLU(inplace=True)).double()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    expected = x.relu() + unit.conv2(unit.conv1(x.relu()).relu())
    torch.testing.assert_close(unit(x.clone()), expected)


def test_fusion_block_doubles_unless_told_a_size():
    block = FeatureFusionBlock(4, has_residual=False)
    x = torch.randn(1, 4, 3, 5)
    assert block(x.clone()).shape == (1, 4, 6, 10)
    assert block(x.clone(), size=(7, 2)).shape == (1, 4, 7, 2)


def test_huge_interpolations_are_split_over_the_batch(monkeypatch):
    head = make_head(output_dim=2)
    tokens, images = backbone((3, 4))
    whole = head(tokens, images, SPECIAL)
    batches = []
    interpolate = torch.nn.functional.interpolate

    def recorded(x, **options):
        batches.append(len(x))
        return interpolate(x, **options)

    monkeypatch.setattr(dpt.F, "interpolate", recorded)
    monkeypatch.setattr(dpt, "_MAX_INTERPOLATED_ELEMENTS", 2 * 16 * 42 * 56)
    split = head(tokens, images, SPECIAL)
    assert batches[-3:] == [2, 2, 2]  # the final upsampling, to 42x56 with 16 channels, of 2 * 3 frames
    for a, b in zip(whole, split, strict=True):
        assert torch.equal(a, b)


def test_reads_only_the_named_layers_and_no_special_tokens():
    head = make_head(output_dim=2)
    tokens, images = backbone((2, 3))
    expected = head(tokens, images, SPECIAL)
    tokens[2].fill_(torch.nan)
    for layer in tokens:
        layer[:, :, :SPECIAL] = torch.nan
    for a, b in zip(expected, head(tokens, images, SPECIAL), strict=True):
        assert torch.equal(a, b)


def test_runs_in_bfloat16():
    tokens, images = backbone((3, 4))
    head = make_head(output_dim=2)
    expected, _ = head(tokens, images, SPECIAL)
    depth, _ = head.bfloat16()([t.bfloat16() for t in tokens], images.bfloat16(), SPECIAL)
    assert depth.dtype == torch.bfloat16
    torch.testing.assert_close(depth.float(), expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("argument", ["activation", "conf_activation"])
def test_unknown_activation_is_refused_by_name(argument):
    with pytest.raises(ValueError, match=f"^{argument} must be one of .*, got 'tanh'$"):
        make_head(**{argument: "tanh"})


def test_chunk_size_must_be_positive():
    tokens, images = backbone((1, 1))
    with pytest.raises(ValueError, match="frames_chunk_size must be a positive integer or None, got 0"):
        make_head()(tokens, images, SPECIAL, frames_chunk_size=0)
