"""Records as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from moe3d.benchmark.case import Case
from moe3d.benchmark.peers import CONCATENATED, STOCK, STOCK_CACHED
from moe3d.benchmark.records import Record
from moe3d.benchmark.roofline import (
    PAPER_GFLOPS_PERCENT,
    PAPER_PARAMETERS_PERCENT,
    PAPER_TIME_PERCENT,
    counted_overhead,
)
from moe3d.benchmark.sharpening import IN_PYTORCH
from moe3d.benchmark.statistics import spread
from moe3d.benchmark.suites import MEMORY_SUITES, RACES

_OVERHEAD_SUITES = ("head", "mini", "vggt")


def summary(records: Sequence[Record]) -> str:
    """Everything that a run has to say: a table for each case, the overhead beside the paper's, and the machine."""
    parts = [times(group) for group in _by_case(records, tuple(RACES))]
    parts += [memory(group) for group in _by_case(records, tuple(MEMORY_SUITES.values()))]
    parts += [latency(group) for group in _by_case(records, ("latency",))]
    parts.append(overhead(records))
    if records:
        parts.append(machine(records[-1].run))
    return "\n\n".join(parts)


def _by_case(records: Iterable[Record], suites: Sequence[str]) -> list[list[Record]]:
    """Groups of one suite and case, in the suites' order and then in that of the records."""
    groups: dict[tuple, list[Record]] = {}
    for record in sorted((r for r in records if r.suite in suites), key=lambda r: suites.index(r.suite)):
        groups.setdefault((record.suite, *record.case.items()), []).append(record)
    return list(groups.values())


def times(records: Sequence[Record]) -> str:
    """One case: milliseconds per frame, time over the baselines', and the fraction of the ceiling."""
    case = Case(**records[0].case)
    columns: list[tuple[str, Callable[[Record], str]]] = [
        ("", lambda r: r.peer),
        ("ms/frame", lambda r: milliseconds(r.ms_per_frame)),
        ("p20..p80", lambda r: f"{milliseconds(r.p20_ms / case.frames)}..{milliseconds(r.p80_ms / case.frames)}"),
        ("x stock", lambda r: _ratio(r, STOCK)),
        ("x cached stock", lambda r: _ratio(r, STOCK_CACHED)),
        ("x eager", lambda r: _ratio(r, CONCATENATED)),
        ("x PyTorch", lambda r: _ratio(r, IN_PYTORCH)),
        ("error", lambda r: f"{r.rms_error:.0e}"),
        ("GFLOP/s", lambda r: f"{r.roof['gflops']:.0f}" if r.roof else ""),
        ("direct GFLOP/s", _direct_rate),
        ("of ceiling", lambda r: f"{100 * r.roof['fraction']:.0f}% {r.roof['bound']}" if r.roof else ""),
    ]
    title = (
        f"{RACES[records[0].suite].about}\n"
        f"{case.height}x{case.width}, {_frames(case.frames)} a call, K = {case.experts}, {case.precision}, "
        f"{records[0].rounds} interleaved rounds; time over the baseline's ({spread(records[0].rounds)})"
    )
    return f"{title}\n{_table(columns, records)}"


def memory(records: Sequence[Record]) -> str:
    case = Case(**records[0].case)
    columns = [("", lambda r: r.peer), ("peak MiB", lambda r: f"{r.peak_bytes / 2**20:.0f}" if r.peak_bytes else "")]
    about = next(RACES[race].about for race, suite in MEMORY_SUITES.items() if suite == records[0].suite)
    title = f"peak memory beyond the inputs of {about}, {case.height}x{case.width}, {_frames(case.frames)}"
    return f"{title}\n{_table(columns, records)}"


