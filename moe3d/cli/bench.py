"""``moe3d bench``: the short table of the benchmarks, on a user's own machine."""

from __future__ import annotations

import argparse
import dataclasses
import json

import torch
from tqdm import tqdm

import moe3d
from moe3d.benchmark import heads
from moe3d.benchmark.case import PRECISIONS, Case, precisions
from moe3d.benchmark.peers import CONCATENATED, STOCK, STOCK_CACHED
from moe3d.benchmark.race import Effort
from moe3d.benchmark.session import Session
from moe3d.benchmark.tables import summary
from moe3d.cli.arguments import integer, number

MINI_CHANNELS = 32  # of the features that MiniVGGT's tail gets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to measure (default: cuda where there is one)")
    parser.add_argument(
        "--size", type=_size, default=(518, 518), metavar="HxW", help="of an image, multiples of 14 (default: 518x518)"
    )
    parser.add_argument(
        "--frames",
        type=_counts,
        default=(1, 8),
        metavar="N[,N]",
        help="frames per call, several to compare (default: 1,8)",
    )
    parser.add_argument(
        "--experts", type=integer(), default=4, metavar="K", help="experts of the head (default: %(default)s)"
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="of the arithmetic (default: ieee on the CPU, tf32 on CUDA)"
    )
    parser.add_argument(
        "--seconds",
        type=number(0, 3600),
        default=10.0,
        metavar="S",
        help="to spend on each case, at least (default: %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines, one per result, instead of the table")


def run(args: argparse.Namespace) -> None:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: PyTorch finds no CUDA device here")
    precision = args.precision or ("tf32" if device == "cuda" else "ieee")
    if precision == "tf32" and device == "cpu":
        raise ValueError("--precision tf32 is arithmetic of CUDA devices, and the device is the CPU")
    if precision not in precisions(device):
        raise RuntimeError(
            f"--precision {precision}: PyTorch, with which it would be compared, has no such convolutions here"
        )
    races = _races(args.size, args.frames, args.experts, precision, device)
    session = Session(device)
    refused: dict[str, str] = {}
    for suite, case, names in tqdm(races, desc="measuring", disable=None, leave=False):
        outcomes = session.race(suite, case, Effort(args.seconds, 3, 200), names)
        refused |= {name: outcome.refused for name, outcome in outcomes.items() if outcome.refused}
    print(_json_lines(session) if args.json else summary(session.records))
    if refused:
        raise RuntimeError("; ".join(f"{name} is left out, it was refused: {why}" for name, why in refused.items()))


def _races(size: tuple[int, int], frames: tuple[int, ...], experts: int, precision: str, device: str) -> list[tuple]:
    """The tail at each number of frames, then the whole MiniVGGT: what the mixture costs end to end."""
    names = (STOCK, STOCK_CACHED, CONCATENATED, *moe3d.backends())
    cases = [Case(f, *size, experts, precision=precision, device=device) for f in frames]
    mini = Case(
        1, *size, experts, channels=MINI_CHANNELS, precision="ieee" if precision == "bf16" else precision, device=device
    )
    return [*(("tail", case, names) for case in cases), ("mini", mini, heads.names())]


def _json_lines(session: Session) -> str:
    return "\n".join(json.dumps(dataclasses.asdict(record)) for record in session.records)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(integer()(part) for part in text.split(","))


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected HxW, as 518x518, got {text!r}")
    try:
        return Case(height=int(height), width=int(width)).size
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
