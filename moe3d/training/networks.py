"""What is trained: a patched model on images, the part of it that learns, and its losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe3d.integrations import patched_heads
from moe3d.losses import WeightedLoss, mean_weight
from moe3d.nn import MoEHead
from moe3d.training.scenes import Batch

PARTS = ("head", "decoder", "all")


class ImageNetwork(nn.Module):
    """A model with VGGT's interface and a patched depth head, on a batch's images.

    Args:
        model: patched.
        bf16: run the backbone in bfloat16; VGGT-like models compute their heads in float32 whatever is around them.
    """

    def __init__(self, model: nn.Module, bf16: bool = False) -> None:
        super().__init__()
        self.model, self.bf16 = model, bf16

    @property
    def tail(self) -> MoEHead:
        return patched_heads(self.model)["depth"].tail

    def forward(self, batch: Batch) -> dict[str, Any]:
        """The model's dictionary, of ``images`` [B, S, 3, H, W]."""
        images = batch["images"]
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            return self.model(images)


def set_trainable(model: nn.Module, part: str, cameras: bool) -> None:
    """Let a part of a patched model learn and freeze the rest, which also goes to eval mode.

    Args:
        part: "head" (the mixture), "decoder" (the depth head, and with ``cameras`` the camera head) or "all" (the
            backbone, too). What no loss reaches stays frozen (other heads, the depth head's other branches in Depth
            Anything 3), and so does what the model itself holds fixed (DINOv2's mask token in VGGT).
    """
    fixed = [p for p in model.parameters() if not p.requires_grad]
    model.requires_grad_(False).eval()
    depth_head = patched_heads(model)["depth"]
    learning: list[nn.Module] = [depth_head.tail if part == "head" else depth_head]
    if part != "head" and cameras:
        learning.append(model.get_submodule("camera_head"))
    if part == "all":
        learning.append(model.get_submodule("aggregator"))
    for module in learning:
        module.requires_grad_(True).train()
    for branch in depth_head.other_branches():
        branch.requires_grad_(False).eval()
    for parameter in fixed:
        parameter.requires_grad_(False)


def transformer_blocks(module: nn.Module) -> set[str]:
    """The class names of what the lists ``blocks``, ``frame_blocks`` and ``global_blocks`` hold."""
    lists = [m for name, m in module.named_modules() if name.endswith("blocks") and isinstance(m, nn.ModuleList)]
    return {type(block).__name__ for blocks in lists for block in blocks}


class Supervised(nn.Module):
    """A network and its losses as one module, so that what distributes a module distributes both.

    Args:
        network: with a ``tail``; takes a batch, gives a patched model's dictionary.
        objective: the losses, which may have parameters.
    """

    def __init__(self, network: nn.Module, objective: WeightedLoss) -> None:
        super().__init__()
        self.network, self.objective = network, objective

    def forward(self, batch: Batch, progress: float | None = None) -> dict[str, Any]:
        """The losses [B] at a progress, with the experts' mean weights ``balance`` [K]; without one, the predictions.

        Losses are computed in float32, whatever the network computes in.
        """
        predictions = _in_float32(self.network(batch))
        if progress is None:
            return predictions
        with torch.autocast(batch["depth"].device.type, enabled=False):
            losses = self.objective(predictions, batch, progress)
        if "depth_weights" in predictions:
            losses["balance"] = mean_weight(predictions["depth_weights"])
        return losses


def _in_float32(predictions: Mapping[str, Any]) -> dict[str, Any]:
    def cast(value: Any) -> Any:
        if isinstance(value, list):
            return [cast(v) for v in value]
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {key: cast(value) for key, value in predictions.items()}
