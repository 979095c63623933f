"""patch_vggt and unpatch_vggt on MiniVGGT and on the real ``vggt`` package: nothing changes but what was asked for."""

from __future__ import annotations

import copy
import io
import math
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import moe3d
from moe3d.integrations.dpt import PatchedDPTHead
from moe3d.models import DPTHead
from moe3d.sharpen import sharpen
from support import ddp, models
from support.models import (
    BOTH,
    HEIGHT,
    WIDTH,
    assert_equal,
    assert_untouched,
    disturb,
    fingerprint,
    images,
    predict,
    state,
    tensors,
)  # fmt: skip

STOCK = {"init_noise": 0.0, "optimize_head": False, "backend": "reference"}


@pytest.fixture(params=["mini", pytest.param("real", marks=pytest.mark.real_vggt)])
def make(request):
    """Builds the same small model each time it is called."""
    return getattr(models, request.param)


def depth_tokens(model, batch):
    """What the model itself calls its depth head with."""
    seen = {}
    hook = model.depth_head.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(batch)
    hook.remove()
    return seen["args"], seen["kwargs"]


# --- equal to stock, and back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize("mode", ["mean", "argmax"])
def test_zero_noise_predicts_what_stock_predicts(make, experts, mode):
    model = make()
    stock = predict(model)
    assert moe3d.patch_vggt(model, experts, heads=BOTH, mode=mode, **STOCK) is model
    patched = predict(model)
    assert [key for key in patched if key in stock] == list(stock), "a key was lost or moved"
    for key, value in stock.items():
        assert patched[key].shape == value.shape and patched[key].dtype == value.dtype
        assert (patched[key] - value).abs().max() <= 1e-5 * max(1.0, value.abs().max().item()), key
    assert patched.keys() - stock.keys() == {"depth_entropy", "point_entropy"}
    for key in ("depth_entropy", "point_entropy"):
        assert patched[key].shape == stock["depth_conf"].shape
        assert (patched[key] - math.log(experts)).abs().max() < 1e-6


def test_zero_noise_on_every_backend(make, runner):
    """op.md: 2e-5 relative RMS, 2e-4 at the worst pixel, and no further from the float64 truth than stock is."""
    model = make().to(runner.device)
    batch = images(2).to(runner.device)
    stock = predict(model, batch)
    exact = predict(copy.deepcopy(model).double(), batch.double())
    moe3d.patch_vggt(model, init_noise=0.0, backend=runner.backend, precision="ieee")
    patched = predict(model, batch)
    for key in ("depth", "depth_conf"):
        value = stock[key].double()
        assert (patched[key] - value).norm() <= 2e-5 * value.norm()
        assert (patched[key] - value).abs().max() <= 2e-4 * value.abs().max()
        ours, theirs = ((found[key] - exact[key]).norm() for found in (patched, stock))
        assert ours <= (1.01 if runner.backend == "reference" else 1.0) * theirs + 1e-7 * exact[key].norm()


@pytest.mark.parametrize("heads", [("depth",), ("point",), BOTH, "depth"], ids=str)
def test_unpatching_restores_everything_bit_for_bit(make, heads):
    model = make()
    before, stock = fingerprint(model), predict(model)
    block = model.depth_head.scratch.output_conv2
    moe3d.patch_vggt(model, heads=heads, image_gate=True)
    predict(disturb(model))
    assert moe3d.unpatch_vggt(model) is model
    assert_untouched(model, before)
    assert model.depth_head.scratch.output_conv2 is block, "an optimizer may hold its parameters"
    assert_equal(predict(model), stock)


def test_unpatching_an_unpatched_model_does_nothing(make):
    model = make()
    before = fingerprint(model)
    assert moe3d.unpatch_vggt(model) is model
    assert_untouched(model, before)


def test_patching_twice_is_an_error_and_changes_nothing(make):
    model = moe3d.patch_vggt(make())
    before = fingerprint(model)
    for heads in (("depth",), BOTH, ("point", "depth")):
        with pytest.raises(ValueError, match=r"model\.depth_head is already patched: call unpatch_vggt"):
            moe3d.patch_vggt(model, heads=heads)
        assert_untouched(model, before)
    assert not isinstance(model.point_head, PatchedDPTHead)


