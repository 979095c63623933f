"""The reference backend: the operation's definition in plain PyTorch, on any device and dtype.

It works frame by frame, so its buffers do not grow with the batch: at 518x518 with N = K*Hd + Hg = 256 and C = 128 in
float32 about 140 MB for the upsampled features and 275 MB for the hidden activations. Its derivative is written out
(a backend runs below autograd) and deterministic: sums over frames run in order, and the adjoint of the interpolation
gathers, where PyTorch's own scatters with atomics on CUDA.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from moe3d.ops.backend import Backend
from moe3d.ops.mixture import mix, mix_vjp
from moe3d.ops.types import HeadOptions, HeadTensors, MoEOutput
from moe3d.position import position_map


class ReferenceBackend(Backend):
    def unavailable(self) -> str | None:
        return None

    def unsupported(self, tensors: HeadTensors, options: HeadOptions) -> str | None:
        if options.precision == "tf32" and tensors.x.device.type != "cuda":
            return f"precision 'tf32' is arithmetic of CUDA devices, and x is on {tensors.x.device.type!r}"
        if options.precision in ("tf32", "bf16") and tensors.x.dtype == torch.float64:
            return f"precision {options.precision!r} would throw away the accuracy of float64 inputs"
        return None

    def forward(self, tensors: HeadTensors, options: HeadOptions) -> MoEOutput:
        layers = _Layers.pack(tensors, compute_dtype(tensors.x.dtype, options.precision))
        with _convolution_arithmetic(tensors.x.device, options.precision):
            frames = [_forward(tensors, layers, options, slice(b, b + 1)) for b in range(tensors.x.shape[0])]
        outputs: list[Any] = [None if parts[0] is None else torch.cat(parts) for parts in zip(*frames, strict=True)]
        return MoEOutput(*outputs)

    def forward_at_once(self, tensors: HeadTensors, options: HeadOptions) -> MoEOutput:
        """As :meth:`forward`, without a loop over frames: for a graph that is to take any number of them."""
        layers = _Layers.pack(tensors, compute_dtype(tensors.x.dtype, options.precision))
        return _forward(tensors, layers, options, slice(None))

    def backward(
        self, tensors: HeadTensors, options: HeadOptions, cotangents: MoEOutput, needs: HeadTensors
    ) -> HeadTensors:
        layers = _Layers.pack(tensors, compute_dtype(tensors.x.dtype, options.precision))
        total = _Sums(tensors)
        with _convolution_arithmetic(tensors.x.device, options.precision, deterministic=True):
            for b in range(tensors.x.shape[0]):
                _backward(tensors, layers, options, cotangents, needs, slice(b, b + 1), total)
        return total.gradients(needs)


def compute_dtype(x: torch.dtype, precision: str) -> torch.dtype:
    """The dtype in which the convolutions run: x's own under "auto", float32 (float64 for float64) otherwise."""
    if precision == "bf16":
        return torch.bfloat16
    if precision == "auto" or x == torch.float64:
        return x
    return torch.float32


def output_dtype(x: torch.dtype) -> torch.dtype:
    """float32 for 16-bit inputs, else x's own."""
    return x if x == torch.float64 else torch.float32


_SWITCHES_LOCK = threading.Lock()


@contextlib.contextmanager
def _convolution_arithmetic(device: torch.device, precision: str, deterministic: bool = False) -> Iterator[None]:
    """PyTorch's switches for the arithmetic of convolutions, which are global: one thread at a time may turn them.

    "auto" leaves the user's choice of precision as it is.
    """
    switches = _switches(device, precision, deterministic)
    if not switches:
        yield
        return
    with _SWITCHES_LOCK, contextlib.ExitStack() as stack:
        for owner, name, value in switches:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


def _switches(device: torch.device, precision: str, deterministic: bool) -> list[tuple[Any, str, Any]]:
    """(owner, attribute, value) of every switch to turn."""
    library: Any = {"cuda": torch.backends.cudnn, "cpu": torch.backends.mkldnn}.get(device.type)
    found: list[tuple[Any, str, Any]] = []
    if deterministic and device.type == "cuda":
        found.append((library, "deterministic", True))
    if precision != "auto" and hasattr(library, "conv"):
        found.append((library.conv, "fp32_precision", "tf32" if precision == "tf32" else "ieee"))
    elif precision != "auto" and device.type == "cuda":  # before PyTorch 2.9
        found.append((library, "allow_tf32", precision == "tf32"))
    return found


