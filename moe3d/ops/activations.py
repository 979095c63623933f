"""VGGT's output activations by name, each with its derivative.

A backend's backward runs below autograd, so every activation carries its own vector-Jacobian product. Tensors are
[..., channels, H, W]; only ``norm``, ``norm_exp`` and ``xy_inv_log`` mix channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHANNELS = -3
_SMALLEST_NORM = 1e-8  # VGGT's clamp in norm_exp


@dataclass(frozen=True)
class Activation:
    """``forward(y)`` and ``vjp(y, grad)``, the gradient with respect to ``y``."""

    forward: Callable[[Tensor], Tensor]
    vjp: Callable[[Tensor, Tensor], Tensor]
    positive: bool = False  # never below zero, so that ratios of outputs mean something (mode "switch")
    channels: int | None = None  # the only number of channels it accepts


def _relu_vjp(y: Tensor, grad: Tensor) -> Tensor:
    return torch.where(y <= 0, 0, grad)  # so that NaN passes, as in torch.relu


def _sigmoid_vjp(y: Tensor, grad: Tensor) -> Tensor:
    s = torch.sigmoid(y)
    return grad * s * (1 - s)


def _inv_log(y: Tensor) -> Tensor:
    return torch.sign(y) * torch.expm1(y.abs())


def _inv_log_vjp(y: Tensor, grad: Tensor) -> Tensor:
    return grad * torch.exp(y.abs())


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(CHANNELS, keepdim=True)


def _norm(y: Tensor) -> Tensor:
    return y / y.norm(dim=CHANNELS, keepdim=True)


def _norm_vjp(y: Tensor, grad: Tensor) -> Tensor:
    length = y.norm(dim=CHANNELS, keepdim=True)
    unit = y / length
    return (grad - unit * _dot(unit, grad)) / length


def _norm_exp(y: Tensor) -> Tensor:
    length = y.norm(dim=CHANNELS, keepdim=True).clamp(min=_SMALLEST_NORM)
    return y / length * torch.expm1(length)


def _norm_exp_vjp(y: Tensor, grad: Tensor) -> Tensor:
    length = y.norm(dim=CHANNELS, keepdim=True).clamp(min=_SMALLEST_NORM)
    unit = y / length
    radial = unit * _dot(unit, grad)
    return torch.expm1(length) / length * (grad - radial) + torch.exp(length) * radial


def _xy_inv_log(y: Tensor) -> Tensor:
    z = _inv_log(y[..., 2:, :, :])
    return torch.cat([y[..., :2, :, :] * z, z], dim=CHANNELS)


def _xy_inv_log_vjp(y: Tensor, grad: Tensor) -> Tensor:
    xy, log_z = y[..., :2, :, :], y[..., 2:, :, :]
    grad_xy, grad_z = grad[..., :2, :, :], grad[..., 2:, :, :]
    return torch.cat([grad_xy * _inv_log(log_z), _inv_log_vjp(log_z, grad_z + _dot(grad_xy, xy))], dim=CHANNELS)


def _exp_vjp(y: Tensor, grad: Tensor) -> Tensor:
    return grad * torch.exp(y)


ACTIVATIONS: dict[str, Activation] = {
    "exp": Activation(torch.exp, _exp_vjp, positive=True),
    "relu": Activation(torch.relu, _relu_vjp, positive=True),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_vjp, positive=True),
    "linear": Activation(lambda y: y, lambda y, grad: grad),
    "inv_log": Activation(_inv_log, _inv_log_vjp),
    "xy_inv_log": Activation(_xy_inv_log, _xy_inv_log_vjp, channels=3),
    "norm": Activation(_norm, _norm_vjp),
    "norm_exp": Activation(_norm_exp, _norm_exp_vjp),
}

CONF_ACTIVATIONS: dict[str, Activation] = {
    "expp1": Activation(lambda y: 1 + torch.exp(y), _exp_vjp),
    "expp0": Activation(torch.exp, _exp_vjp),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_vjp),
}
