"""``moe3d eval``: published protocols of multi-view reconstruction, depth and boundaries, for any system's output."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import moe3d
from moe3d.atomic import check_file, output_folder
from moe3d.benchmark.machine import describe
from moe3d.cli.arguments import integer, positive
from moe3d.cli.model import NAME_HELP, OPTIONS, add_model_arguments, choose_device, choose_dtype, load, width_of
from moe3d.data import DATASETS, Dataset, open_dataset
from moe3d.evaluation import FileSystem, ModelSystem, Protocol, default_sampling, evaluate
from moe3d.evaluation.alignment import METHODS
from moe3d.evaluation.multiview import ALIGNMENTS, POINT_SOURCES
from moe3d.evaluation.protocol import CROPS
from moe3d.evaluation.sampling import SAMPLINGS
from moe3d.evaluation.systems import System
from moe3d.integrations import patched_heads
from moe3d.models import load_model
from moe3d.nn import MoEHead
from moe3d.viz.evaluation import Gallery, render_evaluation
from moe3d.viz.metrics import METRICS

TASKS = {
    "mv": "multi-view reconstruction: accuracy, completeness and normal consistency of point clouds",
    "depth": "depth errors: AbsRel, delta1 to delta3, SqRel, RMSE, logRMSE",
    "boundary": "depth boundaries: F1 and overlap of edges, their distances, flying points",
}
MULTI_VIEW = ("nrgbd", "7scenes", "synthetic", "hypersim", "vkitti2")
PACKAGES = ("torch", "numpy", "scipy", "scikit-image")
MINI = "mini"
MOE, STOCK, FILES = "moe", "stock", "predictions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_subparsers(title="tasks", metavar="TASK", required=True)
    for task, summary in TASKS.items():
        command = tasks.add_parser(task, help=summary, description=f"Evaluate {summary}.", allow_abbrev=False)
        command.set_defaults(task=task, command=command)
        _add_subject(command, MULTI_VIEW if task == "mv" else sorted(DATASETS))
        _ADD_PROTOCOL[task](command.add_argument_group("protocol").add_argument)
        _add_common_protocol(command.add_argument_group("protocol, of every task").add_argument, task)
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _add_subject(command: argparse.ArgumentParser, datasets) -> None:
    command.add_argument("--dataset", required=True, choices=datasets)
    command.add_argument("--root", metavar="DIR", help="the dataset's folder; synthetic and motorcycle need none")
    judged = command.add_mutually_exclusive_group()
    beside = "with a MoE head the stock one is judged beside it"
    judged.add_argument("--model", metavar="NAME", help=f"{NAME_HELP} (default: mini); {beside}")
    judged.add_argument(
        "--predictions", metavar="DIR", help="judge DIR/<sequence>.npz of any system instead of a model"
    )
    add_model_arguments(command.add_argument)
    command.add_argument(
        "--compare",
        type=_named_folder,
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="predictions to judge beside it; may be repeated",
    )
    command.add_argument(
        "--out", type=_report_file, metavar="FILE", help="the report, as JSON, with a page for people beside it (.html)"
    )


def _add_multiview(add: Callable) -> None:
    add("--align", default=ALIGNMENTS[0], choices=ALIGNMENTS, help="default: %(default)s")
    add(
        "--sampling",
        choices=SAMPLINGS,
        help="which frames: a published scheme, or all (default: pi3-sparse on nrgbd and 7scenes, else all)",
    )
    add(
        "--points",
        default=POINT_SOURCES[0],
        choices=POINT_SOURCES,
        help="from depth and cameras, or a point head's (default: %(default)s)",
    )


def _add_depth(add: Callable) -> None:
    add("--align", default="median", choices=METHODS, help="default: %(default)s")
    add(
        "--per",
        default="image",
        choices=("image", "sequence"),
        help="align, and show models, one image at a time or a sequence together (default: %(default)s)",
    )


def _add_boundary(add: Callable) -> None:
    add(
        "--per",
        default="image",
        choices=("image", "sequence"),
        help="show models one image at a time or a sequence together (default: %(default)s)",
    )


_ADD_PROTOCOL = {"mv": _add_multiview, "depth": _add_depth, "boundary": _add_boundary}


def _add_common_protocol(add: Callable, task: str) -> None:
    add("--max-depth", type=positive(), metavar="METRES", help="ground truth counts below it (default: the dataset's)")
    add(
        "--crop",
        default=CROPS[0],
        choices=CROPS,
        help="eigen: rows 45 to 470, columns 41 to 600 of 480x640 (default: %(default)s)",
    )
    add(
        "--edge-filter",
        type=positive(),
        metavar="T",
        help="drop predictions where depth varies by more than T, say 0.03, around them",
    )
    what = "sequences" if task == "mv" else "images (sequences with --per sequence)"
    add("--limit", type=integer(), metavar="N", help=f"only the first N {what}")


def run(args: argparse.Namespace) -> None:
    _check_usage(args)
    dataset = open_dataset(args.dataset, args.root)
    if args.max_depth is not None:
        dataset.max_depth = args.max_depth
    if args.out is None:
        print(as_table(_evaluate(args, dataset, Gallery(0))))
        return
    page = args.out.with_suffix(".html")
    for file in (args.out, page):
        check_file(file)
    with output_folder(args.out.parent) as folder:
        gallery = Gallery()
        report = _evaluate(args, dataset, gallery)
        (folder / args.out.name).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", "utf-8")
        (folder / page.name).write_text(render_evaluation(report, gallery.frames()), "utf-8")
    print(as_table(report))
    print(f"\nreport: {args.out}\npage: {page}")


def as_table(report: dict) -> str:
    """The means as text: a line per metric, a column per system."""
    systems = {report["system"]: report["mean"]} | {name: other["mean"] for name, other in report["compare"].items()}
    rows = [["", *systems]]
    for key, metric in METRICS.items():
        if key in report["mean"]:
            rows.append([key, *(metric.text(mean[key]) for mean in systems.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        row[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def _check_usage(args: argparse.Namespace) -> None:
    taken = {FILES} if args.predictions is not None else {MOE, STOCK}
    for name, _ in args.compare:
        if name in taken:
            args.command.error(f"argument --compare: the name '{name}' is taken")
        taken.add(name)
    for option in OPTIONS if args.predictions is not None else ():
        if getattr(args, option) != args.command.get_default(option):
            args.command.error(f"argument --{option}: not allowed with argument --predictions")


def _evaluate(args: argparse.Namespace, dataset: Dataset, gallery: Gallery) -> dict:
    systems, told = _systems(args)
    protocol = Protocol(
        task=args.task,
        dataset=args.dataset,
        crop=args.crop,
        edge_filter=args.edge_filter,
        limit=args.limit,
        **_choices(args),
    )
    total = sum(1 for _ in protocol.batches(dataset))
    with tqdm(total=total, desc=f"{args.task} on {args.dataset}", disable=None, leave=False) as progress:
        report = evaluate(dataset, systems, protocol, gallery.offer, partial(progress.update, 1))
    report["protocol"] |= {"root": args.root, **told}
    return report | {"versions": _versions(), "commit": describe("cpu", _checkout())["commit"]}


def _choices(args: argparse.Namespace) -> dict:
    if args.task == "mv":
        sampling = args.sampling or default_sampling(args.dataset)
        return {"align": args.align, "sampling": sampling, "points": args.points}
    return {"align": args.align, "per": args.per} if args.task == "depth" else {"per": args.per}


def _systems(args: argparse.Namespace) -> tuple[list[System], dict[str, Any]]:
    """What is judged, the main one first, and what the report says of it: each one's origin, and where a model ran."""
    folders = dict(args.compare)
    if args.predictions is not None:
        folders = {FILES: args.predictions, **folders}
    files = [FileSystem(name, folder) for name, folder in folders.items()]  # before a model takes its time
    descriptions = {name: f"predictions in {folder}" for name, folder in folders.items()}
    if args.predictions is not None:
        return list(files), {"systems": descriptions}
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    models = _models(args, device)
    descriptions = {name: f"{args.model or MINI}, {what}" for name, (_, what) in models.items()} | descriptions
    running = [ModelSystem(name, model, width_of(args, model), dtype) for name, (model, _) in models.items()]
    where = {"device": str(device), "dtype": str(dtype)[6:], "width": running[0].width}
    return [*running, *files], {"systems": descriptions, **where}


