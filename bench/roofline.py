"""The byte and operation model, for every case and formulation: ``python -m bench.roofline [--measure]``.

The model is :mod:`moe3d.benchmark.roofline`, because ``moe3d bench`` needs it on machines without this folder; here
it is printed. With ``--measure`` this machine's ceilings are measured, and the least times that follow.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from moe3d.benchmark.case import Case, precisions
from moe3d.benchmark.roofline import (
    FORMULATIONS,
    Ceilings,
    Work,
    counted_overhead,
    eager_bytes,
    eager_bytes_by_expert,
    embedding_bytes,
    measure_ceilings,
    tail_work,
    vggt_head_macs,
    vggt_macs,
    vggt_paper_flops,
)

SIZES = ((154, 518), (392, 518), (518, 518), (1036, 1036))
EXPERTS = (1, 2, 4, 8, 16)


def rows() -> Iterator[tuple[str, str, Work]]:
    """(case, formulation, work) of one frame: VGGT's sizes, then numbers of experts."""
    for size in SIZES:
        case = Case(1, *size)
        yield f"{size[0]}x{size[1]} stock", "direct", tail_work(case.single)
        for formulation in FORMULATIONS:
            yield f"{size[0]}x{size[1]} K=4", formulation, tail_work(case, formulation)
    for experts in EXPERTS:
        case = Case(experts=experts)
        for formulation in ("direct", "low-resolution"):
            yield f"518x518 K={experts}", formulation, tail_work(case, formulation)


def table(ceilings: Ceilings | None) -> str:
    """Per frame, in float32."""
    lines = [
        "case            formulation       matrix GMAC  vector GMAC  least MB" + ("  floor ms" if ceilings else "")
    ]
    for name, formulation, work in rows():
        line = f"{name:<16}{formulation:<16}{work.matrix_macs / 1e9:>13.2f}{work.vector_macs / 1e9:>13.2f}"
        line += f"{work.bytes / 1e6:>10.1f}"
        if ceilings:
            seconds, bound = ceilings.floor_s(work, "ieee")
            line += f"{1e3 * seconds:>10.2f} {bound}"
        lines.append(line)
    return "\n".join(lines)


def whole() -> str:
    """What plain PyTorch moves, and what the tail is a part of."""
    case = Case()
    moved = {
        "mixture, concatenated": eager_bytes(case),
        "mixture, expert by expert": eager_bytes_by_expert(case),
        "stock head": eager_bytes(case.single),
        "building the embedding, once a call": embedding_bytes(case),
    }
    counted = {
        "depth head, GMAC": vggt_head_macs(*case.size),
        "aggregator and depth head, GMAC": vggt_macs(*case.size),
        "aggregator and depth head as fvcore counts, G": vggt_paper_flops(*case.size),
    }
    overhead = counted_overhead(case)
    return "\n".join(
        [
            "moved by plain PyTorch as written, GB (518x518, one frame, float32)",
            *(f"  {name:<48}{size / 1e9:>8.2f}" for name, size in moved.items()),
            "VGGT (518x518, one frame)",
            *(f"  {name:<48}{count / 1e9:>8.1f}" for name, count in counted.items()),
            f"  the mixture adds {overhead.gflops:.2f}% GFLOPs and {overhead.parameters:.2f}% parameters",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description="Count the least work of every case.")
    parser.add_argument("--measure", action="store_true", help="measure this machine's ceilings, too")
    args = parser.parse_args()
    ceilings = None
    if args.measure:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        ceilings = measure_ceilings(device, precisions(device))
        print(ceilings)
    print(table(ceilings), whole(), sep="\n\n")


if __name__ == "__main__":
    main()
