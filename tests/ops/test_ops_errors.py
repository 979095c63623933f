"""Everything that op.md's Errors lists: one clear sentence that names the argument, what came and what is expected."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from moe3d.functional import moe_head
from support.problems import GATE, random_problem

B, C, K, HD, HG, OUT = 2, 6, 3, 5, 4, 2
SIZE = (7, 9)


def arguments(**changes):
    problem = random_problem(pos=True, gate_logits=True)
    return problem.tensors | {"size": problem.size, "pos": problem.pos} | changes


def t(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


TABLES = arguments()["pos"]
NO_GATE = dict.fromkeys((*GATE, "gate_logits"))
TWO_EXPERTS = {
    "expert_w1": t(2, HD, C, 3, 3), "expert_b1": t(2, HD), "expert_w2": t(2, OUT, HD), "expert_b2": t(2, OUT),
}  # fmt: skip

CASES = [
    # size
    (ValueError, r"size must be a pair \(H, W\), got 7", {"size": 7}),
    (ValueError, r"size must be a pair \(H, W\), got \(7,\)", {"size": (7,)}),
    (ValueError, r"size must be a pair \(H, W\), got \(7, 9, 1\)", {"size": (7, 9, 1)}),
    (ValueError, r"size must be a pair \(H, W\), got None", {"size": None}),
    (ValueError, r"size must hold two positive integers \(H, W\), got \(0, 9\)", {"size": (0, 9)}),
    (ValueError, r"size must hold two positive integers \(H, W\), got \(7, -9\)", {"size": (7, -9)}),
    (TypeError, r"size must hold two integers \(H, W\), got \(7.0, 9\)", {"size": (7.0, 9)}),
    (TypeError, r"size must hold two integers \(H, W\), got \(7, True\)", {"size": (7, True)}),
    (TypeError, r"size must hold two integers \(H, W\), got \(7, nan\)", {"size": (7, math.nan)}),
    (TypeError, r"size must hold two integers \(H, W\), got \('7', 9\)", {"size": ("7", 9)}),
    # what is no tensor
    (TypeError, r"x must be a tensor, got list", {"x": [1.0]}),
    (TypeError, r"x must be a tensor, got ndarray", {"x": np.zeros((B, C, 3, 4), np.float32)}),
    (TypeError, r"x must be a tensor, got NoneType", {"x": None}),
    (TypeError, r"expert_w2 must be a tensor, got NoneType", {"expert_w2": None}),
    (TypeError, r"gate_b1 must be a tensor or None, got float", {"gate_b1": 0.0}),
    (TypeError, r"gate_logits must be a tensor or None, got str", {"gate_logits": "image"}),
    (TypeError, r"pos must be None or a pair of tensors \(\[W, C/2\], \[H, C/2\]\), got Tensor", {"pos": TABLES[0]}),
    (TypeError, r"pos must be None or a pair of tensors .*, got tuple", {"pos": (TABLES[0],)}),
    (
        TypeError,
        r"pos must be None or a pair of tensors .*, got a pair of Tensor and NoneType",
        {"pos": (TABLES[0], None)},
    ),
    (
        TypeError,
        r"pos must be None or a pair of tensors .*, got a pair of NoneType and NoneType",
        {"pos": (None, None)},
    ),
    # dtypes
    (TypeError, r"x must be float32, bfloat16, float16 or float64, got int64", {"x": t(B, C, 3, 4, dtype=torch.int64)}),
    (TypeError, r"x must be float32, .*, got complex64", {"x": t(B, C, 3, 4, dtype=torch.complex64)}),
    (TypeError, r"x must be float32, .*, got bool", {"x": t(B, C, 3, 4, dtype=torch.bool)}),
    (
        TypeError,
        r"expert_w1 must be float32 beside x in float32, got bfloat16",
        {"expert_w1": t(K, HD, C, 3, 3, dtype=torch.bfloat16)},
    ),
    (
        TypeError,
        r"gate_b2 must be bfloat16 or float32 beside x in bfloat16, got float16",
        {"x": t(B, C, 3, 4, dtype=torch.bfloat16), "gate_b2": t(K, dtype=torch.float16)},
    ),
    (
        TypeError,
        r"gate_w1 must have the dtype of the other parameters, float32 as expert_w1, got bfloat16",
        {"x": t(B, C, 3, 4, dtype=torch.bfloat16), "gate_w1": t(HG, C, 3, 3, dtype=torch.bfloat16)},
    ),
    (
        TypeError,
        r"gate_logits must be float32 beside .*, got float64",
        {"gate_logits": t(B, K, *SIZE, dtype=torch.float64)},
    ),
    (TypeError, r"pos\[1\] must be float32 beside .*, got float16", {"pos": (TABLES[0], TABLES[1].half())}),
    # devices
    (ValueError, r"x's device cpu|expert_b1 is on meta", {"expert_b1": t(K, HD, device="meta")}),
    (ValueError, r"gate_logits is on meta, expected x's device cpu", {"gate_logits": t(B, K, *SIZE, device="meta")}),
    (ValueError, r"pos\[0\] is on meta, expected x's device cpu", {"pos": (TABLES[0].to("meta"), TABLES[1])}),
    (ValueError, r"expert_w1 is on cpu, expected x's device meta", {"x": t(B, C, 3, 4, device="meta")}),
    # ranks and sizes
    (ValueError, r"x must have shape \[B, C, h, w\], got \[6, 3, 4\]", {"x": t(C, 3, 4)}),
    (ValueError, r"x must have at least one channel and one pixel, got shape \[2, 6, 0, 4\]", {"x": t(B, C, 0, 4)}),
    (ValueError, r"x must have at least one channel and one pixel, got shape \[2, 6, 3, 0\]", {"x": t(B, C, 3, 0)}),
    (ValueError, r"x must have at least one channel and one pixel", {"x": t(B, 0, 3, 4)}),
    (
        ValueError,
        r"expert_w1 must have shape \[K, Hd, C, 3, 3\], got \[15, 6, 3, 3\]",
        {"expert_w1": t(K * HD, C, 3, 3)},
    ),
    (ValueError, r"expert_w1 must have .* \[3, 5, 6, 3, 3\], got \[3, 5, 7, 3, 3\]", {"expert_w1": t(K, HD, 7, 3, 3)}),
    (ValueError, r"expert_w1 must have .* \[3, 5, 6, 3, 3\], got \[3, 5, 6, 1, 1\]", {"expert_w1": t(K, HD, C, 1, 1)}),
    (ValueError, r"expert_w1.* at least one expert", {"expert_w1": t(0, HD, C, 3, 3), "expert_w2": t(0, OUT, HD)}),
    (
        ValueError,
        r"expert_w1.* at least one .*hidden channel",
        {"expert_w1": t(K, 0, C, 3, 3), "expert_w2": t(K, OUT, 0)},
    ),
    (ValueError, r"expert_w2.* at least one .*output channel", {"expert_w2": t(K, 0, HD), "expert_b2": t(K, 0)}),
    (ValueError, r"expert_b1 must have shape \[K, Hd\] = \[3, 5\], got \[15\]", {"expert_b1": t(K * HD)}),
    (ValueError, r"expert_w2 must have shape \[K, O, Hd\], got \[3, 2, 5, 1, 1\]", {"expert_w2": t(K, OUT, HD, 1, 1)}),
    (
        ValueError,
        r"expert_w2 must have shape \[K, O, Hd\] = \[3, 2, 5\], got \[4, 2, 5\]",
        {"expert_w2": t(4, OUT, HD)},
    ),
    (ValueError, r"expert_b2 must have shape \[K, O\] = \[3, 2\], got \[3, 3\]", {"expert_b2": t(K, 3)}),
    (ValueError, r"gate_w1 must have shape \[Hg, C, 3, 3\], got \[4, 6, 3\]", {"gate_w1": t(HG, C, 3)}),
    (ValueError, r"gate_w1 must have .* \[4, 6, 3, 3\], got \[4, 5, 3, 3\]", {"gate_w1": t(HG, 5, 3, 3)}),
    (ValueError, r"gate_w1 must hold at least one hidden channel", {"gate_w1": t(0, C, 3, 3)}),
    (ValueError, r"gate_b1 must have shape \[Hg\] = \[4\], got \[5\]", {"gate_b1": t(5)}),
    (ValueError, r"gate_w2 must have shape \[K, Hg\] = \[3, 4\], got \[4, 3\]", {"gate_w2": t(HG, K)}),
    (ValueError, r"gate_b2 must have shape \[K\] = \[3\], got \[1\]", {"gate_b2": t(1)}),
    (ValueError, r"gate_logits must have .* = \[2, 3, 7, 9\], got \[2, 3, 9, 7\]", {"gate_logits": t(B, K, 9, 7)}),
    (ValueError, r"gate_logits must have .* = \[2, 3, 7, 9\], got \[1, 3, 7, 9\]", {"gate_logits": t(1, K, *SIZE)}),
    (ValueError, r"pos\[0\] must have shape \[W, C/2\] = \[9, 3\], got \[7, 3\]", {"pos": TABLES[::-1]}),
    (ValueError, r"pos\[1\] must have shape \[H, C/2\] = \[7, 3\], got \[7, 6\]", {"pos": (TABLES[0], t(7, 6))}),
    (ValueError, r"pos must not require a gradient", {"pos": (TABLES[0].clone().requires_grad_(), TABLES[1])}),
    # the gate
    (ValueError, r"gate_w2 is None, but the other gate tensors are given", {"gate_w2": None}),
    (ValueError, r"gate_w1, gate_b1, gate_w2 and gate_b2 may be None only for one expert, got K = 3", NO_GATE),
    (ValueError, r"gate_b2 may be None only for one expert, got K = 2", NO_GATE | TWO_EXPERTS),
    # numbers
    *(
        (error, rf"{name} must be a finite number {bound}, got {re.escape(repr(value))}", {name: value})
        for name, bound, lowest in (
            ("temperature", "above 0", [0, 0.0, -1.0]),
            ("gap", "of at least 0", [-0.1]),
            ("skip_below", "of at least 0", [-1e-9]),
        )
        for error, value in (
            *((ValueError, v) for v in (*lowest, math.nan, math.inf, -math.inf)),
            *((TypeError, v) for v in ("1", None, True, 1j)),
        )
    ),
    (TypeError, r"temperature must be a finite number above 0, got tensor", {"temperature": torch.tensor(1.0)}),
    # names
    *(
        (ValueError, rf"{name} must be one of .*{known}.*, got {re.escape(repr(value))}", {name: value})
        for name, known in (
            ("activation", "xy_inv_log"),
            ("conf_activation", "expp1"),
            ("mode", "switch"),
            ("backend", "triton"),
            ("precision", "tf32"),
        )
        for value in ("Exp", "", 3, ["exp"])
    ),
    (ValueError, r"activation must be one of .*, got None", {"activation": None}),
    # combinations
    (ValueError, r"activation 'xy_inv_log' needs 3 prediction channels, got 1", {"activation": "xy_inv_log"}),
    (ValueError, r"'xy_inv_log' needs 3 .*, got 2", {"activation": "xy_inv_log", "conf_activation": None}),
    (ValueError, r"expert_w2 must have O >= 2 .*, got O = 1", {"expert_w2": t(K, 1, HD), "expert_b2": t(K, 1)}),
    (ValueError, r"mode 'switch' needs a positive activation .*'linear'", {"mode": "switch", "activation": "linear"}),
    (ValueError, r"mode 'switch' needs a positive activation .*'inv_log'", {"mode": "switch", "activation": "inv_log"}),
]


@pytest.mark.parametrize(
    ("error", "message", "changes"), CASES, ids=lambda v: v[:60] if isinstance(v, str) else getattr(v, "__name__", "")
)
def test_errors_name_the_argument(error, message, changes):
    moe_head(**arguments())  # the unchanged call is right
    with pytest.raises(error, match=message) as caught:
        moe_head(**arguments(**changes))
    assert type(caught.value) is error
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_odd_channels_with_a_position_embedding():
    problem = random_problem(channels=5, pos=True)
    with pytest.raises(ValueError, match=r"pos needs an even number of channels in x, got C = 5"):
        problem.run()


def test_logits_without_a_gate():
    problem = random_problem(experts=1, gate=False, gate_logits=True)
    with pytest.raises(ValueError, match="gate_logits was given without a gate"):
        problem.run()


@pytest.mark.parametrize("batch", [0, 2])
def test_empty_batches_are_validated_like_others(batch):
    problem = random_problem(batch=batch).with_tensors(gate_b2=t(5))
    with pytest.raises(ValueError, match="gate_b2"):
        problem.run()


@pytest.mark.parametrize("missing", ["expert_w1", "expert_b2"])
def test_required_arguments(missing):
    given = arguments()
    del given[missing]
    with pytest.raises(TypeError, match=missing):
        moe_head(**given)


def test_an_integer_beyond_all_floats_is_not_finite():
    with pytest.raises(ValueError, match="temperature must be a finite number above 0, got 1000"):
        moe_head(**arguments(temperature=10**400))


def test_numbers_of_other_types_are_numbers():
    """numpy scalars and integers come out of configuration files."""
    plain = moe_head(**arguments(temperature=2.0, gap=1.0))
    other = moe_head(**arguments(temperature=np.float32(2), gap=1, size=[np.int64(7), 9]))
    assert torch.equal(plain.prediction, other.prediction)


def test_x_and_size_may_be_positional():
    given = arguments()
    x, size = given.pop("x"), given.pop("size")
    assert moe_head(x, size, **given).prediction.shape == (B, 1, *SIZE)
    with pytest.raises(TypeError):
        moe_head(x, size, given.pop("expert_w1"), **given)