def latency(records: Sequence[Record]) -> str:
    case = Case(**records[0].case)
    columns = [
        ("", lambda r: r.peer),
        ("first, cold ms", lambda r: milliseconds(r.first_call_ms["cold"]) if r.first_call_ms else ""),
        ("first, warm ms", lambda r: milliseconds(r.first_call_ms["warm"]) if r.first_call_ms else ""),
        ("second ms", lambda r: milliseconds(r.p50_ms)),
    ]
    title = f"first call of the tail in a fresh process, {case.height}x{case.width}, {_frames(case.frames)}"
    return f"{title}; cold: empty compilation caches\n{_table(columns, records)}"


def overhead(records: Sequence[Record]) -> str:
    """What the mixture costs end to end, measured and counted, beside the paper's figures."""
    lines = [f"overhead of the mixture, MoE over single head (the paper: about +{PAPER_TIME_PERCENT:.0f}% time)"]
    measured = [r for r in records if r.suite in _OVERHEAD_SUITES and not r.peer.startswith(STOCK)]
    for group in _by_case(measured, _OVERHEAD_SUITES):
        case = Case(**group[0].case)
        lines.append(
            f"  {RACES[group[0].suite].about}; {case.height}x{case.width}, {_frames(case.frames)}, {case.precision} "
            f"({spread(group[0].rounds)})"
        )
        columns = [
            ("", lambda r: f"    {r.peer}"),
            ("over stock", lambda r: _percent(r, STOCK)),
            ("over cached stock", lambda r: _percent(r, STOCK_CACHED)),
        ]
        lines.append(_table(columns, group))
    counted = counted_overhead(Case())
    lines.append(
        f"  counted for VGGT at 518x518, K = 4, gate 128: GFLOPs {counted.gflops:+.2f}% (the paper: "
        f"+{PAPER_GFLOPS_PERCENT}%), parameters {counted.parameters:+.2f}% (the paper: +{PAPER_PARAMETERS_PERCENT}%)"
    )
    return "\n".join(lines)


def machine(run: dict) -> str:
    where = (
        run["gpu"]["name"]
        if run["gpu"]
        else f"{run['cpu']}, {run['isa']}, {run['threads']} threads of {run['cores']} cores"
    )
    lines = [
        f"{where}; torch {run['torch']}, triton {run['triton']}, python {run['python']}, "
        f"moe3d {run['moe3d']}{' at ' + run['commit'] if run['commit'] else ''}, {run['date']}"
    ]
    ceilings = run.get("ceilings")
    if ceilings:
        rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in ceilings["matrix_flops_per_s"].items())
        lines.append(f"measured ceilings: copy {ceilings['copy_bytes_per_s'] / 1e9:.1f} GB/s, matrix product {rates}")
    if not run["gpu"] and run["load"] is not None and run["load"] > run["cores"] / 2:
        lines.append(f"the machine was busy when this began (load {run['load']}): measure again when it is quiet")
    return "\n".join(lines)


def _direct_rate(record: Record) -> str:
    """Where it is another than the executed one."""
    roof = record.roof
    return f"{roof['direct_gflops']:.0f}" if roof and roof["formulation"] != "direct" else ""


def milliseconds(value: float) -> str:
    """As text, with three digits that count."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _frames(count: int) -> str:
    return f"{count} frame{'s' if count > 1 else ''}"


def _ratio(record: Record, baseline: str) -> str:
    ratio = record.ratio(baseline)
    return "" if ratio is None else f"{ratio.value:.2f} ({ratio.low:.2f}..{ratio.high:.2f})"


def _percent(record: Record, baseline: str) -> str:
    ratio = record.ratio(baseline)
    if ratio is None:
        return ""
    more = ratio.percent_more
    return f"{more.value:+.1f}% ({more.low:+.1f}..{more.high:+.1f})"


def _table(columns: Sequence[tuple[str, Callable[[Record], str]]], records: Sequence[Record]) -> str:
    """A line for each record; columns that would be empty are left out."""
    columns = [(title, cell) for title, cell in columns if any(cell(r) for r in records)]
    rows = [[title for title, _ in columns], *([cell(r) for _, cell in columns] for r in records)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    )
