"""A whole run, as ``moe3d train`` asks for it: model and data in, checkpoint, log and trained head out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import Dataset

from moe3d.atomic import whole_file
from moe3d.integrations import patch, patched_heads, save_head, unpatch
from moe3d.models import MiniVGGT, save_mini
from moe3d.models.load import load_model
from moe3d.training.features import CachedScenes, FeatureNetwork, cache_scenes, read_batches
from moe3d.training.networks import ImageNetwork, Supervised, set_trainable
from moe3d.training.recipes import Recipe
from moe3d.training.scenes import LiveScenes, collate, open_corpus
from moe3d.training.trainer import CHECKPOINT, Trainer, TrainOptions, on_cpu
from moe3d.training.validate import Validation

VALIDATION_SEED = 1_000_003  # of the draw of validation scenes, whatever the run's own seed


@dataclass(frozen=True)
class RunOptions:
    """What to train, on what, and where to."""

    datasets: tuple[tuple[str, str | None, tuple[int, int] | None], ...]
    """(name, root, size or None for the dataset's own) of each."""
    model: str
    """As for :func:`~moe3d.models.load.load_model`."""
    recipe: Recipe
    out: Path
    train: TrainOptions
    frames: tuple[int, int] = (2, 2)
    """The least and the largest number of frames per scene."""
    part: str = "head"
    """Which part learns, see :func:`~moe3d.training.networks.set_trainable`."""
    resume: bool = False
    cache: Path | None = None
    """Train from features cached here."""
    cache_scenes: int = 1000
    validation_scenes: int = 16
    precision: str | None = None
    """Of the backbone: bf16 or fp32; None for bf16 on a GPU."""


def train(options: RunOptions) -> dict[str, float | None]:
    """Train, and write ``head.safetensors`` (see :func:`~moe3d.load_head`); where more than the head has learned,
    also ``model.safetensors``, the model to load it into (see :func:`~moe3d.models.load.load_model`).

    Returns:
        The last validation's metrics; nothing without one.

    Raises:
        ValueError, OSError, RuntimeError: whatever is wrong with model, data or folder; see :class:`Trainer`.
    """
    if options.cache is not None and options.part != "head":
        raise ValueError(f"cached features are those of a frozen network: train the head, not '{options.part}'")
    if options.resume and not (options.out / CHECKPOINT).is_file():
        raise FileNotFoundError(f"there is no checkpoint to resume in {options.out}")
    options.out.mkdir(parents=True, exist_ok=True)
    process = PartialState(cpu=on_cpu())
    set_seed(options.train.seed)  # for whatever a model draws; data and initial weights have generators of their own
    model = load_model(options.model, "stock").to(process.device)
    scenes = _scenes(options, validation=False)
    held_out = _scenes(options, validation=True) if options.validation_scenes else None
    network, training, validation = _prepare(options, model, scenes, held_out, process)
    cameras = options.part != "head" and options.recipe.camera_weight > 0
    supervised = Supervised(network, options.recipe.objective(cameras))
    trainer = Trainer(
        supervised,
        training,
        options.train,
        options.out,
        validation,
        options.resume,
        _identity(options),
        decode=options.recipe.set_decode,
        shard=options.part == "all",
    )
    trainer.train()
    _export(trainer, options)
    return trainer.metrics


def _identity(options: RunOptions) -> dict[str, Any]:
    """What a run that is resumed must have been begun with, beside :class:`TrainOptions`."""
    names = ("datasets", "frames", "model", "part", "precision")
    cached = {"cache_scenes": None if options.cache is None else options.cache_scenes}
    return {name: getattr(options, name) for name in names} | cached | vars(options.recipe)


def _scenes(options: RunOptions, validation: bool) -> LiveScenes:
    seed = VALIDATION_SEED if validation else options.train.seed
    corpora = [open_corpus(*dataset, options.frames[1], validation) for dataset in options.datasets]
    return LiveScenes(corpora, options.frames, seed)


def _prepare(
    options: RunOptions, model: nn.Module, scenes: LiveScenes, held_out: LiveScenes | None, process: PartialState
) -> tuple[nn.Module, Dataset, Validation | None]:
    """The network that is trained, its training scenes and its validation: of images, or of cached features."""
    seed, count = options.train.seed, options.validation_scenes
    bf16 = options.precision == "bf16" or (options.precision is None and process.device.type == "cuda")
    if options.cache is not None:
        how = (process.process_index, process.num_processes, bf16)
        cache_scenes(model, scenes, options.cache_scenes, options.cache / "train", *how)
        if held_out is not None:
            cache_scenes(model, held_out, count, options.cache / "val", *how)
        process.wait_for_everyone()
    patch(model, **options.recipe.patch_options(seed))
    options.recipe.spread_experts(patched_heads(model)["depth"].tail)
    set_trainable(model, options.part, options.recipe.camera_weight > 0)
    if options.cache is None:
        validation = Validation(collate([held_out[i, 0]]) for i in range(count)) if held_out is not None else None
        return ImageNetwork(model, bf16), scenes, validation
    head = patched_heads(model)["depth"]
    cached = CachedScenes(options.cache / "train", seed, options.cache_scenes)
    network = FeatureNetwork(head.tail, head.pos_embed)
    if held_out is None:
        return network, cached, None
    return network, cached, Validation(read_batches(CachedScenes(options.cache / "val", 0, count)))


def _export(trainer: Trainer, options: RunOptions) -> None:
    """The trained weights, gathered from all processes where they are spread over them, into a model as it was."""
    weights = trainer.whole_weights()
    if not trainer.accelerator.is_main_process:
        return
    model = load_model(options.model, "stock")
    patch(model, **options.recipe.patch_options(options.train.seed))
    tail = patched_heads(model)["depth"].tail
    place, prefix = (model, "network.model.") if options.cache is None else (tail, "network.tail.")
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    place.load_state_dict(own, strict=False)  # what was frozen is as it was loaded
    options.recipe.set_decode(tail)
    save_head(model, options.out / "head.safetensors")
    if options.part != "head":
        _save_model(unpatch(model), options.out / "model.safetensors")


def _save_model(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    if isinstance(model, MiniVGGT):
        save_mini(model, path)
        return
    once: dict[tuple, tuple[str, Tensor]] = {}  # what several names share, as in Depth Anything 3, under the first
    for key, value in model.state_dict().items():
        once.setdefault((value.data_ptr(), value.shape), (key, value.contiguous()))
    with whole_file(path) as unfinished:
        save_file(dict(once.values()), unfinished)
