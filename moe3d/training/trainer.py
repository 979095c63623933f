"""The trainer: one process or many, from step 0 or from the last checkpoint, and the same result either way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, gather_object
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.utils.data import Dataset
from tqdm import tqdm

from moe3d.losses import CONSTANT_ONE, Schedule
from moe3d.nn import MoEHead
from moe3d.training.checkpoint import load_checkpoint, random_state, restore_random_state, save_checkpoint
from moe3d.training.logbook import Logbook
from moe3d.training.networks import Supervised, transformer_blocks
from moe3d.training.scenes import Batch, Share, batches, collate, to_device
from moe3d.training.validate import Validation

CHECKPOINT = "checkpoint.pt"
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


@dataclass(frozen=True)
class TrainOptions:
    """How long, how fast, how often."""

    steps: int = 10_000
    batch: int = 1
    """Scenes per process and forward pass."""
    accumulate: int = 1
    """Forward passes per step."""
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    warm_up: float = 0.05
    """The part of the steps over which the learning rate rises; it then falls to zero along half a cosine."""
    clip: float = 1.0
    """Of the gradient's norm; 0 for none."""
    ema: float = 0.0
    """Decay per step of an average of the weights, which is what is validated and kept; 0 for none."""
    temperature: Schedule = CONSTANT_ONE
    """Of the gate's softmax."""
    workers: int = 0
    """Processes that load scenes ahead."""
    seed: int = 0
    save_every: int = 500
    validate_every: int = 1000
    log_every: int = 50


class DivergedError(RuntimeError):
    """A loss or a gradient is not finite."""


