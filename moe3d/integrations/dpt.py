"""The patched DPT head: a stock head whose class is swapped, so that everything after ``output_conv1`` is the MoE head.

Swapping ``__class__`` (as FSDP2 does) keeps the object, its parameters, its hooks and its state-dict keys, and it
survives ``copy.deepcopy`` and pickling, where a method bound to the instance would not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from moe3d.integrations import front
from moe3d.integrations.front_native import forget, native_front
from moe3d.nn import MoEHead, check_conv_block
from moe3d.ops.types import MoEOutput
from moe3d.position import position_tables

_ATTRIBUTES = (
    "norm", "projects", "resize_layers", "scratch", "patch_size", "activation", "conf_activation", "pos_embed",
    "feature_only", "down_ratio", "intermediate_layer_idx",
)  # fmt: skip
_SCRATCH = (
    "layer1_rn", "layer2_rn", "layer3_rn", "layer4_rn", "refinenet1", "refinenet2", "refinenet3", "refinenet4",
    "output_conv1", "output_conv2",
)  # fmt: skip


_COMPILED = 0  # in place of a thread's id


class PatchedDPTHead(nn.Module):
    """A VGGT depth or point head with a mixture-of-experts tail; made by :func:`patch_head`, never constructed.

    It is called as the stock head is, and returns the same pair (prediction [B, S, H, W, O-1], confidence
    [B, S, H, W]). What the tail gives beyond that (entropy [B, S, H, W]; with ``return_experts`` weights
    [B, S, K, H, W] and hypotheses [B, S, K, H, W, O-1], [B, S, K, H, W] where O-1 = 1) is kept only between
    :meth:`expect_extras` and :meth:`take_extras`, which the model's forward hooks call; ``extras`` holds it by caller.
    """

    # What check_head has made sure of: the stock head's own attributes.
    norm: Any
    projects: Any
    resize_layers: Any
    scratch: Any
    patch_size: int
    pos_embed: bool
    down_ratio: float
    intermediate_layer_idx: Sequence[int]

    stock_class: type[nn.Module]
    extras: dict[int, dict[str, Tensor]]
    optimize_head: bool
    head_dtype: torch.dtype | None

    @property
    def tail(self) -> MoEHead:
        return self.scratch.output_conv2

    def other_branches(self) -> list[nn.Module]:
        """What predicts something else than the head's one map: nothing."""
        return []

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_tail(name)
        super().__setattr__(name, value)

    def forward(
        self,
        aggregated_tokens_list: Sequence[Tensor],
        images: Tensor,
        patch_start_idx: int,
        frames_chunk_size: int | None = 8,
    ) -> tuple[Tensor, Tensor | None]:
        """Token tensors [B, S, patch_start_idx + P, dim] of the backbone's layers and images [B, S, 3, H, W].

        ``frames_chunk_size`` frames at a time bound the memory; None = all at once. An exported graph takes any number
        of frames, which a loop over chunks would fix, and so all at once.
        """
        if frames_chunk_size is not None and frames_chunk_size < 1:
            raise ValueError(f"frames_chunk_size must be None or an integer of at least 1, got {frames_chunk_size!r}")
        parts = [slice(None)]
        if frames_chunk_size is not None and not torch.compiler.is_exporting():
            parts = [slice(i, i + frames_chunk_size) for i in range(0, images.shape[1], frames_chunk_size)] or parts
        chunks = [self._forward_frames(aggregated_tokens_list, images, patch_start_idx, part) for part in parts]
        joined: list[Any] = [None if outputs[0] is None else _join(outputs) for outputs in zip(*chunks, strict=True)]
        output = MoEOutput(*joined)
        if self.extras:
            self._keep_extras(output)
        return output.prediction.movedim(2, -1), output.confidence

    def _keep_extras(self, output: MoEOutput) -> None:
        if torch.compiler.is_compiling() and _COMPILED not in self.extras:  # the model around the graph is not in it
            _keep_extras_eagerly(self, output)
        elif _caller() in self.extras:
            self.extras[_caller()] = _extras(output)

    def expect_extras(self) -> None:
        """Keep what the caller's next forward gives beyond the pair."""
        self.extras[_caller()] = {}

    def take_extras(self) -> dict[str, Tensor]:
        """What the caller's forward gave beyond the pair since :meth:`expect_extras`; the head then forgets it."""
        return self.extras.pop(_caller(), {})

    def _forward_frames(
        self, tokens: Sequence[Tensor], images: Tensor, patch_start_idx: int, frames: slice
    ) -> MoEOutput:
        """One chunk of frames through the front and the tail; outputs with [B, S] in front."""
        images = images[:, frames]
        batch, count, _, height, width = images.shape
        grid = (height // self.patch_size, width // self.patch_size)
        dtype = self.projects[0].weight.dtype  # some backbones give tokens of another one
        layers = [tokens[layer][:, frames, patch_start_idx:] for layer in self.intermediate_layer_idx]
        patches = [layer.to(dtype).flatten(0, 1) for layer in layers]
        rows, columns = (int(n * self.patch_size / self.down_ratio) for n in grid)
        size = (rows, columns)
        image = images.flatten(0, 1) if self.tail.sees_image else None
        with self._arithmetic(images.device.type):
            fused = self._front(patches)(self, patches, grid, width / height)
            pos = position_tables(size, fused.shape[1], width / height, fused) if self.pos_embed else None
            output = self.tail(fused, size, pos=pos, image=image)
        unflattened: list[Any] = [None if o is None else o.unflatten(0, (batch, count)) for o in output]
        return MoEOutput(*unflattened)

    def _arithmetic(self, device_type: str) -> AbstractContextManager:
        return nullcontext() if self.head_dtype is None else torch.autocast(device_type, self.head_dtype)

    def _front(self, patches: Sequence[Tensor]) -> Callable[..., Tensor]:
        """The fastest of the ways from patch tokens to fused features; they differ in rounding only."""
        if not self.optimize_head:
            return front.plain
        native = None if self.tail.backend == "reference" else native_front(self, patches)
        if native is not None:
            return native
        return front.reordered if front.can_reorder(self) else front.plain


def _caller() -> int:
    """Threads that share a model must not take each other's extras. (A compiled graph has one caller, and no ids.)"""
    return _COMPILED if torch.compiler.is_compiling() else threading.get_ident()


@_disable_dynamo  # torch.compiler.disable, which would import the compiler here and now
def _keep_extras_eagerly(head: PatchedDPTHead, output: MoEOutput) -> None:
    """Out of a graph of the head or of the model's forward alone, for a caller outside."""
    if _caller() in head.extras:
        head.extras[_caller()] = _extras(output)


def refuse_tail(name: str) -> None:
    """AttributeError for a patched head's ``tail``: nn.Module would register a module of that name beside it."""
    if name == "tail":
        raise AttributeError("tail cannot be replaced: change its parameters, or unpatch the model and patch it anew")


def _join(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _extras(output: MoEOutput) -> dict[str, Tensor]:
    extras = {"entropy": output.entropy}
    if output.weights is not None and output.hypotheses is not None:
        points = output.hypotheses.movedim(3, -1)  # [B, S, K, H, W, O-1], as VGGT's own predictions
        extras |= {"weights": output.weights, "hypotheses": points.squeeze(-1) if points.shape[-1] == 1 else points}
    return extras


def check_head(name: str, head: Any) -> None:
    """ValueError that says what was looked for and what was found, unless ``head`` has VGGT's DPT structure."""
    if head is None:
        raise ValueError(f"model.{name} must be a DPT head, got None: the model was built without it")
    missing = [a for a in _ATTRIBUTES if not hasattr(head, a)]
    missing += [f"scratch.{a}" for a in _SCRATCH if not hasattr(getattr(head, "scratch", None), a)]
    if missing:
        raise ValueError(
            f"model.{name} must have the attributes of VGGT's DPT head, got {type(head).__name__} without "
            f"{', '.join(missing)}"
        )
    if head.feature_only:
        raise ValueError(f"model.{name} must predict, got a head with feature_only=True, which has no output block")
    try:
        check_conv_block(head.scratch.output_conv2)
    except ValueError as error:
        raise ValueError(f"model.{name}.scratch.output_conv2: {error}") from None


def require_image_resolution(name: str, head: Any) -> None:
    """ValueError unless a head predicts at the image's own resolution, as what looks at the image needs it."""
    if head.down_ratio != 1:
        raise ValueError(
            f"image_gate and sharpen need predictions at the image's own resolution, but {name} has "
            f"down_ratio={head.down_ratio}"
        )


def patch_head(head: Any, tail: MoEHead, optimize_head: bool = True, head_dtype: torch.dtype | None = None) -> None:
    """Swap the class of a checked stock head and put the tail in place of its output block."""
    head.stock_class = type(head)
    head.extras = {}
    head.optimize_head, head.head_dtype = optimize_head, head_dtype
    head.scratch.output_conv2 = tail
    head.__class__ = PatchedDPTHead


def unpatch_head(head: Any) -> None:
    """Undo :func:`patch_head`: the stock class and block, as last loaded."""
    block = head.tail.source_block
    block.train(head.tail.training)
    head.scratch.output_conv2 = block
    head.__class__ = head.stock_class
    forget(head)
    del head.stock_class, head.extras, head.optimize_head, head.head_dtype
