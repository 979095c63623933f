"""MoEHead: how it starts, what it copies, what its state dict accepts, and that it leaves the world as it was."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe3d import MoEHead
from moe3d.nn import ImageGate

TENSORS = ("expert_w1", "expert_b1", "expert_w2", "expert_b2", "gate_w1", "gate_b1", "gate_w2", "gate_b2")


def block(channels=6, hidden=5, outputs=2, seed=0, **where):
    torch.manual_seed(seed)
    layers = nn.Conv2d(channels, hidden, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(hidden, outputs, 1)
    return nn.Sequential(*layers).to(**where)


def small(**options):
    return MoEHead(**({"in_channels": 6, "num_experts": 3, "expert_hidden": 5, "gate_hidden": 4} | options))


def features(batch=2, channels=6, h=3, w=4, seed=1):
    return torch.randn(batch, channels, h, w, generator=torch.Generator().manual_seed(seed))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("experts", [2, 3, 4, 7, 16])
def test_starts_exactly_uniform(experts):
    for head in (small(num_experts=experts), MoEHead.from_conv_block(block(), experts, 4)):
        head.return_experts = True
        output = head(10 * features(), (7, 9))
        assert (output.weights == torch.tensor(1 / experts)).all()
        torch.testing.assert_close(
            output.entropy, torch.full_like(output.entropy, math.log(experts)), rtol=1e-6, atol=0
        )


def test_a_head_of_its_own_starts_like_pytorchs_convolutions():
    head = small(in_channels=64, expert_hidden=64, num_experts=4)
    reference = nn.Conv2d(64, 64, 3)
    assert abs(head.expert_w1.std() / reference.weight.std() - 1) < 0.02
    assert head.expert_w1.abs().max() <= reference.weight.abs().max() * 1.05
    assert len({e.sum().item() for e in head.expert_w1}) == 4, "the experts differ"


def test_first_layers_of_gates_start_like_pytorchs_convolutions():
    head = small(in_channels=64, gate_hidden=64, image_gate="guided")
    gate = head.image_gate
    for weight in (head.gate_w1, gate.conv1.weight, gate.conv2.weight, gate.project.weight, gate.merge.weight):
        reference = nn.Conv2d(weight.shape[1], 1000, weight.shape[2:]).weight
        assert abs(weight.std() / reference.std() - 1) < 0.2
        assert weight.abs().max() <= reference.abs().max() * 1.01


@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize("outputs", [2, 4])
def test_zero_noise_computes_the_block(experts, outputs):
    plain = block(outputs=outputs)
    head = MoEHead.from_conv_block(plain, experts, 4, init_noise=0.0)
    x = features()
    upsampled = F.interpolate(x, size=(7, 9), mode="bilinear", align_corners=True)
    y = plain(upsampled)
    output = head(x, (7, 9))
    torch.testing.assert_close(output.prediction, y[:, :-1].exp(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output.confidence, 1 + y[:, -1].exp(), rtol=1e-6, atol=1e-6)


def test_noise_is_relative_to_each_tensors_deviation():
    plain = block(channels=64, hidden=64, outputs=32)
    with torch.no_grad():
        plain[0].weight.mul_(100)
        plain[2].weight.add_(5)
    head = MoEHead.from_conv_block(plain, 8, 4, init_noise=0.05)
    sources = (plain[0].weight, plain[0].bias, plain[2].weight.flatten(1), plain[2].bias)
    for name, source in zip(TENSORS, sources, strict=False):
        noise = getattr(head, name) - source
        ratio = noise.std() / source.std(correction=0)
        assert abs(ratio - 0.05) < 0.05 * 4 / math.sqrt(2 * noise.numel()), name
        assert len({n.sum().item() for n in noise}) == 8, "every expert has its own noise"


def test_a_single_expert_is_the_block_itself():
    plain = block()
    head = MoEHead.from_conv_block(plain, 1, init_noise=0.5)
    assert torch.equal(head.expert_w1[0], plain[0].weight)
    assert [name for name, _ in head.named_parameters()] == list(TENSORS[:4])
    assert head(features(), (7, 9)).entropy.eq(0).all()


@pytest.mark.parametrize("image_gate", [False, True])
def test_seeds_decide_everything_and_the_global_state_nothing(image_gate):
    def make(seed):
        return MoEHead.from_conv_block(plain, 3, 4, seed=seed, image_gate=image_gate).state_dict()

    plain = block()
    state = torch.get_rng_state()
    torch.manual_seed(1)
    first = make(5)
    torch.manual_seed(2)
    after = torch.get_rng_state()
    assert equal(first, make(5)) and not equal(first, make(6))
    assert torch.equal(torch.get_rng_state(), after), "the global random state advanced"
    torch.set_rng_state(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_new_parameters_follow_the_block(dtype, training):
    plain = block(dtype=dtype).train(training)
    head = MoEHead.from_conv_block(plain, 3, 4, image_gate=True)
    assert {p.dtype for p in head.parameters()} == {dtype}
    assert head.training == training and head.image_gate.training == training
    reference = MoEHead.from_conv_block(block(), 3, 4, image_gate=True)
    for name, parameter in head.named_parameters():
        expected = reference.get_parameter(name)
        torch.testing.assert_close(parameter.float(), expected, rtol=1e-2, atol=1e-2, msg=name)


def test_float64_blocks_keep_their_digits():
    plain = block(dtype=torch.float64)
    head = MoEHead.from_conv_block(plain, 2, 4, init_noise=1e-12)
    assert 0 < (head.expert_w1 - plain[0].weight).abs().max() < 1e-11


def test_device_contexts_and_meta_blocks():
    """A default device is for the user's tensors; the head goes where its block is, with the same numbers."""
    plain = block()
    with torch.device("meta"):
        head = MoEHead.from_conv_block(plain, 3, 4, image_gate=True)
    assert equal(head.state_dict(), MoEHead.from_conv_block(plain, 3, 4, image_gate=True).state_dict())
    meta = MoEHead.from_conv_block(block(device="meta"), 3, 4)
    assert {p.device.type for p in meta.parameters()} == {"meta"}


