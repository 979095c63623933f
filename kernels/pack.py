"""Parameters in the order in which the kernels read them, made once per version of the parameters.

A packed set is kept per ``expert_w1`` tensor and found again while every parameter is the same tensor object, at the
same address, at the same ``_version``; it goes away with the tensor. In-place changes that hide from the version
counter (``p.data.add_()``) are not seen: change parameters under ``torch.no_grad()`` instead. Nothing is kept for
inference tensors, which have no version, nor while a CUDA graph is captured: its replays shall see later changes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from moe3d.kernels.plan import Precision, Section, block_of, expert_section, round_up, sections


class Parameters(NamedTuple):
    """The layers' tensors as the operation receives them; the gate's are None for a single head."""

    expert_w1: Tensor  #        [K, Hd, C, 3, 3]
    expert_b1: Tensor  #        [K, Hd]
    expert_w2: Tensor  #        [K, O, Hd]
    expert_b2: Tensor  #        [K, O]
    gate_w1: Tensor | None  #   [Hg, C, 3, 3]
    gate_b1: Tensor | None  #   [Hg]
    gate_w2: Tensor | None  #   [K, Hg]
    gate_b2: Tensor | None  #   [K]

    @property
    def padded(self) -> tuple[int, int]:
        """OP and KP: the output rows, the gate's among them, and the experts; at least 16 columns together."""
        experts, outputs = self.expert_w2.shape[:2]
        experts_padded = max(2, triton.next_power_of_2(experts))
        rows = outputs + (self.gate_w1 is not None)
        return max(triton.next_power_of_2(rows), 16 // experts_padded, 1), experts_padded


class Packed(NamedTuple):
    """N hidden channels of all experts and the gate in two sections of groups, padded with zeros."""

    w1: Tensor  #          [N, C/BK, 9, BK] operands: the order in which the convolution walks over its inputs
    b1: Tensor  #          [N] float32
    w2: Tensor  #          [N, OP*KP] operands: column o*KP + k feeds output o of expert k, row O the gate's logits
    feeds: Tensor  #       [N, OP*KP] float16: 1 where a hidden channel is the column's expert's (or gate's), else 0
    b2: Tensor  #          [OP*KP] float32
    position: Tensor  #    [K*Hd + Hg] int64: where each hidden channel (experts first, then the gate) went
    main: Section
    tail: Section
    block_k: int
    outputs_padded: int  # OP
    experts_padded: int  # KP

    @property
    def channels(self) -> int:
        """C, padded to a multiple of BK."""
        return self.w1.shape[1] * self.block_k

    def arguments(self) -> dict[str, Any]:
        return dict(
            CHANNELS=self.channels,
            BLOCK_K=self.block_k,
            MAIN_WIDTH=self.main.width,
            MAIN_COUNT=self.main.count,
            TAIL_WIDTH=self.tail.width,
            TAIL_COUNT=self.tail.count,
            OUTPUTS_PADDED=self.outputs_padded,
            EXPERTS_PADDED=self.experts_padded,
        )


def pack(p: Parameters, precision: Precision, max_width: int, max_block_k: int, skip: bool = False) -> Packed:
    """``skip`` keeps the gate in the main section and every expert in groups of its own in the tail."""
    experts, hidden, channels = p.expert_w1.shape[:3]
    outputs = p.expert_w2.shape[1]
    gate = 0 if p.gate_w1 is None else p.gate_w1.shape[0]
    expert_index = torch.arange(experts * hidden, device=p.expert_w1.device)
    gate_index = torch.arange(gate, device=p.expert_w1.device)
    if skip:
        main, one = sections(gate, max_width)[0], expert_section(hidden, max_width)
        main = Section(main.width, triton.cdiv(gate, main.width))
        tail = Section(one.width, one.count * experts)
        expert_index = main.channels + expert_index // hidden * one.channels + expert_index % hidden
    else:
        main, tail = sections(experts * hidden + gate, max_width)
        gate_index = gate_index + experts * hidden
    position = torch.cat([expert_index, gate_index])
    padded = main.channels + tail.channels

    outputs_padded, experts_padded = p.padded
    block_k = block_of(channels, max_block_k)
    w1, b1 = p.expert_w1.flatten(0, 1), p.expert_b1.flatten()
    w2 = _second_layer(p, experts_padded, outputs_padded)
    feeds = _second_layer(p._replace(**_ones(p)), experts_padded, outputs_padded)
    b2 = w2.new_zeros(outputs_padded, experts_padded)
    b2[:outputs, :experts] = p.expert_b2.T
    if gate:
        w1, b1 = torch.cat([w1, p.gate_w1]), torch.cat([b1, p.gate_b1])
        b2[outputs, :experts] = p.gate_b2
    return Packed(
        w1=operand(walk_order(_scatter(w1.float(), position, padded), block_k), precision),
        b1=_scatter(b1.float(), position, padded),
        w2=operand(_scatter(w2, position, padded), precision),
        feeds=_scatter(feeds, position, padded).half(),
        b2=b2.flatten(),
        position=position,
        main=main,
        tail=tail,
        block_k=block_k,
        outputs_padded=outputs_padded,
        experts_padded=experts_padded,
    )


def columns_first(packed: Packed) -> Packed:
    """The 3x3 weights as :mod:`moe3d.kernels.columns` reads them, [N, 3 columns, C/BK, 3 rows, BK]."""
    by_tap = packed.w1.unflatten(2, (3, 3))
    return packed._replace(w1=by_tap.permute(0, 3, 1, 2, 4).contiguous().view_as(packed.w1))


def pack_transposed(p: Parameters, packed: Packed, precision: Precision, max_block_k: int) -> Tensor:
    """The 3x3 weights for the convolution's adjoint, [C, N/BK, 9, BK]: taps flipped, channels exchanged."""
    w1 = p.expert_w1.flatten(0, 1) if p.gate_w1 is None else torch.cat([p.expert_w1.flatten(0, 1), p.gate_w1])
    n = packed.b1.shape[0]
    weight = _scatter(w1.float(), packed.position, n).flip(2, 3).transpose(0, 1)  # [C, N, 3, 3]
    weight = torch.nn.functional.pad(weight.flatten(1), (0, 0, 0, packed.channels - weight.shape[0]))
    return operand(walk_order(weight.unflatten(1, (n, 3, 3)), min(n & -n, max_block_k)), precision)


def _second_layer(p: Parameters, experts_padded: int, outputs_padded: int) -> Tensor:
    """Both 1x1 layers as one matrix [K*Hd + Hg, OP*KP] float32: every expert feeds its own columns, the gate row O."""
    experts, outputs, hidden = p.expert_w2.shape
    w2 = p.expert_w2.new_zeros(experts, hidden, outputs_padded, experts_padded, dtype=torch.float32)
    index = torch.arange(experts, device=w2.device)
    w2[index, :, :outputs, index] = p.expert_w2.float().transpose(1, 2)
    w2 = w2.reshape(experts * hidden, -1)
    if p.gate_w2 is None:
        return w2
    gate = w2.new_zeros(p.gate_w2.shape[1], outputs_padded, experts_padded)
    gate[:, outputs, :experts] = p.gate_w2.T
    return torch.cat([w2, gate.flatten(1)])


def _ones(p: Parameters) -> dict[str, Tensor | None]:
    """Second layers that only tell which hidden channel belongs to which expert."""
    gate = None if p.gate_w2 is None else torch.ones_like(p.gate_w2)
    return {"expert_w2": torch.ones_like(p.expert_w2), "gate_w2": gate}


def _scatter(rows: Tensor, position: Tensor, size: int) -> Tensor:
    return rows.new_zeros(size, *rows.shape[1:]).index_copy_(0, position, rows)


def walk_order(weight: Tensor, block_k: int) -> Tensor:
    """[N, C, 3, 3] -> [N, C/BK, 9, BK]: a block of channels, then its nine taps; C padded with zeros."""
    n, channels = weight.shape[:2]
    padded = torch.nn.functional.pad(weight.flatten(2), (0, 0, 0, round_up(channels, block_k) - channels))
    return padded.reshape(n, -1, block_k, 9).transpose(2, 3).contiguous()


def operand(x: Tensor, precision: Precision) -> Tensor:
    """float32 values rounded as the kernels round theirs."""
    if precision.dot != "tf32":
        return x.to(precision.dtype)
    bits = x.contiguous().view(torch.int32)
    return torch.where(x.isfinite(), ((bits + 0x1000) & -0x2000).view(torch.float32), x)


class Cache:
    """Packed parameters by version; see the module's text for what is kept and for how long."""

    def __init__(self) -> None:
        self._entries: Any = WeakIdKeyDictionary()

    def get(self, parameters: Sequence[Tensor | None], key: tuple, make: Callable[[], Any]) -> Any:
        """What ``make`` made for these parameters and this key, made now if they are new or have changed."""
        present = [p for p in parameters if p is not None]
        if any(p.is_inference() for p in present) or _capturing(present[0]):
            return make()
        versions = [(id(p), p.data_ptr(), p._version) for p in present]
        entry = self._entries.get(present[0])
        if entry is None or entry.versions != versions or any(ref() is None for ref in entry.refs):
            entry = _Entry([weakref.ref(p) for p in present], versions, {})
            self._entries[present[0]] = entry
        if key not in entry.made:
            entry.made[key] = make()
        return entry.made[key]


class _Entry(NamedTuple):
    refs: list[weakref.ref]
    versions: list[tuple[int, int, int]]
    made: dict[tuple, Any]


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