def _models(args: argparse.Namespace, device: torch.device) -> dict[str, tuple[torch.nn.Module, str]]:
    """Name -> model, what its depth head is."""
    name = args.model or MINI
    model = load(args, name, device)
    heads = patched_heads(model)
    if not heads:
        return {STOCK: (model, "stock head")}
    what = f"MoE head {args.head}" if args.head else "shipped MoE head"
    how = "".join(f", {name} {_settings(head.tail)}" for name, head in heads.items())
    return {MOE: (model, what + how), STOCK: (load_model(name, "stock").to(device), "stock head")}


def _settings(tail: MoEHead) -> str:
    return f"by {tail.mode}, {tail.sharpen} passes of sharpening, backend {tail.backend}, precision {tail.precision}"


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"moe3d": moe3d.__version__, "python": platform.python_version(), **packages}


def _checkout() -> Path | None:
    """The repository that this package runs from, if it does."""
    root = Path(moe3d.__file__).parents[1]
    return root if (root / ".git").exists() else None


def _named_folder(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"must be NAME=DIR, got '{text}'")
    return name, folder


def _report_file(text: str) -> Path:
    path = Path(text)
    if not path.name or path.suffix.lower() in (".html", ".htm"):
        raise argparse.ArgumentTypeError(f"must name a JSON file, got '{text}'")
    return path
