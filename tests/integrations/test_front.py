"""The front's faster ways against the stock head in float64: the same features, gradients and state, come what may."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

import moe3d
from moe3d.integrations import front, front_native
from moe3d.integrations.front_native import NativeFront, native_front
from moe3d.models import DPTHead
from moe3d.ops import native_layers

needs_native = pytest.mark.skipif(not native_layers.can_run(), reason="no C++ part")

SPECIAL = 3
LAYERS = (0, 1, 2, 3)
GRIDS = [(4, 6), (1, 1), (1, 7), (5, 3)]


class HeadAlone(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.depth_head = head


def stock_head(kind="ours", seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        small = {"dim_in": 32, "features": 32, "out_channels": (24, 48, 64, 64), "intermediate_layer_idx": LAYERS}
        if kind == "ours":
            head = DPTHead(output_dim=2, activation="exp", **small)
        else:
            from vggt.heads.dpt_head import DPTHead as RealHead

            head = RealHead(output_dim=2, activation="exp", **small)
        with torch.no_grad():  # so that depths vary
            for parameter in head.parameters():
                parameter.mul_(2 if parameter.dim() > 1 else 1).add_(0.02 * torch.randn_like(parameter))
        return head.eval()


def patched_head(head=None, **options):
    return moe3d.patch_vggt(HeadAlone(head or stock_head()), init_noise=0.0, **options).depth_head


def inputs(batch=1, frames=1, grid=(4, 6), seed=1, dim=32):
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randn(batch, frames, SPECIAL + grid[0] * grid[1], dim, generator=generator) for _ in LAYERS]
    return tokens, torch.zeros(batch, frames, 3, 14 * grid[0], 14 * grid[1])


def call(head, tokens, images, **options):
    return torch.cat(
        [part.flatten(3) if part.dim() == 5 else part for part in head(tokens, images, SPECIAL, **options)]
    )


def patches(tokens):
    return [t[:, :, SPECIAL:].flatten(0, 1) for t in tokens]


def features(way, head, tokens, grid):
    return way(head, patches(tokens), grid, grid[1] / grid[0])


def true_features(head, tokens, grid):
    """By the stock head's own modules in float64."""
    return features(front.plain, copy.deepcopy(head).double(), [t.double() for t in tokens], grid)


def assert_as_right_as_plain(found, head, tokens, grid):
    """op.md: 1.5 times the error of plain PyTorch plus 1e-6, and 4 times plus 1e-5 at the worst place."""
    true, plain = true_features(head, tokens, grid), features(front.plain, head, tokens, grid)
    assert found.shape == true.shape
    assert (found - true).norm() <= 1.5 * (plain - true).norm() + 1e-6 * true.norm()
    assert (found - true).abs().max() <= 4 * (plain - true).abs().max() + 1e-5 * true.abs().max()


@pytest.fixture(params=["ours", pytest.param("real", marks=pytest.mark.real_vggt)])
def kind(request):
    return request.param


@pytest.fixture
def run_natively(monkeypatch):
    """Counts the calls that run in the compiled layers."""
    calls = []
    whole = NativeFront.__call__
    monkeypatch.setattr(NativeFront, "__call__", lambda self, *args: calls.append(self) or whole(self, *args))
    return calls


# --- the same numbers -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_features_are_the_stock_heads(kind, grid, batch):
    head = patched_head(stock_head(kind))
    tokens, _ = inputs(batch, 2, grid)
    assert front.can_reorder(head)
    assert_as_right_as_plain(features(front.reordered, head, tokens, grid), head, tokens, grid)
    if native_layers.can_run():
        native = native_front(head, patches(tokens))
        assert_as_right_as_plain(features(native, head, tokens, grid), head, tokens, grid)


@torch.no_grad()
def test_a_front_that_is_not_compiled_is_reordered_all_the_same(monkeypatch):
    calls, reordered = [], front.reordered
    monkeypatch.setattr(front, "reordered", lambda *args: calls.append(1) or reordered(*args))
    call(patched_head(backend="reference"), *inputs(1, 2))
    assert calls
    call(patched_head(backend="reference", optimize_head=False), *inputs(1, 2))
    assert len(calls) == 1


