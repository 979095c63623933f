"""The ``cpu`` backend: C++ kernels in the compiled module ``moe3d._native`` (sources in ``csrc/``).

The module takes addresses, sizes and strides, and knows nothing of PyTorch. What can keep it from running (not built,
built for another version, not loadable here) is a reason told when the backend is asked for, never an import error.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from moe3d import _build
from moe3d.ops.activations import ACTIVATIONS, CONF_ACTIVATIONS
from moe3d.ops.backend import Backend
from moe3d.ops.mixture import MODES
from moe3d.ops.types import HeadOptions, HeadTensors, MoEOutput

ISA_VARIABLE = "MOE3D_CPU_ISA"  # amx, avx512, avx2 or portable; "auto" or unset takes the best that the processor has
# Of float32 arithmetic: low-resolution, winograd or bf16x3 (which give way where they cannot run); "auto" or unset
# takes what needs least time.
FORMULATION_VARIABLE = "MOE3D_CPU_FORMULATION"
FORMULATIONS = {"auto": 0, "low-resolution": 1, "winograd": 2, "bf16x3": 4}  # of moe::Formulation

_BACKEND = "moe_head: the cpu backend"  # of whom errors speak
_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_OUT_OF_MEMORY = 1
_FAILURES = {2: "no such instruction set", 3: "an instruction set that this processor lacks"}


class CPUBackend(Backend):
    """The first layer at low resolution (csrc/cpu/hidden.h) or by Winograd's algorithm (csrc/cpu/tiles.h), whichever
    needs less time; products of float32 numbers, of those as sums of two bfloat16 ones (where AMX multiplies them), or
    of bfloat16 ones, with float32 sums."""

    def unavailable(self) -> str | None:
        native = _build.native()
        if native.module is None:
            return native.reason
        known = ("auto", *native.module.supported_isas())
        if isa() not in known:
            return f"{ISA_VARIABLE}={isa()!r}, expected one of {', '.join(known)} on this processor"
        if formulation() not in FORMULATIONS:
            return f"{FORMULATION_VARIABLE}={formulation()!r}, expected one of {', '.join(FORMULATIONS)}"
        return None

    def unsupported(self, tensors: HeadTensors, options: HeadOptions) -> str | None:
        x = tensors.x
        if x.device.type != "cpu":
            return f"x is on {x.device.type!r}, and this backend works on the CPU"
        if x.dtype not in _ELEMENTS:
            return f"x is {str(x.dtype).removeprefix('torch.')}, and the kernels compute in float32 or less"
        if options.precision == "tf32":
            return "precision 'tf32' is arithmetic of CUDA devices"
        if options.precision == "bf16" and not has_bf16_products():
            return "precision 'bf16' needs a processor with avx512_bf16 (and MOE3D_CPU_ISA at auto, amx or avx512)"
        return None

    def forward(self, tensors: HeadTensors, options: HeadOptions) -> MoEOutput:
        outputs = empty_outputs(tensors, options)
        call = _CPUCall(tensors, options, bf16=_uses_bf16(tensors.x.dtype, options.precision))
        call.use_packed_weights(tensors)
        call.run("cpu_forward", call.addresses("Outputs", outputs._asdict()))
        return outputs

    def backward(
        self, tensors: HeadTensors, options: HeadOptions, cotangents: MoEOutput, needs: HeadTensors
    ) -> HeadTensors:
        gradients = empty_gradients(tensors, needs)
        call = _CPUCall(tensors, options, bf16=False)  # twice the work of bfloat16, and exact to the last reduction
        call.run(
            "cpu_backward",
            call.addresses("Cotangents", call.keep_all(cotangents._asdict())),
            call.addresses("Gradients", gradients),
        )
        return as_head_tensors(gradients)


def has_bf16_products() -> bool:
    """Whether bfloat16 arithmetic can be had: by the processor, and by the instruction set asked for."""
    module = _build.native().module
    return module is not None and module.has_bf16_products(isa())


def _has_amx() -> bool:
    module = _build.native().module
    return module is not None and "amx" in module.supported_isas() and isa() in ("auto", "amx")


def isa() -> str:
    """The instruction set asked for."""
    return os.environ.get(ISA_VARIABLE) or "auto"


def formulation() -> str:
    """The formulation asked for."""
    return os.environ.get(FORMULATION_VARIABLE) or "auto"


def chosen_formulation(source: tuple[int, int], size: tuple[int, int], channels: int, hidden: int, bf16: bool) -> str:
    """What a forward pass takes, for features of ``source`` size and ``hidden`` channels over all branches."""
    module: Any = _build.native().module
    p = module.Problem()
    (p.in_height, p.in_width), (p.height, p.width) = source, size
    p.channels, p.experts, p.expert_hidden, p.bf16 = channels, 1, hidden, bf16
    p.formulation, p.isa = FORMULATIONS[formulation()], isa()
    return formulation_name(FORMULATIONS, module.cpu_formulation(p))


def formulation_name(formulations: Mapping[str, int], code: int) -> str:
    """The name in one of the backends' ``FORMULATIONS``."""
    return next(name for name, known in formulations.items() if known == code)


