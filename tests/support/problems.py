"""Random calls of the operation, as plain data that the package and the truth can both evaluate."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe3d.functional import moe_head
from moe3d.ops.types import HeadOptions, HeadTensors, MoEOutput

GATE = ("gate_w1", "gate_b1", "gate_w2", "gate_b2")


@dataclass(frozen=True)
class Problem:
    """Everything that defines the result: tensors by the names of ``moe_head``'s arguments, and the options."""

    tensors: dict[str, Tensor]
    size: tuple[int, int]
    pos: tuple[Tensor, Tensor] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def option(self, name: str) -> Any:
        defaults = {"temperature": 1.0, "activation": "exp", "conf_activation": "expp1", "mode": "mean", "gap": 0.3}
        return self.options.get(name, defaults.get(name))

    @property
    def experts(self) -> int:
        return self.tensors["expert_w1"].shape[0]

    @property
    def prediction_channels(self) -> int:
        outputs = self.tensors["expert_w2"].shape[1]
        return outputs if self.option("conf_activation") is None else outputs - 1

    def with_tensors(self, **tensors: Tensor) -> Problem:
        return dataclasses.replace(self, tensors=self.tensors | tensors)

    def with_options(self, **options: Any) -> Problem:
        return dataclasses.replace(self, options=self.options | options)

    def leaves(self) -> Problem:
        """The same problem, strides and all, on tensors that require gradients of their own."""
        return dataclasses.replace(
            self, tensors={name: t.detach().requires_grad_() for name, t in self.tensors.items()}
        )

    def double(self) -> Problem:
        """The same (rounded) numbers in float64."""
        pos = None if self.pos is None else tuple(table.double() for table in self.pos)
        return dataclasses.replace(self, tensors={name: t.double() for name, t in self.tensors.items()}, pos=pos)

    def run(self, **options: Any) -> MoEOutput:
        return moe_head(size=self.size, pos=self.pos, **self.tensors, **(self.options | options))


def random_problem(
    *,
    batch: int = 2,
    channels: int = 6,
    source: tuple[int, int] = (3, 4),
    size: tuple[int, int] = (7, 9),
    experts: int = 3,
    hidden: int = 5,
    gate_hidden: int = 4,
    prediction_channels: int = 1,
    gate: bool = True,
    pos: bool = False,
    gate_logits: bool = False,
    dtype: torch.dtype = torch.float32,
    param_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
    **options: Any,
) -> Problem:
    """Activations of order one everywhere, and a gate that is neither uniform nor one-hot."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)

    outputs = prediction_channels + (options.get("conf_activation", "expp1") is not None)
    own = param_dtype or dtype
    tensors = {
        "x": normal(batch, channels, *source),
        "expert_w1": normal(experts, hidden, channels, 3, 3, scale=(9 * channels) ** -0.5, dtype=own),
        "expert_b1": normal(experts, hidden, scale=0.3, dtype=own),
        "expert_w2": normal(experts, outputs, hidden, scale=hidden**-0.5, dtype=own),
        "expert_b2": normal(experts, outputs, scale=0.5, dtype=own),
    }
    if gate:
        tensors |= {
            "gate_w1": normal(gate_hidden, channels, 3, 3, scale=(9 * channels) ** -0.5, dtype=own),
            "gate_b1": normal(gate_hidden, scale=0.3, dtype=own),
            "gate_w2": normal(experts, gate_hidden, dtype=own),
            "gate_b2": normal(experts, dtype=own),
        }
    if gate_logits:
        tensors["gate_logits"] = normal(batch, experts, *size)
    tables = (normal(size[1], channels // 2, scale=0.5), normal(size[0], channels // 2, scale=0.5)) if pos else None
    return Problem(tensors, size, tables, options)


def operator_arguments(problem: Problem, backend: str = "auto", precision: str = "auto") -> tuple:
    """The flat arguments of ``moe3d::moe_head``."""
    pos = problem.pos or (None, None)
    tensors = HeadTensors(*(problem.tensors.get(n) for n in HeadTensors._fields[:-2]), *pos)
    options = HeadOptions(
        *problem.size,
        *(problem.option(n) for n in ("temperature", "activation", "conf_activation", "mode", "gap")),
        return_experts=True,
        skip_below=0.0,
        precision=precision,
    )
    return (*tensors, *vars(options).values(), backend)