@torch.no_grad()
def test_large_maps_are_interpolated_part_by_part(monkeypatch):
    head, (tokens, _) = patched_head(), inputs(2, 3)
    expected = features(front.reordered, head, tokens, GRIDS[0])
    monkeypatch.setattr(front, "_MOST_INTERPOLATED", 4 * expected[0].numel())
    assert torch.equal(features(front.reordered, head, tokens, GRIDS[0]), expected)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_plain_is_the_stock_head(kind, backend):
    head = stock_head(kind)
    tokens, images = inputs(2, 3)
    expected = call(head, tokens, images)
    patched_head(head, optimize_head=False, backend=backend)
    torch.testing.assert_close(call(head, tokens, images), expected, rtol=2e-5, atol=2e-5)


@needs_native
@torch.no_grad()
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(monkeypatch, isa):
    monkeypatch.setenv("MOE3D_CPU_ISA", isa)
    if not native_layers.can_run():
        pytest.skip("this processor lacks it")
    head, (tokens, _) = patched_head(), inputs(1, 2)
    assert_as_right_as_plain(features(native_front(head, patches(tokens)), head, tokens, (4, 6)), head, tokens, (4, 6))


@needs_native
@torch.no_grad()
def test_an_instruction_set_may_change_between_calls(monkeypatch):
    head, (tokens, images) = patched_head(), inputs(1, 2)
    expected = call(head, tokens, images)
    monkeypatch.setenv("MOE3D_CPU_ISA", "portable")  # its panels of weights are narrower
    torch.testing.assert_close(call(head, tokens, images), expected, rtol=1e-5, atol=1e-5)


@needs_native
@torch.no_grad()
def test_threads_chunks_and_strides_change_nothing(run_natively):
    head, (tokens, images) = patched_head(), inputs(2, 5)
    expected = call(head, tokens, images)
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.testing.assert_close(call(head, tokens, images), expected, rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(before)
    for chunk in (1, 2, None):
        torch.testing.assert_close(call(head, tokens, images, frames_chunk_size=chunk), expected, rtol=1e-5, atol=1e-6)
    strided = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in tokens]
    torch.testing.assert_close(call(head, strided, images), expected, rtol=1e-5, atol=1e-6)
    assert len(run_natively) == 1 + 3 + (5 + 3 + 1) + 1


@needs_native
@torch.no_grad()
def test_tokens_are_left_as_they_were():
    head, (tokens, images) = patched_head(), inputs(1, 2)
    before = [t.clone() for t in tokens]
    call(head, tokens, images)
    assert all(torch.equal(a, b) for a, b in zip(tokens, before, strict=True))


@needs_native
@torch.no_grad()
def test_units_that_keep_their_residual(kind):
    """VGGT's ReLU works in place and so changes what the skip connection adds; where it does not, neither do we. Ours
    adds relu(x) in any case."""
    head, (tokens, _) = patched_head(stock_head(kind)), inputs(1, 2)
    in_place = features(native_front(head, patches(tokens)), head, tokens, (4, 6))
    for module in head.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    found = features(native_front(head, patches(tokens)), head, tokens, (4, 6))
    assert_as_right_as_plain(found, head, tokens, (4, 6))
    assert torch.equal(found, in_place) if kind == "ours" else (found - in_place).abs().max() > 0.01


# --- what is kept is never stale --------------------------------------------------------------------------------------


def add_in_place(head):
    head.scratch.refinenet2.resConfUnit1.conv2.weight.add_(0.1)


def add_through_data(head):
    head.scratch.layer3_rn.weight.data.add_(0.1)


def replace(head):
    head.projects[1].bias = nn.Parameter(head.projects[1].bias + 1)


def assign_data(head):
    head.resize_layers[0].weight.data = head.resize_layers[0].weight.data * 2


def pad_otherwise(head):
    head.scratch.output_conv1.padding_mode = "replicate"


def load(head):
    head.load_state_dict(patched_head(stock_head(seed=7)).state_dict())


def load_assigned(head):
    head.load_state_dict(patched_head(stock_head(seed=7)).state_dict(), assign=True)


