"""The Triton backend: translates a call into the terms of :mod:`moe3d.kernels` and runs its passes.

Triton is imported at the first call that needs it. With TRITON_INTERPRET=1 in the environment before that, an explicit
``backend="triton"`` runs on CPU tensors in Triton's interpreter: slow, and meant for tests.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe3d.ops import gpu
from moe3d.ops.backend import Backend
from moe3d.ops.mixture import SWITCH_MIN_WEIGHT
from moe3d.ops.types import HeadOptions, HeadTensors, MoEOutput

OLDEST_TRITON = (3, 6)
INTERPRETER = (0, 0)  # its row in the launch tables
MAX_EXPERTS = 16
MAX_OUTPUTS = 15
MAX_SIDE = 32768  # the kernels multiply two pixel indices in 32 bits


class TritonBackend(Backend):
    """Any C, Hd, Hg, strides, batch and image size; K to 16, O to 15; float32, bfloat16 and float16.

    Channels are padded with zeros to the blocks of the matrix units; multiples of 64 (C) and 32 (K*Hd + Hg) waste none.
    """

    @property
    def automatic(self) -> bool:
        return False  # until `make gpu` has found it right on a GPU; until then it is used where it is asked for

    def unavailable(self) -> str | None:
        return _no_triton() or _no_device()

    def unsupported(self, tensors: HeadTensors, options: HeadOptions) -> str | None:
        return _unsupported_device(tensors.x.device) or _unsupported_call(tensors, options)

    def forward(self, tensors: HeadTensors, options: HeadOptions) -> MoEOutput:
        from moe3d.kernels import passes

        with gpu.current_device(tensors.x):
            call = _call(tensors, options)
            outputs = passes.new_outputs(call)
            _run_forward(call, outputs, _forward_config(call, outputs))
        return MoEOutput(*outputs)

    def backward(
        self, tensors: HeadTensors, options: HeadOptions, cotangents: MoEOutput, needs: HeadTensors
    ) -> HeadTensors:
        from moe3d.kernels import passes

        with gpu.current_device(tensors.x):
            call = _call(tensors, options)
            wanted = passes.Gradients(*needs[:10])
            parts: Any = map(_cotangent, cotangents)
            given = passes.Outputs(*parts)
            backward = passes.Backward(call, given, wanted, lambda kernel: _config(kernel, call))
            for launch in backward.launches():
                launch.run()
            return HeadTensors(**backward.gradients()._asdict(), pos_x=None, pos_y=None)

    def candidates(self, tensors: HeadTensors, options: HeadOptions) -> dict[str, Callable[[], MoEOutput]]:
        """The formulations and launch configurations that ``make gpu`` races: see :mod:`moe3d.benchmark.tuning`."""
        from moe3d.kernels import passes

        call = _call(tensors, options)

        def run(config) -> MoEOutput:
            with gpu.current_device(tensors.x):
                outputs = passes.new_outputs(call)
                _run_forward(call, outputs, config)
            return MoEOutput(*outputs)

        return {name: partial(run, config) for name, config in _candidates(call).items()}

    def choose(self, tensors: HeadTensors, options: HeadOptions, candidate: str) -> None:
        """Write a candidate into the user's launch table, for calls of this kind on this GPU."""
        from moe3d.kernels import tables

        call = _call(tensors, options)
        name = _gpu(call.x.device)[1]
        tables.choose("forward", call.precision.kind, name, call.shape_class, _candidates(call)[candidate])


def _candidates(call):
    from moe3d.kernels import tables

    return tables.candidates(call.precision.kind, _gpu(call.x.device)[0], call.columns, call.wider)


