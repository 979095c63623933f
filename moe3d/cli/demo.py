"""``moe3d demo``: the shipped model, stock head beside MoE head, on a real stereo pair and on synthetic scenes."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import moe3d
from moe3d.benchmark.clock import time_call
from moe3d.benchmark.statistics import ratio_of_medians
from moe3d.cli.arguments import folder
from moe3d.data import Sample, open_dataset
from moe3d.evaluation import Frame, flying_points
from moe3d.integrations import patched_heads
from moe3d.models import MINI_WIDTH
from moe3d.ops.dispatch import AUTO, NAMES, automatic_backends
from moe3d.reconstruct import output_folder, write_glb, write_ply
from moe3d.reconstruct.comparison import METRICS, SceneComparison, compare_heads, prepare_views
from moe3d.reconstruct.images import resize_note
from moe3d.viz.comparison import encode_picture, scene_pictures
from moe3d.viz.page import PageScene, render_page
from moe3d.viz.pictures import depth_range

ROUNDS = 5  # of timing, interleaved
GPU_BACKENDS, CPU_BACKENDS = ("triton", "cuda"), ("cpu",)


@dataclass(frozen=True)
class DemoScene:
    """Which views of which dataset, and what the report calls them."""

    name: str
    title: str
    about: str
    dataset: str
    sequence: str
    frames: tuple[str, ...]


def _synthetic(number: int, title: str) -> DemoScene:
    return DemoScene(
        name=f"synthetic-{number:06d}",
        title=title,
        about=f"synthetic scene {number} of the test split, never trained on",
        dataset="synthetic",
        sequence=f"scene-{number:06d}",
        frames=("frame-0000", "frame-0001"),
    )


# The synthetic ones were chosen by their images alone, for many boundaries, before there was a model to predict them.
SCENES = (
    DemoScene(
        name="motorcycle",
        title="Motorcycle",
        about="a real stereo pair with measured depth (Middlebury 2014)",
        dataset="motorcycle",
        sequence="motorcycle",
        frames=("left", "right"),
    ),
    _synthetic(5, "Bench and railings"),
    _synthetic(7, "Boxes and a wheel"),
    _synthetic(17, "Workshop"),
    _synthetic(30, "Lamps and tripods"),
)


@dataclass(frozen=True)
class Models:
    """The stock model and its patched twin: all but the depth head's tail is the same."""

    stock: nn.Module
    moe: nn.Module
    backend: str
    device: torch.device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=folder, default="moe3d-demo", metavar="DIR", help="folder to write to (default: %(default)s)"
    )
    parser.add_argument("--backend", default=AUTO, choices=NAMES, help="of the MoE head (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    with output_folder(args.out) as folder:
        report = write_demo(folder, load_models(args.backend))
    print(as_table(report))
    print(f"\nreport: {args.out / 'report.html'}")


def load_models(asked_for: str) -> Models:
    """The shipped models, with the backend that is asked for, where it runs."""
    backend, device = choose_backend(asked_for, torch.cuda.is_available())
    stock, moe = (moe3d.load_mini(head).to(device) for head in ("single", "moe"))
    for head in patched_heads(moe).values():
        head.tail.backend = backend
    return Models(stock, moe, backend, torch.device(device))


def choose_backend(asked_for: str, has_gpu: bool) -> tuple[str, str]:
    """Backend and device ("cuda" or "cpu"); "auto" becomes the fastest that can run, so that the report can name it."""
    device = "cuda" if has_gpu and asked_for != "cpu" else "cpu"
    if asked_for != AUTO:
        return asked_for, device
    # Those of the other device cannot serve; the reference backend, the last in the list, serves both.
    elsewhere = CPU_BACKENDS if device == "cuda" else GPU_BACKENDS
    return next(name for name in automatic_backends() if name not in elsewhere), device


def write_demo(
    folder: Path, models: Models, scenes: Sequence[DemoScene] = SCENES, width: int = MINI_WIDTH, rounds: int = ROUNDS
) -> dict:
    """Run the demo, write everything into a folder, and return what ``report.json`` holds.

    Args:
        folder: an empty folder.
        models: the two models.
        scenes: at least one; the first is the one that is timed.
        width: of the images that the models get.
        rounds: of timing.
    """
    entries, page_scenes, views = [], [], []
    with tqdm(total=len(scenes) + rounds, disable=None, leave=False) as progress:
        for scene in scenes:
            progress.set_description(scene.title)
            sample = open_dataset(scene.dataset).load(scene.sequence, scene.frames)
            images = prepare_views(sample, width).to(models.device)
            views.append(images)
            note = resize_note(sample.images.shape[2:], images.shape[2:])
            progress.write(f"{scene.title}: {len(images)} views, {note or 'as they are'}")
            comparison = _compare(sample, images, models)
            page_scenes.append(_write_scene(folder / scene.name, scene, comparison))
            entries.append(_scene_entry(scene, comparison, len(images)))
            progress.update()
        progress.set_description("Timing")
        timing = _time(models, views[0], rounds, progress)
    report = _report(entries, timing, models)
    (folder / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", "utf-8")
    (folder / "report.html").write_text(render_page(report, page_scenes), "utf-8")
    return report


def as_table(report: dict) -> str:
    """The report's metrics as text, stock beside MoE, and the time."""
    rows = [(scene["name"], scene) for scene in report["scenes"]] + [("mean of the scenes", report["mean"])]
    widest = max(len(name) for name, _ in rows)
    lines = [
        " " * widest + "".join(f"{key:>20}" for key in METRICS),
        "scene".ljust(widest) + "     stock       MoE" * len(METRICS),
    ]
    for name, heads in rows:
        values = (heads[head][key] for key in METRICS for head in ("stock", "moe"))
        lines.append(
            name.ljust(widest) + "".join(f"{'-' if value is None else f'{value:.3f}':>10}" for value in values)
        )
    return "\n".join([*lines, "", _time_line(report)])


def _time_line(report: dict) -> str:
    timing = report["timing"]
    height, width = timing["size"]
    low, high = timing["interval_percent"]
    return (
        f"{timing['views']} views of {height}x{width}: stock {timing['stock_seconds']:.3f} s, "
        f"MoE {timing['moe_seconds']:.3f} s, overhead {report['overhead_percent']:+.1f}% ({low:+.1f} to {high:+.1f}), "
        f"with its depth sharpened {timing['sharpened_seconds']:.3f} s, "
        f"{report['backend']} backend, {report['device']}"
    )


def _compare(sample: Sample, images: Tensor, models: Models) -> SceneComparison:
    """With the gate's weights, which cost time and are therefore not asked for while the clock runs."""
    with _set_on_tail(models.moe, "return_experts", True):
        return compare_heads(sample, images, models.stock, models.moe)


@contextmanager
def _set_on_tail(model: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Another value of an attribute of the depth head's tail for a while."""
    tail = patched_heads(model)["depth"].tail
    before = getattr(tail, name)
    setattr(tail, name, value)
    try:
        yield
    finally:
        setattr(tail, name, before)


def _write_scene(folder: Path, scene: DemoScene, comparison: SceneComparison) -> PageScene:
    folder.mkdir()
    pictures = {}
    for name, picture in scene_pictures(comparison).items():
        file, pictures[name] = encode_picture(name, picture)
        (folder / file).write_bytes(pictures[name])
    downloads = {}
    colors = comparison.model_image.reshape(-1, 3)
    for head, result in (("stock", comparison.stock), ("moe", comparison.moe)):
        points = result.points.reshape(-1, 3)
        finite = np.isfinite(points).all(axis=1)
        for kind, write in (("glb", write_glb), ("ply", write_ply)):
            write(folder / f"points_{head}.{kind}", points[finite], colors[finite])
            downloads[f"points_{head}.{kind}"] = f"{scene.name}/points_{head}.{kind}"
    return PageScene(
        title=scene.title,
        about=scene.about,
        pictures=pictures,
        depth_range=depth_range(comparison.truth, comparison.valid),
        weights=comparison.weights,
        downloads=downloads,
    )


def _scene_entry(scene: DemoScene, comparison: SceneComparison, views: int) -> dict:
    perfect = flying_points(Frame(comparison.truth, comparison.truth, comparison.valid))
    return {
        "name": scene.name,
        "stock": comparison.stock.metrics,
        "moe": comparison.moe.metrics,
        "truth_flying_rate": perfect.rate,
        "views": views,
        "size": list(comparison.truth.shape),
        "model_size": list(comparison.entropy.shape),
    }


def _time(models: Models, images: Tensor, rounds: int, progress: tqdm) -> dict:
    """Both models in turn, so that whatever else the machine does hits both, after a round that warms up.

    The MoE model with and without what sharpens its depth afterwards: that is no part of the head's own cost.
    """
    sharpen = patched_heads(models.moe)["depth"].tail.sharpen
    runs = {"stock": (models.stock, 0), "moe": (models.moe, 0), "sharpened": (models.moe, sharpen)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for number in range(rounds + 1):
            for name, (model, passes) in runs.items():
                with _set_on_tail(models.moe, "sharpen", passes):
                    seconds[name].append(time_call(partial(model, images), str(models.device)))
            progress.update(number > 0)
    stock, moe, sharpened = (times[1:] for times in seconds.values())
    overhead = ratio_of_medians(moe, stock).percent_more
    return {
        "overhead_percent": overhead.value,
        "interval_percent": [overhead.low, overhead.high],
        "stock_seconds": median(stock),
        "moe_seconds": median(moe),
        "sharpened_seconds": median(sharpened),
        "rounds": rounds,
        "views": len(images),
        "size": list(images.shape[2:]),
    }


def _report(entries: list[dict], timing: dict, models: Models) -> dict:
    return {
        "scenes": entries,
        "mean": _mean(entries),
        "overhead_percent": timing["overhead_percent"],
        "timing": timing,
        "backend": models.backend,
        "device": _device_name(models.device),
        "parameters": sum(parameter.numel() for parameter in models.stock.parameters()),
        "version": moe3d.__version__,
    }


def _mean(entries: list[dict]) -> dict[str, dict[str, float | None]]:
    """Plain means over the scenes where a metric is defined for both heads."""

    def mean(head: str, key: str) -> float | None:
        values = [entry[head][key] for entry in entries if None not in (entry["stock"][key], entry["moe"][key])]
        return fmean(values) if values else None

    return {head: {key: mean(head, key) for key in METRICS} for head in ("stock", "moe")}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"