def train_a_step(head):
    tokens, images = inputs(1, 2)
    with torch.enable_grad():
        call(head, tokens, images).sum().backward()
    torch.optim.SGD(head.parameters(), 1e-3).step()
    head.zero_grad()


def new_module(head):
    head.scratch.output_conv1 = copy.deepcopy(head.scratch.output_conv1)
    head.scratch.output_conv1.bias.data.zero_()


def own_forward(head):
    conv = head.projects[2]
    stock = conv.forward
    conv.forward = lambda x: 1.5 * stock(x)


def plain_tensor(head):
    weight = head.scratch.layer2_rn.weight.detach()
    del head.scratch.layer2_rn.weight
    head.scratch.layer2_rn.weight = 2 * weight


@needs_native
@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [add_in_place, add_through_data, replace, assign_data, load, load_assigned, train_a_step, new_module],
    ids=lambda f: f.__name__,
)
def test_changed_weights_count_at_the_next_call(change, run_natively):
    head, (tokens, images) = patched_head(), inputs(1, 2)
    before = call(head, tokens, images)
    call(head, tokens, images)
    assert run_natively[0] is run_natively[1]
    change(head)
    run_natively.clear()
    found = call(head, tokens, images)
    assert len(run_natively) == 1 and not torch.allclose(found, before, rtol=1e-4)
    head.optimize_head = False
    torch.testing.assert_close(found, call(head, tokens, images), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("change", [own_forward, plain_tensor, pad_otherwise], ids=lambda f: f.__name__)
def test_what_the_compiled_layers_would_not_see_runs_as_it_is(change, run_natively):
    head, (tokens, images) = patched_head(), inputs(1, 2)
    before = call(head, tokens, images)
    run_natively.clear()
    change(head)
    found = call(head, tokens, images)
    assert not run_natively and not torch.allclose(found, before, rtol=1e-4)
    head.optimize_head = False
    torch.testing.assert_close(found, call(head, tokens, images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_a_projection_with_a_forward_of_its_own_is_called(grad):
    """As Accelerate's offloading and layers that are wrapped in place have it."""
    head, (tokens, images) = patched_head(), inputs(1, 2)
    own_forward(head)
    with torch.set_grad_enabled(grad):
        found = call(head, tokens, images)
        head.optimize_head = False
        torch.testing.assert_close(found, call(head, tokens, images), rtol=1e-5, atol=1e-5)


@needs_native
@torch.no_grad()
def test_weights_made_in_inference_mode_count_when_they_change(run_natively):
    """They have no version counter: every value is looked at, of the front and of the tail."""
    tokens, images = inputs(1, 2)
    with torch.inference_mode():
        head = patched_head()
        for weight in (head.scratch.refinenet2.resConfUnit1.conv2.weight, head.tail.expert_w1):
            before = call(head, tokens, images)
            weight.view(-1)[1::2] += 0.1
            found = call(head, tokens, images)
            assert not torch.allclose(found, before, rtol=1e-5)
        fresh = copy.deepcopy(head)
        assert torch.equal(found, call(fresh, tokens, images))
    assert run_natively


@needs_native
@torch.no_grad()
def test_global_defaults_change_nothing(run_natively):
    head, (tokens, images) = patched_head(), inputs(1, 2)
    expected = call(copy.deepcopy(head), tokens, images)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = call(head, tokens, images)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected) and len(run_natively) == 2


@needs_native
@torch.no_grad()
def test_weights_loaded_for_inference_only(run_natively):
    tokens, images = inputs(1, 2)
    with torch.inference_mode():
        head = patched_head()
        head.scratch.layer1_rn.weight = nn.Parameter(head.scratch.layer1_rn.weight.clone(), requires_grad=False)
        inside = call(head, tokens, images)
    assert torch.equal(call(head, tokens, images), inside)
    assert len(run_natively) == 2


@needs_native
@torch.no_grad()
def test_copies_and_pickles_carry_nothing_along():
    head, (tokens, images) = patched_head(), inputs(1, 2)
    bare = len(pickle.dumps(head))
    expected = call(head, tokens, images)
    assert len(pickle.dumps(head)) == bare
    file = io.BytesIO()
    torch.save(head, file)
    file.seek(0)
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), torch.load(file, weights_only=False)):
        assert torch.equal(call(other, tokens, images), expected)
        other.scratch.layer1_rn.weight.mul_(2)
        assert not torch.equal(call(other, tokens, images), expected)
    assert torch.equal(call(head, tokens, images), expected)


