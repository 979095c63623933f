"""The C++ CPU backend beyond what every backend is tested for (tests/ops): each instruction set, drawn shapes, threads,
strides, skipping, memory."""

from __future__ import annotations

import math
import resource

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe3d import _build
from moe3d.functional import moe_head
from moe3d.ops import native
from support import truth
from support.accuracy import Runner, assert_as_accurate_as_pytorch
from support.problems import Problem, random_problem

CPU = Runner("cpu", "cpu")

pytestmark = pytest.mark.skipif(_build.native().module is None, reason=_build.native().reason or "")


def gradients(problem: Problem, **options) -> dict[str, torch.Tensor]:
    """Of a sum with random signs over all outputs."""
    leaves = problem.leaves()
    outputs = [o for o in leaves.run(**options) if o is not None]
    generator = torch.Generator().manual_seed(3)
    loss = sum((o * torch.randn(o.shape, generator=generator)).sum() for o in outputs)
    loss.backward()
    return {name: leaf.grad for name, leaf in leaves.tensors.items()}


def everything(problem: Problem, **options) -> dict[str, torch.Tensor]:
    outputs = problem.run(**options)
    return {k: v for k, v in outputs._asdict().items() if v is not None} | gradients(problem, **options)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


SHAPES = [
    {},
    {"source": (5, 37), "size": (9, 130), "pos": True},  # more than one tile of 64 columns
    {"source": (9, 7), "size": (4, 3), "experts": 16, "gate_logits": True},
    {"channels": 33, "hidden": 17, "gate_hidden": 33, "source": (5, 5), "size": (9, 9)},  # no group is full
    {"source": (1, 1), "size": (40, 5)},  # one low-resolution row feeds several chunks of output rows
    {"source": (70, 3), "size": (3, 5), "experts": 1},  # rows that downsampling skips
    {"activation": "norm_exp", "prediction_channels": 3, "pos": True},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set_is_as_accurate_as_pytorch(isa, poisoned, shape):
    assert_as_accurate_as_pytorch(CPU, precision="ieee", **shape)


sizes = st.integers(1, 12)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    data=st.fixed_dictionaries(
        {
            "batch": st.integers(1, 3),
            "channels": st.integers(1, 5).map(lambda half: 2 * half),
            "source": st.tuples(sizes, sizes),
            "size": st.tuples(sizes, st.one_of(sizes, st.integers(60, 70))),
            "experts": st.integers(1, 5),
            "hidden": st.sampled_from([1, 3, 16, 17]),
            "gate_hidden": st.sampled_from([1, 5, 16, 33]),
            "pos": st.booleans(),
            "gate_logits": st.booleans(),
            "mode": st.sampled_from(["mean", "argmax", "switch"]),
            "temperature": st.sampled_from([0.3, 1.0, 2.0]),
            "seed": st.integers(0, 1000),
        }
    ),
    channels_last=st.booleans(),
    threads=st.integers(1, 3),
)
def test_drawn_shapes_agree_with_the_float64_truth(data, channels_last, threads):
    """The strict rule is tested on fixed problems; here shapes are drawn, and a slip is an error of order one."""
    problem = random_problem(**data)
    if channels_last:
        problem = problem.with_tensors(x=problem.tensors["x"].contiguous(memory_format=torch.channels_last))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = problem.run(return_experts=True, backend="cpu")
    finally:
        torch.set_num_threads(before)
    exact = truth.evaluate(problem)
    clear = truth.decided(problem)
    for name, a, r in zip(ours._fields, ours, exact, strict=True):
        off = (a - r).abs() / (1 + r.abs())
        if name == "prediction":
            off = off * clear.unsqueeze(1)
        if name == "confidence":
            off = off * clear
        assert off.max() < 2e-5, name


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    source=st.tuples(sizes, sizes),
    size=st.tuples(sizes, st.one_of(sizes, st.integers(60, 70))),
    experts=st.integers(1, 3),
    pos=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_gradients_of_drawn_shapes_agree_with_the_reference(source, size, experts, pos, seed):
    problem = random_problem(source=source, size=size, experts=experts, pos=pos, seed=seed, activation="sigmoid")
    if truth.distance_to_kinks(problem) < 1e-5:
        return
    ours, reference = gradients(problem, backend="cpu"), gradients(problem, backend="reference")
    scale = max(g.abs().max() for g in reference.values())
    for name, gradient in ours.items():
        assert (gradient - reference[name]).abs().max() <= 2e-4 * scale, name