def test_state_dict_has_the_parameters_only():
    head = MoEHead.from_conv_block(block(), 3, 4, image_gate=True)
    convs = [f"image_gate.{c}.{p}" for c in ("conv1", "conv2", "out") for p in ("weight", "bias")]
    assert list(head.state_dict()) == [*TENSORS, *convs]
    other = MoEHead.from_conv_block(block(seed=3), 3, 4, image_gate=True, seed=9)
    other.load_state_dict(head.state_dict(), strict=True)
    assert equal(other.state_dict(), head.state_dict())
    assert torch.equal(other.source_block[0].weight, block(seed=3)[0].weight), "its source stays what it was"


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_blocks_state_fills_every_expert(assign):
    head = MoEHead.from_conv_block(block(), 3, 4, image_gate=True, init_noise=0.1, seed=4)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    new = block(seed=8)
    given = {name: t.clone() for name, t in new.state_dict().items()}
    missing, unexpected = head.load_state_dict(given, strict=True, assign=assign)
    assert not missing and not unexpected and equal(given, new.state_dict()), "the caller's dictionary changed"
    fresh = MoEHead.from_conv_block(new, 3, 4, image_gate=True, init_noise=0.1, seed=4)
    assert equal(head.state_dict(), fresh.state_dict())
    assert equal(head.source_block.state_dict(), new.state_dict())
    assert all(p.requires_grad for p in head.parameters())


def test_a_wrong_plain_state_changes_no_expert():
    head = MoEHead.from_conv_block(block(), 3, 4)
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        head.load_state_dict(block(channels=7).state_dict())
    incomplete = block(seed=8).state_dict()
    del incomplete["2.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*2\.bias"):
        head.load_state_dict(incomplete)
    assert equal(head.state_dict(), before)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        head.load_state_dict(block().state_dict() | {"4.weight": torch.zeros(1)})


def test_a_head_without_a_source_refuses_a_plain_state():
    with pytest.raises(RuntimeError, match=r"Missing key.*expert_w1"):
        small().load_state_dict(block().state_dict())


def test_copies_and_pickles_are_independent_and_whole():
    head = MoEHead.from_conv_block(block(), 3, 4, temperature=0.5)
    buffer = io.BytesIO()
    torch.save(head, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), torch.load(buffer, weights_only=False)):
        assert equal(other.state_dict(), head.state_dict()) and other.temperature == 0.5
        assert other.source_block is not head.source_block
        with torch.no_grad():
            other.source_block[0].weight.zero_()
        assert head.source_block[0].weight.any()