@needs_native
@torch.no_grad()
def test_nothing_outlives_its_head():
    head, (tokens, images) = patched_head(), inputs()
    call(head, tokens, images)
    gc.collect()
    kept = len(front_native._kept)
    model = HeadAlone(head)
    moe3d.unpatch_vggt(model)
    assert len(front_native._kept) == kept - 1
    other = patched_head()
    call(other, tokens, images)
    del other
    gc.collect()
    assert len(front_native._kept) == kept - 1


@needs_native
@torch.no_grad()
def test_threads_share_a_head():
    head, (tokens, images) = patched_head(), inputs(1, 2)
    with torch.no_grad():
        expected = call(copy.deepcopy(head), tokens, images)
    found = []

    @torch.no_grad()
    def work():
        found.append(call(head, tokens, images))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4 and all(torch.equal(f, expected) for f in found)


# --- gradients, and everything else that needs PyTorch's own operations -----------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_gradients_are_the_stock_heads(kind, backend):
    stock, (tokens, images) = stock_head(kind).train(), inputs(1, 2)
    head = patched_head(copy.deepcopy(stock), num_experts=1, backend=backend)
    gradients = []
    for one in (stock.double(), head):
        given = [t.to(one.norm.weight.dtype).requires_grad_() for t in tokens]
        call(one, given, images).log().sum().backward()
        named = {n: p.grad for n, p in one.named_parameters() if "output_conv2" not in n}
        gradients.append(named | {f"tokens {i}": t.grad for i, t in enumerate(given)})
    for name, true in gradients[0].items():
        if true is not None and true.norm() > 0:
            assert (gradients[1][name] - true).norm() <= 2e-4 * true.norm(), name


@needs_native
def test_a_frozen_front_runs_natively_under_a_trained_tail(run_natively):
    head, (tokens, images) = patched_head().train(), inputs(1, 2)
    head.requires_grad_(False)
    head.tail.requires_grad_(True)
    call(head, tokens, images).sum().backward()
    assert len(run_natively) == 1
    assert head.tail.expert_w1.grad is not None and head.scratch.layer1_rn.weight.grad is None
    expected = head.tail.expert_w1.grad.clone()
    head.zero_grad()
    head.optimize_head = False
    call(head, tokens, images).sum().backward()
    assert (head.tail.expert_w1.grad - expected).norm() <= 1e-4 * expected.norm()


@needs_native
@pytest.mark.filterwarnings("ignore:.*trace")
def test_what_does_not_run_natively(run_natively):
    tokens, images = inputs(1, 2)
    head = patched_head()
    call(head, tokens, images)  # its parameters want gradients
    with torch.no_grad():
        call(patched_head(backend="reference"), tokens, images)
        call(patched_head(optimize_head=False), tokens, images)
        with torch.autocast("cpu", torch.bfloat16):
            call(head, tokens, images)
        call(copy.deepcopy(head).bfloat16(), [t.bfloat16() for t in tokens], images)
    head.requires_grad_(False)
    torch.jit.trace(lambda *t: call(head, list(t), images), tuple(tokens), check_trace=False)
    with FlopCounterMode(display=False):  # and every other mode that must see each operation
        call(head, tokens, images)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="moe_head has no forward-mode derivative"):
        call(head, [forward_ad.make_dual(t, torch.ones_like(t)) for t in tokens], images)
    everywhere = register_module_forward_hook(lambda *_: None)
    call(head, tokens, images)
    everywhere.remove()
    call(head, [tokens[0].requires_grad_(), *tokens[1:]], images)
    assert not run_natively


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["norm", "projects.2", "resize_layers.0", "scratch.refinenet1", "scratch.output_conv1"]
)
def test_hooks_still_fire(name, run_natively):
    head, (tokens, images) = patched_head(), inputs(1, 2)
    expected, seen = call(head, tokens, images), []
    run_natively.clear()
    handle = head.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(call(head, tokens, images), expected, rtol=1e-4, atol=1e-5)
    assert seen and not run_natively
    handle.remove()
    assert torch.equal(call(head, tokens, images), expected)