def _uses_bf16(x: torch.dtype, precision: str) -> bool:
    """On request; by itself for bfloat16 features where AMX makes it the faster one, which ``vdpbf16ps`` does not."""
    return precision == "bf16" or (precision == "auto" and x == torch.bfloat16 and _has_amx())


def empty_outputs(t: HeadTensors, options: HeadOptions) -> MoEOutput:
    batch, experts = t.x.shape[0], t.expert_w1.shape[0]
    channels = options.prediction_channels(t.expert_w2.shape[1])

    def new(*shape, present=True):
        if not present:
            return None
        return torch.empty(*shape, options.height, options.width, dtype=torch.float32, device=t.x.device)

    return MoEOutput(
        prediction=new(batch, channels),
        confidence=new(batch, present=options.conf_activation is not None),
        entropy=new(batch),
        weights=new(batch, experts, present=options.return_experts),
        hypotheses=new(batch, experts, channels, present=options.return_experts),
    )


def empty_gradients(tensors: HeadTensors, needs: HeadTensors) -> dict[str, Tensor]:
    """Contiguous float32 memory for each gradient that is needed; that of x has its channels last."""
    named = {n: value for n, value in tensors._asdict().items() if value is not None and getattr(needs, n)}
    shapes = {n: value.shape for n, value in named.items()}
    if "x" in named:
        batch, channels, height, width = named["x"].shape
        shapes["x"] = torch.Size((batch, height, width, channels))
    return {n: torch.empty(shape, dtype=torch.float32, device=named[n].device) for n, shape in shapes.items()}


def as_head_tensors(gradients: dict[str, Tensor]) -> HeadTensors:
    if "x" in gradients:
        gradients["x"] = gradients["x"].permute(0, 3, 1, 2)
    return HeadTensors(*(gradients.get(name) for name in HeadTensors._fields))


def check_status(status: int, who: str) -> None:
    """MemoryError or RuntimeError for a status of the CPU kernels other than ok; ``who`` was called."""
    if status == _OUT_OF_MEMORY:
        raise MemoryError(f"{who} ran out of memory")
    if status:
        raise RuntimeError(f"{who} failed: {_FAILURES.get(status, f'status {status}')}")


def fingerprint(tensors: Sequence[Tensor]) -> int:
    """Changes with the values of these contiguous float32 tensors, of each of which a few are read."""
    module: Any = _build.native().module
    return module.fingerprint([(t.data_ptr(), t.numel()) for t in tensors])


