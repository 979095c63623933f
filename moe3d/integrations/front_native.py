"""The front of VGGT's DPT head in the compiled module's layers: float32 on the CPU, without gradients.

Beyond the order of :func:`moe3d.integrations.front.reordered`: 3x3 convolutions by Winograd's algorithm; a transposed
convolution and the 3x3 one after it as one layer, and so refinenet1's 1x1 and output_conv1, before the upsampling.
Folded and packed weights are kept between calls, for as long as the head's own stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe3d.eager import runs_eagerly
from moe3d.integrations.front import can_reorder, is_watched
from moe3d.ops import native_layers
from moe3d.ops.native import isa, state_of
from moe3d.ops.native_layers import CHANNEL_STEP, Cells, Upsampled, Winograd
from moe3d.position import position_tables

# Of modules: what a front depends on beside their weights.
_SETTINGS = ("inplace", "stride", "padding", "padding_mode", "output_padding", "dilation", "groups")

# By head: the state of its weights and its front, or None where it cannot have one. Beside the head, not in it: what is
# kept must be neither copied nor pickled with it.
_kept: WeakKeyDictionary[nn.Module, tuple[tuple, NativeFront | None]] = WeakKeyDictionary()


def native_front(head: Any, tokens: Sequence[Tensor]) -> NativeFront | None:
    """The head's front in compiled layers, or None where it cannot run: another device or type, gradients, hooks, a
    graph in the making, an unusual structure, no compiled module."""
    modules = list(_front_modules(head))
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    tensors = [*tokens, *parameters]
    if not runs_eagerly(*tensors) or torch.is_autocast_enabled("cpu") or not native_layers.can_run():
        return None
    if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in tensors):
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return None
    if is_watched(*modules) or any(_holds_plain_tensors(module) for module in modules):
        return None
    if not all(p.is_contiguous() for p in parameters):
        return None
    state = _state(modules, parameters)
    kept = _kept.get(head)
    if kept is None or kept[0] != state:
        with torch.inference_mode(False), torch.no_grad():
            kept = state, NativeFront(head) if has_native_front(head) else None
        _kept[head] = kept
    return kept[1]


def forget(head: nn.Module) -> None:
    """Free what is kept for a head."""
    _kept.pop(head, None)


class NativeFront:
    """The folded and packed weights of a head that :func:`has_native_front`."""

    def __init__(self, head: Any):
        s = head.scratch
        convs = [getattr(s, f"layer{i}_rn") for i in (1, 2, 3, 4)]
        self._levels = [_level(resize, conv) for resize, conv in zip(head.resize_layers, convs, strict=True)]
        self._blocks = [_Block(getattr(s, f"refinenet{i}")) for i in (1, 2, 3, 4)]
        point, last = s.refinenet1.out_conv, s.output_conv1
        self._last = Upsampled(point.weight.flatten(1), point.bias, last.weight, last.bias)

    def __call__(self, head: Any, tokens: Sequence[Tensor], grid: tuple[int, int], aspect: float) -> Tensor:
        """As :func:`moe3d.integrations.front.plain`; the features' memory has its channels last."""
        first, second, third, fourth = (self._level(head, i, patches, grid, aspect) for i, patches in enumerate(tokens))
        x = self._blocks[3].upsampled(fourth, None, _size(third))
        del fourth
        x = self._blocks[2].upsampled(x, third, _size(second))
        del third
        x = self._blocks[1].upsampled(x, second, _size(first))
        del second
        x = self._blocks[0](x, first)
        height, width = _size(first)
        del first
        return self._last(x, (2 * height, 2 * width)).permute(0, 3, 1, 2)

    def _level(self, head: Any, level: int, patches: Tensor, grid: tuple[int, int], aspect: float) -> Tensor:
        project = head.projects[level]
        x = F.linear(head.norm(patches), project.weight.flatten(1), project.bias).unflatten(1, grid)
        if head.pos_embed:
            columns, rows = position_tables(grid, x.shape[3], aspect, x)
            x[..., : columns.shape[1]] += columns
            x[..., columns.shape[1] :] += rows[:, None]
        for layer in self._levels[level]:
            x = layer(x)
        return x


class _Block:
    """A fusion block up to its upsampling."""

    def __init__(self, block: Any):
        self._first = _Unit(block.resConfUnit1) if hasattr(block, "resConfUnit1") else None
        self._second = _Unit(block.resConfUnit2)
        self._point = block.out_conv

    def __call__(self, x: Tensor, finer: Tensor | None) -> Tensor:
        if self._first is not None and finer is not None:
            x = self._first(finer, added=x)
        return self._second(x)

    def upsampled(self, x: Tensor, finer: Tensor | None, size: tuple[int, int]) -> Tensor:
        x = F.linear(self(x, finer), self._point.weight.flatten(1), self._point.bias)
        return native_layers.upsample(x, size)