@pytest.mark.parametrize("skip_below", [0.0, 1e-3])
@pytest.mark.parametrize("batch", [1, 3])
def test_results_do_not_depend_on_the_number_of_threads(isa, threads, batch, skip_below):
    problem = random_problem(
        batch=batch, source=(20, 23), size=(35, 130), pos=True, gate_logits=True, skip_below=skip_below
    )
    found = {}
    for count in (1, 2, 3, 7):
        threads(count)
        found[count] = everything(problem, backend="cpu")
    for count, results in found.items():
        for name, value in results.items():
            assert torch.equal(value, found[1][name]), f"{name} with {count} threads"


@pytest.mark.parametrize("layout", ["channels last", "transposed", "every second", "expanded", "flipped storage"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_strides(layout, dtype):
    problem = random_problem(dtype=dtype)
    x = problem.tensors["x"]
    strided = {
        "channels last": lambda: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda: x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0),
        "every second": lambda: torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2],
        "expanded": lambda: x[:1, :, :, :1].expand_as(x),
        "flipped storage": lambda: torch.cat([x, x], 1)[:, x.shape[1] :],
    }[layout]()
    plain = problem.with_tensors(x=strided.contiguous())
    for a, b in zip(problem.with_tensors(x=strided).run(backend="cpu"), plain.run(backend="cpu"), strict=True):
        assert a is b is None or torch.equal(a, b)


def test_an_expert_far_below_the_threshold_is_left_out_and_one_above_it_is_not():
    """Expert 1 is NaN everywhere: it shows exactly in the tiles (8 rows, 64 columns) where it was computed."""
    height, width = 40, 150
    problem = random_problem(batch=1, experts=2, source=(20, 70), size=(height, width), skip_below=1e-6)
    nan = problem.tensors["expert_b2"].clone()
    nan[1] = torch.nan
    logits = torch.zeros(1, 2, height, width)
    logits[:, 1] = -60.0
    logits[:, 1, 20, 70] = 0.0  # one pixel of the tile of rows 16-23 and columns 64-127
    zero = {name: torch.zeros_like(problem.tensors[name]) for name in ("gate_w2", "gate_b2")}
    output = problem.with_tensors(expert_b2=nan, gate_logits=logits, **zero).run(backend="cpu")
    computed = torch.zeros(height, width, dtype=torch.bool)
    computed[16:24, 64:128] = True
    assert torch.equal(output.prediction[0, 0].isnan(), computed)
    assert output.entropy.isfinite().all()


def test_a_tile_with_a_logit_that_is_not_finite_skips_nothing():
    problem = random_problem(batch=1, experts=2, source=(10, 40), size=(16, 70), skip_below=1e-6)
    logits = torch.zeros(1, 2, 16, 70)
    logits[:, 1] = -60.0
    logits[:, 1, 3, 3] = -math.inf
    zero = {name: torch.zeros_like(problem.tensors[name]) for name in ("gate_w2", "gate_b2")}
    problem = problem.with_tensors(gate_logits=logits, **zero)
    skipping, full = problem.run(backend="cpu"), problem.with_options(skip_below=0.0).run(backend="cpu")
    assert torch.equal(skipping.prediction[..., :64], full.prediction[..., :64])


