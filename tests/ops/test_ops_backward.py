"""The backward operator: correct to the last digit of float64, deterministic, and no more work than was asked for."""

from __future__ import annotations

import pytest
import torch

from moe3d.ops import reference
from moe3d.ops.schema import moe_head_backward_op, moe_head_op
from moe3d.ops.types import HeadTensors
from support import truth
from support.problems import Problem, operator_arguments, random_problem


def gradients(problem: Problem, names=None, **call):
    """Gradients of a fixed random functional of all outputs, by name; None where a tensor was not asked for."""
    names = problem.tensors.keys() if names is None else names
    tensors = {n: t.detach().clone().requires_grad_(n in names) for n, t in problem.tensors.items()}
    outputs = problem.with_tensors(**tensors).run(return_experts=True, **call)
    generator = torch.Generator().manual_seed(3)
    loss = sum((o * torch.randn(o.shape, generator=generator).to(o)).sum() for o in outputs if o is not None)
    loss.backward()
    return {name: t.grad for name, t in tensors.items()}


@pytest.mark.parametrize(
    "case",
    [
        {"pos": True, "gate_logits": True},
        {"activation": "xy_inv_log", "prediction_channels": 3, "conf_activation": "expp0"},
        {"activation": "norm_exp", "prediction_channels": 3, "conf_activation": "sigmoid", "mode": "argmax"},
        {"activation": "norm", "prediction_channels": 2, "conf_activation": None},
        {"activation": "inv_log", "temperature": 0.4, "source": (1, 3)},
        {"activation": "relu", "mode": "switch", "experts": 4},
        {"activation": "sigmoid", "mode": "switch", "source": (4, 5), "size": (3, 2)},
        {"activation": "linear", "experts": 1, "gate": False, "size": (1, 5)},
    ],
    ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()),
)
def test_gradcheck_in_float64(case):
    """Numerical differences of the op itself, along random directions: no second implementation is involved."""
    arguments = {"batch": 2, "channels": 2, "hidden": 2, "gate_hidden": 2, "source": (2, 3), "size": (4, 4)} | case
    seed = next(
        s
        for s in range(100)
        if truth.distance_to_kinks(p := random_problem(dtype=torch.float64, seed=s, **arguments)) > 1e-3
        and truth.decided(p.with_tensors(x=p.tensors["x"].float())).all()
    )
    problem = random_problem(dtype=torch.float64, seed=seed, **arguments).leaves()
    names = list(problem.tensors)

    def outputs(*tensors):
        found = problem.with_tensors(**dict(zip(names, tensors, strict=True))).run(return_experts=True)
        return tuple(o for o in found if o is not None)

    assert torch.autograd.gradcheck(outputs, tuple(problem.tensors.values()), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_is_bitwise_deterministic(runner, dtype):
    problem = random_problem(
        batch=3,
        channels=16,
        hidden=8,
        source=(16, 20),
        size=(28, 35),
        dtype=dtype,
        gate_logits=True,
        device=runner.device,
    )
    first = gradients(problem, backend=runner.backend)
    for _ in range(3):
        again = gradients(problem, backend=runner.backend)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("name", ["x", *HeadTensors._fields[1:10]])
def test_each_gradient_alone_is_the_one_among_all(runner, name):
    problem = random_problem(gate_logits=True, pos=True, device=runner.device)
    together = gradients(problem, backend=runner.backend)
    alone = gradients(problem, names=[name], backend=runner.backend)
    assert all((g is not None) == (n == name) for n, g in alone.items())
    torch.testing.assert_close(alone[name], together[name], rtol=1e-6, atol=1e-6)
    rest = gradients(problem, names=[n for n in problem.tensors if n != name], backend=runner.backend)
    assert rest[name] is None
    for other in problem.tensors.keys() - {name}:
        torch.testing.assert_close(rest[other], together[other], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", HeadTensors._fields[:10])
def test_the_operator_returns_empty_tensors_for_what_is_not_needed(runner, name):
    problem = random_problem(gate_logits=True, device=runner.device)
    needs = [field == name for field in HeadTensors._fields]
    cotangents = (torch.ones(2, 1, 7, 9, device=runner.device), None, None, None, None)
    found = moe_head_backward_op(*operator_arguments(problem, runner.backend), *cotangents, needs)
    for field, gradient in zip(HeadTensors._fields, found, strict=True):
        assert gradient.numel() == (problem.tensors[name].numel() if field == name else 0)


ALL_LAYERS = [f"{part}_{t}" for part in ("expert", "gate") for t in ("w1", "b1", "w2", "b2")]


@pytest.mark.parametrize(
    ("names", "weights", "hidden", "inputs"),
    [
        (["x"], 0, 2, 1),
        (["expert_b2"], 0, 0, 0),
        (["gate_logits"], 0, 0, 0),
        (["expert_w2", "gate_b2"], 1, 0, 0),
        (["expert_w1"], 1, 2, 0),
        (ALL_LAYERS, 3, 2, 0),
        (["x", *ALL_LAYERS, "gate_logits"], 3, 2, 1),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, list) else str(v),
)
def test_reference_computes_no_gradient_that_is_not_needed(monkeypatch, names, weights, hidden, inputs):
    """Counted at the expensive calls, per frame: a frozen backbone must not pay for the gradient to x."""
    calls = {}
    for owner, function in (
        (reference, "conv2d_weight"),
        (reference.F, "conv_transpose2d"),
        (reference, "conv2d_input"),
    ):
        calls[function] = 0
        real = getattr(owner, function)

        def spy(*args, _function=function, _real=real, **kwargs):
            calls[_function] += 1
            return _real(*args, **kwargs)

        monkeypatch.setattr(owner, function, spy)
    gradients(random_problem(batch=1, gate_logits=True), names=names, backend="reference")
    assert list(calls.values()) == [weights, hidden, inputs]


@pytest.mark.parametrize("output", ["prediction", "confidence", "entropy", "weights", "hypotheses"])
def test_each_output_alone_may_be_used(runner, output):
    problem = random_problem(device=runner.device).leaves()
    getattr(problem.run(backend=runner.backend, return_experts=True), output).square().sum().backward()
    exact = problem.double().leaves()
    getattr(truth.evaluate(exact), output).square().sum().backward()
    for name, leaf in problem.tensors.items():
        expected = exact.tensors[name].grad
        expected = torch.zeros_like(leaf, dtype=torch.float64) if expected is None else expected
        torch.testing.assert_close(
            leaf.grad.double(), expected, rtol=1e-4, atol=1e-4 * (1 + expected.abs().max().item())
        )


@pytest.mark.parametrize("mode", ["argmax", "switch"])
def test_only_the_chosen_expert_learns_from_the_prediction(runner, mode):
    """And the gate not at all, except from entropy and weights."""
    problem = random_problem(experts=3, mode=mode, gap=0.0, device=runner.device)
    constant = torch.tensor([0.0, 2.0, 1.0], device=runner.device)
    zero = torch.zeros_like(problem.tensors["gate_w2"])
    problem = problem.with_tensors(gate_w2=zero, gate_b2=constant).leaves()
    output = problem.run(backend=runner.backend)
    (output.prediction.sum() + output.confidence.sum()).backward(retain_graph=True)
    for name in ("expert_w1", "expert_b1", "expert_w2", "expert_b2"):
        grad = problem.tensors[name].grad
        assert grad[1].any() and not grad[0].any() and not grad[2].any(), name
    if mode == "argmax":
        assert not problem.tensors["gate_b2"].grad.any() and not problem.tensors["gate_w1"].grad.any()
    output.entropy.sum().backward()
    assert problem.tensors["gate_b2"].grad.any()


def test_forward_keeps_its_inputs_and_nothing_else(runner):
    """Hidden activations would be the largest tensors by far; they are recomputed."""
    problem = random_problem(pos=True, gate_logits=True, device=runner.device).leaves()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        problem.run(backend=runner.backend, return_experts=True)
    given = {t.data_ptr() for t in (*problem.tensors.values(), *problem.pos)}
    assert set(kept) == given


@pytest.mark.parametrize("accumulate", [False, True])
def test_non_contiguous_cotangents(runner, accumulate):
    """``sum()`` sends an expanded scalar; a transposed loss sends a transposed cotangent."""
    problem = random_problem(device=runner.device).leaves()
    output = problem.run(backend=runner.backend)
    weights = torch.randn(9, 7, generator=torch.Generator().manual_seed(1)).to(runner.device)
    loss = (output.prediction.mT * weights).sum() + output.entropy.sum()
    loss.backward(retain_graph=accumulate)
    exact = problem.double().leaves()
    expected = truth.evaluate(exact)
    ((expected.prediction.mT * weights.double()).sum() + expected.entropy.sum()).backward()
    if accumulate:
        loss.backward()
    for name, leaf in problem.tensors.items():
        grad = exact.tensors[name].grad * (1 + accumulate)
        torch.testing.assert_close(leaf.grad.double(), grad, rtol=1e-4, atol=1e-4 * (1 + grad.abs().max().item()))


@pytest.mark.parametrize("source", range(1, 9))
def test_the_adjoint_of_upsampling(source):
    """<upsample(x), g> gradients as PyTorch's own, to the last digits of float64."""
    for target in (*range(1, 20), 37):
        x = torch.randn(1, 2, source, 5, dtype=torch.float64, requires_grad=True)
        y = torch.nn.functional.interpolate(x, size=(target, 9), mode="bilinear", align_corners=True)
        g = torch.randn_like(y)
        (expected,) = torch.autograd.grad(y, x, g)
        torch.testing.assert_close(reference._upsample_vjp(g, (source, 5)), expected, rtol=1e-12, atol=1e-12)


def test_outputs_are_fresh_tensors():
    """An operator must not return its inputs, nor one tensor twice."""
    problem = random_problem(experts=1, gate=False, activation="linear", conf_activation=None)
    outputs = moe_head_op(*operator_arguments(problem))
    seen = [t.untyped_storage().data_ptr() for t in (*outputs, *problem.tensors.values()) if t.numel()]
    assert len(seen) == len(set(seen))
