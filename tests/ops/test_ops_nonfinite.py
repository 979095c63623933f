"""NaN, infinity and numbers at the edge: what must spread, what must not, and which gradients stay finite."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from support import truth
from support.problems import random_problem

SIZES = [
    ((6, 7), (11, 17)),
    ((9, 8), (9, 8)),
    ((8, 9), (5, 4)),
    ((3, 3), (12, 10)),
    ((5, 1), (9, 4)),
    ((1, 6), (4, 11)),
]


def positions(source, target):
    return torch.arange(target, dtype=torch.float64) * ((source - 1) / (target - 1) if target > 1 else 0.0)


def reached(source, target, index, margin):
    """Targets along one axis whose 3-tap kernel meets source pixel ``index``, or one up to ``margin`` beside it.

    ``margin = 0``: only those that read it with a weight above 0.
    """
    distance = (positions(source, target) - index).abs()
    if source == target:
        reads = (distance <= margin).double()
    else:
        reads = (distance < 1 + margin - 1e-9).double()
    return F.max_pool1d(reads[None, None], 3, stride=1, padding=1)[0, 0].bool()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("source", "size"), SIZES)
def test_a_bad_source_pixel_reaches_its_footprint_and_no_further(runner, source, size, value):
    problem = random_problem(source=source, size=size, batch=2, pos=True, device=runner.device)
    clean = problem.run(backend=runner.backend, return_experts=True)
    for row, column in {(0, 0), (source[0] // 2, source[1] // 2), (source[0] - 1, source[1] - 1)}:
        x = problem.tensors["x"].clone()
        x[1, 2, row, column] = value
        dirty = problem.with_tensors(x=x).run(backend=runner.backend, return_experts=True)
        inside, around = (
            reached(source[0], size[0], row, margin)[:, None] & reached(source[1], size[1], column, margin)[None]
            for margin in (0, 1)
        )
        for before, after in zip(clean, dirty, strict=True):
            assert torch.equal(after[0], before[0]), "another frame changed"
            assert torch.equal(after[1][..., ~around], before[1][..., ~around]), "outside the footprint"
            if math.isnan(value):
                assert after[1][..., inside].isnan().all(), "NaN was lost"


@pytest.mark.parametrize("mode", ["mean", "argmax", "switch"])
@pytest.mark.parametrize("source", ["gate_b2", "gate_logits"])
def test_a_nan_gate_gives_nan(runner, mode, source):
    problem = random_problem(gate_logits=True, mode=mode, device=runner.device)
    bad = problem.tensors[source].clone()
    bad[(1,) if source == "gate_b2" else (0, 1, 3, 4)] = math.nan
    output = problem.with_tensors(**{source: bad}).run(backend=runner.backend, return_experts=True)
    clean = problem.run(backend=runner.backend, return_experts=True)
    here = torch.zeros(2, 7, 9, dtype=torch.bool, device=runner.device)
    here[(...,) if source == "gate_b2" else (0, 3, 4)] = True
    for name in ("prediction", "confidence", "entropy", "weights"):
        after, before = getattr(output, name), getattr(clean, name)
        where = here if after.dim() == 3 else here.unsqueeze(1).expand_as(after)
        assert after[where].isnan().all() and torch.equal(after[~where], before[~where]), name
    assert torch.equal(output.hypotheses, clean.hypotheses)


def test_relu_keeps_nan(runner):
    """A NaN bias of one hidden unit poisons its expert, and through the sum over experts every pixel."""
    problem = random_problem(device=runner.device)
    bias = problem.tensors["expert_b1"].clone()
    bias[2, 0] = math.nan
    output = problem.with_tensors(expert_b1=bias).run(backend=runner.backend, return_experts=True)
    assert output.prediction.isnan().all() and output.hypotheses[:, 2].isnan().all()
    assert output.hypotheses[:, :2].isfinite().all() and output.entropy.isfinite().all()


def test_nan_does_not_hide_from_the_gradients(runner):
    """Wherever plain PyTorch's gradient is NaN, so is ours: a diverged training must be seen."""
    problem = random_problem(gate_logits=True, device=runner.device)
    x = problem.tensors["x"].clone()
    x[1, 2, 1, 1] = math.nan
    ours, plain = problem.with_tensors(x=x).leaves(), problem.with_tensors(x=x).leaves()
    ours.run(backend=runner.backend).prediction.sum().backward()
    truth.evaluate(plain).prediction.sum().backward()
    for name, leaf in ours.tensors.items():
        expected = plain.tensors[name].grad.isnan()
        assert expected.any() and leaf.grad[expected].isnan().all(), name


