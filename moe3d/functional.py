"""The functional API: one operation, validated here, computed by a backend."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from moe3d.ops import dispatch
from moe3d.ops.activations import ACTIVATIONS, CONF_ACTIVATIONS
from moe3d.ops.mixture import MODES
from moe3d.ops.schema import AUTOCAST_DEVICES, moe_head_op
from moe3d.ops.types import PARAMETERS, PRECISIONS, HeadOptions, HeadTensors, MoEOutput

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def moe_head(
    x: Tensor,
    size: tuple[int, int],
    *,
    expert_w1: Tensor,
    expert_b1: Tensor,
    expert_w2: Tensor,
    expert_b2: Tensor,
    gate_w1: Tensor | None = None,
    gate_b1: Tensor | None = None,
    gate_w2: Tensor | None = None,
    gate_b2: Tensor | None = None,
    gate_logits: Tensor | None = None,
    pos: tuple[Tensor, Tensor] | None = None,
    temperature: float = 1.0,
    activation: str = "exp",
    conf_activation: str | None = "expp1",
    mode: str = "mean",
    gap: float = 0.3,
    return_experts: bool = False,
    skip_below: float = 0.0,
    backend: str = "auto",
    precision: str = "auto",
) -> MoEOutput:
    """The mixture-of-experts output block of MoE3D (arXiv 2601.05208), at full resolution in one operation.

    With F = upsample(x) + pos, each of K experts computes z_k = W2_k relu(conv(F, W1_k) + b1_k) + b2_k and the gate
    g = G2 relu(conv(F, G1) + g1) + g2 + gate_logits; w = softmax(g / temperature), d_k = activation(z_k[:O-1]),
    c_k = conf_activation(z_k[O-1]). The outputs are sum_k w_k d_k, sum_k w_k c_k, and -sum_k w_k log w_k.

    Args:
        x: [B, C, h, w] fused decoder features, float32, bfloat16, float16 (or float64 on the reference backend).
        size: output resolution (H, W); bilinear upsampling with align_corners=True, none if it is x's own.
        expert_w1, expert_b1: [K, Hd, C, 3, 3] and [K, Hd], the experts' 3x3 convolutions (padding 1).
        expert_w2, expert_b2: [K, O, Hd] and [K, O], their 1x1 layers.
        gate_w1, gate_b1, gate_w2, gate_b2: [Hg, C, 3, 3], [Hg], [K, Hg], [K]; all None where K = 1.
        gate_logits: [B, K, H, W], added to the gate's logits.
        pos: ([W, C/2], [H, C/2]) separable position embedding, added after upsampling: the first half of the channels
            by column, the second by row. It gets no gradient.
        temperature: of the softmax, > 0.
        activation: exp, inv_log, linear, relu, sigmoid, norm_exp, norm or xy_inv_log (VGGT's names).
        conf_activation: expp1 (1 + e^x), expp0 (e^x) or sigmoid; None: all O channels are prediction.
        mode: "mean" (MoE3D), "argmax" (the most probable expert, MDA) or "switch" (argmax where the hypotheses of
            experts with weight over 0.01 differ by more than a factor exp(gap), the mean elsewhere).
        gap: the threshold of "switch", in log depth.
        return_experts: also return weights and hypotheses.
        skip_below: experts whose weight stays below it in a whole tile may be left out; 0 = never.
        backend: "auto" (the faster of "cpu" and "reference" that can run), or a name: "triton" or "cuda", which have
            not run on a GPU yet, "cpu" or "reference".
        precision: arithmetic of the convolutions: "auto" (PyTorch's own), "ieee", "tf32" or "bf16".

    Returns:
        prediction [B, O-1, H, W], confidence [B, H, W] or None, entropy [B, H, W] (nats), weights [B, K, H, W] or None,
        hypotheses [B, K, O-1, H, W] or None; float32 for 16-bit inputs.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, device, shape or range; the message names it.
        RuntimeError: an explicit backend that cannot run, with the reason; a second or forward-mode derivative; vmap.

    Under autocast, x and the parameters are cast as conv2d's are. Parameters are float32 or of x's dtype.
    """
    height, width = _check_size(size)
    pos_x, pos_y = _check_pos_pair(pos)
    tensors = HeadTensors(
        x, expert_w1, expert_b1, expert_w2, expert_b2, gate_w1, gate_b1, gate_w2, gate_b2, gate_logits, pos_x, pos_y
    )
    _check_are_tensors(tensors)
    _check_not_forward_mode(tensors)
    tensors = _autocast(tensors)
    _check_dtypes_and_devices(tensors)
    _check_shapes(tensors, height, width)
    options = check_options(
        (height, width),
        expert_w2.shape[1],
        temperature=temperature,
        activation=activation,
        conf_activation=conf_activation,
        mode=mode,
        gap=gap,
        return_experts=return_experts,
        skip_below=skip_below,
        backend=backend,
        precision=precision,
    )
    outputs = moe_head_op(*tensors, *options, backend)
    return _present(outputs, options)


def check_options(
    size: tuple[int, int],
    out_channels: int,
    *,
    temperature: float,
    activation: str,
    conf_activation: str | None,
    mode: str,
    gap: float,
    return_experts: bool,
    skip_below: float,
    backend: str,
    precision: str,
) -> HeadOptions:
    """What :func:`moe_head` was told beside its tensors, validated: ValueError or TypeError as there."""
    _check_name("backend", backend, dispatch.NAMES)
    if conf_activation is not None:
        _check_name("conf_activation", conf_activation, CONF_ACTIVATIONS)
    options = HeadOptions(
        *size,
        temperature=check_number("temperature", temperature, above_zero=True),
        activation=_check_name("activation", activation, ACTIVATIONS),
        conf_activation=conf_activation,
        mode=_check_name("mode", mode, MODES),
        gap=check_number("gap", gap),
        return_experts=bool(return_experts),
        skip_below=check_number("skip_below", skip_below),
        precision=_check_name("precision", precision, PRECISIONS),
    )
    _check_output_channels(out_channels, options)
    return options


def check_number(argument: str, value: float, above_zero: bool = False) -> float:
    """``value`` as a float, if it is a finite number of at least (or above) 0; otherwise a TypeError or ValueError."""
    kind = "a finite number above 0" if above_zero else "a finite number of at least 0"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{argument} must be {kind}, got {value!r}")
    # Comparisons, which are false for NaN: torch.compile cannot trace math.isfinite of a float that varies.
    too_large = isinstance(value, int) and value > sys.float_info.max
    if not (0 < value if above_zero else 0 <= value) or not value < math.inf or too_large:
        raise ValueError(f"{argument} must be {kind}, got {value!r}")
    return float(value)


def _present(outputs: Sequence[Tensor], options: HeadOptions) -> MoEOutput:
    """The operator's empty tensors stand for absent outputs."""
    # Not by ``_replace``, whose tuple PyTorch 2.11 cannot return from a compiled graph.
    prediction, confidence, entropy, weights, hypotheses = outputs
    return MoEOutput(
        prediction,
        None if options.conf_activation is None else confidence,
        entropy,
        weights if options.return_experts else None,
        hypotheses if options.return_experts else None,
    )


def _autocast(t: HeadTensors) -> HeadTensors:
    """x and the parameters as conv2d's autocast would cast them; float64 stays, as there."""
    device = t.x.device.type
    if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return t
    dtype = torch.get_autocast_dtype(device)

    def cast(value: Tensor | None) -> Tensor | None:
        if value is None or value.dtype == torch.float64 or not value.is_floating_point():
            return value
        return value.to(dtype)

    casts = ("x", *PARAMETERS)
    return HeadTensors(*[cast(v) if name in casts else v for name, v in zip(HeadTensors._fields, t, strict=True)])


def _check_size(size: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(size, (tuple, list, torch.Size)) or len(size) != 2:
        raise ValueError(f"size must be a pair (H, W), got {size!r}")
    for value in size:
        if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
            raise TypeError(f"size must hold two integers (H, W), got {size!r}")
        if value < 1:
            raise ValueError(f"size must hold two positive integers (H, W), got {size!r}")
    height, width = (v if isinstance(v, torch.SymInt) else int(v) for v in size)
    return height, width


def _check_pos_pair(pos: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    if pos is None:
        return None, None
    expected = "None or a pair of tensors ([W, C/2], [H, C/2])"
    if not isinstance(pos, (tuple, list)) or len(pos) != 2:
        raise TypeError(f"pos must be {expected}, got {type(pos).__name__}")
    if not all(isinstance(table, Tensor) for table in pos):
        raise TypeError(f"pos must be {expected}, got a pair of {' and '.join(type(table).__name__ for table in pos)}")
    if any(table.requires_grad for table in pos):
        raise ValueError("pos must not require a gradient: the position embedding is fixed, detach it")
    return pos[0], pos[1]


def _check_are_tensors(t: HeadTensors) -> None:
    for name, value in zip(HeadTensors._fields, t, strict=True):
        optional = name.startswith(("gate", "pos"))
        if not isinstance(value, Tensor) and not (optional and value is None):
            kind = "a tensor or None" if optional else "a tensor"
            raise TypeError(f"{name} must be {kind}, got {type(value).__name__}")


def _check_not_forward_mode(t: HeadTensors) -> None:
    if torch.compiler.is_compiling():
        return
    if any(v is not None and torch.autograd.forward_ad.unpack_dual(v).tangent is not None for v in t):
        raise RuntimeError("moe_head has no forward-mode derivative: use reverse mode (backward)")


def _check_dtypes_and_devices(t: HeadTensors) -> None:
    if t.x.dtype not in _DTYPES:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {_name(t.x.dtype)}")
    for field, value in zip(HeadTensors._fields, t, strict=True):
        if value is None:
            continue
        name = {"pos_x": "pos[0]", "pos_y": "pos[1]"}.get(field, field)
        if value.device != t.x.device:
            raise ValueError(f"{name} is on {value.device}, expected x's device {t.x.device}")
        if value.dtype not in (torch.float32, t.x.dtype):
            expected = " or ".join(sorted({"float32", _name(t.x.dtype)}))
            raise TypeError(f"{name} must be {expected} beside x in {_name(t.x.dtype)}, got {_name(value.dtype)}")
    for name in PARAMETERS:
        value = getattr(t, name)
        if value is not None and value.dtype != t.expert_w1.dtype:
            raise TypeError(
                f"{name} must have the dtype of the other parameters, {_name(t.expert_w1.dtype)} as expert_w1, "
                f"got {_name(value.dtype)}"
            )


def _check_shapes(t: HeadTensors, height: int, width: int) -> None:
    _check_rank("x", t.x, "[B, C, h, w]")
    _check_rank("expert_w1", t.expert_w1, "[K, Hd, C, 3, 3]")
    _check_rank("expert_w2", t.expert_w2, "[K, O, Hd]")
    batch, channels = t.x.shape[:2]
    experts, hidden = t.expert_w1.shape[:2]
    outputs = t.expert_w2.shape[1]
    if t.x.shape[2] < 1 or t.x.shape[3] < 1 or channels < 1:
        raise ValueError(f"x must have at least one channel and one pixel, got shape {_shape(t.x)}")
    if experts < 1 or hidden < 1 or outputs < 1:
        raise ValueError(
            f"expert_w1 and expert_w2 must hold at least one expert, hidden channel and output channel, "
            f"got shapes {_shape(t.expert_w1)} and {_shape(t.expert_w2)}"
        )
    _check_shape("expert_w1", t.expert_w1, (experts, hidden, channels, 3, 3), "[K, Hd, C, 3, 3]")
    _check_shape("expert_b1", t.expert_b1, (experts, hidden), "[K, Hd]")
    _check_shape("expert_w2", t.expert_w2, (experts, outputs, hidden), "[K, O, Hd]")
    _check_shape("expert_b2", t.expert_b2, (experts, outputs), "[K, O]")
    _check_gate(t, experts, channels)
    if t.gate_logits is not None:
        _check_shape("gate_logits", t.gate_logits, (batch, experts, height, width), "[B, K, H, W]")
    if t.pos_x is not None:
        _check_pos(t, channels, height, width)


def _check_gate(t: HeadTensors, experts: int, channels: int) -> None:
    gate = {n: getattr(t, n) for n in ("gate_w1", "gate_b1", "gate_w2", "gate_b2")}
    missing = [name for name, value in gate.items() if value is None]
    if missing and len(missing) < len(gate):
        raise ValueError(f"{missing[0]} is None, but the other gate tensors are given: pass all four or none")
    if missing and experts > 1:
        raise ValueError(f"gate_w1, gate_b1, gate_w2 and gate_b2 may be None only for one expert, got K = {experts}")
    if missing:
        if t.gate_logits is not None:
            raise ValueError("gate_logits was given without a gate: pass the four gate tensors too")
        return
    _check_rank("gate_w1", t.gate_w1, "[Hg, C, 3, 3]")
    hidden = t.gate_w1.shape[0]
    if hidden < 1:
        raise ValueError(f"gate_w1 must hold at least one hidden channel, got shape {_shape(t.gate_w1)}")
    _check_shape("gate_w1", t.gate_w1, (hidden, channels, 3, 3), "[Hg, C, 3, 3]")
    _check_shape("gate_b1", t.gate_b1, (hidden,), "[Hg]")
    _check_shape("gate_w2", t.gate_w2, (experts, hidden), "[K, Hg]")
    _check_shape("gate_b2", t.gate_b2, (experts,), "[K]")


def _check_pos(t: HeadTensors, channels: int, height: int, width: int) -> None:
    if channels % 2:
        raise ValueError(f"pos needs an even number of channels in x, got C = {channels}")
    _check_shape("pos[0]", t.pos_x, (width, channels // 2), "[W, C/2]")
    _check_shape("pos[1]", t.pos_y, (height, channels // 2), "[H, C/2]")


def _check_output_channels(outputs: int, options: HeadOptions) -> None:
    predicted = options.prediction_channels(outputs)
    if predicted < 1:
        raise ValueError(
            f"expert_w2 must have O >= 2 output channels, the last one for the confidence, got O = {outputs}"
        )
    needed = ACTIVATIONS[options.activation].channels
    if needed is not None and predicted != needed:
        raise ValueError(f"activation {options.activation!r} needs {needed} prediction channels, got {predicted}")
    if options.mode == "switch" and not ACTIVATIONS[options.activation].positive:
        positive = ", ".join(name for name, a in ACTIVATIONS.items() if a.positive)
        raise ValueError(f"mode 'switch' needs a positive activation ({positive}), got {options.activation!r}")


def _check_rank(name: str, value: Tensor, form: str) -> None:
    if value.dim() != form.count(",") + 1:
        raise ValueError(f"{name} must have shape {form}, got {_shape(value)}")


def _check_shape(name: str, value: Tensor, expected: tuple[int, ...], form: str) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(f"{name} must have shape {form} = {list(expected)}, got {_shape(value)}")


def _check_name(argument: str, value: str, known) -> str:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{argument} must be one of {', '.join(known)}, got {value!r}")
    return value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(value: Tensor) -> list[int]:
    return list(value.shape)