class _Layers(NamedTuple):
    """Both layers of all experts and the gate, side by side: N = K*Hd + Hg hidden channels."""

    w1: Tensor  #           [N, C, 3, 3]
    b1: Tensor  #           [N]
    expert_w2: Tensor  #    [K*O, Hd, 1, 1], one group an expert
    expert_b2: Tensor  #    [K*O]
    gate_w2: Any  #         [K, Hg, 1, 1], or None without a gate
    gate_b2: Any  #         [K]
    experts: int  #         K
    expert_width: int  #    K*Hd

    @classmethod
    def pack(cls, t: HeadTensors, dtype: torch.dtype) -> _Layers:
        w1, b1 = t.expert_w1.flatten(0, 1), t.expert_b1.flatten()
        if t.has_gate:
            w1, b1 = torch.cat([w1, t.gate_w1]), torch.cat([b1, t.gate_b1])
        return cls(
            w1=w1.to(dtype),
            b1=b1.to(dtype),
            expert_w2=t.expert_w2.flatten(0, 1)[:, :, None, None].to(dtype),
            expert_b2=t.expert_b2.flatten().to(dtype),
            gate_w2=t.gate_w2[:, :, None, None].to(dtype) if t.has_gate else None,
            gate_b2=t.gate_b2.to(dtype) if t.has_gate else None,
            experts=t.expert_w1.shape[0],
            expert_width=t.expert_w1.shape[0] * t.expert_w1.shape[1],
        )


def _features(t: HeadTensors, options: HeadOptions, frames: slice, dtype: torch.dtype) -> Tensor:
    """F = upsample(x) + pos for some frames, [n, C, H, W]."""
    x = t.x[frames].to(dtype)
    size = (options.height, options.width)
    if x.shape[-2:] != size:
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
    return x if t.pos_x is None else x + position_map(t.pos_x, t.pos_y).to(dtype)


def _second_layer(hidden: Tensor, layers: _Layers, t: HeadTensors, frames: slice) -> tuple[Tensor, Tensor | None]:
    """The experts' outputs z [n, K, O, H, W] and the gate's logits [n, K, H, W], in the outputs' dtype."""
    wide = output_dtype(t.x.dtype)
    z = F.conv2d(hidden[:, : layers.expert_width], layers.expert_w2, layers.expert_b2, groups=layers.experts)
    z = z.unflatten(1, (layers.experts, -1)).to(wide)
    if layers.gate_w2 is None:
        return z, None
    logits = F.conv2d(hidden[:, layers.expert_width :], layers.gate_w2, layers.gate_b2).to(wide)
    if t.gate_logits is not None:
        logits = logits + t.gate_logits[frames].to(wide)
    return z, logits


def _hidden(features: Tensor, layers: _Layers) -> Tensor:
    """relu(conv(F, W1) + b1) of all experts and the gate, [n, N, H, W]."""
    return torch.relu(F.conv2d(features, layers.w1, layers.b1, padding=1))


def _forward(t: HeadTensors, layers: _Layers, options: HeadOptions, frames: slice) -> MoEOutput:
    hidden = _hidden(_features(t, options, frames, layers.w1.dtype), layers)
    return mix(*_second_layer(hidden, layers, t, frames), options)


class _Sums:
    """Gradients as they grow: the batch's own frame by frame, the parameters' summed over frames in order."""

    def __init__(self, tensors: HeadTensors):
        self.tensors = tensors
        self.wide = output_dtype(tensors.x.dtype)
        self.sums: dict[str, Tensor] = {}
        self.frames: dict[str, list[Tensor]] = {}

    def add(self, name: str, grad: Tensor) -> None:
        grad = grad.to(self.wide)
        self.sums[name] = self.sums[name] + grad if name in self.sums else grad

    def append(self, name: str, grad: Tensor) -> None:
        self.frames.setdefault(name, []).append(grad)

    def gradients(self, needs: HeadTensors) -> HeadTensors:
        found = {**self.sums, **{name: torch.cat(frames) for name, frames in self.frames.items()}}
        return HeadTensors(
            *(
                found[name].reshape(like.shape).to(like.dtype) if needed else None
                for name, like, needed in zip(HeadTensors._fields, self.tensors, needs, strict=True)
            )
        )


