"""The registered operators under everything that PyTorch does to operators."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import moe3d
from moe3d.functional import moe_head
from moe3d.ops.schema import moe_head_backward_op, moe_head_op
from support.problems import operator_arguments, random_problem

KINDS = [
    {"pos": True, "gate_logits": True},
    {"experts": 1, "gate": False, "conf_activation": None, "prediction_channels": 2},
    {"dtype": torch.bfloat16, "param_dtype": torch.float32, "mode": "argmax"},
    {"batch": 0},
]


def run_and_differentiate(call, problem):
    """Outputs and gradients of the sum of all outputs."""
    problem = problem.leaves()
    outputs = call(problem)
    sum(o.sum() for o in outputs if o is not None).backward()
    return outputs, {name: t.grad for name, t in problem.tensors.items()}


def assert_same(actual, expected):
    (outputs, grads), (expected_outputs, expected_grads) = actual, expected
    for a, b in (*zip(outputs, expected_outputs, strict=True), *((grads[n], g) for n, g in expected_grads.items())):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_opcheck(runner, kind):
    """Schema, fakes, autograd registration, and tracing with symbolic shapes."""
    problem = random_problem(device=runner.device, **kind)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(moe_head_op, operator_arguments(problem.leaves(), runner.backend), test_utils=checks)


@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
def test_opcheck_of_the_backward(runner, kind):
    problem = random_problem(device=runner.device, **kind)
    forward = operator_arguments(problem, runner.backend)
    cotangents = [torch.randn_like(o) if o.numel() else None for o in moe_head_op(*forward)]
    needs = [isinstance(t, torch.Tensor) for t in forward[:10]] + [False, False]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(moe_head_backward_op, (*forward, *cotangents, needs), test_utils=checks)


@pytest.fixture
def compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("how", ["aot_eager", "inductor"])
def test_compile_in_one_graph(runner, compiled, how):
    problem = random_problem(pos=True, gate_logits=True, return_experts=True, device=runner.device)
    problem = problem.with_tensors(x=problem.tensors["x"].contiguous(memory_format=torch.channels_last))

    def call(p):
        return p.run(backend=runner.backend)

    graph = torch.compile(call, fullgraph=True, backend=how)
    assert_same(run_and_differentiate(graph, problem), run_and_differentiate(call, problem))


def test_compile_with_dynamic_shapes(runner, compiled):
    """Frames, sizes and their ratio change; one graph serves them all.

    (The first sizes are unlike any other of the call, because PyTorch takes equal sizes for the same one.)
    """
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def call(x, height, width, weights):
        return moe_head(x, (height, width), backend=runner.backend, **weights)

    graph = torch.compile(call, fullgraph=True, backend=count, dynamic=True)
    for batch, source, size in ((8, (10, 11), (12, 13)), (3, (5, 6), (8, 11)), (2, (4, 3), (6, 13))):
        problem = random_problem(batch=batch, source=source, size=size, device=runner.device)
        weights = {n: t for n, t in problem.tensors.items() if n != "x"}
        outputs = graph(problem.tensors["x"], *size, weights)
        assert torch.equal(outputs.prediction, problem.run(backend=runner.backend).prediction)
    assert len(graphs) == 1


def test_compile_while_a_number_changes(runner, compiled):
    """An annealed temperature: PyTorch makes a float that varies symbolic, which must not break the graph."""
    head = moe3d.MoEHead(6, num_experts=3, expert_hidden=5, gate_hidden=4, backend=runner.backend).to(runner.device)
    nn.init.normal_(head.gate_w2, generator=torch.Generator(runner.device).manual_seed(0))
    graph = torch.compile(head, fullgraph=True, backend="eager")
    x = random_problem(device=runner.device).tensors["x"]
    for temperature in (1.0, 0.5, 0.25, 0.2):
        head.temperature = temperature
        assert torch.equal(graph(x, (7, 9)).entropy, head(x, (7, 9)).entropy)


class Doubling(nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.head = moe3d.MoEHead(6, num_experts=3, expert_hidden=5, gate_hidden=4, backend=backend)

    def forward(self, x):
        return self.head(x, (2 * x.shape[2], 2 * x.shape[3]))


def test_export(runner):
    module = Doubling(runner.backend).to(runner.device).eval()
    x = random_problem(device=runner.device).tensors["x"]
    sizes = {"x": {0: torch.export.Dim("b"), 2: torch.export.Dim("h", min=2), 3: torch.export.Dim("w", min=2)}}
    program = torch.export.export(module, (x,), dynamic_shapes=sizes)
    operators = {str(node.target) for node in program.graph.nodes}
    assert "moe3d.moe_head.default" in operators
    for shape in ((2, 6, 3, 4), (3, 6, 5, 2)):
        x = torch.randn(shape, device=runner.device)
        assert torch.equal(program.module()(x).prediction, module(x).prediction)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(runner, use_reentrant):
    problem = random_problem(pos=True, device=runner.device, return_experts=True)

    def through_checkpoint(p):
        names = list(p.tensors)
        return checkpoint(
            lambda *tensors: p.with_tensors(**dict(zip(names, tensors, strict=True))).run(backend=runner.backend),
            *p.tensors.values(),
            use_reentrant=use_reentrant,
        )

    plain = run_and_differentiate(lambda p: p.run(backend=runner.backend), problem)
    assert_same(run_and_differentiate(through_checkpoint, problem), plain)


@pytest.mark.parametrize("precision", ["auto", "ieee"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_casts_as_for_a_convolution(runner, dtype, precision, backward_inside):
    """x and the parameters take the autocast dtype; outputs stay float32, and so does the arithmetic under "ieee"."""
    problem = random_problem(gate_logits=True, pos=True, device=runner.device)
    call = {"backend": runner.backend, "precision": precision}
    tensors = problem.leaves().tensors
    with torch.autocast(runner.device, dtype=dtype):
        convolved = nn.functional.conv2d(tensors["x"], tensors["gate_w1"])
        outputs = problem.with_tensors(**tensors).run(**call)
        loss = outputs.prediction.sum() + outputs.entropy.sum()
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    assert convolved.dtype == dtype and outputs.prediction.dtype == torch.float32

    cast = {name: t.to(dtype) if name != "gate_logits" else t for name, t in problem.tensors.items()}
    by_hand = problem.with_tensors(**cast).leaves()
    expected = by_hand.run(**call)
    (expected.prediction.sum() + expected.entropy.sum()).backward()
    assert torch.equal(outputs.prediction, expected.prediction)
    for name, leaf in tensors.items():
        assert leaf.grad.dtype == torch.float32 and torch.equal(leaf.grad, by_hand.tensors[name].grad.float()), name


def test_compile_under_autocast(runner, compiled):
    problem = random_problem(gate_logits=True, device=runner.device)

    def call(p):
        return p.run(backend=runner.backend)

    graph = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.autocast(runner.device, dtype=torch.bfloat16):
        assert_same(run_and_differentiate(graph, problem), run_and_differentiate(call, problem))


def test_autocast_leaves_float64_as_it_is():
    problem = random_problem(dtype=torch.float64)
    expected = problem.run().prediction
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(problem.run().prediction, expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(runner, context):
    problem = random_problem(device=runner.device).leaves()
    with context():
        output = problem.run(backend=runner.backend)
    assert not output.prediction.requires_grad
    assert torch.equal(output.prediction, problem.run(backend=runner.backend).prediction)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_global_defaults_change_nothing(runner, default):
    """Default dtype and default device are the user's, not the operation's."""
    problem = random_problem(pos=True, device=runner.device, return_experts=True)
    cotangent = torch.randn_like(problem.run().entropy)

    def outputs_and_gradients():
        leaves = problem.leaves()
        outputs = leaves.run(backend=runner.backend)
        torch.autograd.backward((outputs.prediction[:, 0], outputs.entropy), (cotangent, cotangent))
        return [*(t for t in outputs if t is not None), *(leaf.grad for leaf in leaves.tensors.values())]

    expected = outputs_and_gradients()
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            found = outputs_and_gradients()
    finally:
        torch.set_default_dtype(torch.float32)
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_vmap_says_what_to_do_instead():
    problem = random_problem()
    for name in ("x", "expert_b1"):
        with pytest.raises(RuntimeError, match=r"moe_head does not support torch\.vmap: put the extra dimension into"):
            torch.vmap(lambda t, name=name: problem.with_tensors(**{name: t}).run().prediction)(
                torch.stack(2 * [problem.tensors[name]])
            )


@pytest.mark.parametrize("name", ["x", "gate_w2", "gate_logits"])
def test_forward_mode_has_no_derivative(name):
    problem = random_problem(gate_logits=True)
    value = problem.tensors[name]
    with pytest.raises(RuntimeError, match="moe_head has no forward-mode derivative: use reverse mode"):
        torch.func.jvp(lambda t: problem.with_tensors(**{name: t}).run().prediction, (value,), (value,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(value, value)
        with pytest.raises(RuntimeError, match="moe_head has no forward-mode derivative"):
            problem.with_tensors(**{name: dual}).run()


def test_there_is_no_second_derivative(runner):
    problem = random_problem(device=runner.device).leaves()
    x = problem.tensors["x"]
    (grad,) = torch.autograd.grad(problem.run(backend=runner.backend).prediction.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="moe_head has no second derivative"):
        grad.square().sum().backward()
