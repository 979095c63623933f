"""Whether code runs eagerly on ordinary tensors, so that it may keep results between calls and read memory directly."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def runs_eagerly(*tensors: Tensor) -> bool:
    """False while a graph is compiled, exported, traced or captured, under ``torch.func`` or a dispatch mode (which
    would not see it), for tensor subclasses, and while forward-mode differentiation goes on.

    What is computed then belongs to a graph or a transformation, and must not outlive it.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:  # type: ignore[attr-defined]  # no public equal
        return False
    if torch._C._len_torch_dispatch_stack() > 0 or forward_ad._current_level >= 0:  # type: ignore[attr-defined]  # nor
        return False
    if any(type(t) not in (Tensor, nn.Parameter) for t in tensors):
        return False
    return not (any(t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing())