def _backward(
    t: HeadTensors,
    layers: _Layers,
    options: HeadOptions,
    cotangents: MoEOutput,
    needs: HeadTensors,
    frames: slice,
    total: _Sums,
) -> None:
    dtype = layers.w1.dtype
    features = _features(t, options, frames, dtype)
    hidden = _hidden(features, layers)
    z, logits = _second_layer(hidden, layers, t, frames)
    here: list[Any] = [None if c is None else c[frames].to(z.dtype) for c in cotangents]
    grad_z, grad_logits = mix_vjp(z, logits, options, MoEOutput(*here))

    grad_z = grad_z.flatten(1, 2)
    if needs.expert_b2:
        total.add("expert_b2", grad_z.sum((0, 2, 3)))
    if needs.gate_b2:
        total.add("gate_b2", grad_logits.sum((0, 2, 3)))
    if needs.gate_logits:
        total.append("gate_logits", grad_logits)

    of_experts, of_gate = hidden.tensor_split([layers.expert_width], 1)
    grad_z = grad_z.to(dtype)
    if needs.expert_w2:
        total.add("expert_w2", conv2d_weight(of_experts, layers.expert_w2.shape, grad_z, groups=layers.experts))
    if needs.gate_w2:
        total.add("gate_w2", conv2d_weight(of_gate, layers.gate_w2.shape, grad_logits.to(dtype)))
    if not any((needs.x, needs.expert_w1, needs.expert_b1, needs.gate_w1, needs.gate_b1)):
        return

    grad_hidden = F.conv_transpose2d(grad_z, layers.expert_w2, groups=layers.experts)
    if grad_logits is not None:
        grad_hidden = torch.cat([grad_hidden, F.conv_transpose2d(grad_logits.to(dtype), layers.gate_w2)], 1)
    grad_hidden = torch.where(hidden <= 0, 0, grad_hidden)  # NaN passes, as through relu
    if needs.expert_w1 or needs.gate_w1:
        grad_w1 = conv2d_weight(features, layers.w1.shape, grad_hidden, padding=1)
        _add_split(total, "expert_w1", "gate_w1", grad_w1, layers.expert_width, needs)
    if needs.expert_b1 or needs.gate_b1:
        grad_b1 = grad_hidden.to(total.wide).sum((0, 2, 3))
        _add_split(total, "expert_b1", "gate_b1", grad_b1, layers.expert_width, needs)
    if needs.x:
        grad_features = conv2d_input(features.shape, layers.w1, grad_hidden, padding=1)
        total.append("x", _upsample_vjp(grad_features.to(total.wide), t.x.shape[-2:]))


def _add_split(total: _Sums, experts: str, gate: str, grad: Tensor, width: int, needs: HeadTensors) -> None:
    if getattr(needs, experts):
        total.add(experts, grad[:width])
    if getattr(needs, gate):
        total.add(gate, grad[width:])


def _upsample_vjp(grad: Tensor, size: tuple[int, int]) -> Tensor:
    """The adjoint of the bilinear upsampling, [1, C, H, W] -> [1, C, h, w]."""
    return _gather(_gather(grad, 2, size[0]), 3, size[1])


def _gather(grad: Tensor, axis: int, source: int) -> Tensor:
    """The adjoint of interpolation along one axis: each source pixel sums, in order, over the targets that read it.

    Those are less than one source pixel away; the weights are computed in float64.
    """
    target = grad.shape[axis]
    if source == target:
        return grad
    if source == 1:
        return grad.sum(axis, keepdim=True)
    step = (source - 1) / max(target - 1, 1)  # source pixels per target
    exact = torch.float32 if grad.device.type == "mps" else torch.float64
    pixel = torch.arange(source, dtype=exact, device=grad.device)
    first = ((pixel - 1) / step).floor().add(1).clamp(min=0)
    along = [-1 if dim == axis else 1 for dim in range(grad.dim())]
    total = torch.zeros((), dtype=grad.dtype, device=grad.device)
    for tap in range(min(target, math.ceil(2 / step))):
        index = first + tap
        weight = torch.where(index < target, (1 - (index * step - pixel).abs()).clamp(min=0), 0)
        taken = grad.index_select(axis, index.clamp(max=target - 1).long())
        total = torch.addcmul(total, taken, weight.to(grad.dtype).view(along))
    return total