class Trainer:
    """Trains whatever is trainable in ``supervised``.

    Args:
        supervised: a network and its losses.
        scenes: training scenes, by (step, place).
        options: see :class:`TrainOptions`.
        folder: for the checkpoint and the log; None for neither.
        validation: metrics on held-out scenes, now and then.
        resume: go on from the folder's checkpoint.
        identity: what else makes the run this one (data, model, recipe): a checkpoint must have the same.
        decode: sets the mode, the temperature and the like in which the trained head will predict; validation is of
            that. None for as it is trained.
        shard: spread parameters, gradients and the optimizer's state over the processes (FSDP2), transformer block by
            transformer block. On CPUs every process holds them all.

    Raises:
        ValueError: the folder has a checkpoint and ``resume`` is off, or the checkpoint is one of another run.
        FileNotFoundError: ``resume`` without a checkpoint.
    """

    def __init__(
        self,
        supervised: Supervised,
        scenes: Dataset,
        options: TrainOptions,
        folder: Path | None = None,
        validation: Validation | None = None,
        resume: bool = False,
        identity: Mapping[str, Any] | None = None,
        decode: Callable[[MoEHead], None] | None = None,
        shard: bool = False,
    ) -> None:
        self._identity = _plain(dict(identity or {}) | {key: getattr(options, key) for key in _DECISIVE})
        self.accelerator = Accelerator(cpu=on_cpu(), fsdp_plugin=_sharding(supervised) if shard else None)
        self.scenes, self.options, self.folder, self.validation = scenes, options, folder, validation
        self.supervised, self.decode = supervised, decode
        self.step = 0
        learning = [p for p in supervised.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=options.learning_rate, weight_decay=options.weight_decay)
        self.distributed, self.optimizer = self.accelerator.prepare(supervised, optimizer)
        self.ema = Ema(self._learning(), options.ema) if options.ema else None
        self._measured_unit: float | None = None
        self.metrics: dict[str, float | None] = {}
        """Of the last validation."""
        if resume:
            self._resume()
        elif folder is not None and self._checkpoint.exists():
            raise ValueError(f"{self._checkpoint} exists: resume the run, or choose another folder")
        self.logbook = Logbook(folder if self.accelerator.is_main_process else None, self.step)

    @property
    def tail(self) -> MoEHead:
        """The head that learns."""
        return self.supervised.network.tail  # type: ignore[union-attr,return-value]

    def train(self) -> None:
        """Take the remaining steps; afterwards the network holds the weights to keep (the average, with ``ema``).

        Raises:
            RuntimeError: a loss or gradient that is not finite. The message names the frames, and the checkpoint holds
                the state before them.
            OSError: a checkpoint could not be written; the last one is kept.
        """
        share = Share(
            self.options.batch,
            self.options.accumulate,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        if self._measured_unit is None:
            self._measure_unit(share)
        loaded = batches(self.scenes, share, self.step, self.options.steps, self.options.workers)
        progress_bar = tqdm(
            total=self.options.steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=None if self.accelerator.is_main_process and self.folder is not None else True,
        )
        with progress_bar as bar:
            while self.step < self.options.steps:
                losses = self._take_step([next(loaded) for _ in range(self.options.accumulate)])
                bar.update()
                self._after_step(losses, bar)
        if self.ema is not None:
            self.ema.copy_to(self._learning())

    def _after_step(self, losses: dict[str, float], bar: tqdm) -> None:
        options, last = self.options, self.step == self.options.steps
        if self.step % options.log_every == 0 or last:
            self.logbook.numbers("train", losses, self.step)
            bar.set_postfix(loss=f"{losses['total']:.4g}")
        if self.validation is not None and (self.step % options.validate_every == 0 or last):
            with self._averaged_weights(), self._trained_decode():
                report = self.validation.run(self.distributed, self.accelerator.device)
            self.metrics = report.metrics
            self.logbook.numbers("validation", report.metrics, self.step)
            self.logbook.pictures(report.pictures, self.step)
        if self.step % options.save_every == 0 or last:
            self.save()

    def _take_step(self, shares: list[Batch]) -> dict[str, float]:
        progress = self.step / self.options.steps
        self.tail.temperature = self.options.temperature.at(progress)
        rate = self.options.learning_rate * warm_up_cosine(progress, self.options.warm_up)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        seen: list[dict[str, Tensor]] = []
        for turn, batch in enumerate(shares, start=1):
            # Not Accelerate's own accumulation: its count of turns is one for all trainers of a process.
            with nullcontext() if turn == len(shares) else self.accelerator.no_sync(self.distributed):
                losses = self.distributed(to_device(batch, self.accelerator.device), progress)
                self._require_finite("loss", losses["total"], shares)
                self.accelerator.backward(losses["total"].mean() / len(shares))
            seen.append(losses)
        limit = self.options.clip or math.inf
        norm = _whole(self.accelerator.clip_grad_norm_(self.distributed.parameters(), limit))
        self._require_finite("gradient", norm, shares)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self._learning())
        return self._mean_over_processes(seen) | {"gradient_norm": float(norm), "learning_rate": rate}

    def _require_finite(self, what: str, value: Tensor, shares: list[Batch]) -> None:
        """All processes stop together, and each has its frames named."""
        device = self.accelerator.device
        bad = torch.tensor([0.0 if value.isfinite().all() else 1.0], device=device)
        if self.accelerator.reduce(bad, "sum").item() == 0:
            return
        self.optimizer.zero_grad()
        names = [name for batch in shares for scene in batch["names"] for name in scene] if bad.item() else []
        names = gather_object(names)
        kept = ""
        if self.folder is not None:
            self.save()
            kept = f"; {self._checkpoint} holds the state before it"
        raise DivergedError(f"the {what} is not finite at step {self.step}, on the frames {', '.join(names)}{kept}")

    @torch.no_grad()
    def _measure_unit(self, share: Share) -> None:
        """What relative weights are relative to: the depth loss of the first batch, before training."""
        batch = collate([self.scenes[key] for key in next(share.keys(0))])
        losses = self.distributed(to_device(batch, self.accelerator.device), 0.0)
        self._set_unit(self._mean_over_processes([losses])["depth"])

    def _set_unit(self, unit: float) -> None:
        self._measured_unit = unit
        self.supervised.objective.unit = abs(unit)

    def _mean_over_processes(self, seen: list[dict[str, Tensor]]) -> dict[str, float]:
        names = [name for name in seen[0] if name != "balance"]
        means = torch.stack([torch.stack([losses[name].detach().mean() for losses in seen]).mean() for name in names])
        numbers = dict(zip(names, self.accelerator.reduce(means, "mean").tolist(), strict=True))
        if "balance" in seen[0]:
            balance = torch.stack([losses["balance"] for losses in seen]).mean(0)
            weights = self.accelerator.reduce(balance, "mean").tolist()
            numbers |= {f"mean_weight/{expert}": weight for expert, weight in enumerate(weights)}
        return numbers

    def _learning(self) -> dict[str, nn.Parameter]:
        # By their names in ``supervised``: what distributes it may put a prefix before them.
        return {name: p for name, p in self.supervised.named_parameters() if p.requires_grad}

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """The average in place of the weights, where there is one."""
        if self.ema is None:
            yield
            return
        with self.ema.in_place_of(self._learning()):
            yield

    @contextmanager
    def _trained_decode(self) -> Iterator[None]:
        """The head as it will predict once it is trained."""
        before = {name: getattr(self.tail, name) for name in ("mode", "temperature", "sharpen")}
        if self.decode is not None:
            self.decode(self.tail)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self.tail, name, value)

    def whole_weights(self) -> dict[str, Tensor]:
        """What learned, by its name in ``supervised``, on the CPU; in full on the first process, whoever holds it."""
        return cast(dict[str, Tensor], get_model_state_dict(self.distributed, options=_WHOLE))

    @property
    def _checkpoint(self) -> Path:
        assert self.folder is not None
        return self.folder / CHECKPOINT

    def save(self) -> None:
        """Replace the folder's checkpoint; every process must call this, the first one writes."""
        if self.folder is None:
            return
        model, optimizer = get_state_dict(self.distributed, self.optimizer.optimizer, options=_WHOLE)
        state = {
            "step": self.step,
            "identity": self._identity,
            "model": model,
            "optimizer": optimizer,
            "unit": self._measured_unit,
            "ema": None if self.ema is None else self.ema.state(),
            "random": gather_object([random_state()]),
        }
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_checkpoint(self._checkpoint, state)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        state = load_checkpoint(self._checkpoint)
        for key in self._identity | state["identity"]:
            there, here = state["identity"].get(key), self._identity.get(key)
            if there != here:
                raise ValueError(f"{self._checkpoint} is of a run with {key} = {there!r}, and this one has {here!r}")
        set_state_dict(
            self.distributed,
            self.optimizer.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False),
        )
        if self.accelerator.is_main_process:
            for cut_short in self._checkpoint.parent.glob(
                f".{CHECKPOINT}.*.tmp"
            ):  # of a run that was killed writing it
                cut_short.unlink()
        self.step = state["step"]
        self._set_unit(state["unit"])
        if self.ema is not None:
            self.ema.load(state["ema"])
        ours = state["random"][self.accelerator.process_index : self.accelerator.process_index + 1]
        for random in ours:  # none, where there are more processes than there were
            restore_random_state(random)


