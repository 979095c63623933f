"""Plots of committed results for the README: ``python -m bench.plot [FILE...] [--out DIR]``.

Reads the JSON lines of ``pytest bench --record`` and the JSON files of ``make gpu``, by default all in bench/results,
takes each device's newest result of every contestant and case, and writes SVG files named after device and plot.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot: there may be no display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

import moe3d
from bench.gpu.state import State
from moe3d.benchmark.case import Case
from moe3d.benchmark.peers import BY_EXPERT, BY_EXPERT_CACHED, STOCK, STOCK_CACHED, WIDENED, peers
from moe3d.benchmark.records import Record, read_jsonl
from moe3d.benchmark.roofline import eager_bytes, eager_bytes_by_expert, embedding_bytes
from moe3d.benchmark.statistics import Ratio
from moe3d.benchmark.tables import milliseconds

RESULTS = Path(__file__).parent / "results"

_SINGLE, _EAGER = "#9aa5b1", "#5b7fa6"  # single heads; the mixture in plain PyTorch
_OURS = {"reference": "#c9a227", "cpu": "#d1495b", "triton": "#d1495b", "cuda": "#8f2d56"}
_PRECISIONS = {"ieee": "float32", "tf32": "TF32", "bf16": "bfloat16"}
_MARKERS = "osDv^P*Xhp"
_STYLE = {
    "figure.facecolor": "white",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "svg.hashsalt": "moe3d",  # equal results give equal files
}


def load(paths: Iterable[Path]) -> list[Record]:
    """The records of files of either kind, oldest first."""
    records = []
    for path in paths:
        records += (
            read_jsonl(path) if path.suffix == ".jsonl" else [Record(**r) for r in State(path).benchmark_records()]
        )
    return sorted(records, key=lambda r: r.run["date"])


def newest(records: Iterable[Record]) -> list[Record]:
    """Of records sorted by date, the last one of every contestant and case on the machine that was measured last."""
    records = list(records)
    machine = _machine(records[-1])
    latest = {(r.suite, r.peer, json.dumps(r.case, sort_keys=True)): r for r in records if _machine(r) == machine}
    return list(latest.values())


def _machine(record: Record) -> str:
    run = record.run
    return (
        run["gpu"]["name"]
        if run["gpu"]
        else f"{run['cpu']}, {run['threads']} thread{'s' if run['threads'] > 1 else ''}"
    )


def _color(peer: str) -> str:
    if peer in (STOCK, STOCK_CACHED, WIDENED):
        return _SINGLE
    return _OURS.get(peer.split(",")[0], _EAGER)


def ratios(records: Sequence[Record]) -> Figure | None:
    """Time over the stock head's for one and for eight frames a call; bars as :func:`~.statistics.spread` says."""
    groups = [g for frames in (1, 8) if (g := _largest(records, frames))]
    if not groups:
        return None
    slowest_first = sorted(groups[-1], key=lambda r: -r.ms_per_frame)
    names = list(dict.fromkeys(r.peer for group in (slowest_first, *groups) for r in group))
    size = (2.4 + 4.2 * len(groups), 0.32 * len(names) + 1.7)
    figure, axes = plt.subplots(1, len(groups), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for ax, group in zip(axes[0], groups, strict=True):
        _bars(ax, {r.peer: r for r in group}, names)
    figure.suptitle(f"Time of the depth head's tail over VGGT's stock head's ({_machine(groups[0][0])})", fontsize=11)
    kinds = {
        _SINGLE: "single head",
        _EAGER: "mixture, plain PyTorch",
        **{_color(n): f"mixture, {n} backend" for n in _OURS if n in names},
    }
    handles = [Patch(color=color, label=label) for color, label in kinds.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    return figure


def _largest(records: Sequence[Record], frames: int) -> list[Record]:
    """The default head's race over the tail with so many frames a call: most contestants, then most pixels."""
    races: dict[str, list[Record]] = {}
    for record in records:
        case = Case(**record.case)
        if record.suite == "tail" and case.frames == frames and case.experts == 4 and case.height <= 518:
            races.setdefault(case.label, []).append(record)
    return max(races.values(), key=lambda group: (len(group), Case(**group[0].case).pixels), default=[])


def _bars(ax: Axes, by_name: dict[str, Record], names: Sequence[str]) -> None:
    error = {"ecolor": "#444444", "elinewidth": 1, "capsize": 2}
    furthest = 1.0
    for row, name in enumerate(names):
        if name not in by_name:
            continue
        record = by_name[name]
        ratio = Ratio(1, 1, 1) if name == STOCK else record.ratio(STOCK)
        spread = [[ratio.value - ratio.low], [ratio.high - ratio.value]]
        ax.barh(row, ratio.value, color=_color(name), xerr=spread, error_kw=error)
        text = f"{ratio.value:.2f}   {milliseconds(record.ms_per_frame)} ms a frame"
        ax.annotate(text, (ratio.high, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
        furthest = max(furthest, ratio.high)
    ax.axvline(1, color="#444444", linewidth=0.8, linestyle=":")
    ax.set_title(_where(Case(**next(iter(by_name.values())).case)))
    ax.set_yticks(range(len(names)), names)
    ax.set_xlim(0, 1.5 * furthest)
    ax.set_xlabel("time / stock head's time")
    ax.tick_params(axis="y", length=0)


def _where(case: Case) -> str:
    frames = f"{case.frames} frame{'s' if case.frames > 1 else ''} a call"
    return f"{case.height} x {case.width}, {frames}, {_PRECISIONS[case.precision]}"


def experts(records: Sequence[Record]) -> Figure | None:
    """Milliseconds per frame against the number of experts."""
    return _lines(records, "experts", lambda case: case.frames == 1, "number of experts K")


def frames(records: Sequence[Record]) -> Figure | None:
    """Milliseconds per frame against the frames of a call."""
    return _lines(records, "frames", lambda case: case.experts == 4, "frames a call")


def _lines(records: Sequence[Record], field: str, wanted: Callable[[Case], bool], label: str) -> Figure | None:
    """One line a contestant over the size and precision that were measured at most values of ``field``."""
    by_setting: dict[tuple, list[Record]] = {}
    for record in records:
        case = Case(**record.case)
        if record.suite == "tail" and wanted(case):
            by_setting.setdefault((case.size, case.precision), []).append(record)
    group = max(by_setting.values(), key=lambda g: len({r.case[field] for r in g}), default=[])
    values = sorted({r.case[field] for r in group})
    if len(values) < 3:
        return None
    figure, ax = plt.subplots(figsize=(6.4, 4.2))
    names = list(dict.fromkeys(r.peer for r in group))
    curves = {name: sorted((r for r in group if r.peer == name), key=lambda r: r.case[field]) for name in names}
    for marker, (name, curve) in zip(_MARKERS, _long(curves).items(), strict=False):
        x = [r.case[field] for r in curve]
        ax.plot(x, [r.ms_per_frame for r in curve], marker=marker, markersize=5, color=_color(name), label=name)
        low, high = ([q / r.case["frames"] for q, r in zip(qs, curve, strict=True)] for qs in _band(curve))
        ax.fill_between(x, low, high, color=_color(name), alpha=0.15, linewidth=0)
    _log_axes(ax, values)
    case = Case(**group[0].case)
    ax.set_xlabel(label)
    ax.set_ylabel("ms a frame")
    setting = f"{case.height} x {case.width}, {_PRECISIONS[case.precision]}"
    ax.set_title(f"The depth head's tail, {setting} ({_machine(group[0])})")
    ax.legend(frameon=False, fontsize=8)
    return figure


def _long(curves: dict[str, list[Record]]) -> dict[str, list[Record]]:
    return {name: curve for name, curve in curves.items() if len(curve) > 2}


def _band(curve: Sequence[Record]) -> tuple[list[float], list[float]]:
    return [r.p20_ms for r in curve], [r.p80_ms for r in curve]


def _log_axes(ax: Axes, values: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_locator(FixedLocator(list(values)))
    ax.xaxis.set_minor_locator(NullLocator())
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(plain)
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: f"{v:g}" if f"{v:.0e}"[0] in "25" else ""))
    ax.grid(which="major", color="#e5e8eb")


def roofline(records: Sequence[Record]) -> Figure | None:
    """Executed operations per second against operations per byte, under the measured ceilings.

    Plain PyTorch (and the reference backend, which is that) moves what it writes down step by step; the other backends
    are drawn at the least bytes.
    """
    group = _largest(records, 8) or _largest(records, 1)
    if not group:
        return None
    case, ceilings = Case(**group[0].case), group[0].run["ceilings"]
    peak, bandwidth = ceilings["matrix_flops_per_s"][case.precision] / 1e9, ceilings["copy_bytes_per_s"] / 1e9
    figure, ax = plt.subplots(figsize=(8.4, 4.2), layout="constrained")
    points = {r.peer: (2 * r.roof["matrix_macs"] / _moved(case, r), r.roof["gflops"]) for r in group}
    left, right = 0.5 * min(x for x, _ in points.values()), 2 * max(x for x, _ in points.values())
    left = min(left, peak / bandwidth / 2)
    ax.plot([left, peak / bandwidth, right], [left * bandwidth, peak, peak], color="#444444", linewidth=1.2)
    ax.annotate(
        f"matrix product {peak:.0f} GFLOP/s", (right, peak), xytext=(0, 5), textcoords="offset points", ha="right"
    )
    ax.annotate(
        f"copy {bandwidth:.1f} GB/s", (left, left * bandwidth), xytext=(6, 0), textcoords="offset points", va="top"
    )
    for marker, (name, (x, y)) in zip(_MARKERS * 2, points.items(), strict=False):
        ax.scatter(
            x, y, s=42, marker=marker, color=_color(name), edgecolor="white", linewidth=0.6, label=name, zorder=3
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.grid(color="#e5e8eb")
    ax.set_xlabel("executed operations per byte moved")
    ax.set_ylabel("executed GFLOP/s")
    ax.set_title(f"Roofline of the tail, {_where(case)} ({_machine(group[0])})")
    figure.legend(frameon=False, fontsize=8, loc="outside right center")
    return figure


def _moved(case: Case, record: Record) -> int:
    if record.peer.split(",")[0] in moe3d.backends() and record.peer != "reference":
        return record.roof["bytes"]
    count = eager_bytes_by_expert if record.peer in (BY_EXPERT, BY_EXPERT_CACHED) else eager_bytes
    rebuilt = embedding_bytes(case) if record.peer in (STOCK, BY_EXPERT) else 0
    return count(peers()[record.peer].of(case)) + rebuilt


PLOTS = {"ratios": ratios, "experts": experts, "frames": frames, "roofline": roofline}


def draw(records: Sequence[Record], out: Path) -> list[Path]:
    """Every plot for which there are results, of every device; the files written."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    with plt.rc_context(_STYLE):
        for device in sorted({r.run["device"] for r in records}):
            chosen = newest(r for r in records if r.run["device"] == device)
            for name, plot in PLOTS.items():
                figure = plot(chosen)
                if figure is None:
                    print(f"{device}: no results for {name} (python -m pytest bench --full has them all)")
                    continue
                written.append(out / f"{device}-{name}.svg")
                figure.savefig(written[-1], bbox_inches="tight", metadata={"Date": None})
                plt.close(figure)
    return written


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description="Draw the benchmark results.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="results (default: all in bench/results)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    files = args.files or [*RESULTS.glob("*.jsonl"), *(RESULTS / "gpu").glob("*.json")]
    records = load(files)
    if not records:
        parser.error("there are no results to draw: run make bench first")
    for path in draw(records, args.out):
        print(path)


if __name__ == "__main__":
    main()
