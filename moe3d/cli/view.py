"""``moe3d view``: a reconstruction in the browser, on this machine only."""

from __future__ import annotations

import argparse
import ipaddress
import sys
from pathlib import Path

from moe3d.cli.arguments import integer
from moe3d.data import DATASETS, open_dataset
from moe3d.reconstruct.frames import find_scenes
from moe3d.viz.viewer import LOOPBACK, SceneClouds, Viewer, true_depths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="what moe3d reconstruct --out wrote")
    parser.add_argument(
        "--port", type=integer(1, 65535), default=8080, help="or, if taken, the next free one (default: %(default)s)"
    )
    parser.add_argument(
        "--host",
        default=LOOPBACK,
        help="address to answer on; 0.0.0.0 lets the whole network look (default: %(default)s)",
    )
    parser.add_argument(
        "--max-points",
        type=integer(),
        default=1_000_000,
        metavar="N",
        help="hold at most N points per scene (default: %(default)s)",
    )
    parser.add_argument(
        "--dataset",
        choices=sorted(DATASETS),
        help="ground truth with the scenes' and frames' names, to colour by error",
    )
    parser.add_argument("--root", type=Path, metavar="DIR", help="the dataset's files")


def run(args: argparse.Namespace) -> None:
    dataset = open_dataset(args.dataset, args.root) if args.dataset else None
    scenes = {}
    for name, frames in find_scenes(args.folder).items():
        truth = true_depths(dataset, name, frames.names) if dataset else None
        scenes[name] = SceneClouds(frames, args.max_points, truth)
    viewer = Viewer(scenes, args.host, args.port)
    try:
        if not is_loopback(args.host):
            print(f"anyone who can reach {args.host} can look at these scenes", file=sys.stderr)
        print(f"open {viewer.url} in a browser; Ctrl-C ends", flush=True)
        viewer.server.sleep_forever()
    finally:
        viewer.stop()


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
