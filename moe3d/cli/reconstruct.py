"""``moe3d reconstruct``: photographs or a video to depth, cameras and point clouds that other programs open."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from moe3d.cli.arguments import folder, integer, number, positive
from moe3d.cli.model import NAME_HELP, add_model_arguments, choose_device, choose_dtype, load, width_of
from moe3d.models.load import weights_file
from moe3d.reconstruct.exports import EXPORTERS, Exporter, export_pictures
from moe3d.reconstruct.frames import ReconstructedFrame
from moe3d.reconstruct.points import PointSelection
from moe3d.reconstruct.run import Job, file_stamp, reconstruct
from moe3d.viz.pictures import gate_picture


def gates(frame: ReconstructedFrame):
    """The picture of ``gate-png``: each expert's colour, mixed by its weight."""
    if frame.weights is None:
        raise ValueError("gate-png needs a model with a mixture-of-experts head, and this one has its stock head")
    return gate_picture(frame.weights)


ALL_EXPORTERS: dict[str, Exporter] = EXPORTERS | {"gate-png": partial(export_pictures, kind="gate", picture=gates)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="images, folders of images, globs, or videos; all are one scene"
    )
    parser.add_argument("--out", type=folder, required=True, metavar="DIR", help="folder to write to")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="mini", metavar="NAME", help=f"{NAME_HELP} (default: %(default)s)")
    add_model_arguments(add)
    add("--experts", action="store_true", help="keep each expert's depth, too")
    add(
        "--frames-chunk",
        type=integer(),
        default=8,
        metavar="N",
        help="frames the heads see at once (default: %(default)s)",
    )

    add = parser.add_argument_group("input").add_argument
    add(
        "--fps",
        type=positive(),
        default=1.0,
        metavar="F",
        help="frames per second taken of a video (default: %(default)s)",
    )
    add("--skip-bad", action="store_true", help="leave out images that cannot be read, and say which")
    add("--resume", action="store_true", help="keep the frames that an interrupted run of the same job has finished")

    add = parser.add_argument_group("output").add_argument
    add(
        "--export",
        type=kinds,
        default="npz,ply,glb",
        metavar="KINDS",
        help=f"any of {','.join(ALL_EXPORTERS)} (default: %(default)s)",
    )
    add(
        "--points",
        default="depth",
        choices=("depth", "head"),
        help="from depth and camera, or the point head's (default: %(default)s)",
    )
    add(
        "--conf-percentile",
        type=number(0, 100),
        default=25.0,
        metavar="P",
        help="drop the P per cent least confident points (default: %(default)s)",
    )
    add(
        "--edge-filter",
        type=positive(),
        metavar="T",
        help="drop points where depth varies by more than T, say 0.03, around them",
    )
    add(
        "--max-points",
        type=integer(),
        default=1_000_000,
        metavar="N",
        help="keep at most N points (default: %(default)s)",
    )
    add("--json", action="store_true", help="print a summary as JSON")


def run(args: argparse.Namespace) -> None:
    device = choose_device(args.device)
    selection = PointSelection(args.points, args.conf_percentile, args.edge_filter, args.max_points)
    job = Job(
        inputs=args.inputs,
        out=args.out,
        load=lambda: load(args, args.model, device, return_experts=True),
        identity=identity(args),
        width=partial(width_of, args),
        fps=args.fps,
        frames_chunk=args.frames_chunk,
        dtype=choose_dtype(args.dtype, device),
        keep_hypotheses=args.experts,
        skip_unreadable=args.skip_bad,
        resume=args.resume,
    )
    summary = reconstruct(job, selection, {kind: ALL_EXPORTERS[kind] for kind in args.export})
    summary |= {"model": args.model, "head": args.head, "device": str(device), "dtype": str(job.dtype)[6:]}
    for note in [*summary["notes"], *(f"skipped: {why}" for why in summary["skipped"].values())]:
        print(note, file=sys.stderr)
    print(json.dumps(summary, indent=2) if args.json else as_text(summary))


def identity(args: argparse.Namespace) -> dict[str, Any]:
    """What tells the model and its settings from others."""
    named = {name: getattr(args, name) for name in ("model", "head", "mode", "sharpen", "precision", "width")}
    head = file_stamp(Path(args.head)) if args.head else None
    return named | {"model_file": file_stamp(weights_file(Path(args.model))), "head_file": head}


def as_text(summary: dict[str, Any]) -> str:
    height, width = summary["size"]
    resumed = f", {summary['resumed']} of them from an earlier run" if summary["resumed"] else ""
    points = "" if summary["points"] is None else f", {summary['points']:,} points"
    files = [file for file in summary["files"] if "/" not in file]
    folders = sorted({str(Path(file).parents[-3]) for file in summary["files"] if "/" in file})
    lines = [
        f"{summary['scene']}: {summary['frames']} frames of {height}x{width}{resumed}{points}, "
        f"{summary['seconds']:.1f} s, at most {summary['peak_memory'] / 2**30:.1f} GiB",
        *(f"  {Path(summary['out']) / file}" for file in [*files, *(f"{folder}/" for folder in folders)]),
        f"look at it: moe3d view {summary['out']}",
    ]
    return "\n".join(lines)


def kinds(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in ALL_EXPORTERS:
            raise argparse.ArgumentTypeError(f"must be of {','.join(ALL_EXPORTERS)}, got '{name}'")
    return list(dict.fromkeys(names))