def test_moves_take_the_hidden_source_along():
    head = MoEHead.from_conv_block(block(), 3, 4).double()
    assert {p.dtype for p in head.source_block.parameters()} == {torch.float64}
    assert {p.dtype for p in head.half().source_block.parameters()} == {torch.float16}
    assert {p.device.type for p in head.to("meta").source_block.parameters()} == {"meta"}
    assert not list(head.children()), "the source is no submodule"


def test_attributes_may_change_at_any_time():
    head = small(num_experts=4)
    nn.init.normal_(head.gate_w2, generator=torch.Generator().manual_seed(0))
    x = features()
    warm, head.temperature = head(x, (7, 9)), 0.1
    cold, head.mode = head(x, (7, 9)), "argmax"
    assert cold.entropy.mean() < warm.entropy.mean() and not torch.equal(head(x, (7, 9)).prediction, cold.prediction)
    head.mode = "median"
    with pytest.raises(ValueError, match="mode must be one of"):
        head(x, (7, 9))


@pytest.mark.parametrize(
    ("skip_below", "training", "return_experts", "expected"),
    [
        (None, False, False, 1e-6),
        (None, True, False, 0.0),
        (None, False, True, 0.0),
        (0.0, False, False, 0.0),
        (1e-3, True, True, 1e-3),
    ],
)
def test_when_experts_may_be_skipped(monkeypatch, skip_below, training, return_experts, expected):
    import moe3d.nn

    seen = []
    real = moe3d.nn.moe_head
    monkeypatch.setattr(moe3d.nn, "moe_head", lambda *a, **k: seen.append(k["skip_below"]) or real(*a, **k))
    small(skip_below=skip_below, return_experts=return_experts).train(training)(features(), (7, 9))
    assert seen == [expected]


@pytest.mark.parametrize("option", [True, "guided"])
def test_image_gate_adds_its_logits_and_learns(option):
    head = small(image_gate=option)
    image = torch.rand(2, 3, 7, 9, generator=torch.Generator().manual_seed(2))
    x = features()
    assert (head(x, (7, 9), image=image).entropy - math.log(3)).abs().max() < 1e-6, "zero at the start"
    with torch.no_grad():
        head.image_gate.out.weight.normal_(generator=torch.Generator().manual_seed(3))
    head.return_experts = True
    output = head(x, (7, 9), image=image)
    torch.testing.assert_close(output.weights, head.image_gate(image, x).softmax(1), rtol=1e-5, atol=1e-6)
    output.prediction.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in head.image_gate.parameters())


def test_image_gate_is_two_3x3_convolutions_of_16_channels_and_a_1x1():
    gate = ImageGate(5)
    assert gate.option is True
    shapes = {name: tuple(p.shape) for name, p in gate.named_parameters() if name.endswith("weight")}
    assert shapes == {"conv1.weight": (16, 3, 3, 3), "conv2.weight": (16, 16, 3, 3), "out.weight": (5, 16, 1, 1)}
    gate.reset(torch.Generator().manual_seed(0))
    nn.init.normal_(gate.out.weight)
    layers = nn.Sequential(gate.conv1, nn.ReLU(), gate.conv2, nn.ReLU(), gate.out)
    image = torch.rand(2, 3, 8, 9)
    torch.testing.assert_close(gate(image), layers(image - 0.5), rtol=1e-6, atol=1e-6)


def test_a_guided_image_gate_sees_the_features_where_they_are_in_the_image():
    gate = ImageGate(2, feature_channels=3)
    assert gate.option == "guided"
    gate.reset(torch.Generator().manual_seed(0))
    with torch.no_grad():
        gate.out.weight.fill_(1.0)
    image, x = torch.rand(1, 3, 13, 13), torch.rand(1, 3, 7, 7)
    with pytest.raises(ValueError, match="features must be given to a guided image gate, got None"):
        gate(image)
    before = gate(image, x)
    x[:, :, 6, 6] += 5.0  # the last feature is that of the last pixel: align_corners
    changed = (gate(image, x) != before).any(1)[0].nonzero()
    assert len(changed) and changed.min() >= 12 - 2  # one pixel of interpolation, one of the merging convolution


