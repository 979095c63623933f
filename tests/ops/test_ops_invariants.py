"""What op.md says must hold for every input, by property: no reference value needed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support import truth
from support.problems import GATE, Problem, random_problem

MODES = ("mean", "argmax", "switch")
# The fixture `runner` is a constant, so it may be shared by all examples.
properties = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def problems(**fixed):
    """Small random calls of every kind."""
    side = st.integers(1, 6)
    arguments = {
        "batch": st.integers(1, 2),
        "channels": st.sampled_from([2, 4, 6]),
        "source": st.tuples(side, side),
        "size": st.tuples(side, side),
        "experts": st.integers(2, 6),
        "pos": st.booleans(),
        "gate_logits": st.booleans(),
        "prediction_channels": st.integers(1, 3),
        "seed": st.integers(0, 10**6),
        "mode": st.sampled_from(MODES),
        "temperature": st.floats(0.05, 20),
    }
    return st.fixed_dictionaries(arguments | {name: st.just(value) for name, value in fixed.items()})


def assert_close(actual, expected, tolerance=2e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def single_expert(problem: Problem, k: int) -> Problem:
    tensors = {name: t for name, t in problem.tensors.items() if name not in (*GATE, "gate_logits")}
    tensors |= {name: t[k : k + 1] for name, t in tensors.items() if name.startswith("expert")}
    return Problem(tensors, problem.size, problem.pos, problem.options)


@properties
@given(arguments=problems())
def test_copies_of_one_expert_give_the_single_head(runner, arguments):
    problem = random_problem(device=runner.device, **arguments)
    single = single_expert(problem, 0)
    copies = {
        name: t.expand(problem.experts, *t.shape[1:]) for name, t in single.tensors.items() if name.startswith("expert")
    }
    output = problem.with_tensors(**copies).run(backend=runner.backend)
    expected = single.run(backend=runner.backend)
    assert_close(output.prediction, expected.prediction)
    assert_close(output.confidence, expected.confidence)


@properties
@given(arguments=problems())
def test_weights_sum_to_one_and_entropy_is_bounded(runner, arguments):
    problem = random_problem(device=runner.device, **arguments)
    output = problem.run(backend=runner.backend, return_experts=True)
    assert ((output.weights >= 0) & (output.weights <= 1)).all()
    assert_close(output.weights.sum(1), torch.ones_like(output.entropy), 1e-6)
    assert (output.entropy >= 0).all()
    assert (output.entropy <= torch.tensor(math.log(problem.experts))).all()
    assert_close(output.entropy, torch.special.entr(output.weights).sum(1), 1e-5)


@properties
@given(arguments=problems(), data=st.data())
def test_permuting_the_experts_permutes_their_weights_and_nothing_else(runner, arguments, data):
    problem = random_problem(device=runner.device, **arguments)
    order = data.draw(st.permutations(range(problem.experts)))
    permuted = {
        name: t[order] for name, t in problem.tensors.items() if name.startswith(("expert", "gate_w2", "gate_b2"))
    }
    if "gate_logits" in problem.tensors:
        permuted["gate_logits"] = problem.tensors["gate_logits"][:, order]
    before = problem.run(backend=runner.backend, return_experts=True)
    after = problem.with_tensors(**permuted).run(backend=runner.backend, return_experts=True)
    assert_close(after.weights, before.weights[:, order])
    assert_close(after.hypotheses, before.hypotheses[:, order])
    assert_close(after.entropy, before.entropy)
    clear = truth.decided(problem)
    assert_close(after.prediction * clear.unsqueeze(1), before.prediction * clear.unsqueeze(1))
    assert_close(after.confidence * clear, before.confidence * clear)


@properties
@given(arguments=problems(mode="mean"), temperature=st.sampled_from([1e-6, 1e-30, 1e-44]))
def test_a_vanishing_temperature_is_argmax(runner, arguments, temperature):
    problem = random_problem(device=runner.device, **arguments)
    cold = problem.run(backend=runner.backend, temperature=temperature, return_experts=True)
    chosen = problem.with_options(mode="argmax").run(backend=runner.backend)
    unique = truth.decided(problem.with_options(mode="argmax"))
    assert all(o.isfinite().all() for o in cold)
    assert_close(cold.prediction * unique.unsqueeze(1), chosen.prediction * unique.unsqueeze(1))
    assert_close(cold.confidence * unique, chosen.confidence * unique)
    assert_close(cold.entropy * unique, torch.zeros_like(cold.entropy))


@properties
@given(arguments=problems(), logit=st.floats(-3, 3))
def test_one_logit_for_all_experts_changes_nothing(runner, arguments, logit):
    """Softmax does not see a shift, which a single expert's weight of 1 relies on."""
    problem = random_problem(device=runner.device, **(arguments | {"gate_logits": True}))
    shifted = problem.with_tensors(gate_logits=problem.tensors["gate_logits"] + logit)
    before = problem.run(backend=runner.backend, return_experts=True)
    after = shifted.run(backend=runner.backend, return_experts=True)
    assert_close(after.weights, before.weights, 1e-4)


