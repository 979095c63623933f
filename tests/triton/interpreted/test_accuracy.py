"""Outputs and gradients against the float64 truth, by the rule that judges every backend."""

import pytest
import torch
from triton.runtime.interpreter import InterpreterOptions, interpreter_builder

from support.accuracy import assert_accurate_to_tf32, assert_as_accurate_as_pytorch
from support.backends import Runner

RUNNER = Runner("triton", "cpu")
SMALL = {"batch": 1, "channels": 16, "hidden": 16, "gate_hidden": 16, "source": (2, 3), "size": (3, 4)}


@pytest.fixture(autouse=True)
def no_checks_of_overflow(monkeypatch):
    """They take a third of the time; the other files of this folder run the same kernels, both ways, with them."""
    monkeypatch.setattr(interpreter_builder, "options", InterpreterOptions(sanitize_overflow=False))


def check(**arguments):
    assert_as_accurate_as_pytorch(RUNNER, **{**SMALL, **arguments})


@pytest.mark.parametrize("experts", [1, 2, 3, 4, 7])
def test_number_of_experts(experts):
    check(experts=experts, pos=experts % 2 == 0)


def test_more_hidden_channels_than_one_group_holds():
    check(experts=6, hidden=48, gate_hidden=32, source=(2, 2), size=(2, 2))


def test_channels_that_fill_no_block():
    check(channels=20, hidden=5, gate_hidden=3, gate_logits=True, batch=2)


def test_several_tiles_and_blocks_of_channels():
    check(channels=48, experts=2, size=(6, 10), pos=True, gate_logits=True)


@pytest.mark.parametrize(
    ("source", "size"),
    [((1, 1), (2, 3)), ((1, 3), (3, 5)), ((3, 1), (2, 4)), ((5, 6), (2, 3)), ((3, 4), (3, 4)), ((3, 3), (1, 1))],
)
def test_resampling(source, size):
    check(source=source, size=size, experts=2)


@pytest.mark.parametrize(
    "activation", ["exp", "inv_log", "linear", "relu", "sigmoid", "norm_exp", "norm", "xy_inv_log"]
)
def test_activations(activation):
    tiny = {"experts": 2, "source": (2, 2), "size": (2, 3)}
    check(**tiny, activation=activation, prediction_channels=3, conf_activation="sigmoid")


@pytest.mark.parametrize("conf_activation", ["expp0", None])
def test_confidence(conf_activation):
    check(conf_activation=conf_activation, prediction_channels=2, pos=True)


@pytest.mark.parametrize("mode", ["argmax", "switch"])
def test_modes(mode):
    check(mode=mode, gate_logits=True, temperature=0.5)


def test_16_bit_operands():
    check(dtype=torch.float16, experts=2, source=(2, 2), size=(2, 3))


def test_tf32_operands():
    assert_accurate_to_tf32(RUNNER, "tf32", **SMALL | {"experts": 2, "pos": True})