# What must not change between a checkpoint and the run that goes on from it; the rest is how it is watched.
_DECISIVE = (
    "steps", "batch", "accumulate", "learning_rate", "weight_decay", "warm_up", "clip", "ema", "temperature", "seed",
)  # fmt: skip


class Ema:
    """An exponential moving average of parameters, sharded as they are.

    Args:
        parameters: by name.
        decay: per step, above 0 and below 1.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.average = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: dict[str, nn.Parameter]) -> None:
        """Move the average towards the parameters."""
        for name, p in parameters.items():
            self.average[name].lerp_(p, 1 - self.decay)

    @torch.no_grad()
    def copy_to(self, parameters: dict[str, nn.Parameter]) -> None:
        """The average into the parameters."""
        for name, p in parameters.items():
            p.copy_(self.average[name])

    @contextmanager
    def in_place_of(self, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
        """The average in the parameters, until the block ends."""
        before = {name: p.detach().clone() for name, p in parameters.items()}
        self.copy_to(parameters)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(before[name])

    def state(self) -> dict[str, Tensor]:
        """Whole tensors on the CPU, also of sharded parameters."""
        return {name: _whole(value).cpu() for name, value in self.average.items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """What :meth:`state` gave."""
        for name, value in self.average.items():
            value.copy_(_like(state[name], value))


def _sharding(module: nn.Module) -> FullyShardedDataParallelPlugin:
    """Every block of the backbone is gathered for itself; heads, which compute with each other's weights, with all
    that is left."""
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted(transformer_blocks(module)),
        cpu_ram_efficient_loading=False,
    )


def on_cpu() -> bool:
    """Whether there is no accelerator; Accelerate must be told, or it ignores that torchrun has started several."""
    return not torch.accelerator.is_available()


def warm_up_cosine(progress: float, warm_up: float) -> float:
    """The learning rate's factor at a progress from 0 to 1: linear warm-up, then half a cosine to zero."""
    if progress < warm_up:
        return (progress + 1e-3) / (warm_up + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warm_up) / (1 - warm_up))))


def _plain(identity: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from a file."""
    return json.loads(json.dumps(identity, default=vars))


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _like(value: Tensor, sharded: Tensor) -> Tensor:
    if not hasattr(sharded, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(sharded.device), sharded.device_mesh, sharded.placements)  # type: ignore[attr-defined]