@properties
@given(arguments=problems(mode="mean"), index=st.integers(0, 1))
def test_frames_do_not_see_each_other(runner, arguments, index):
    problem = random_problem(device=runner.device, **(arguments | {"batch": 2}))
    alone = {name: t[index : index + 1] for name, t in problem.tensors.items() if name in ("x", "gate_logits")}
    both = problem.run(backend=runner.backend)
    one = problem.with_tensors(**alone).run(backend=runner.backend)
    for whole, part in zip(both[:3], one[:3], strict=True):
        assert torch.equal(whole[index : index + 1], part)


@pytest.mark.parametrize("experts", [*range(1, 17)])
def test_zero_logits_give_exactly_uniform_weights(runner, experts):
    problem = random_problem(experts=experts, device=runner.device)
    zero = {name: torch.zeros_like(problem.tensors[name]) for name in ("gate_w2", "gate_b2")}
    output = problem.with_tensors(**zero).run(backend=runner.backend, return_experts=True)
    assert (output.weights == torch.tensor(1 / experts)).all()
    assert_close(output.entropy, torch.full_like(output.entropy, math.log(experts)), 1e-6)


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-4, 15.0, 60.0])
@pytest.mark.parametrize("experts", [2, 3, 5, 7, 11, 13, 16])
def test_entropy_is_bounded_where_rounding_could_break_it(runner, experts, spread):
    """Next to log K and next to 0."""
    problem = random_problem(experts=experts, gate_logits=True, size=(12, 13), device=runner.device)
    zero = {name: torch.zeros_like(problem.tensors[name]) for name in ("gate_w2", "gate_b2")}
    logits = spread * problem.tensors["gate_logits"]
    entropy = problem.with_tensors(**zero, gate_logits=logits).run(backend=runner.backend).entropy
    assert (entropy >= 0).all() and (entropy <= torch.tensor(math.log(experts))).all()


@pytest.mark.parametrize("mode", ["argmax", "switch"])
def test_ties_go_to_the_lowest_index(runner, mode):
    problem = random_problem(experts=4, mode=mode, gap=0.0, device=runner.device)
    zero = torch.zeros_like(problem.tensors["gate_w2"])
    bias = torch.tensor([-1.0, 2.0, 2.0, 2.0], device=runner.device)
    output = problem.with_tensors(gate_w2=zero, gate_b2=bias).run(backend=runner.backend, return_experts=True)
    assert torch.equal(output.prediction, output.hypotheses[:, 1])


def test_switch_listens_only_to_experts_above_one_percent(runner):
    """Two experts differ wildly; whether the second is heard is decided by its weight alone."""
    problem = random_problem(experts=2, mode="switch", device=runner.device)
    t = problem.tensors
    constant = {name: torch.zeros_like(t[name]) for name in ("expert_w1", "expert_b1", "expert_w2", "gate_w2")}
    apart = torch.tensor([[0.0, 0.0], [3.0, 0.0]], device=runner.device)
    for weight, switched in ((0.011, True), (0.009, False)):
        logits = torch.tensor([0.0, math.log(weight / (1 - weight))], device=runner.device)
        output = problem.with_tensors(**constant, expert_b2=apart, gate_b2=logits).run(backend=runner.backend)
        expected = 1.0 if switched else 1 + weight * (math.exp(3.0) - 1)
        assert_close(output.prediction, torch.full_like(output.prediction, expected), 1e-5)


@pytest.mark.parametrize(("gap", "switched"), [(0.4, True), (0.6, False), (200.0, False), (1e30, False)])
def test_switch_compares_logarithms_with_the_gap(runner, gap, switched):
    problem = random_problem(experts=2, mode="switch", gap=gap, device=runner.device)
    t = problem.tensors
    constant = {
        name: torch.zeros_like(t[name]) for name in ("expert_w1", "expert_b1", "expert_w2", "gate_w2", "gate_b2")
    }
    apart = torch.tensor([[0.0, 0.0], [0.5, 0.0]], device=runner.device)  # depths 1 and e^0.5
    output = problem.with_tensors(**constant, expert_b2=apart).run(backend=runner.backend)
    expected = 1.0 if switched else (1 + math.exp(0.5)) / 2
    assert_close(output.prediction, torch.full_like(output.prediction, expected), 1e-5)