def test_image_errors():
    head = small(image_gate=True)
    with pytest.raises(ValueError, match=r"image must be given .*got None"):
        head(features(), (7, 9))
    with pytest.raises(ValueError, match="gate_logits must have shape"):
        head(features(), (7, 9), image=torch.rand(2, 3, 9, 7))


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        *(
            (ValueError, f"{name} must be an integer of at least {least}", {name: value})
            for name, least in (
                ("in_channels", 1), ("out_channels", 1), ("num_experts", 1), ("expert_hidden", 1), ("gate_hidden", 1),
                ("seed", 0),
            )
            for value in (least - 1, 1.5, True, "4", None)
        ),
        (ValueError, "image_gate must be False, True or 'guided', got 'deep'", {"image_gate": "deep"}),
        (ValueError, "seed must be an integer", {"seed": 2**64}),
        (ValueError, "temperature must be a finite number above 0", {"temperature": 0.0}),
        (TypeError, "temperature must be a finite number above 0", {"temperature": "hot"}),
        (ValueError, "gap must be", {"gap": -1.0}),
        (ValueError, "skip_below must be", {"skip_below": math.nan}),
        (ValueError, "mode must be one of", {"mode": "median"}),
        (ValueError, "activation must be one of", {"activation": "softplus"}),
        (ValueError, "conf_activation must be one of", {"conf_activation": "exp"}),
        (ValueError, "backend must be one of", {"backend": "tpu"}),
        (ValueError, "precision must be one of", {"precision": "fp8"}),
        (ValueError, "mode 'switch' needs a positive activation", {"mode": "switch", "activation": "inv_log"}),
        (ValueError, "'xy_inv_log' needs 3 prediction channels", {"activation": "xy_inv_log"}),
        (ValueError, "O >= 2", {"out_channels": 1}),
    ],
    ids=str,
)  # fmt: skip
def test_a_head_that_cannot_work_is_not_built(error, message, options):
    with pytest.raises(error, match=message):
        small(**options)


BAD_BLOCKS = {
    "no Sequential": nn.Conv2d(6, 2, 1),
    "empty": nn.Sequential(),
    "order": nn.Sequential(nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 2, 1)),
    "too long": nn.Sequential(*block(), nn.ReLU()),
    "another activation": nn.Sequential(block()[0], nn.GELU(), block()[2]),
    "5x5": nn.Sequential(nn.Conv2d(6, 5, 5, padding=2), nn.ReLU(), nn.Conv2d(5, 2, 1)),
    "no padding": nn.Sequential(nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1)),
    "reflected": nn.Sequential(nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(5, 2, 1)),
    "strided": nn.Sequential(nn.Conv2d(6, 5, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(5, 2, 1)),
    "dilated": nn.Sequential(nn.Conv2d(6, 5, 3, padding=1, dilation=2), nn.ReLU(), nn.Conv2d(5, 2, 1)),
    "grouped": nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1)),
    "no bias": nn.Sequential(nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(5, 2, 1)),
    "3x3 last": nn.Sequential(nn.Conv2d(6, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 2, 3, padding=1)),
    "padded last": nn.Sequential(nn.Conv2d(6, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 2, 1, padding=1)),
}


@pytest.mark.parametrize("name", BAD_BLOCKS)
def test_blocks_of_another_structure_are_refused(name):
    with pytest.raises(ValueError, match=r"block must be Sequential\(Conv2d\(C, Hd, 3, padding=1\), ReLU, .*got \w"):
        MoEHead.from_conv_block(BAD_BLOCKS[name])


@pytest.mark.parametrize(
    ("error", "noise"), [(ValueError, -0.1), (ValueError, math.nan), (ValueError, math.inf), (TypeError, "1")]
)
def test_noise_out_of_range(error, noise):
    with pytest.raises(error, match="init_noise must be a finite number of at least 0"):
        MoEHead.from_conv_block(block(), init_noise=noise)


def test_trains_end_to_end():
    """Two planes at depths 1 and 3 that one smooth head cannot separate: the gate learns which is where."""
    generator = torch.Generator().manual_seed(0)
    side = (torch.arange(16) >= 8).float().expand(1, 1, 16, 16)
    x = torch.cat([side, 1 - side, torch.randn(1, 4, 16, 16, generator=generator) * 0.1], 1)
    target = 1 + 2 * side
    head = small(num_experts=2, seed=1).train()
    optimizer = torch.optim.Adam(head.parameters(), 0.03)
    losses = []
    for _ in range(60):
        loss = (head(x, (16, 16)).prediction - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_repr_names_what_matters():
    assert repr(small()).startswith("MoEHead(6, 2, num_experts=3, expert_hidden=5, gate_hidden=4, mode='mean'")