def state_of(tensors: Sequence[Tensor]) -> tuple:
    """Equal to an earlier one only if these contiguous float32 tensors are what they were.

    Version counters miss what is written through ``.data`` (as averages of weights are swapped in); hence a few values
    of each tensor, too. Tensors made in inference mode have no version, so all of their values are read.
    """
    places = tuple((t.data_ptr(), t.shape) for t in tensors)
    versions = tuple(zlib.crc32(t.numpy().data) if t.is_inference() else t._version for t in tensors)
    return places, versions, fingerprint(tensors)


# By expert_w1: the state of the first layers' weights, and what was packed from them, by kind of packing.
_packed = WeakTensorKeyDictionary()


class Call:
    """One call's description for a compiled module, and the float32 copies that must live until it returns."""

    def __init__(self, module: Any, tensors: HeadTensors, options: HeadOptions):
        self.module = module
        self._kept: list[Tensor] = []
        self.problem = self._describe(tensors, options)

    def keep_all(self, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        return {name: None if value is None else self._keep(value) for name, value in tensors.items()}

    def _keep(self, value: Tensor) -> Tensor:
        """``value`` as contiguous float32, alive as long as this call."""
        value = value.detach().to(torch.float32).contiguous()
        self._kept.append(value)
        return value

    def addresses(self, kind: str, tensors: Mapping[str, Tensor | None]):
        struct = getattr(self.module, kind)()
        for name, value in tensors.items():
            setattr(struct, name, 0 if value is None else value.data_ptr())
        return struct

    def _describe(self, t: HeadTensors, options: HeadOptions):
        p = self.module.Problem()
        p.batch, p.channels, p.in_height, p.in_width = t.x.shape
        p.height, p.width = options.height, options.width
        p.experts, p.expert_hidden, _, _, _ = t.expert_w1.shape
        p.outputs = t.expert_w2.shape[1]
        p.gate_hidden = t.gate_w1.shape[0] if t.has_gate else 0
        p.x, p.x_strides, p.x_element = t.x.data_ptr(), t.x.stride(), _ELEMENTS[t.x.dtype]
        for name, value in t._asdict().items():
            if name != "x" and value is not None:
                setattr(p, name, self._keep(value).data_ptr())
        p.temperature, p.gap, p.skip_below = options.temperature, options.gap, options.skip_below
        if options.return_experts:
            p.skip_below = 0.0  # every hypothesis is wanted
        p.activation = list(ACTIVATIONS).index(options.activation)
        confidence = options.conf_activation
        p.conf_activation = -1 if confidence is None else list(CONF_ACTIVATIONS).index(confidence)
        p.mode = MODES.index(options.mode)
        return p


class _CPUCall(Call):
    def __init__(self, tensors: HeadTensors, options: HeadOptions, bf16: bool):
        super().__init__(_build.native().module, tensors, options)  # there, or the dispatcher had not come here
        self.problem.formulation = FORMULATIONS[formulation()]
        self.problem.bf16, self.problem.isa, self.problem.threads = bf16, isa(), torch.get_num_threads()

    def use_packed_weights(self, tensors: HeadTensors) -> None:
        """The first layers' weights as the kernels read them, from an earlier call if they are still the same."""
        first_layers = [w for w in (tensors.expert_w1, tensors.gate_w1) if w is not None]
        if any(w.dtype != torch.float32 or not w.is_contiguous() for w in first_layers):
            return
        state = state_of(first_layers)
        kept = _packed.get(tensors.expert_w1)
        if kept is None or kept[0] != state:
            kept = _packed[tensors.expert_w1] = state, {}
        kind = self.module.cpu_formulation(self.problem), self.problem.bf16, self.problem.isa
        if kind not in kept[1]:
            status, floats = self.module.cpu_packed_floats(self.problem)
            check_status(status, _BACKEND)
            packed = torch.empty(floats, dtype=torch.float32, device="cpu")
            self.run("cpu_pack", packed.data_ptr())
            kept[1][kind] = packed
        self.problem.packed = self._keep(kept[1][kind]).data_ptr()

    def run(self, function: str, *structs) -> None:
        check_status(getattr(self.module, function)(self.problem, *structs), _BACKEND)
