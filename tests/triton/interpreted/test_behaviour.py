"""What accuracy alone does not show: layouts, bands, skipping, NaN, the cache, reproducibility, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F

import moe3d
from moe3d.kernels import pack, passes, tables
from support.problems import random_problem

BASE = {"batch": 1, "channels": 16, "hidden": 16, "gate_hidden": 16, "source": (3, 4), "size": (6, 10), "pos": True}
SMALL = {"experts": 2, "source": (2, 3), "size": (5, 6), "gate_logits": True}


def problem(**arguments):
    return random_problem(**{**BASE, **arguments})


def run(p, **options):
    return p.run(backend="triton", **options)


def gradients(p, **options):
    leaves = p.leaves()
    outputs = [o for o in run(leaves, **options) if o is not None]
    torch.autograd.backward(outputs, [torch.ones_like(o) + 0.1 * o.detach() for o in outputs])
    return {name: leaf.grad for name, leaf in leaves.tensors.items()}


def test_a_single_expert_needs_no_gate():
    # As wide as a block: on some processors NumPy's products, the interpreter's, sum in an order of their width.
    gated = problem(**SMALL | {"experts": 1, "gate_logits": False, "hidden": 64, "gate_hidden": 64})
    plain = gated.__class__({n: t for n, t in gated.tensors.items() if not n.startswith("gate")}, gated.size, gated.pos)
    assert_equal(run(plain), run(gated))
    expected = gradients(gated)
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def assert_equal(a, b):
    for one, other in zip(a, b, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        lambda x: torch.stack([x, x], -1)[..., 0],
    ],
    ids=["channels_last", "transposed", "slice of channels", "strided"],
)
def test_layouts_of_x_give_the_same_bits(layout):
    p = problem()
    assert_equal(run(p), run(p.with_tensors(x=layout(p.tensors["x"]))))


@pytest.mark.parametrize("skip_below", [0.0, 1e-6])
def test_weights_through_tma_give_the_same_bits(monkeypatch, tmp_path, skip_below):
    monkeypatch.setenv("MOE3D_CACHE", str(tmp_path))
    p = problem(channels=48, experts=2)
    direct, used = run(p, skip_below=skip_below), []
    default = tables.config("forward", "ieee", (0, 0), "interpreter", 16)
    shape = "C48-N48-wider" + "-skip" * (skip_below > 0)
    tables.choose("forward", "ieee", "interpreter", shape, default._replace(tma=True))
    original = passes.forward
    monkeypatch.setattr(passes, "forward", lambda *a: used.append(a[8].tma) or original(*a))
    assert_equal(direct, run(p, skip_below=skip_below))
    assert used == [True]


def test_bands_give_the_same_outputs_bit_for_bit(monkeypatch):
    p = problem(batch=3, experts=2)
    whole = run(p, return_experts=True)
    for rows in (1, 10, 20):  # a row of tiles at a time; one frame at a time; two frames
        monkeypatch.setattr(passes, "FORWARD_BYTES", rows * (16 + 2) * 16 * 4)
        assert_equal(whole, run(p, return_experts=True))


def test_bands_of_the_backward_pass_add_up(monkeypatch):
    p = problem(**SMALL)
    whole = gradients(p)
    monkeypatch.setattr(passes, "BACKWARD_BYTES", 1)
    for name, banded in gradients(p).items():
        torch.testing.assert_close(banded, whole[name], rtol=1e-5, atol=1e-5)


def test_gradients_are_reproducible_bit_for_bit():
    p = problem(**SMALL)
    first, second = gradients(p), gradients(p)
    assert_equal(first.values(), second.values())


def test_only_what_is_asked_for_gets_a_gradient():
    p = problem(**SMALL | {"size": (3, 4)})
    everything = gradients(p)
    for wanted in ("x", "gate_w1", "expert_b2", "gate_logits"):
        leaves = p.with_tensors(**{wanted: p.tensors[wanted].clone().requires_grad_()})
        outputs = [o for o in run(leaves) if o is not None]
        torch.autograd.backward(outputs, [torch.ones_like(o) + 0.1 * o.detach() for o in outputs])
        torch.testing.assert_close(leaves.tensors[wanted].grad, everything[wanted], rtol=1e-6, atol=1e-7)


def decided_gate(p, scale=40.0):
    """A gate that leaves whole tiles to one expert."""
    return p.with_tensors(gate_w2=scale * p.tensors["gate_w2"])


@pytest.mark.parametrize("mode", ["mean", "argmax", "switch"])
def test_skipping_changes_no_more_than_its_bound(mode):
    p = decided_gate(problem(experts=4, mode=mode))
    huge = p.tensors["expert_b2"].clone()
    huge[0, 0] = 12.0  # exp(12): an expert that would spoil the mean if its weight were dropped unseen
    p, eps = p.with_tensors(expert_b2=huge), 1e-6
    exact, skipped = run(p, return_experts=True), run(p, skip_below=eps)
    spread = (exact.hypotheses - exact.prediction[:, None]).abs().amax(1)
    error = (skipped.prediction - exact.prediction).abs()
    assert (error <= 3 * eps * spread / (1 - 3 * eps) + 1e-5 * exact.prediction.abs()).all()
    assert torch.equal(skipped.entropy, exact.entropy)


def test_skipping_leaves_experts_out(monkeypatch):
    """A poisoned expert that no tile needs is never computed."""
    p = problem(experts=3)
    bias = torch.tensor([50.0, 50.0, -500.0])
    poisoned = p.tensors["expert_w1"].clone()
    poisoned[2] = math.nan
    p = p.with_tensors(gate_b2=bias, expert_w1=poisoned)
    assert run(p).prediction.isnan().all()
    assert run(p, skip_below=1e-6).prediction.isfinite().all()


def test_a_tile_with_a_strange_logit_skips_nothing():
    p = decided_gate(problem(gate_logits=True))
    logits = p.tensors["gate_logits"].clone()
    logits[0, 0, 1, 1] = math.inf
    p = p.with_tensors(gate_logits=logits)
    exact, skipped = run(p), run(p, skip_below=0.4)
    tile = (slice(0, 1), slice(None), slice(0, 4), slice(0, 8))
    torch.testing.assert_close(skipped.prediction[tile], exact.prediction[tile], equal_nan=True)


@pytest.mark.parametrize("skip_below", [0.0, 1e-6])
def test_nan_reaches_exactly_its_footprint(skip_below):
    p = problem(source=(6, 7), size=(11, 13), gate_logits=True)
    clean = run(p, skip_below=skip_below)
    x = p.tensors["x"].clone()
    x[0, 3, 2, 3] = math.nan
    dirty = p.with_tensors(x=x)
    pixel = torch.zeros(1, 1, 6, 7, dtype=torch.float64)
    pixel[0, 0, 2, 3] = 1.0
    weight = F.interpolate(pixel, size=p.size, mode="bilinear", align_corners=True)
    spread = F.max_pool2d((weight > 1e-9).double(), 3, stride=1, padding=1) > 0
    got = run(dirty, skip_below=skip_below)
    assert torch.equal(got.prediction.isnan(), spread) and torch.equal(got.entropy.isnan(), spread[:, 0])
    if not skip_below:
        assert torch.equal(got.prediction[~spread], clean.prediction[~spread])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_expert_that_is_not_finite_spoils_no_other(dtype):
    """A NaN bias, and in float16 also an overflow of one hidden unit; forward, and in the gradients to the others."""
    p = problem(**SMALL | {"size": (3, 4), "dtype": dtype, "experts": 3})
    bias = p.tensors["expert_b1"].clone()
    bias[1, 0] = math.nan if dtype == torch.float32 else 65504.0
    bad = p.with_tensors(expert_b1=bias, x=p.tensors["x"] * (1.0 if dtype == torch.float32 else 1e4))
    fine = bad.with_tensors(expert_b1=p.tensors["expert_b1"])
    leaves = bad.leaves()
    spoilt, clean = run(leaves, return_experts=True), run(fine, return_experts=True)
    kept = [0, 2]
    assert (spoilt.hypotheses[:, 1] != clean.hypotheses[:, 1]).any() and not spoilt.hypotheses[:, 1].isfinite().all()
    assert torch.equal(spoilt.hypotheses[:, kept], clean.hypotheses[:, kept])
    assert torch.equal(spoilt.entropy, clean.entropy) and torch.equal(spoilt.weights, clean.weights)
    if dtype == torch.float32:
        spoilt.hypotheses.sum().backward()
        gradient = leaves.tensors["expert_w1"].grad
        assert gradient[kept].isfinite().all() and gradient[1].isnan().any()


@pytest.mark.parametrize("mode", ["argmax", "switch"])
def test_an_overflowing_expert_that_is_not_chosen_has_no_gradient(mode):
    p = problem(**SMALL | {"size": (3, 4), "gate_logits": False, "mode": mode})
    bias, gate = p.tensors["expert_b2"].clone(), torch.tensor([4.0, -0.4])  # 0.012 has a say in "switch"
    bias[1] = 200.0
    leaves = p.with_tensors(expert_b2=bias, gate_b2=gate, gate_w2=0 * p.tensors["gate_w2"]).leaves()
    output = run(leaves)
    (output.prediction.sum() + output.confidence.sum()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves.tensors.values())
    assert not leaves.tensors["expert_w1"].grad[1].any()


def test_a_gate_that_is_not_finite_leaves_the_hypotheses_alone():
    p = problem(**SMALL | {"size": (3, 4)})
    bias = p.tensors["gate_b1"].clone()
    bias[0] = math.nan
    spoilt, clean = run(p.with_tensors(gate_b1=bias), return_experts=True), run(p, return_experts=True)
    assert spoilt.weights.isnan().all() and torch.equal(spoilt.hypotheses, clean.hypotheses)


def test_extreme_logits_and_temperatures_stay_finite():
    p = problem(**SMALL)
    p = p.with_tensors(gate_logits=200.0 * p.tensors["gate_logits"].sign())
    for temperature in (1.0, 1e-30):
        q = p.with_options(temperature=temperature)
        assert all(o.isfinite().all() for o in run(q, return_experts=True))
        if temperature == 1.0:
            assert all(g.isfinite().all() for g in gradients(q, return_experts=True).values())


def test_packed_parameters_follow_the_parameters():
    p = problem()
    w1 = p.tensors["expert_w1"]
    before = run(p)
    again = run(p)
    assert_equal(before, again)
    with torch.no_grad():
        w1.mul_(2.0)
    changed = run(p)
    assert not torch.equal(changed.prediction, before.prediction)
    assert_equal(changed, run(p.with_tensors(expert_w1=w1.clone())))


def test_packed_parameters_are_made_once_and_go_with_the_tensor():
    cache, made = pack.Cache(), []
    tensor = torch.ones(3)
    for _ in range(2):
        cache.get([tensor], ("key",), lambda: made.append(1) or object())
    cache.get([tensor], ("other",), lambda: made.append(1) or object())
    assert len(made) == 2 and len(cache._entries) == 1
    with torch.inference_mode():
        inference = torch.ones(3)
        cache.get([inference], ("key",), lambda: made.append(1))
    del tensor
    assert len(made) == 3 and len(cache._entries) == 0


def test_cotangents_of_absent_outputs_are_ignored():
    from moe3d.ops.schema import moe_head_op

    p = problem(**SMALL | {"size": (2, 3)}).leaves()
    t = p.tensors
    gate = [t[n] for n in ("gate_w1", "gate_b1", "gate_w2", "gate_b2", "gate_logits")]
    experts = [t[n] for n in ("x", "expert_w1", "expert_b1", "expert_w2", "expert_b2")]
    options = (2, 3, 1.0, "exp", None, "mean", 0.3, False, 0.0, "auto", "triton")
    outputs = moe_head_op(*experts, *gate, *p.pos, *options)
    assert [o.numel() for o in outputs] == [12, 0, 6, 0, 0]
    with_empty = torch.autograd.grad(outputs, experts, [torch.ones_like(o) for o in outputs], retain_graph=True)
    assert_equal(
        with_empty, torch.autograd.grad(outputs[::2][:2], experts, [torch.ones_like(o) for o in outputs[::2][:2]])
    )


def test_parameters_are_packed_once_for_several_calls(monkeypatch):
    made, original = [], passes.pack
    monkeypatch.setattr(passes, "pack", lambda *a: made.append(1) or original(*a))
    leaves = problem(**SMALL | {"size": (2, 3)}).leaves()
    for _ in range(2):
        run(leaves)
    assert len(made) == 1


def test_compiles_as_one_graph():
    p = problem(**SMALL | {"size": (2, 3)})
    compiled = torch.compile(lambda x: run(p.with_tensors(x=x)).prediction, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(p.tensors["x"]), run(p).prediction)


def test_auto_does_not_choose_the_interpreter(monkeypatch):
    monkeypatch.setattr(passes, "forward_pass", lambda *_: pytest.fail("the interpreter was chosen"))
    problem().run(backend="auto")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [({"dtype": torch.float64}, "float64"), ({"experts": 17}, "17"), ({"prediction_channels": 16}, "17")],
)
def test_refusals_say_why(arguments, reason):
    with pytest.raises(RuntimeError, match=f"backend 'triton' cannot run here because .*{reason}"):
        run(problem(**arguments))
    assert moe3d.backends()["triton"] is None