def _call(t: HeadTensors, options: HeadOptions):
    from moe3d.kernels.pack import Parameters
    from moe3d.kernels.passes import Call
    from moe3d.kernels.plan import Mixing

    experts, outputs = t.expert_w2.shape[:2]
    return Call(
        x=t.x,
        parameters=Parameters(*t[1:9]),
        gate_logits=_contiguous(t.gate_logits),
        pos_x=_contiguous(t.pos_x),
        pos_y=_contiguous(t.pos_y),
        size=(options.height, options.width),
        mixing=Mixing(
            experts=experts,
            outputs=outputs,
            activation=options.activation,
            conf_activation=options.conf_activation,
            mode=options.mode,
            temperature=options.temperature,
            gap=options.gap,
            has_gate=t.has_gate,
        ),
        return_experts=options.return_experts,
        skip_below=_skip_below(options, experts),
        precision=_precision(t.x, options.precision),
        multiprocessors=_multiprocessors(t.x.device),
    )


def _cotangent(c: Tensor | None) -> Tensor | None:
    """As the kernels read it; the operator's absent outputs are empty tensors, and so may their cotangents be."""
    return None if c is None or c.numel() == 0 else c.float().contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _skip_below(options: HeadOptions, experts: int) -> float:
    """0 where every expert is asked for; never so high that a tile could lose its most probable expert, or "switch"
    a hypothesis that has a say."""
    if options.return_experts or experts == 1:
        return 0.0
    return min(options.skip_below, 0.5 / experts, SWITCH_MIN_WEIGHT)


def _precision(x: Tensor, name: str):
    from moe3d.kernels.plan import Precision

    if name == "bf16" or (name == "auto" and x.dtype.itemsize == 2):
        return Precision(torch.bfloat16 if name == "bf16" else x.dtype, "upcast" if _interpreting() else "half")
    if name == "auto":
        name = "tf32" if x.is_cuda and gpu.convolutions_use_tf32() else "ieee"
    return Precision(torch.float32, name)


def _run_forward(call, outputs, config) -> None:
    from moe3d.kernels import passes

    for launch in passes.forward_pass(call, outputs, config):
        launch.run()


def _config(kernel: str, call, shape: str = "any"):
    from moe3d.kernels import tables

    return tables.config(kernel, call.precision.kind, *_gpu(call.x.device), call.columns, shape)


def _forward_config(call, outputs):
    """The table's, after filling in this class of shapes where the user asked for tuning."""
    from triton.testing import do_bench

    from moe3d.kernels import tables

    name = _gpu(call.x.device)[1]
    kind, shape = call.precision.kind, call.shape_class
    tunable = call.x.is_cuda and not torch.cuda.is_current_stream_capturing() and tables.autotune_requested()
    if tunable and not tables.is_tuned("forward", kind, name, shape):
        options = list(_candidates(call).values())
        tables.tune("forward", kind, name, shape, options, lambda c: do_bench(lambda: _run_forward(call, outputs, c)))
    return _config("forward", call, shape)


def _gpu(device: torch.device) -> tuple[tuple[int, int], str]:
    """Compute capability and name: what the launch tables are keyed by."""
    if device.type != "cuda":
        return INTERPRETER, "interpreter"
    return torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _no_triton() -> str | None:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed"
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TRITON:
        return f"Triton {version} is installed, and it needs {'.'.join(map(str, OLDEST_TRITON))} or newer"
    return None


def _no_device() -> str | None:
    if _interpreting():
        return None
    return gpu.unavailable()


def _unsupported_device(device: torch.device) -> str | None:
    if device.type == "cpu" and _interpreting():
        return None
    return gpu.unsupported(device)


def _unsupported_call(t: HeadTensors, options: HeadOptions) -> str | None:
    if t.x.dtype == torch.float64:
        return "it has no float64 arithmetic"
    if t.expert_w1.shape[0] > MAX_EXPERTS:
        return f"K = {t.expert_w1.shape[0]} experts are more than {MAX_EXPERTS}"
    if t.expert_w2.shape[1] > MAX_OUTPUTS:
        return f"O = {t.expert_w2.shape[1]} output channels are more than {MAX_OUTPUTS}"
    if max(options.height, options.width, *t.x.shape[2:]) > MAX_SIDE:
        return f"an image side is longer than {MAX_SIDE} pixels"
    return None