@pytest.mark.parametrize("scale", [200.0, -200.0, 1e4])
@pytest.mark.parametrize("mode", ["mean", "argmax", "switch"])
def test_extreme_logits_have_finite_and_right_gradients(runner, mode, scale):
    """Weights underflow to 0: the entropy is 0 log 0 = 0, and so is its gradient."""
    problem = random_problem(experts=3, mode=mode, gate_logits=True, device=runner.device)
    logits = torch.zeros_like(problem.tensors["gate_logits"])
    logits[:, 0], logits[:, 1] = scale, -scale
    problem = problem.with_tensors(gate_logits=logits).leaves()
    output = problem.run(backend=runner.backend, return_experts=True)
    assert all(o.isfinite().all() for o in output)
    assert (output.entropy < 1e-5).all()
    torch.autograd.backward([o.sum() for o in output])
    for name, leaf in problem.tensors.items():
        assert leaf.grad.isfinite().all(), name
    exact = problem.double().leaves()
    torch.autograd.backward([o.sum() for o in truth.evaluate(exact)])
    torch.testing.assert_close(
        problem.tensors["gate_logits"].grad.double(), exact.tensors["gate_logits"].grad, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("mode", ["argmax", "switch"])
def test_an_overflowing_expert_that_is_not_chosen_is_not_noticed(runner, mode):
    problem = random_problem(experts=3, mode=mode, device=runner.device)
    bias = problem.tensors["expert_b2"].clone()
    bias[1] = 200.0  # e^200 is infinite in float32
    gate = torch.tensor([4.0, -0.5, 0.0], device=runner.device)
    zero = torch.zeros_like(problem.tensors["gate_w2"])
    problem = problem.with_tensors(expert_b2=bias, gate_b2=gate, gate_w2=zero).leaves()
    output = problem.run(backend=runner.backend, return_experts=True)
    assert output.hypotheses[:, 1].isinf().all()
    assert torch.equal(output.prediction, output.hypotheses[:, 0])
    (output.prediction.sum() + output.confidence.sum() + output.entropy.sum()).backward()
    for name, leaf in problem.tensors.items():
        assert leaf.grad.isfinite().all(), name
        if name.startswith("expert"):
            assert not leaf.grad[1].any(), name


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 1e-45])
def test_extreme_logits_at_extreme_temperatures(runner, temperature):
    """200 / 1e-38 overflows; the weights must still be 1 and 0, and the entropy 0."""
    problem = random_problem(experts=3, gate_logits=True, temperature=temperature, device=runner.device)
    logits = torch.zeros_like(problem.tensors["gate_logits"])
    logits[:, 2] = 200.0
    output = problem.with_tensors(gate_logits=logits).run(backend=runner.backend, return_experts=True)
    assert torch.equal(output.weights[:, 2], torch.ones_like(output.entropy)) and not output.weights[:, :2].any()
    assert not output.entropy.any() and torch.equal(output.prediction, output.hypotheses[:, 2])


def test_a_logit_of_minus_infinity_switches_an_expert_off(runner):
    problem = random_problem(experts=3, gate_logits=True, device=runner.device)
    logits = problem.tensors["gate_logits"].clone()
    logits[:, 1] = -math.inf
    problem = problem.with_tensors(gate_logits=logits).leaves()
    output = problem.run(backend=runner.backend, return_experts=True)
    assert not output.weights[:, 1].any()
    kept = [0, 2]
    fewer = {name: t[kept] for name, t in problem.tensors.items() if name.startswith(("expert", "gate_w2", "gate_b2"))}
    expected = problem.with_tensors(**fewer, gate_logits=logits[:, kept]).run(backend=runner.backend)
    for name in ("prediction", "confidence", "entropy"):
        torch.testing.assert_close(getattr(output, name), getattr(expected, name), rtol=1e-5, atol=1e-6)
    torch.autograd.backward([o.sum() for o in output])
    assert all(leaf.grad.isfinite().all() for leaf in problem.tensors.values())
    assert not problem.tensors["gate_logits"].grad[:, 1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_outputs_beyond_the_input_dtype(runner, dtype):
    """e^12 does not fit into float16: outputs are float32 from the logarithm on."""
    problem = random_problem(experts=2, dtype=dtype, device=runner.device)
    bias = problem.tensors["expert_b2"].clone()
    bias[:, 0] = 12.0
    output = problem.with_tensors(expert_b2=bias).run(backend=runner.backend)
    assert output.prediction.dtype == torch.float32 and output.prediction.isfinite().all()
    assert output.prediction.max() > 65504