def test_heads_may_be_patched_one_after_the_other():
    model = models.mini()
    before = fingerprint(model)
    moe3d.patch_vggt(model, 2)
    moe3d.patch_vggt(model, 3, heads=("point",))
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1
    assert {"depth_entropy", "point_entropy"} < predict(model).keys()
    assert_untouched(moe3d.unpatch_vggt(model), before)


def test_repatching_after_unpatching_starts_afresh(make):
    model = moe3d.patch_vggt(make(), seed=3)
    first = state(model)
    moe3d.patch_vggt(moe3d.unpatch_vggt(disturb(model)), seed=3)
    assert_equal(state(model), first)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
def test_a_stock_checkpoint_loads_into_a_patched_model(make, assign):
    """Every expert gets the loaded block, noise reapplied from the seed; the gate goes back to uniform."""
    other = make(seed=1)
    checkpoint_ = state(other)
    options = {"num_experts": 3, "gate_hidden": 8, "heads": BOTH, "init_noise": 0.05, "seed": 11, "image_gate": True}
    model = disturb(moe3d.patch_vggt(make(), **options))
    result = model.load_state_dict(copy.deepcopy(checkpoint_), strict=True, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    after = moe3d.patch_vggt(copy.deepcopy(other), **options)
    assert_equal(state(model), state(after))
    assert_equal(predict(model), predict(after))
    moe3d.unpatch_vggt(model)
    assert_equal(state(model), checkpoint_)
    assert_equal(predict(model), predict(other))


def test_a_stock_checkpoint_without_the_patched_heads_leaves_them(make):
    model = disturb(moe3d.patch_vggt(make()))
    before = state(model.depth_head)
    backbone = {key: value for key, value in make(seed=1).state_dict().items() if "head" not in key}
    model.load_state_dict(backbone, strict=False)
    assert_equal(state(model.depth_head), before)


def test_a_patched_state_dict_travels(make):
    """To a file and into another patched model, whose own source block stays what it was."""
    model = disturb(moe3d.patch_vggt(make(), heads=BOTH))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = moe3d.patch_vggt(make(seed=1), heads=BOTH)
    other.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert_equal(predict(other), predict(model))
    block = make(seed=1).depth_head.scratch.output_conv2.state_dict()
    assert_equal(state(moe3d.unpatch_vggt(other).depth_head.scratch.output_conv2), block)


def test_state_dict_keys_are_the_heads_own():
    model = moe3d.patch_vggt(models.mini())
    prefix = "depth_head.scratch.output_conv2."
    keys = [key.removeprefix(prefix) for key in model.state_dict() if key.startswith(prefix)]
    assert keys == [f"{part}_{t}" for part in ("expert", "gate") for t in ("w1", "b1", "w2", "b2")]
    assert model.state_dict().keys() - models.mini().state_dict().keys() == {prefix + key for key in keys}


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_independent(make, how):
    model = disturb(moe3d.patch_vggt(make(), heads=BOTH, return_experts=True))
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    expected = predict(model)
    assert_equal(predict(copied), expected)
    stock = predict(moe3d.unpatch_vggt(copied))
    assert "depth_entropy" not in stock
    assert_equal(stock, predict(make()))
    assert_equal(predict(model), expected)


# --- what new parameters are ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_flags_and_types_follow_the_old_block(make, training):
    model = make().train(not training)
    model.depth_head.scratch.output_conv2.train(training).double()
    moe3d.patch_vggt(model, image_gate=True)
    tail = model.depth_head.tail
    assert {p.dtype for p in tail.parameters()} == {torch.float64}
    assert all(module.training == training for module in tail.modules())
    model.train(not training)
    moe3d.unpatch_vggt(model)
    assert model.depth_head.scratch.output_conv2.training == (not training)


def test_a_meta_model_can_be_patched():
    with torch.device("meta"):
        model = models.MiniVGGT(enable_point=True)
    moe3d.patch_vggt(model, heads=BOTH)
    assert {p.device.type for p in model.depth_head.tail.parameters()} == {"meta"}


@pytest.mark.parametrize("patched", [False, True])
def test_a_meta_model_is_filled_by_assigning_a_stock_checkpoint(patched):
    source = models.mini(enable_point=False)
    with torch.device("meta"):
        model = models.mini(enable_point=False)
    if patched:
        moe3d.patch_vggt(model, 3, 8, image_gate="guided", seed=11)
    model.load_state_dict(state(source), strict=True, assign=True)
    if patched:
        assert_equal(state(model), state(moe3d.patch_vggt(source, 3, 8, image_gate="guided", seed=11)))
    assert_equal(predict(model.eval()), predict(source))


def test_an_assigned_checkpoint_brings_its_type():
    model = moe3d.patch_vggt(models.mini(enable_point=False)).half()
    model.load_state_dict(state(models.mini(enable_point=False)), assign=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_global_random_state_stays(make):
    model = make()
    torch.manual_seed(123)
    before = torch.get_rng_state()
    moe3d.patch_vggt(model, heads=BOTH, image_gate=True)
    model.load_state_dict(make(seed=1).state_dict())
    moe3d.unpatch_vggt(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_all_options_reach_the_head():
    options = {
        "num_experts": 3, "gate_hidden": 7, "init_noise": 0.03, "temperature": 0.5, "mode": "switch", "gap": 0.1,
        "return_experts": True, "backend": "reference", "precision": "ieee", "skip_below": 1e-4, "seed": 9,
    }  # fmt: skip
    tail = moe3d.patch_vggt(models.mini(), **options, image_gate=True).depth_head.tail
    assert {name: getattr(tail, name) for name in options} == options
    assert tail.image_gate is not None and (tail.activation, tail.conf_activation) == ("exp", "expp1")
    point = moe3d.patch_vggt(models.mini(), heads=("point",)).point_head.tail
    assert (point.activation, point.out_channels) == ("inv_log", 4)


def test_defaults_are_those_of_the_interface():
    tail = moe3d.patch_vggt(models.mini()).depth_head.tail
    expected = {
        "num_experts": 4, "gate_hidden": 128, "init_noise": 1e-2, "temperature": 1.0, "mode": "mean", "gap": 0.3,
        "return_experts": False, "backend": "auto", "precision": "auto", "skip_below": None, "seed": 0,
        "sharpen": 0,
    }  # fmt: skip
    assert {name: getattr(tail, name) for name in expected} == expected and tail.image_gate is None


# --- what the model returns -------------------------------------------------------------------------------------------


def test_experts_are_returned_on_request(make):
    model = moe3d.patch_vggt(make(), 3, heads=BOTH, return_experts=True, init_noise=0.1)
    batch = torch.stack([images(2), images(2, seed=4)])
    found = predict(model, batch)
    assert found["depth_weights"].shape == found["depth_hypotheses"].shape == (2, 2, 3, HEIGHT, WIDTH)
    assert found["point_weights"].shape == (2, 2, 3, HEIGHT, WIDTH)
    assert found["point_hypotheses"].shape == (2, 2, 3, HEIGHT, WIDTH, 3)
    depth = (found["depth_weights"] * found["depth_hypotheses"]).sum(2)
    torch.testing.assert_close(depth, found["depth"][..., 0], rtol=1e-5, atol=1e-6)
    points = (found["point_weights"].unsqueeze(-1) * found["point_hypotheses"]).sum(2)
    torch.testing.assert_close(points, found["world_points"], rtol=1e-4, atol=1e-5)
    assert found["depth_hypotheses"].var(2).max() > 0


def test_batches_are_independent(make):
    model = disturb(moe3d.patch_vggt(make(), return_experts=True))
    first, second = images(2), images(2, seed=4)
    both, one = predict(model, torch.stack([first, second])), predict(model, second[None])
    for key in ("depth", "depth_conf", "depth_entropy", "depth_weights"):
        torch.testing.assert_close(both[key][1:], one[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 3, 8, None])
def test_chunks_of_frames_change_nothing(make, chunk):
    model = make()
    args, kwargs = depth_tokens(model, images(3))
    with torch.no_grad():
        stock = model.depth_head(*args, **kwargs, frames_chunk_size=chunk)
        moe3d.patch_vggt(model, **STOCK)
        pair = model.depth_head(*args, **kwargs, frames_chunk_size=chunk)
        model.depth_head.expect_extras()
        model.depth_head(*args, **kwargs, frames_chunk_size=chunk)
    assert isinstance(pair, tuple) and len(pair) == 2
    for a, b in zip(pair, stock, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert model.depth_head.take_extras()["entropy"].shape == (1, 3, HEIGHT, WIDTH)


@pytest.mark.parametrize("chunk", [1, 2])
def test_each_frame_meets_its_own_image_whatever_the_chunk(make, chunk):
    model = disturb(moe3d.patch_vggt(make(), 3, image_gate=True, return_experts=True))
    args, kwargs = depth_tokens(model, images(3))
    found = []
    for size in (chunk, None):
        model.depth_head.expect_extras()
        with torch.no_grad():
            pair = model.depth_head(*args, **kwargs, frames_chunk_size=size)
        found.append((*pair, *model.depth_head.take_extras().values()))
    for a, b in zip(*found, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 2), (1, 0)])
def test_no_frames_give_no_predictions(shape):
    model = models.mini(enable_point=False)
    args, kwargs = depth_tokens(model, images(2))
    tokens = [t.new_zeros(*shape, *t.shape[2:]) for t in args[0]]
    kwargs = kwargs | {"images": kwargs["images"].new_zeros(*shape, 3, HEIGHT, WIDTH)}
    expected = model.depth_head(tokens, **kwargs)
    found = moe3d.patch_vggt(model).depth_head(tokens, **kwargs)
    assert [t.shape for t in found] == [t.shape for t in expected]


def test_a_tail_cannot_be_replaced():
    model = moe3d.patch_vggt(models.mini(enable_point=False))
    before = state(model)
    with pytest.raises(AttributeError, match="tail cannot be replaced"):
        model.depth_head.tail = copy.deepcopy(model.depth_head.tail)
    assert_equal(state(model), before)


def test_a_chunk_of_no_frames_is_an_error():
    model = moe3d.patch_vggt(models.mini())
    args, kwargs = depth_tokens(model, images(3))
    for chunk in (0, -1):
        with pytest.raises(
            ValueError, match=f"frames_chunk_size must be None or an integer of at least 1, got {chunk}"
        ):
            model.depth_head(*args, **kwargs, frames_chunk_size=chunk)


def test_nothing_is_kept_outside_the_models_forward(make):
    """A head that is called on its own, a forward that fails, and a finished one hold no tensors."""
    model = moe3d.patch_vggt(make())
    args, kwargs = depth_tokens(model, images(2))
    model.depth_head(*args, **kwargs)
    assert model.depth_head.extras == {}
    hook = model.depth_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(images(2))
    hook.remove()
    assert model.depth_head.extras == {}
    assert "depth_entropy" in predict(model) and model.depth_head.extras == {}


def test_threads_that_share_a_model_keep_their_entropies_apart():
    model = disturb(moe3d.patch_vggt(models.mini()))
    batches = [images(2, seed=seed) for seed in range(4)]
    expected = [predict(model, batch)["depth_entropy"] for batch in batches]
    wrong = []

    def work(index):
        for _ in range(8):
            found = predict(model, batches[index]).get("depth_entropy")
            if found is None or not torch.equal(found, expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Wrapped(nn.Module):
    """A relative that keeps VGGT's heads but returns something of its own."""

    def __init__(self, form):
        super().__init__()
        self.inner, self.form = models.mini(), form
        self.depth_head, self.point_head = self.inner.depth_head, self.inner.point_head

    def forward(self, batch):
        predictions = self.inner(batch)
        return self.form(predictions)


@pytest.mark.parametrize(
    "form",
    [lambda p: (p["depth"], p["depth_conf"]), lambda p: p["depth"], lambda p: None],
    ids=["pair", "depth", "nothing"],
)
def test_a_model_that_returns_no_dictionary_is_left_alone(form):
    model = Wrapped(form)
    with torch.no_grad():
        stock = model(images(2))
        moe3d.patch_vggt(model, **STOCK)
        patched = model(images(2))
    assert type(patched) is type(stock)
    if isinstance(stock, tuple):
        assert len(patched) == len(stock)
    assert model.depth_head.extras == {}


def test_hooks_of_the_user_survive(make):
    model, calls = make(), []
    model.depth_head.register_forward_hook(lambda m, args, output: calls.append(("head", len(output))))
    model.register_forward_hook(lambda m, args, output: calls.append(("model", "depth_entropy" in output)))
    moe3d.patch_vggt(model)
    model.register_forward_hook(lambda m, args, output: calls.append(("later", "depth_entropy" in output)))
    predict(model)
    moe3d.unpatch_vggt(model)
    predict(model)
    before, after = calls[:3], calls[3:]
    assert before == [("head", 2), ("model", False), ("later", True)]
    assert after == [("head", 2), ("model", False), ("later", False)]


def test_a_smooth_image_gate_sees_the_image(make):
    model = moe3d.patch_vggt(make(), 3, image_gate=True, init_noise=0.1)
    batch = images(2)
    uniform = predict(model, batch)
    assert (uniform["depth_entropy"] - math.log(3)).abs().max() < 1e-6
    gate = model.depth_head.tail.image_gate
    with torch.no_grad():
        gate.out.weight.normal_(generator=torch.Generator().manual_seed(0))
        expected = gate(batch).softmax(1)
    model.depth_head.tail.return_experts = True
    torch.testing.assert_close(predict(model, batch)["depth_weights"][0], expected, rtol=1e-4, atol=1e-5)


def test_sharpening_follows_the_head(make):
    plain, batch = predict(moe3d.patch_vggt(make(), 3), images(2)), images(2)
    model = moe3d.patch_vggt(make(), 3, sharpen=2)
    expected = sharpen(plain["depth"][0, ..., 0], batch, 2)
    assert not torch.equal(expected, plain["depth"][0, ..., 0])
    torch.testing.assert_close(predict(model, batch)["depth"][0, ..., 0], expected)


@pytest.mark.real_vggt
def test_the_track_head_is_left_alone():
    model = models.real(enable_track=True)
    before = state(model.track_head)
    batch = images(2, size=(140, 140))  # its correlation pyramid has seven levels
    queries = torch.tensor([[10.0, 12.0], [30.0, 20.0]])
    with torch.no_grad():
        stock = model(batch, query_points=queries)
        moe3d.patch_vggt(model, heads=BOTH)
        patched = model(batch, query_points=queries)
    assert not any(isinstance(module, PatchedDPTHead) for module in model.track_head.modules())
    assert_equal(state(model.track_head), before)
    for key in ("track", "vis", "conf"):
        assert torch.equal(patched[key], stock[key])


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_experts_share_the_stock_gradient(make):
    """K equal experts of weight 1/K: their gradients sum to the block's, and the backbone's is the same."""
    model = make().train()
    batch = images(2)

    def gradients(run):
        model.zero_grad()
        predictions = run(batch)
        (predictions["depth"].square().mean() + predictions["depth_conf"].mean()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    stock = gradients(model)
    moe3d.patch_vggt(model, 3, **STOCK)
    patched = gradients(model)
    prefix = "depth_head.scratch.output_conv2."
    pairs = {"0.weight": "expert_w1", "0.bias": "expert_b1", "2.weight": "expert_w2", "2.bias": "expert_b2"}
    for name, expert in pairs.items():
        summed = patched.pop(prefix + expert).sum(0)
        expected = stock.pop(prefix + name)
        torch.testing.assert_close(summed, expected.view_as(summed), rtol=1e-3, atol=1e-5 * expected.abs().max().item())
    for name, expected in stock.items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(patched[name], expected, rtol=1e-3, atol=1e-4 * scale, msg=name)


def test_every_new_parameter_learns_and_frozen_ones_do_not(make):
    model = make().requires_grad_(False).train()
    moe3d.patch_vggt(model, heads=BOTH, image_gate=True, init_noise=0.1)
    predictions = disturb(model)(images(2))
    sum(predictions[k].mean() for k in ("depth", "world_points", "depth_entropy", "point_entropy")).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, p in model.named_parameters() if p.requires_grad}
    assert with_gradient == {name for name, _ in model.named_parameters() if ".output_conv2." in name}
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.any() or "conf" in name, name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    # In float64: the gradient of an encoder's bias is a sum over all pixels that nearly cancels.
    model = disturb(moe3d.patch_vggt(models.mini())).double().train()
    batch = images(2)[None].double().requires_grad_()

    def gradients(run):
        model.zero_grad()
        predictions = run(batch)
        (predictions["depth"].mean() + predictions["depth_entropy"].mean()).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients(model)

    def checkpointed(batch):
        keys = ("depth", "depth_entropy")
        found = checkpoint(lambda b: tuple(model(b)[k] for k in keys), batch, use_reentrant=use_reentrant)
        return dict(zip(keys, found, strict=True))

    for a, b in zip(gradients(checkpointed), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10 * b.abs().max().item())
    assert model.depth_head.extras == {}


def test_distributed_training_with_a_frozen_backbone(tmp_path):
    """Two processes, two batches: both end with the mean of the gradients."""
    torch.multiprocessing.spawn(ddp.step, args=(2, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    model = ddp.patched()
    (sum(ddp.loss_of(model, rank) for rank in range(2)) / 2).backward()
    expected = ddp.gradients(model)
    for gradients in found:
        assert gradients.keys() == expected.keys() and all(".output_conv2." in name for name in expected)
        for name, value in expected.items():
            torch.testing.assert_close(gradients[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("image_gate", [False, True])
def test_autocast(make, image_gate):
    """16-bit convolutions inside, fp32 outputs, near the fp32 result."""
    model = moe3d.patch_vggt(make(), image_gate=image_gate, return_experts=True)
    expected = predict(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = predict(model)
    for key in ("depth", "depth_conf", "depth_entropy", "depth_weights", "depth_hypotheses"):
        assert found[key].dtype == torch.float32 and found[key].shape == expected[key].shape
        assert (found[key] - expected[key]).norm() < 0.1 * expected[key].norm(), key
    assert not torch.equal(found["depth"], expected["depth"])


def test_a_16_bit_model():
    model = moe3d.patch_vggt(models.mini(enable_point=False))
    expected = predict(model)
    found = predict(model.bfloat16(), images(3).bfloat16())
    assert found["depth"].dtype == torch.float32
    assert (found["depth"] - expected["depth"]).norm() < 0.1 * expected["depth"].norm()
    moe3d.unpatch_vggt(model)
    assert {p.dtype for p in model.depth_head.parameters()} == {torch.bfloat16}


@pytest.fixture
def compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_compile_in_one_graph_forward_and_backward(compiled):
    """The whole model with its hooks; the dictionary gains the same keys."""
    model = disturb(moe3d.patch_vggt(models.mini(enable_point=False), image_gate=True, return_experts=True)).train()
    model.requires_grad_(False).depth_head.requires_grad_(True)

    def run(call):
        model.zero_grad()
        predictions = call(images(2))
        (predictions["depth"].mean() + predictions["depth_entropy"].mean()).backward()
        return tensors(predictions), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected, gradients = run(model)
    found, compiled_gradients = run(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=key)
    for a, b in zip(compiled_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert model.depth_head.extras == {}


def compile_the_head(model):
    model.depth_head.compile(backend="eager")


def compile_the_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")


def wrap_the_head_in_a_graph(model):
    model.depth_head = torch.compile(model.depth_head, backend="eager")


def wrap_the_head_in_checkpoints(model):
    model.depth_head = checkpoint_wrapper(model.depth_head)


@pytest.mark.parametrize(
    ("wrap", "first"),
    [
        (compile_the_head, "patch"),
        (compile_the_forward, "patch"),
        (wrap_the_head_in_a_graph, "wrap"),
        (wrap_the_head_in_checkpoints, "patch"),
        (wrap_the_head_in_checkpoints, "wrap"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_part_that_is_compiled_or_wrapped_keeps_the_entropy(compiled, wrap, first):
    model = models.mini(enable_point=False, depth=1)
    expected = predict(moe3d.patch_vggt(copy.deepcopy(model)))
    for step in (moe3d.patch_vggt, wrap) if first == "patch" else (wrap, moe3d.patch_vggt):
        step(model)
    found = predict(model)
    assert found.keys() == expected.keys() and "depth_entropy" in found
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)
    moe3d.unpatch_vggt(model)
    assert "depth_entropy" not in predict(model)


def test_a_compiled_model_can_be_patched(compiled):
    model = torch.compile(models.mini(enable_point=False, depth=1), backend="eager")
    assert "depth_entropy" in predict(moe3d.patch_vggt(model))
    assert "depth_entropy" not in predict(moe3d.unpatch_vggt(model))


@pytest.mark.real_vggt
def test_the_real_patched_head_compiles(compiled):
    model = moe3d.patch_vggt(models.real(enable_point=False))
    args, kwargs = depth_tokens(model, images(2))
    with torch.no_grad():
        expected = model.depth_head(*args, **kwargs)
        found = torch.compile(model.depth_head, fullgraph=True, backend="aot_eager")(*args, **kwargs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimize_head", [False, True])
def test_a_patched_head_exports(optimize_head):
    model = moe3d.patch_vggt(models.mini(enable_point=False), optimize_head=optimize_head)
    args, kwargs = depth_tokens(model, images(2))
    program = torch.export.export(model.depth_head, args, kwargs)
    with torch.no_grad():
        for a, b in zip(program.module()(*args, **kwargs), model.depth_head(*args, **kwargs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# --- what cannot be patched -------------------------------------------------------------------------------------------


def test_structure_decides_not_the_class():
    """A subclass with VGGT's attributes is a VGGT head; FastVGGT and StreamVGGT bring classes of their own."""

    class Foreign(DPTHead):
        pass

    model = models.mini()
    expected = predict(model)
    model.depth_head.__class__ = Foreign
    moe3d.patch_vggt(model, **STOCK)
    torch.testing.assert_close(predict(model)["depth"], expected["depth"], rtol=1e-5, atol=1e-5)
    assert type(moe3d.unpatch_vggt(model).depth_head) is Foreign


def without(attribute):
    def change(model):
        *path, name = attribute.split(".")
        delattr(model.get_submodule(".".join(path)), name)

    return change


def replace(attribute, value):
    def change(model):
        *path, name = attribute.split(".")
        setattr(model.get_submodule(".".join(path)), name, value)

    return change


UNSUITABLE = {
    "no head": (without("depth_head"), "model must have a depth_head like VGGT's, got MiniVGGT without one"),
    "disabled": (replace("depth_head", None), r"model\.depth_head must be a DPT head, got None"),
    "another head": (
        replace("depth_head", nn.Linear(2, 2)),
        r"model\.depth_head must have the attributes .*, got Linear without norm, projects, .*scratch\.output_conv2",
    ),
    "no refinenet": (without("depth_head.scratch.refinenet3"), r"got DPTHead without scratch\.refinenet3"),
    "no activation": (without("depth_head.activation"), "got DPTHead without activation"),
    "feature only": (replace("depth_head.feature_only", True), r"model\.depth_head must predict, .*feature_only=True"),
    "another block": (
        replace("depth_head.scratch.output_conv2", nn.Conv2d(16, 2, 1)),
        r"model\.depth_head\.scratch\.output_conv2: block must be Sequential.*got Conv2d",
    ),
    "another activation": (replace("depth_head.activation", "softplus"), "activation must be one of .*'softplus'"),
}


@pytest.mark.parametrize("what", UNSUITABLE)
def test_unsuitable_models_say_what_is_missing_and_stay_as_they_are(what):
    change, message = UNSUITABLE[what]
    model = models.mini()
    change(model)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        moe3d.patch_vggt(model, heads=("point", "depth"))  # the point head would be fine
    assert_untouched(model, before)


@pytest.mark.parametrize("model", [None, 3, nn.Linear(2, 2)], ids=str)
def test_no_model_at_all(model):
    with pytest.raises(ValueError, match="model must have a depth_head like VGGT's, got"):
        moe3d.patch_vggt(model)


def test_a_feature_only_head_of_the_package():
    model = models.mini()
    model.depth_head = DPTHead(64, feature_only=True, features=32, out_channels=(24, 48, 64, 64))
    with pytest.raises(ValueError, match=r"model\.depth_head must have .*without scratch\.output_conv2"):
        moe3d.patch_vggt(model)


@pytest.mark.parametrize("option", [{"image_gate": True}, {"sharpen": 1}], ids=str)
def test_what_sees_the_image_needs_its_resolution(option):
    model = models.mini()
    model.depth_head.down_ratio = 2
    with pytest.raises(ValueError, match=r"sharpen need .* model\.depth_head has down_ratio=2"):
        moe3d.patch_vggt(model, **option)
    moe3d.patch_vggt(model)
    assert predict(model)["depth_entropy"].shape == (1, 3, HEIGHT // 2, WIDTH // 2)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "heads must name one or both of depth, point, got 'track'", {"heads": "track"}),
        (ValueError, "heads must name", {"heads": ()}),
        (ValueError, "heads must name", {"heads": ("depth", "depth")}),
        (ValueError, "heads must name", {"heads": ("depth", "camera")}),
        (ValueError, "heads must name", {"heads": 5}),
        (ValueError, "heads must name", {"heads": None}),
        (ValueError, "heads must name", {"heads": ([],)}),
        (ValueError, "num_experts must be an integer of at least 1, got 0", {"num_experts": 0}),
        (ValueError, "gate_hidden must be an integer", {"gate_hidden": 1.5}),
        (ValueError, "init_noise must be a finite number of at least 0, got -1", {"init_noise": -1}),
        (TypeError, "init_noise must be a finite number of at least 0, got 'small'", {"init_noise": "small"}),
        (ValueError, "temperature must be a finite number above 0, got nan", {"temperature": math.nan}),
        (ValueError, "mode must be one of mean, argmax, switch, got 'best'", {"mode": "best"}),
        (ValueError, "mode 'switch' needs a positive activation", {"mode": "switch", "heads": BOTH}),
        (ValueError, "gap must be", {"gap": math.inf}),
        (ValueError, "skip_below must be", {"skip_below": -1e-3}),
        (ValueError, "backend must be one of", {"backend": "cudnn"}),
        (ValueError, "precision must be one of", {"precision": "fp16"}),
        (ValueError, "seed must be an integer of at least 0", {"seed": -1}),
    ],
    ids=str,
)
def test_wrong_arguments_leave_the_model_as_it_was(error, message, options):
    model = models.mini()
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        moe3d.patch_vggt(model, **options)
    assert_untouched(model, before)


# --- VGGT's arithmetic, once more from its definition -----------------------------------------------------------------


def test_the_patched_head_is_upsampling_embedding_experts_and_softmax(make):
    """From output_conv1's output by plain PyTorch, the embedding taken from the stock head; experts that differ."""
    model = disturb(moe3d.patch_vggt(make(), 3, return_experts=True, init_noise=0.3))
    head, seen = model.depth_head, {}
    hook = head.scratch.output_conv1.register_forward_hook(lambda m, args, output: seen.update(x=output))
    found = predict(model, images(2))
    hook.remove()
    size = (HEIGHT, WIDTH)
    x = F.interpolate(seen["x"], size=size, mode="bilinear", align_corners=True)
    x = head.stock_class._apply_pos_embed(head, x, WIDTH, HEIGHT)
    t = dict(head.tail.named_parameters())
    hypotheses, confidences = [], []
    for k in range(3):
        hidden = F.relu(F.conv2d(x, t["expert_w1"][k], t["expert_b1"][k], padding=1))
        z = F.conv2d(hidden, t["expert_w2"][k][:, :, None, None], t["expert_b2"][k])
        hypotheses.append(z[:, 0].exp())
        confidences.append(1 + z[:, 1].exp())
    gate = F.relu(F.conv2d(x, t["gate_w1"], t["gate_b1"], padding=1))
    weights = F.conv2d(gate, t["gate_w2"][:, :, None, None], t["gate_b2"]).softmax(1)
    depth = (weights * torch.stack(hypotheses, 1)).sum(1)
    confidence = (weights * torch.stack(confidences, 1)).sum(1)
    torch.testing.assert_close(found["depth"][0, ..., 0], depth, rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(found["depth_conf"][0], confidence, rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(found["depth_weights"][0], weights, rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(found["depth_entropy"][0], torch.special.entr(weights).sum(1), rtol=2e-4, atol=1e-5)