def test_switch_with_an_expert_at_zero_depth_switches_at_any_gap(runner):
    """max > exp(gap) * 0 is true of every positive max."""
    problem = random_problem(experts=2, mode="switch", gap=1e30, activation="relu", device=runner.device)
    t = problem.tensors
    constant = {
        name: torch.zeros_like(t[name]) for name in ("expert_w1", "expert_b1", "expert_w2", "gate_w2", "gate_b2")
    }
    apart = torch.tensor([[-1.0, 0.0], [4.0, 0.0]], device=runner.device)
    output = problem.with_tensors(**constant, expert_b2=apart).run(backend=runner.backend)
    assert (output.prediction == 0).all()


@pytest.mark.parametrize("mode", ["mean", "argmax"])
@pytest.mark.parametrize("skip_below", [1e-6, 1e-3, 1e-2])
def test_what_skipping_may_cost(runner, skip_below, mode):
    """An expert of 1e4 times the others' depth has a weight just below and just above the threshold, by tile."""
    size = (40, 72)
    problem = random_problem(batch=1, experts=3, size=size, source=(20, 36), mode=mode, device=runner.device)
    t = problem.tensors
    huge = t["expert_b2"].clone()
    huge[2, 0] = math.log(1e4)
    around = torch.linspace(math.log(skip_below) - 2, math.log(skip_below) + 2, size[0] * size[1], device=runner.device)
    logits = torch.zeros(1, 3, *size, device=runner.device)
    logits[:, 2] = around.view(size)
    planted = problem.with_tensors(
        expert_b2=huge,
        gate_w2=torch.zeros_like(t["gate_w2"]),
        gate_b2=torch.zeros_like(t["gate_b2"]),
        gate_logits=logits,
    )
    exact = planted.run(backend=runner.backend, return_experts=True)
    skipping = planted.run(backend=runner.backend, skip_below=skip_below)
    spread = (exact.hypotheses - exact.prediction.unsqueeze(1)).abs().amax(1)
    bound = 2 * skip_below * spread + 1e-5 * exact.prediction.abs()
    assert ((skipping.prediction - exact.prediction).abs() <= bound).all()
    again = planted.run(backend=runner.backend, skip_below=skip_below)
    assert all(torch.equal(a, b) for a, b in zip(skipping[:3], again[:3], strict=True))


def test_skipping_tiles_do_not_depend_on_the_batch(runner):
    problem = random_problem(batch=3, experts=4, size=(40, 72), source=(20, 36), temperature=0.1, device=runner.device)
    whole = problem.run(backend=runner.backend, skip_below=1e-2)
    for b in range(3):
        frame = problem.with_tensors(x=problem.tensors["x"][b : b + 1]).run(backend=runner.backend, skip_below=1e-2)
        assert torch.equal(frame.prediction, whole.prediction[b : b + 1])


def test_experts_are_returned_on_request_alone(runner):
    problem = random_problem(device=runner.device)
    output = problem.run(backend=runner.backend)
    assert output.weights is None and output.hypotheses is None
    output = problem.run(backend=runner.backend, return_experts=True)
    assert output.weights.shape == (2, 3, 7, 9) and output.hypotheses.shape == (2, 3, 1, 7, 9)


@pytest.mark.parametrize("options", [{}, {"return_experts": True}, {"conf_activation": None}], ids=str)
def test_empty_batches_give_empty_outputs_and_zero_gradients(runner, options):
    problem = random_problem(batch=0, pos=True, gate_logits=True, device=runner.device, **options).leaves()
    output = problem.run(backend=runner.backend)
    shapes = {"prediction": (0, 1, 7, 9), "confidence": (0, 7, 9), "entropy": (0, 7, 9)}
    shapes |= {"weights": (0, 3, 7, 9), "hypotheses": (0, 3, 1, 7, 9)}
    for name, value in output._asdict().items():
        absent = (name == "confidence" and "conf_activation" in options) or (
            name in ("weights", "hypotheses") and "return_experts" not in options
        )
        assert (value is None) if absent else (tuple(value.shape) == shapes[name] and value.dtype == torch.float32)
    output.prediction.sum().backward()
    for name, leaf in problem.tensors.items():
        assert leaf.grad.shape == leaf.shape and not leaf.grad.any(), name
