"""``moe3d train``: fine-tune a mixture-of-experts depth head, or more of a model, on datasets with ground truth."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe3d.cli.arguments import integer, number
from moe3d.data import WITHOUT_ROOT
from moe3d.losses import Schedule
from moe3d.training.networks import PARTS
from moe3d.training.recipes import LOSSES, RECIPES, Recipe

if TYPE_CHECKING:
    from moe3d.training.runs import RunOptions

SHOWN = ("abs_rel", "delta1", "si_f1", "flying_rate")
MULTIPLE = 14  # of image sizes, the patch size of VGGT's backbone
IMAGE_GATES = {"none": False, "plain": True, "guided": "guided"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset", type=_names, required=True, metavar="NAME[,NAME]", help="as hypersim,vkitti2; or synthetic"
    )
    data.add_argument(
        "--root",
        type=_names,
        default=(),
        metavar="DIR[,DIR]",
        help="the datasets' folders; synthetic and motorcycle need none",
    )
    data.add_argument(
        "--size",
        type=_sizes,
        default=(),
        metavar="HxW[,HxW]",
        help="one for all datasets or one for each (default: hypersim 378x518, vkitti2 154x518, synthetic 168x224)",
    )
    data.add_argument("--frames", type=_range, default=(2, 2), metavar="N[-M]", help="per scene (default: 2)")
    data.add_argument(
        "--workers", type=integer(0), default=2, metavar="N", help="processes that load (default: %(default)s)"
    )
    data.add_argument(
        "--cache-features",
        type=Path,
        metavar="DIR",
        help="run the frozen network over --cache-scenes scenes, keep its features here, and train from them alone",
    )
    data.add_argument("--cache-scenes", type=integer(1), default=1000, metavar="N", help="(default: %(default)s)")

    model = parser.add_argument_group("model and recipe")
    model.add_argument(
        "--model", required=True, metavar="mini|HUB|PATH", help="as facebook/VGGT-1B or depth-anything/DA3-BASE"
    )
    model.add_argument(
        "--train", choices=PARTS, default="head", help="the mixture, the decoders, or all (default: %(default)s)"
    )
    model.add_argument(
        "--recipe", choices=tuple(RECIPES), default="paper", help="MoE3D as published, or beyond (default: %(default)s)"
    )
    model.add_argument(
        "--loss", choices=LOSSES, help="of depth; nll-* are likelihoods of the mixture (default: the recipe's)"
    )
    model.add_argument(
        "--image-gate",
        choices=tuple(IMAGE_GATES),
        help="a branch on the image in the gate, which the features may guide (default: the recipe's)",
    )
    model.add_argument("--num-experts", type=integer(1), metavar="K", help="(default: the recipe's)")
    model.add_argument(
        "--gate-hidden", type=integer(1), metavar="N", help="channels of the gate (default: the recipe's)"
    )
    model.add_argument(
        "--init-noise", type=number(0), metavar="X", help="of the experts, relative (default: the recipe's)"
    )
    schedule = "a number, or START:END:constant|linear|cosine|exponential[:PART OF THE RUN]"
    model.add_argument(
        "--entropy-weight",
        type=_schedule,
        metavar="W",
        help=f"relative to the depth loss before training; {schedule} (default: the recipe's)",
    )
    model.add_argument(
        "--temperature",
        type=_temperature,
        metavar="T",
        help=f"of the gate's softmax; {schedule} (default: the recipe's)",
    )
    model.add_argument(
        "--mode",
        choices=("mean", "argmax", "switch"),
        help="how the trained head combines its experts (default: the recipe's)",
    )

    run_group = parser.add_argument_group("run")
    run_group.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the checkpoint, the log, the head"
    )
    run_group.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    run_group.add_argument("--steps", type=integer(1), default=10_000, metavar="N", help="(default: %(default)s)")
    run_group.add_argument(
        "--batch", type=integer(1), default=1, metavar="N", help="scenes per process and pass (default: 1)"
    )
    run_group.add_argument("--accumulate", type=integer(1), default=1, metavar="N", help="passes per step (default: 1)")
    run_group.add_argument(
        "--lr", type=number(0), default=1e-4, metavar="X", help="learning rate (default: %(default)g)"
    )
    run_group.add_argument("--weight-decay", type=number(0), default=0.0, metavar="X", help="(default: %(default)g)")
    run_group.add_argument(
        "--warm-up", type=number(0, 0.99), default=0.05, metavar="X", help="part of the steps (default: %(default)g)"
    )
    run_group.add_argument(
        "--clip", type=number(0), default=1.0, metavar="X", help="of the gradient's norm, 0 for none (default: 1)"
    )
    run_group.add_argument(
        "--ema",
        type=number(0, 0.999999),
        default=0.0,
        metavar="X",
        help="average the weights with this decay per step",
    )
    run_group.add_argument(
        "--precision", choices=("bf16", "fp32"), help="of the backbone (default: bf16 on a GPU, fp32 elsewhere)"
    )
    run_group.add_argument("--seed", type=integer(0), default=0, metavar="N", help="(default: %(default)s)")
    run_group.add_argument(
        "--save-every", type=integer(1), default=500, metavar="N", help="steps (default: %(default)s)"
    )
    run_group.add_argument(
        "--validate-every", type=integer(1), default=1000, metavar="N", help="steps (default: %(default)s)"
    )
    run_group.add_argument(
        "--validation-scenes", type=integer(0), default=16, metavar="N", help="0 for none (default: %(default)s)"
    )
    run_group.add_argument("--log-every", type=integer(1), default=50, metavar="N", help="steps (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    try:
        from moe3d.training.runs import train
    except ImportError as error:
        raise RuntimeError(f"training needs more packages ({error}): pip install 'moe3d[train]'") from error
    metrics = train(_options(args))
    shown = ", ".join(f"{key} {metrics[key]}" for key in SHOWN if key in metrics)
    print(f"head: {args.out / 'head.safetensors'}" + (f"; on validation scenes {shown}" if shown else ""))


def _options(args: argparse.Namespace) -> RunOptions:
    from moe3d.training.runs import RunOptions
    from moe3d.training.trainer import TrainOptions

    recipe = _recipe(args)
    return RunOptions(
        datasets=_datasets(args),
        frames=args.frames,
        model=args.model,
        part=args.train,
        recipe=recipe,
        out=args.out,
        resume=args.resume,
        cache=args.cache_features,
        cache_scenes=args.cache_scenes,
        validation_scenes=args.validation_scenes,
        precision=args.precision,
        train=TrainOptions(
            steps=args.steps,
            batch=args.batch,
            accumulate=args.accumulate,
            learning_rate=args.lr,
            weight_decay=args.weight_decay,
            warm_up=args.warm_up,
            clip=args.clip,
            ema=args.ema,
            temperature=recipe.temperature,
            workers=args.workers,
            seed=args.seed,
            save_every=args.save_every,
            validate_every=args.validate_every,
            log_every=args.log_every,
        ),
    )


def _recipe(args: argparse.Namespace) -> Recipe:
    """The recipe that is asked for, with what the other options change of it."""
    names = ("loss", "image_gate", "num_experts", "gate_hidden", "init_noise", "entropy_weight", "temperature", "mode")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "image_gate" in changes:
        changes["image_gate"] = IMAGE_GATES[changes["image_gate"]]
    if changes.get("image_gate") and changes.get("num_experts") == 1:
        args.command.error(f"--image-gate {args.image_gate} needs at least 2 experts, got --num-experts 1")
    try:
        recipe = replace(RECIPES[args.recipe], **changes)
    except ValueError as error:
        args.command.error(str(error))
    return recipe


def _datasets(args: argparse.Namespace) -> tuple:
    """(name, root, size) per dataset."""
    roots, sizes = list(args.root), list(args.size)
    with_root = [name for name in args.dataset if name not in WITHOUT_ROOT]
    if len(roots) != len(with_root):
        args.command.error(f"--root must name {len(with_root)} folder(s), one per dataset on disk, got {len(roots)}")
    if len(sizes) not in (0, 1, len(args.dataset)):
        args.command.error(f"--size must give one size or one per dataset ({len(args.dataset)}), got {len(sizes)}")
    by_name = dict(zip(with_root, roots, strict=True))
    per_dataset = sizes * len(args.dataset) if len(sizes) == 1 else sizes or [None] * len(args.dataset)
    return tuple((name, by_name.get(name), size) for name, size in zip(args.dataset, per_dataset, strict=True))


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected different names separated by commas, got {text!r}")
    return names


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    return tuple(_size(part) for part in text.split(","))


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()) or not int(height) * int(width):
        raise argparse.ArgumentTypeError(f"expected HxW, as 378x518, got {text!r}")
    if int(height) % MULTIPLE or int(width) % MULTIPLE:
        raise argparse.ArgumentTypeError(f"height and width must be multiples of {MULTIPLE}, got {text}")
    return int(height), int(width)


def _range(text: str) -> tuple[int, int]:
    low, dash, high = text.partition("-")
    if low.isdecimal() and (high.isdecimal() if dash else True):
        pair = (int(low), int(high or low))
        if 1 <= pair[0] <= pair[1]:
            return pair
    raise argparse.ArgumentTypeError(f"expected N or N-M with 1 <= N <= M, got {text!r}")


def _schedule(text: str) -> Schedule:
    try:
        schedule = Schedule.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if min(schedule.at(0), schedule.at(1)) < 0:
        raise argparse.ArgumentTypeError(f"expected values of at least 0, got {text!r}")
    return schedule


def _temperature(text: str) -> Schedule:
    schedule = _schedule(text)
    if min(schedule.at(0), schedule.at(1)) <= 0:
        raise argparse.ArgumentTypeError(f"expected values above 0, got {text!r}")
    return schedule
