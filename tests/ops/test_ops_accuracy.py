"""Every backend that can run, against the float64 truth by op.md's rule: outputs and all gradients."""

from __future__ import annotations

import pytest
import torch

from moe3d.benchmark.case import arithmetic
from support import truth
from support.accuracy import assert_accurate_to_tf32, assert_as_accurate_as_pytorch
from support.problems import Problem, random_problem

POSITIVE = ("exp", "relu", "sigmoid")
FUNCTIONS = [
    (activation, confidence, mode)
    for activation in truth.PREDICTION
    for confidence in (*truth.CONFIDENCE, None)
    for mode in ("mean", "argmax", "switch")
    if mode != "switch" or activation in POSITIVE
]
# source -> output: up, the same, down, one row, one column, one pixel, both ways at once, and a ratio like VGGT's 8/14
SIZES = [
    ((3, 4), (7, 9)),
    ((5, 7), (5, 7)),
    ((6, 8), (3, 5)),
    ((1, 5), (4, 9)),
    ((5, 1), (9, 4)),
    ((1, 1), (6, 5)),
    ((3, 4), (1, 9)),
    ((3, 4), (7, 1)),
    ((4, 4), (1, 1)),
    ((1, 1), (1, 1)),
    ((2, 7), (8, 3)),
    ((8, 16), (14, 28)),
]


@pytest.mark.parametrize(("activation", "conf_activation", "mode"), FUNCTIONS)
def test_activations_and_modes(runner, activation, conf_activation, mode):
    channels = 3 if activation in ("xy_inv_log", "norm") else 1
    assert_as_accurate_as_pytorch(
        runner, activation=activation, conf_activation=conf_activation, mode=mode, prediction_channels=channels
    )


@pytest.mark.parametrize("mode", ["mean", "argmax", "switch"])
@pytest.mark.parametrize("prediction_channels", [1, 3])
@pytest.mark.parametrize("experts", [1, 2, 3, 4, 7, 16])
def test_experts_and_channels(runner, experts, prediction_channels, mode):
    assert_as_accurate_as_pytorch(runner, experts=experts, prediction_channels=prediction_channels, mode=mode)


@pytest.mark.parametrize(
    "extras", [{}, {"pos": True}, {"gate_logits": True}, {"pos": True, "gate_logits": True}], ids=str
)
@pytest.mark.parametrize(("source", "size"), SIZES)
def test_sizes_positions_and_logits(runner, source, size, extras):
    assert_as_accurate_as_pytorch(runner, source=source, size=size, **extras)


@pytest.mark.parametrize("mode", ["mean", "argmax"])
@pytest.mark.parametrize("gate", [False, True], ids=["no gate", "gate"])
def test_a_single_expert(runner, gate, mode):
    assert_as_accurate_as_pytorch(runner, experts=1, gate=gate, mode=mode, pos=True)


@pytest.mark.parametrize("width", [(1, 1), (2, 3), (16, 8), (33, 17)], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 5, 16, 33])
def test_channel_counts(runner, channels, width):
    hidden, gate_hidden = width
    assert_as_accurate_as_pytorch(runner, channels=channels, hidden=hidden, gate_hidden=gate_hidden)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("temperature", [0.1, 7.0])
def test_batches_and_temperatures(runner, batch, temperature):
    assert_as_accurate_as_pytorch(runner, batch=batch, temperature=temperature, mode="switch", gap=0.1)


@pytest.mark.parametrize("precision", ["auto", "ieee", "bf16"])
@pytest.mark.parametrize(
    ("dtype", "param_dtype"),
    [(d, p) for d in (torch.bfloat16, torch.float16) for p in (d, torch.float32)] + [(torch.float32, torch.float32)],
    ids=str,
)
def test_dtypes_and_precisions(runner, dtype, param_dtype, precision):
    assert_as_accurate_as_pytorch(
        runner,
        dtype=dtype,
        param_dtype=param_dtype,
        precision=precision,
        pos=True,
        gate_logits=True,
    )


@pytest.mark.parametrize("precision", ["tf32", "auto"])
@pytest.mark.parametrize("channels", [6, 32])
def test_tf32(runner, channels, precision):
    """Asked for, and as "auto" where PyTorch's convolutions may use it: a GPU's default."""
    if (runner.device, precision) == ("cpu", "tf32") and runner.backend in ("reference", "cpu"):
        pytest.skip("it is arithmetic of GPUs")
    with arithmetic("tf32"):
        assert_accurate_to_tf32(runner, precision, channels=channels, pos=True, gate_logits=True)


@pytest.mark.parametrize("mode", ["argmax", "switch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("experts", [2, 7])
def test_modes_in_sixteen_bits(runner, experts, dtype, mode):
    assert_as_accurate_as_pytorch(runner, dtype=dtype, mode=mode, experts=experts)


def sliced(t):
    """Every second element along the last two axes of a larger tensor, at an offset."""
    wide = t.new_zeros(*t.shape[:-2], 2 * t.shape[-2] + 1, 2 * t.shape[-1] + 1)
    view = wide[..., 1::2, 1::2]
    return view.copy_(t)


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "sliced": lambda t: sliced(t) if t.dim() > 1 else t,
    "batch last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_every_tensor(runner, layout):
    def change(problem):
        tensors = {name: LAYOUTS[layout](t) for name, t in problem.tensors.items()}
        pos = tuple(LAYOUTS[layout](t) for t in problem.pos)
        assert not all(t.is_contiguous() for t in (*tensors.values(), *pos))
        return Problem(tensors, problem.size, pos, problem.options)

    assert_as_accurate_as_pytorch(runner, change=change, pos=True, gate_logits=True, experts=4)


def test_an_expanded_batch(runner):
    """Stride 0 over frames, which an optimised backend may mistake for a dense batch."""
    problem = random_problem(batch=1, device=runner.device)
    expanded = problem.with_tensors(x=problem.tensors["x"].expand(3, -1, -1, -1))
    output = expanded.run(backend=runner.backend)
    torch.testing.assert_close(output.prediction.double(), truth.evaluate(expanded).prediction, rtol=2e-5, atol=2e-5)
