"""The ``cuda`` backend: CUDA kernels in the compiled module ``moe3d._native`` (sources in ``csrc/cuda/``).

It needs no Triton. The module takes addresses and a stream; the memory that its kernels work in comes from PyTorch's
allocator, and everything is enqueued on x's device and its current stream, so calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from moe3d import _build
from moe3d.ops import gpu
from moe3d.ops.backend import Backend
from moe3d.ops.native import Call, as_head_tensors, empty_gradients, empty_outputs, formulation_name
from moe3d.ops.types import HeadOptions, HeadTensors, MoEOutput

MAX_SIDE = 32768  # the kernels multiply two pixel indices in 32 bits
# low-resolution (which gives way where it cannot run) or direct; "auto" or unset takes what counts as faster
FORMULATION_VARIABLE = "MOE3D_CUDA_FORMULATION"
FORMULATIONS = {"auto": 0, "low-resolution": 1, "direct": 3}  # of moe::Formulation
ARITHMETIC = ("ieee", "tf32", "bf16", "fp16")  # in the order of moe::cuda::Arithmetic


class CUDABackend(Backend):
    """Any C, Hd, Hg, K, O, strides, batch and image size up to 32,768; float32, bfloat16 and float16.

    The first layer at low resolution (csrc/cuda/low_resolution.h) or as a convolution of upsampled features
    (csrc/cuda/convolution.h), whichever counts as faster; uses_low_resolution() in csrc/cuda/passes.h decides.
    """

    @property
    def automatic(self) -> bool:
        return False  # until `make gpu` has found it right on a GPU; until then it is used where it is asked for

    def unavailable(self) -> str | None:
        native = _build.native()
        if native.module is None:
            return native.reason
        if not hasattr(native.module, "cuda_forward"):
            return f"its CUDA part is not installed ({_build.record()['cuda'] or 'moe3d was built without it'})"
        return _unknown_formulation() or gpu.unavailable()

    def unsupported(self, tensors: HeadTensors, options: HeadOptions) -> str | None:
        return self._unsupported_device(tensors.x.device) or _unsupported_call(tensors, options)

    def forward(self, tensors: HeadTensors, options: HeadOptions) -> MoEOutput:
        with gpu.current_device(tensors.x):
            outputs = empty_outputs(tensors, options)
            call = self._call(tensors, options)
            call.run("cuda_forward", call.addresses("Outputs", outputs._asdict()))
        return outputs

    def backward(
        self, tensors: HeadTensors, options: HeadOptions, cotangents: MoEOutput, needs: HeadTensors
    ) -> HeadTensors:
        with gpu.current_device(tensors.x):
            gradients = empty_gradients(tensors, needs)
            call = self._call(tensors, options)
            given = {name: None if c is None or c.numel() == 0 else c for name, c in cotangents._asdict().items()}
            call.run(
                "cuda_backward",
                call.addresses("Cotangents", call.keep_all(given)),
                call.addresses("Gradients", gradients),
            )
        return as_head_tensors(gradients)

    def _unsupported_device(self, device: torch.device) -> str | None:
        return gpu.unsupported(device)

    def _module(self) -> Any:
        return _build.native().module

    def _call(self, tensors: HeadTensors, options: HeadOptions) -> _CUDACall:
        return _CUDACall(self._module(), tensors, options)


class _CUDACall(Call):
    """A call with what else a GPU needs: a stream, and memory to work in."""

    def __init__(self, module: Any, tensors: HeadTensors, options: HeadOptions):
        x = tensors.x
        if x.stride(1) != 1:  # the kernels read any strides, but channels that lie apart slowly
            x = x.contiguous(memory_format=torch.channels_last)
        super().__init__(module, tensors._replace(x=x), options)
        self._x = x
        self._arithmetic = ARITHMETIC.index(_arithmetic(x.dtype, options.precision))
        self.problem.formulation = FORMULATIONS[formulation()]

    @property
    def formulation(self) -> str:
        """What a forward pass takes on a GPU whose blocks may have the most shared memory."""
        return formulation_name(FORMULATIONS, self.module.cuda_formulation(self.problem, self._arithmetic))

    def run(self, function: str, *structs) -> None:
        size = getattr(self.module, f"{function}_workspace")(self.problem, self._arithmetic)
        workspace = torch.empty(size, dtype=torch.uint8, device=self._x.device)
        execution = self.module.Execution()
        execution.arithmetic = self._arithmetic
        execution.workspace, execution.workspace_bytes = workspace.data_ptr(), size
        if self._x.is_cuda:
            execution.device = self._x.device.index
            execution.stream = torch.cuda.current_stream(self._x.device).cuda_stream
        status = getattr(self.module, function)(self.problem, *structs, execution)
        if status:
            raise RuntimeError(f"moe_head: the cuda backend failed: {self.module.cuda_message(status)}")


def formulation() -> str:
    """The formulation asked for."""
    return os.environ.get(FORMULATION_VARIABLE) or "auto"


def chosen_formulation(
    source: tuple[int, int], size: tuple[int, int], channels: int, hidden: tuple[int, int, int], precision: str
) -> str:
    """What a forward pass takes, for features of ``source`` size and K experts of Hd and a gate of Hg ``hidden``."""
    module: Any = _build.native().module
    if not hasattr(module, "cuda_formulation"):
        return "direct"
    p = module.Problem()
    (p.in_height, p.in_width), (p.height, p.width) = source, size
    p.channels, p.outputs, (p.experts, p.expert_hidden, p.gate_hidden) = channels, 2, hidden
    p.formulation = FORMULATIONS[formulation()]
    return formulation_name(FORMULATIONS, module.cuda_formulation(p, ARITHMETIC.index(precision)))


def _unknown_formulation() -> str | None:
    if formulation() in FORMULATIONS:
        return None
    return f"{FORMULATION_VARIABLE}={formulation()!r}, expected one of {', '.join(FORMULATIONS)}"


def _arithmetic(x: torch.dtype, precision: str) -> str:
    if precision != "auto":
        return precision
    if x.itemsize == 2:
        return "bf16" if x == torch.bfloat16 else "fp16"
    return "tf32" if gpu.convolutions_use_tf32() else "ieee"


def _unsupported_call(t: HeadTensors, options: HeadOptions) -> str | None:
    if t.x.dtype == torch.float64:
        return "it has no float64 arithmetic"
    if max(options.height, options.width, *t.x.shape[2:]) > MAX_SIDE:
        return f"an image side is longer than {MAX_SIDE} pixels"
    return None