@torch.no_grad()
def test_an_unusual_front_runs_as_it_is(run_natively):
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    def double_projection(head):
        head.projects[0].__class__ = Doubled

    def grouped(head):
        conv = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        head.scratch.refinenet3.resConfUnit1.conv1 = conv

    def grouped_projection(head):
        conv = head.projects[1]
        head.projects[1] = nn.Conv2d(conv.in_channels, conv.out_channels, 1, groups=2)

    def dilated(head):
        head.scratch.refinenet3.resConfUnit1.conv2 = nn.Conv2d(32, 32, 3, padding=2, dilation=2)

    def overlapping(head):
        conv = head.resize_layers[0]
        head.resize_layers[0] = nn.ConvTranspose2d(conv.in_channels, conv.out_channels, 6, stride=4, padding=1)

    def normalised(head):
        head.scratch.refinenet2.add_module("batch_norm", nn.BatchNorm2d(32).eval())

    tokens, images = inputs(1, 2)
    for change in (double_projection, grouped, grouped_projection, dilated, overlapping, normalised):
        head = patched_head()
        change(head)
        found = call(head, tokens, images)
        head.optimize_head = False
        torch.testing.assert_close(found, call(head, tokens, images), rtol=1e-5, atol=1e-5)
    assert not run_natively


@torch.no_grad()
def test_widths_that_the_compiled_layers_lack(run_natively):
    head = DPTHead(dim_in=32, features=24, out_channels=(8, 16, 24, 24), intermediate_layer_idx=LAYERS, output_dim=2)
    tokens, images = inputs(1, 2)
    expected = call(head, tokens, images)
    torch.testing.assert_close(call(patched_head(head), tokens, images), expected, rtol=1e-4, atol=1e-5)
    assert not run_natively


@torch.no_grad()
def test_a_head_without_position_embedding():
    head = stock_head()
    head.pos_embed = False
    tokens, images = inputs(1, 2)
    expected = call(head, tokens, images)
    torch.testing.assert_close(call(patched_head(head), tokens, images), expected, rtol=1e-4, atol=1e-5)


# --- 16 bits ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 5e-3)], ids=str)
def test_heads_in_16_bits(kind, backend, dtype, bound):
    head, (tokens, images) = stock_head(kind), inputs(2, 3)
    expected, state = call(head, tokens, images), copy.deepcopy(head.state_dict())
    model = moe3d.patch_vggt(HeadAlone(head), init_noise=0.0, head_dtype=dtype, backend=backend)
    found = call(model.depth_head, tokens, images)
    assert found.dtype == torch.float32
    assert 1e-5 < (found - expected).norm() / expected.norm() < bound
    moe3d.unpatch_vggt(model)
    assert all(torch.equal(state[name], value) for name, value in model.depth_head.state_dict().items())


def test_training_in_16_bits():
    gradients = []
    for dtype in (None, torch.bfloat16):
        head, (tokens, images) = patched_head(head_dtype=dtype), inputs(1, 2)
        call(head, tokens, images).log().sum().backward()
        gradients.append(head.scratch.layer1_rn.weight.grad)
    assert gradients[1].dtype == torch.float32
    assert (gradients[1] - gradients[0]).norm() < 0.1 * gradients[0].norm()


@torch.no_grad()
def test_a_head_of_another_type_than_its_tokens():
    """Upstream fails both for a head cast to 16 bits and for a backbone that gives 16 bits (FastVGGT's)."""
    head, (tokens, images) = patched_head(), inputs(1, 2)
    expected = call(head, tokens, images)
    low = [t.bfloat16() for t in tokens]
    torch.testing.assert_close(call(head, low, images), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(call(head.bfloat16(), tokens, images).float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("value", [torch.float64, "bf16", torch.int8])
def test_other_types_are_refused(value):
    with pytest.raises(ValueError, match=r"head_dtype must be None, torch.bfloat16 or torch.float16, got "):
        patched_head(head_dtype=value)