class _Unit:
    """A residual unit. VGGT's ReLU works in place, so that what the skip connection adds is relu(x), not x; ours adds
    that whatever its ReLU does."""

    def __init__(self, unit: Any):
        self._first, self._second = (Winograd(conv.weight, conv.bias) for conv in (unit.conv1, unit.conv2))
        self._adds_relu = getattr(unit, "adds_relu", unit.activation.inplace)

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Overwrites x."""
        hidden = self._first(x, relu_input=True)
        return self._second(hidden, relu_input=True, residual=x, relu_residual=self._adds_relu, added=added, out=x)


def has_native_front(head: Any) -> bool:
    """Whether the front is VGGT's to the last module, of widths that the compiled layers take."""
    s = head.scratch
    blocks = [getattr(s, f"refinenet{i}") for i in (1, 2, 3, 4)]
    units = [unit for block in blocks for name, unit in block.named_children() if name.startswith("resConfUnit")]
    levels = [s.layer1_rn, s.layer2_rn, s.layer3_rn, s.layer4_rn]
    points = [*head.projects, *(block.out_conv for block in blocks)]
    if not (can_reorder(head) and all(_is_unit(unit) for unit in units)):
        return False
    convs = [*levels, s.output_conv1, *(conv for unit in units for conv in (unit.conv1, unit.conv2))]
    widths = [n for conv in (*convs[2:], *points[4:]) for n in (conv.in_channels, conv.out_channels)]
    return (
        all(_is_conv(conv) for conv in convs)
        and all(conv.bias is None for conv in levels)
        and all(conv.bias is not None for conv in (*convs[4:], *points))
        and [_resizing(resize) for resize in head.resize_layers] == ["spread", "spread", "same", "strided"]
        and all(width % CHANNEL_STEP == 0 for width in widths)
    )


def _front_modules(head: Any) -> Iterator[nn.Module]:
    for name, child in (*head.named_children(), *head.scratch.named_children()):
        if name not in ("scratch", "output_conv2"):
            yield from child.modules()


def _holds_plain_tensors(module: nn.Module) -> bool:
    """Whether a weight is no parameter (as hypernetworks have it), so that nothing tells when it is another one."""
    return not vars(module).keys().isdisjoint(("weight", "bias"))


def _state(modules: Sequence[nn.Module], parameters: Sequence[Tensor]) -> tuple:
    """Equal to an earlier one only if the modules and their weights are what they were."""
    settings = tuple((type(m), *(vars(m).get(name) for name in _SETTINGS)) for m in modules)
    return settings, state_of(parameters), isa()


def _level(resize: Any, conv: nn.Conv2d) -> list[Callable[[Tensor], Tensor]]:
    """A level's resizing and the 3x3 convolution after it."""
    kind = _resizing(resize)
    if kind == "spread":
        return [Cells.after_transposed(resize.weight, resize.bias, conv.weight)]
    after = Winograd(conv.weight, None)
    return [after] if kind == "same" else [Cells.strided(resize.weight, resize.bias, resize.stride[0]), after]


def _resizing(layer: Any) -> str | None:
    if type(layer) is nn.Identity:
        return "same"
    if type(layer) is nn.Conv2d and layer.bias is not None and _is_conv(layer, stride=layer.stride[0]):
        return "strided"
    if type(layer) is nn.ConvTranspose2d and layer.bias is not None:
        s = layer.stride[0]
        plain = layer.padding == layer.output_padding == (0, 0) and layer.dilation == (1, 1) and layer.groups == 1
        return "spread" if plain and layer.kernel_size == layer.stride == (s, s) else None
    return None


def _is_unit(unit: Any) -> bool:
    convs = [getattr(unit, "conv1", None), getattr(unit, "conv2", None)]
    bare = getattr(unit, "norm1", None) is None and getattr(unit, "norm2", None) is None
    return bare and type(getattr(unit, "activation", None)) is nn.ReLU and all(_is_conv(conv) for conv in convs)


def _is_conv(conv: Any, stride: int = 1) -> bool:
    """A plain 3x3 convolution with padding 1."""
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == (3, 3)
        and conv.stride == (stride, stride)
        and conv.padding == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[1], x.shape[2]
