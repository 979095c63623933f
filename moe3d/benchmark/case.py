"""What is measured: the size of a problem, its random weights and its inputs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

PRECISIONS = ("ieee", "tf32", "bf16")
VGGT_CHUNK = 8  # VGGT's heads compute at most this many frames at a time

_PATCH, _UPSAMPLED = 14, 8  # of every 14 x 14 pixels VGGT's decoder computes 8 x 8
_ROTATED_BYTES = 256 << 20  # inputs rotate until they are larger than any cache
_MOST_INPUTS = 16


@dataclass(frozen=True)
class Case:
    """One problem. The defaults are VGGT's tail at 518 x 518 with what we infer to be the paper's budget.

    ``precision`` is the arithmetic's class: "ieee" and "tf32" on float32 tensors, "bf16" on bfloat16 tensors.
    """

    frames: int = 1
    height: int = 518
    width: int = 518
    experts: int = 4
    gate_hidden: int = 128
    channels: int = 128
    expert_hidden: int = 32
    outputs: int = 2
    precision: str = "ieee"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.height % _PATCH or self.width % _PATCH or self.height < _PATCH or self.width < _PATCH:
            raise ValueError(f"size must be multiples of {_PATCH}, got {self.height}x{self.width}")
        if self.frames < 1 or self.experts < 1:
            raise ValueError(f"frames and experts must be at least 1, got {self.frames} and {self.experts}")

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def source_size(self) -> tuple[int, int]:
        """(h, w) of the features that the tail upsamples."""
        return self.height * _UPSAMPLED // _PATCH, self.width * _UPSAMPLED // _PATCH

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def gated(self) -> bool:
        return self.experts > 1

    @property
    def hidden(self) -> int:
        """N, the hidden channels of all experts and the gate."""
        return self.experts * self.expert_hidden + (self.gate_hidden if self.gated else 0)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def label(self) -> str:
        return f"{self.height}x{self.width}-{self.frames}f-K{self.experts}-{self.precision}"

    @property
    def single(self) -> Case:
        """The same problem for one plain head."""
        return replace(self, experts=1)

    @property
    def widened(self) -> Case:
        """One plain head with as many parameters as the mixture has, to the nearest channel."""
        per_channel = 9 * self.channels + 1 + self.outputs
        return replace(self, experts=1, expert_hidden=round((self.parameters - self.outputs) / per_channel))

    @property
    def parameters(self) -> int:
        block = 9 * self.channels + 1
        experts = self.experts * (self.expert_hidden * (block + self.outputs) + self.outputs)
        gate = self.gate_hidden * (block + self.experts) + self.experts
        return experts + (gate if self.gated else 0)

    def asdict(self) -> dict:
        return asdict(self)


Block = tuple[Tensor, Tensor, Tensor, Tensor]  # weight and bias of a 3x3, weight and bias of a 1x1


class Weights(NamedTuple):
    """A head's parameters under the names of :func:`moe3d.moe_head`; the gate's are None where there is one expert."""

    expert_w1: Tensor  #        [K, Hd, C, 3, 3]
    expert_b1: Tensor  #        [K, Hd]
    expert_w2: Tensor  #        [K, O, Hd]
    expert_b2: Tensor  #        [K, O]
    gate_w1: Tensor | None  #   [Hg, C, 3, 3]
    gate_b1: Tensor | None  #   [Hg]
    gate_w2: Tensor | None  #   [K, Hg]
    gate_b2: Tensor | None  #   [K]

    @property
    def experts(self) -> list[Block]:
        """Each expert's two layers."""
        return list(zip(*self[:4], strict=True))  # type: ignore[arg-type]  # these four are never None

    @property
    def gate(self) -> Block | None:
        return None if self.gate_w1 is None else self[4:]  # type: ignore[return-value]  # all four or none

    @property
    def present(self) -> list[Tensor]:
        return [t for t in self if t is not None]

    def map(self, change: Callable[[Tensor], Tensor]) -> Weights:
        changed: Any = (None if t is None else change(t) for t in self)
        return Weights(*changed)


def random_weights(case: Case, seed: int) -> Weights:
    """Weights under which hidden activations, depths and the gate's choices all vary from pixel to pixel."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, fan_in: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / math.sqrt(fan_in)).to(case.device, case.dtype)

    k, hd, hg, c, o = case.experts, case.expert_hidden, case.gate_hidden, case.channels, case.outputs
    experts = draw(k, hd, c, 3, 3, fan_in=9 * c), draw(k, hd, fan_in=9), draw(k, o, hd, fan_in=hd), draw(k, o, fan_in=9)
    if not case.gated:
        return Weights(*experts, None, None, None, None)
    return Weights(
        *experts, draw(hg, c, 3, 3, fan_in=9 * c), draw(hg, fan_in=9), draw(k, hg, fan_in=hg), draw(k, fan_in=9)
    )


def random_inputs(case: Case, seed: int) -> list[Tensor]:
    """Decoder features [B, C, h, w]: several, where one would stay in a cache and be measured there."""
    shape = (case.frames, case.channels, *case.source_size)
    itemsize = torch.empty(0, dtype=case.dtype).element_size()
    count = min(_MOST_INPUTS, math.ceil(_ROTATED_BYTES / (math.prod(shape) * itemsize)))
    generator = torch.Generator(case.device).manual_seed(seed)
    return [torch.randn(shape, generator=generator, device=case.device).to(case.dtype) for _ in range(count)]


def precisions(device: str) -> tuple[str, ...]:
    """The classes of arithmetic that a device has; on the CPU those of which PyTorch has convolutions made for it.

    It computes the others in loops that take a thousand times as long: minutes for one tail of VGGT's size.
    """
    if torch.device(device).type == "cuda":
        return PRECISIONS
    return ("ieee", "bf16") if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ("ieee",)


@contextlib.contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """PyTorch's own float32 convolutions and products on CUDA in the class's arithmetic, while it is measured."""
    allow, before = precision != "ieee", (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allow
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