@pytest.mark.parametrize("mode", ["mean", "argmax", "switch"])
def test_what_is_left_out_costs_no_more_than_it_may(isa, mode):
    """Experts of 1e4 times the depth, with weights around the threshold."""
    eps, size = 1e-3, (40, 150)
    problem = random_problem(batch=1, experts=3, source=(20, 70), size=size, mode=mode, gate_logits=True)
    bias = problem.tensors["expert_b2"].clone()
    bias[1:, 0] += math.log(1e4)
    around = torch.linspace(-3, 3, size[0] * size[1])[torch.randperm(size[0] * size[1])].view(size)
    logits = torch.zeros(1, 3, *size)
    logits[:, 1:] = math.log(eps) + around.sort(1).values
    zero = {name: torch.zeros_like(problem.tensors[name]) for name in ("gate_w2", "gate_b2")}
    problem = problem.with_tensors(expert_b2=bias, gate_logits=logits, **zero)
    full = problem.run(backend="cpu", return_experts=True)
    skipping = problem.run(backend="cpu", skip_below=eps)
    bound = 2 * eps * (full.hypotheses - full.prediction.unsqueeze(1)).abs().amax(1) / (1 - 2 * eps)
    assert ((skipping.prediction - full.prediction).abs() <= bound + 1e-5 * full.prediction.abs()).all()
    assert torch.equal(skipping.entropy, full.entropy)


def test_experts_that_are_returned_are_not_left_out():
    problem = random_problem(batch=1, experts=2, source=(10, 40), size=(16, 70))
    logits = torch.tensor([0.0, -60.0]).view(1, 2, 1, 1).expand(1, 2, 16, 70)
    problem = problem.with_tensors(gate_logits=logits)
    skipping, full = (problem.run(backend="cpu", return_experts=True, skip_below=eps) for eps in (1e-6, 0.0))
    assert all(torch.equal(a, b) for a, b in zip(skipping, full, strict=True))


@pytest.mark.parametrize("shape", [*SHAPES[:4], {"channels": 64, "source": (5, 37), "size": (9, 130)}], ids=str)
def test_bf16_arithmetic_is_as_accurate_as_pytorchs(bf16_isa, poisoned, shape):
    assert_as_accurate_as_pytorch(CPU, precision="bf16", **shape)


