"""Results as JSON lines: one line per contestant and case, complete in itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moe3d.benchmark import peers as tail_peers
from moe3d.benchmark.case import Case
from moe3d.benchmark.peers import BY_EXPERT, COMPILED, CONCATENATED, STOCK, STOCK_CACHED
from moe3d.benchmark.race import Outcome
from moe3d.benchmark.roofline import Ceilings, tail_work
from moe3d.benchmark.sharpening import IN_PYTORCH
from moe3d.benchmark.statistics import Ratio, quantiles, ratio_of_medians

SCHEMA = 1
BASELINES = (STOCK, STOCK_CACHED, BY_EXPERT, CONCATENATED, COMPILED, IN_PYTORCH)


@dataclass(frozen=True)
class Roof:
    """A time beside what the machine can do.

    Attributes:
        formulation: what was counted, see :func:`~moe3d.benchmark.roofline.tail_work`.
        matrix_macs, vector_macs, bytes: executed multiply-adds and least bytes of a call.
        fraction: of the ceiling, from the floor under the time that the larger of arithmetic and memory gives.
        bound: which one that is.
        gflops: executed, per second.
        direct_gflops: as if the direct formulation had been executed.
    """

    formulation: str
    matrix_macs: int
    vector_macs: int
    bytes: int
    fraction: float
    bound: str
    gflops: float
    direct_gflops: float


@dataclass(frozen=True)
class Record:
    """One result. Times are in milliseconds per call (of ``case["frames"]`` frames), medians of interleaved rounds.

    Attributes:
        suite: a name in :data:`moe3d.benchmark.suites.RACES`, "latency", or one of its MEMORY_SUITES.
        peer: who.
        case: the fields of :class:`~moe3d.benchmark.case.Case`.
        run: the fields of :func:`moe3d.benchmark.machine.describe`, and "ceilings".
        ratios: {baseline: [ratio, low, high]} of this peer's time over the baseline's; :func:`~.statistics.spread`
            says what the bounds are.
        rms_error, worst_error: against the float64 truth, relative.
        peak_bytes: of the memory suites.
        first_call_ms: {"cold": ..., "warm": ...} of the latency suite.
    """

    suite: str
    peer: str
    case: dict
    run: dict
    rounds: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    ratios: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    rms_error: float | None = None
    worst_error: float | None = None
    roof: dict | None = None
    peak_bytes: int | None = None
    first_call_ms: dict[str, float] | None = None
    schema: int = SCHEMA

    def ratio(self, baseline: str) -> Ratio | None:
        return Ratio(*self.ratios[baseline]) if baseline in self.ratios else None

    @property
    def ms_per_frame(self) -> float:
        return self.p50_ms / self.case["frames"]


def records_of(
    suite: str, case: Case, outcomes: Mapping[str, Outcome], run: dict, ceilings: Ceilings | None = None
) -> list[Record]:
    """Records of a race: only of contestants that were right and ran. With ceilings, the tail's also get a ``roof``."""
    timed = {name: outcome for name, outcome in outcomes.items() if outcome.times}
    return [_record(suite, case, name, timed, run, ceilings if suite == "tail" else None) for name in timed]


def _record(
    suite: str, case: Case, name: str, timed: Mapping[str, Outcome], run: dict, ceilings: Ceilings | None
) -> Record:
    outcome = timed[name]
    p20, p50, p80 = quantiles(outcome.times)
    ratios = {b: list(ratio_of_medians(outcome.times, timed[b].times)) for b in BASELINES if b in timed and b != name}
    return Record(
        suite=suite,
        peer=name,
        case=case.asdict(),
        run=run,
        rounds=len(outcome.times),
        p20_ms=1e3 * p20,
        p50_ms=1e3 * p50,
        p80_ms=1e3 * p80,
        ratios=ratios,
        rms_error=outcome.error and outcome.error.rms,
        worst_error=outcome.error and outcome.error.worst,
        roof=None if ceilings is None else dataclasses.asdict(_roof(case, name, p50, ceilings)),
    )


def _roof(case: Case, name: str, seconds: float, ceilings: Ceilings) -> Roof:
    peer = tail_peers.peers()[name]
    own = peer.of(case)
    formulation = peer.formulation(own)
    work = tail_work(own, formulation)
    floor, bound = ceilings.floor_s(work, case.precision)
    executed, direct = (2 * w.matrix_macs / seconds / 1e9 for w in (work, tail_work(own)))
    return Roof(
        formulation=formulation,
        matrix_macs=work.matrix_macs,
        vector_macs=work.vector_macs,
        bytes=work.bytes,
        fraction=floor / seconds,
        bound=bound,
        gflops=executed,
        direct_gflops=direct,
    )


def append_jsonl(path: Path, records: Iterable[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(dataclasses.asdict(r), allow_nan=False) + "\n" for r in records)


def read_jsonl(path: Path) -> list[Record]:
    """The records of a file.

    Raises:
        ValueError: a line is not a record of this schema; the message names the line.
    """
    lines = path.read_text("utf-8").splitlines()
    return [_parse(path, number, line) for number, line in enumerate(lines, start=1)]


def _parse(path: Path, number: int, line: str) -> Record:
    try:
        fields = json.loads(line)
        if fields["schema"] != SCHEMA:
            raise ValueError(f"schema {fields['schema']}, expected {SCHEMA}")
        record = Record(**fields)
        Case(**record.case)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}:{number} is not a benchmark record: {error}") from None
    return record
