"""What the backends for CUDA devices have in common: whether there is a device, and how PyTorch's own products run."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

OLDEST = (8, 0)  # compute capability


def unavailable() -> str | None:
    """Why no CUDA device can be used at all, in words that follow "because"."""
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm, where it is untested"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return None


def unsupported(device: torch.device) -> str | None:
    """Why tensors on this device cannot be served, in the same form."""
    if device.type != "cuda":
        return f"x is on {device.type!r}, not on a CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {_dotted(capability)}, below {_dotted(OLDEST)}"
    return None


def current_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Kernels are launched on the current device's current stream: this makes x's device the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def convolutions_use_tf32() -> bool:
    """Whether PyTorch's own float32 convolutions would: since 2.9 their setting has a name of its own."""
    convolution = getattr(torch.backends.cudnn, "conv", None)
    return torch.backends.cudnn.allow_tf32 if convolution is None else convolution.fp32_precision == "tf32"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