# 16, 24, 30, 34 and 64 pairs: AMX's tiles are 16, 12, 15 and 16 deep; 34 has no divisor from 8 to 16.
@pytest.mark.parametrize("channels", [32, 48, 60, 68, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_bf16_products_are_summed_in_float32(bf16_isa, poisoned, channels, dtype, channels_last):
    """With operands that bfloat16 holds only sums are rounded: float32's error remains, not bfloat16's 2e-3."""
    problem = random_problem(channels=channels, hidden=20, gate_hidden=40, source=(7, 53), size=(12, 150), experts=3)
    x, *first_layers = (problem.tensors[name].bfloat16().float() for name in ("x", "expert_w1", "gate_w1"))
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    problem = problem.with_tensors(x=x, expert_w1=first_layers[0], gate_w1=first_layers[1])
    exact = truth.evaluate(problem)
    ours = problem.with_tensors(x=x.to(dtype)).run(backend="cpu", precision="bf16")
    assert relative(ours.prediction, exact.prediction) < 2e-6
    assert relative(ours.entropy, exact.entropy) < 1e-5


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    channels=st.integers(1, 70).map(lambda half: 2 * half),
    source=st.tuples(sizes, st.integers(1, 60)),
    size=st.tuples(sizes, st.integers(1, 130)),
    experts=st.integers(1, 4),
    pos=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_drawn_shapes_in_bf16(bf16_isa, channels, source, size, experts, pos, seed):
    """Operands that bfloat16 holds but for the embedding, whose rounding is the larger error where there is one."""
    problem = random_problem(
        channels=channels, source=source, size=size, experts=experts, pos=pos, seed=seed, activation="linear"
    )
    names = [name for name in ("x", "expert_w1", "gate_w1") if name in problem.tensors]
    problem = problem.with_tensors(**{name: problem.tensors[name].bfloat16().float() for name in names})
    ours, exact = problem.run(backend="cpu", precision="bf16"), truth.evaluate(problem)
    off = (ours.prediction - exact.prediction).abs() / (1 + exact.prediction.abs())
    assert off.max() < (1e-2 if pos else 2e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_footprint_in_bf16(bf16_isa, value):
    """Features by contiguous rows and by channels; what does not read the pixel is as it was."""
    problem = random_problem(channels=64, source=(9, 21), size=(16, 37), experts=2, activation="linear")
    clean = problem.run(backend="cpu", precision="bf16").prediction
    spoilt = problem.tensors["x"].clone()
    spoilt[0, 5, 4, 10] = value
    for x in (spoilt, spoilt.contiguous(memory_format=torch.channels_last)):
        found = problem.with_tensors(x=x).run(backend="cpu", precision="bf16").prediction
        changed = found.isnan() | found.isinf()
        assert changed[0].any() and torch.equal(found[~changed], clean[~changed])
        assert changed[0].any(dim=0).sum() < 8 * 8


def test_bf16_results_do_not_depend_on_the_number_of_threads(bf16_isa, threads):
    problem = random_problem(batch=2, channels=64, source=(20, 23), size=(35, 130), pos=True, skip_below=1e-3)
    found = {}
    for count in (1, 2, 3, 7):
        threads(count)
        found[count] = problem.run(backend="cpu", precision="bf16")
    for results in found.values():
        assert torch.equal(results.prediction, found[1].prediction) and torch.equal(results.entropy, found[1].entropy)


def test_float32_inputs_use_bf16_arithmetic_on_request_only(bf16_isa):
    auto, bf16, ieee = (random_problem().run(backend="cpu", precision=p).prediction for p in ("auto", "bf16", "ieee"))
    assert torch.equal(auto, ieee) and not torch.equal(auto, bf16)


def test_bfloat16_features_get_the_faster_arithmetic(monkeypatch):
    for name in _build.native().module.supported_isas():
        monkeypatch.setenv(native.ISA_VARIABLE, name)
        problem = random_problem(dtype=torch.bfloat16, channels=32)
        named = {p: problem.run(backend="cpu", precision=p).prediction for p in ("auto", "ieee")}
        assert torch.equal(named["auto"], named["ieee"]) == (name != "amx")
        if name == "amx":
            assert torch.equal(named["auto"], problem.run(backend="cpu", precision="bf16").prediction)


def test_bf16_arithmetic_without_the_instructions_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setenv(native.ISA_VARIABLE, "portable")
    with pytest.raises(RuntimeError, match="avx512_bf16"):
        random_problem().run(backend="cpu", precision="bf16")


@pytest.mark.parametrize("count", [1, 2])
def test_gradients_below_the_normal_floats_are_flushed_and_nothing_else(threads, count):
    """They would take a processor's slow path (20 times the time of a backward pass); the caller's arithmetic stays."""
    threads(count)
    problem = random_problem(pos=True, gate_logits=True).leaves()
    outputs = problem.run(backend="cpu")
    (outputs.prediction.sum() * 1e-42 + outputs.entropy.sum() * 1e-42).backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in problem.tensors.values())
    assert (torch.full((64,), 1e-38) * 0.01).all()


def test_every_float16_value_is_read_right():
    """All finite ones, denormals included, pass through a head that is the identity."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.float16)
    values = values[values.isfinite()].view(1, 1, 64, -1)
    w1 = torch.zeros(1, 2, 1, 3, 3)
    w1[0, 0, 0, 1, 1], w1[0, 1, 0, 1, 1] = 1.0, -1.0  # relu(v) - relu(-v) = v
    output = moe_head(
        values, values.shape[-2:], expert_w1=w1, expert_b1=torch.zeros(1, 2),
        expert_w2=torch.tensor([[[1.0, -1.0]]]), expert_b2=torch.zeros(1, 1),
        activation="linear", conf_activation=None, backend="cpu",
    )  # fmt: skip
    assert torch.equal(output.prediction, values.float())


def test_memory_does_not_grow_with_height_or_frames(threads):
    """The peak of a fresh process would be surer, and slower; this one bounds what a larger call adds."""
    threads(1)
    head = {"channels": 32, "experts": 2, "hidden": 32, "gate_hidden": 32}

    def added(batch: int, source: int) -> float:
        problem = random_problem(batch=batch, source=(source, 40), size=(2 * source, 80), **head)
        outputs = problem.run(backend="cpu")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(2):
            outputs = problem.run(backend="cpu")
        del outputs
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024

    added(1, 20)
    assert added(4, 160) < 8.0  # MB; the upsampled features alone would be 13 MB a frame
