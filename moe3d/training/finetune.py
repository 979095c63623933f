"""The stock output block and the MoE head, trained alike: frozen network, cached features, equal steps and batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from moe3d.losses import entropy_loss, moe_depth_loss, normalise_scale
from moe3d.models import MiniVGGT
from moe3d.nn import MoEHead
from moe3d.position import position_tables
from moe3d.training.pool import Shard

WARM_UP_STEPS = 20
Log = Callable[[dict], None]


@dataclass(frozen=True)
class FinetuneOptions:
    """The recipe of both arms."""

    steps: int = 400
    sweep_steps: int = 60
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Each is tried for ``sweep_steps``; the one with the least validation loss is used."""
    pixels: int = 24_000
    """Pixels per step, about."""
    num_experts: int = 4
    gate_hidden: int = 128
    init_noise: float = 0.3
    entropy_weight: float = 0.05
    """Relative to the depth loss before training: the losses' units then do not matter."""
    entropy_warm_up: float = 0.5
    """The part of the steps over which the entropy weight rises from zero."""
    seed: int = 0


@dataclass(frozen=True)
class Features:
    """What the tail of the depth head reads for N frames of one size, and what it should predict."""

    fused: Tensor
    """[N, C, h, w] float16, the output of ``output_conv1``."""
    depth: Tensor
    """[N, H, W] float16 planar depth in VGGT's normalised unit; 0 where not valid."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return tuple(self.depth.shape[-2:])


@torch.no_grad()
def cache_features(model: MiniVGGT, shards: list[Shard]) -> list[Features]:
    """Run the frozen network over shards (see :class:`~moe3d.training.pool.Pool`), one view at a time or all together.

    Every second shard's views are seen as single frames, the others as sequences, so that the tail meets both.
    """
    model.eval()
    return [_cache(model, shard if index % 2 else _single_frames(shard)) for index, shard in enumerate(shards)]


def _single_frames(shard: Shard) -> Shard:
    return {key: value.flatten(0, 1)[:, None] for key, value in shard.items()}


def _cache(model: MiniVGGT, shard: Shard) -> Features:
    valid = shard["depth"] > 0
    depth, _ = normalise_scale(shard["depth"].float(), valid, shard["intrinsics"], shard["extrinsics"])
    fused: list[Tensor] = []
    hook = model.depth_head.scratch.output_conv1.register_forward_hook(lambda *call: fused.append(call[-1].half()))
    try:
        for images in (shard["images"] / 255).split(4):
            model(images)
    finally:
        hook.remove()
    return Features(torch.cat(fused), depth.flatten(0, 1).half())


class Arm:
    """One of the two heads. K = 1 is the stock block itself, through the same operation.

    Args:
        name: in the log.
        block: the pretrained output block.
        num_experts: K.
        options: the recipe, the other arm's as well.
    """

    def __init__(self, name: str, block: nn.Sequential, num_experts: int, options: FinetuneOptions) -> None:
        self.name, self.block, self.num_experts, self.options = name, block, num_experts, options

    def run(self, train: list[Features], val: list[Features], log: Log) -> MoEHead:
        """Try every learning rate for a while, each from the start; then train in full at the best on validation."""
        losses = {rate: self._try(rate, train, val, log) for rate in self.options.learning_rates}
        tail = self._tail()
        log({"arm": self.name, "step": 0, "validation": measure(tail, val)})

        def report(step: int, losses: dict[str, float]) -> None:
            if step % 50 == 0:
                log({"arm": self.name, "step": step, "losses": losses})
            if step % 100 == 0 or step == self.options.steps:
                log({"arm": self.name, "step": step, "validation": measure(tail, val)})

        fit(tail, train, min(losses, key=losses.get), self.options.steps, self.options, report)
        return tail

    def _try(self, rate: float, train: list[Features], val: list[Features], log: Log) -> float:
        tail = self._tail()
        fit(tail, train, rate, self.options.sweep_steps, self.options)
        loss = measure(tail, val)["depth_loss"]
        log({"arm": self.name, "rate": rate, "depth_loss": loss})
        return loss

    def _tail(self) -> MoEHead:
        """The start: experts copied from the block, with the seed's noise, and a uniform gate."""
        options = self.options
        return MoEHead.from_conv_block(
            self.block, self.num_experts, options.gate_hidden, init_noise=options.init_noise, seed=options.seed
        )


def fit(
    tail: MoEHead,
    train: list[Features],
    rate: float,
    steps: int,
    options: FinetuneOptions,
    report: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
) -> None:
    """Adam with a cosine to zero on MoE3D's loss: L2 of the mixed depth, and the gate's entropy, warmed up."""
    optimizer = torch.optim.Adam(tail.parameters(), lr=rate)
    entropy_unit = options.entropy_weight * measure(tail, train[:8])["depth_loss"]
    tail.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + np.cos(np.pi * step / steps))
        fused, truth = draw(train, step, options)
        output = apply_tail(tail, fused, truth.shape[-2:])
        losses = {"depth": moe_depth_loss(output.prediction[:, 0], truth, truth > 0)}
        total = losses["depth"]
        if tail.num_experts > 1:
            losses["entropy"] = entropy_loss(output.entropy)
            total = total + entropy_unit * min(1.0, step / (options.entropy_warm_up * steps)) * losses["entropy"]
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(tail.parameters(), 1.0)
        optimizer.step()
        report(step + 1, {name: round(loss.item(), 6) for name, loss in losses.items()})
    tail.eval()


def draw(train: list[Features], step: int, options: FinetuneOptions) -> tuple[Tensor, Tensor]:
    """The batch of a step: features and truth. It depends on the seed and the step alone, so both arms see the same."""
    rng = np.random.default_rng([options.seed, step])
    features = train[rng.integers(len(train))]
    height, width = features.size
    count = min(len(features.depth), max(1, round(options.pixels / (height * width))))
    chosen = torch.from_numpy(rng.permutation(len(features.depth))[:count])
    return features.fused[chosen].float(), features.depth[chosen].float()


def apply_tail(tail: MoEHead, fused: Tensor, size: tuple[int, int]):
    """The tail on cached features [N, C, h, w], as the patched depth head calls it."""
    return tail(fused, tuple(size), pos=position_tables(size, fused.shape[1], size[1] / size[0], fused))


@torch.no_grad()
def measure(tail: MoEHead, sets: list[Features]) -> dict:
    """The mean depth loss, and of a mixture the gate's mean entropy in nats and each expert's share of the pixels."""
    losses, entropies, usages = [], [], []
    tail.eval()
    tail.return_experts = True
    for features in sets:
        truth = features.depth.float()
        output = apply_tail(tail, features.fused.float(), features.size)
        losses.append(moe_depth_loss(output.prediction[:, 0], truth, truth > 0).item())
        entropies.append(output.entropy.mean().item())
        usages.append(torch.bincount(output.weights.argmax(1).flatten(), minlength=tail.num_experts) / truth.numel())
    tail.return_experts = False
    result = {"depth_loss": float(np.mean(losses))}
    if tail.num_experts > 1:
        result |= {"entropy": float(np.mean(entropies)), "usage": torch.stack(usages).mean(0).tolist()}
    return result


def stock_block(tail: MoEHead, block: nn.Sequential) -> None:
    """Write a trained K = 1 tail back into the plain block that it was copied from."""
    first, _, last = block
    with torch.no_grad():
        first.weight.copy_(tail.expert_w1[0])
        first.bias.copy_(tail.expert_b1[0])
        last.weight.copy_(tail.expert_w2[0, :, :, None, None])
        last.bias.copy_(tail.expert_b2[0])
