"""The operation as registered ``torch.library`` operators: schema, fakes, autograd.

``moe3d::moe_head`` and ``moe3d::moe_head_backward`` are opaque to ``torch.compile`` and ``torch.export``. Operators
cannot return optional tensors, so an absent output (or a gradient that is not needed) is an empty tensor here;
:mod:`moe3d.functional` turns those back into None.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from moe3d.ops import dispatch
from moe3d.ops.reference import ReferenceBackend, output_dtype
from moe3d.ops.types import HeadOptions, HeadTensors, MoEOutput

_TENSORS = (
    "Tensor x, Tensor expert_w1, Tensor expert_b1, Tensor expert_w2, Tensor expert_b2, "
    "Tensor? gate_w1, Tensor? gate_b1, Tensor? gate_w2, Tensor? gate_b2, Tensor? gate_logits, "
    "Tensor? pos_x, Tensor? pos_y"
)
_OPTIONS = (
    "SymInt height, SymInt width, float temperature, str activation, str? conf_activation, str mode, float gap, "
    "bool return_experts, float skip_below, str precision"
)
_COTANGENTS = (
    "Tensor? grad_prediction, Tensor? grad_confidence, Tensor? grad_entropy, Tensor? grad_weights, "
    "Tensor? grad_hypotheses"
)
_NUM_TENSORS = len(HeadTensors._fields)
_NUM_OPTIONS = len(HeadOptions._fields)


def _split(args: Sequence) -> tuple[HeadTensors, HeadOptions, Sequence]:
    """The operator's flat arguments back into tensors, options, and what follows."""
    end = _NUM_TENSORS + _NUM_OPTIONS
    return HeadTensors(*args[:_NUM_TENSORS]), HeadOptions(*args[_NUM_TENSORS:end]), args[end:]


@torch.library.custom_op(
    "moe3d::moe_head",
    mutates_args=(),
    schema=f"({_TENSORS}, {_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def moe_head_op(*args):
    tensors, options, (name,) = _split(args)
    backend = dispatch.select(name, tensors, options)
    if tensors.x.shape[0] == 0:
        return _allocate(tensors, options)
    with _no_autocast(tensors.x):
        outputs = backend.forward(tensors, options)
    return tuple(_absent(tensors.x) if o is None else o.contiguous() for o in outputs)


@moe_head_op.register_fake
def _(*args):
    tensors, options, _ = _split(args)
    return _allocate(tensors, options)


def decompose_moe_head(*args) -> tuple[Tensor, ...]:
    """``moe3d::moe_head`` in PyTorch's own operators, for graphs that must run where this package is not."""
    tensors, options, _ = _split(args)
    outputs = ReferenceBackend().forward_at_once(tensors, options)
    return tuple(_absent(tensors.x) if o is None else o.contiguous() for o in outputs)


# Asked once, here, because PyTorch 2.11 cannot trace the question.
AUTOCAST_DEVICES = frozenset(
    device for device in ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu") if torch.amp.is_autocast_available(device)
)


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Inside an operator autocast would still cast every convolution, whatever the precision that was asked for."""
    if x.device.type not in AUTOCAST_DEVICES:
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _absent(x: Tensor) -> Tensor:
    return x.new_empty(0)


def _allocate(t: HeadTensors, options: HeadOptions) -> tuple[Tensor, ...]:
    """Uninitialised outputs of the right shapes."""
    batch, experts, pixels = t.x.shape[0], t.expert_w1.shape[0], (options.height, options.width)
    channels = options.prediction_channels(t.expert_w2.shape[1])
    dtype = output_dtype(t.x.dtype)

    def new(*shape, present=True):
        return t.x.new_empty((*shape, *pixels), dtype=dtype) if present else _absent(t.x)

    return (
        new(batch, channels),
        new(batch, present=options.conf_activation is not None),
        new(batch),
        new(batch, experts, present=options.return_experts),
        new(batch, experts, channels, present=options.return_experts),
    )


@torch.library.custom_op(
    "moe3d::moe_head_backward",
    mutates_args=(),
    schema=f"({_TENSORS}, {_OPTIONS}, str backend, {_COTANGENTS}, bool[] needs) -> Tensor[]",
)
def moe_head_backward_op(*args):
    tensors, options, (name, *cotangents, needs) = _split(args)
    backend = dispatch.select(name, tensors, options)
    if tensors.x.shape[0] == 0:
        return [_absent(tensors.x) if not n else torch.zeros_like(t) for t, n in zip(tensors, needs, strict=True)]
    with _no_autocast(tensors.x):
        gradients = backend.backward(tensors, options, MoEOutput(*cotangents), HeadTensors(*needs))
    return [
        _absent(tensors.x) if g is None else torch.empty_like(t).copy_(g)
        for t, g in zip(tensors, gradients, strict=True)
    ]


@moe_head_backward_op.register_fake
def _(*args):
    tensors, _, (*_, needs) = _split(args)
    return [_absent(tensors.x) if not n else torch.empty_like(t) for t, n in zip(tensors, needs, strict=True)]


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_NUM_TENSORS])
    ctx.rest = inputs[_NUM_TENSORS:]


def _backward(ctx, *cotangents):
    needs = [bool(n) for n in ctx.needs_input_grad[:_NUM_TENSORS]]
    gradients = moe_head_backward_op(*ctx.saved_tensors, *ctx.rest, *cotangents, needs)
    return *(g if n else None for g, n in zip(gradients, needs, strict=True)), *(None for _ in ctx.rest)


moe_head_op.register_autograd(_backward, setup_context=_setup_context)


def _no_double_backward(ctx, *_):
    raise RuntimeError("moe_head has no second derivative: differentiate its outputs only once")


moe_head_backward_op.register_autograd(_no_double_backward, setup_context=lambda ctx, inputs, output: None)


def _no_vmap(info, in_dims, *args):
    raise RuntimeError("moe_head does not support torch.vmap: put the extra dimension into the batch of x")


moe_head_op.register_vmap(_no_vmap)
moe_head_backward_op.register_vmap(_no_vmap)
