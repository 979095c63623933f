"""Results as JSON lines, and as tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.gpu.state import State
from moe3d.benchmark import peers
from moe3d.benchmark.accuracy import Error
from moe3d.benchmark.case import Case
from moe3d.benchmark.machine import describe
from moe3d.benchmark.peers import CONCATENATED, STOCK, STOCK_CACHED
from moe3d.benchmark.race import Outcome
from moe3d.benchmark.records import BASELINES, Record, append_jsonl, read_jsonl, records_of
from moe3d.benchmark.sharpening import IN_PYTORCH
from moe3d.benchmark.tables import milliseconds, summary
from support.results import CEILINGS, made_up_records

RESULTS = Path(__file__).parents[2] / "bench" / "results"
CASE = Case(frames=8, height=154)


@pytest.fixture
def records() -> list[Record]:
    return made_up_records(CASE)


def test_what_a_record_says(records):
    reference = next(r for r in records if r.peer == "reference")
    stock = next(r for r in records if r.peer == STOCK)
    assert reference.rounds == 3 and reference.p20_ms < reference.p50_ms < reference.p80_ms
    assert reference.ms_per_frame == pytest.approx(reference.p50_ms / 8)
    assert reference.ratio(STOCK).value == pytest.approx(reference.p50_ms / stock.p50_ms)
    assert set(reference.ratios) == set(BASELINES) - {IN_PYTORCH} and STOCK not in stock.ratios
    assert reference.rms_error == 1e-6 and reference.worst_error == 1e-5


def test_fractions_of_the_ceiling(records):
    for record in records:
        roof, seconds = record.roof, record.p50_ms / 1e3
        assert roof["gflops"] * 1e9 * seconds == pytest.approx(2 * roof["matrix_macs"])
        floor = max(
            2 * roof["matrix_macs"] / CEILINGS.matrix_flops_per_s["ieee"], roof["bytes"] / CEILINGS.copy_bytes_per_s
        )
        assert roof["fraction"] == pytest.approx(floor / seconds)
    stock, reference = (next(r for r in records if r.peer == name) for name in (STOCK, "reference"))
    assert reference.roof["matrix_macs"] > 7.9 * stock.roof["matrix_macs"]


def test_a_backend_with_another_formulation_is_counted_by_it(monkeypatch):
    monkeypatch.setitem(peers._FORMULATIONS, "reference", lambda case: "low-resolution")
    roof = next(r for r in made_up_records(CASE) if r.peer == "reference").roof
    assert roof["formulation"] == "low-resolution"
    assert roof["direct_gflops"] / roof["gflops"] == pytest.approx(1.75**2, rel=0.01)


def test_no_record_without_times():
    outcomes = {
        "reference": Outcome([0.1], Error(0, 0)),
        "wrong": Outcome(refused="wrong"),
        "cuda": Outcome(skipped="no"),
    }
    assert [r.peer for r in records_of("tail", CASE, outcomes, describe("cpu"))] == ["reference"]


def test_lines_are_appended_and_read_back(records, tmp_path):
    path = tmp_path / "results" / "cpu.jsonl"
    append_jsonl(path, records[:2])
    append_jsonl(path, records[2:])
    assert read_jsonl(path) == records


@pytest.mark.parametrize(
    "change",
    [{"schema": 0}, {"surplus": 1}, {"case": {"frames": 0}}, {"case": {"frame": 1}}, {"suite": None, "schema": None}],
)
def test_a_line_that_is_no_record_is_named(change, records, tmp_path):
    path = tmp_path / "cpu.jsonl"
    append_jsonl(path, records[:1])
    line = json.loads(path.read_text()) | change
    path.write_text(path.read_text() + json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=r"cpu\.jsonl:2 is not a benchmark record"):
        read_jsonl(path)


def test_committed_results_are_records():
    committed = [r for path in RESULTS.glob("*.jsonl") for r in read_jsonl(path)]
    committed += [Record(**r) for path in (RESULTS / "gpu").glob("*.json") for r in State(path).benchmark_records()]
    for record in committed:
        assert {"date", "torch", "commit", "cpu", "threads", "ceilings"} <= set(record.run)
        assert record.run["commit"], "results without a commit prove nothing"


def test_the_machine_describes_itself():
    run = describe("cpu", Path(__file__).parent)
    assert run["device"] == "cpu" and run["gpu"] is None and run["threads"] >= 1 and run["cpu"]
    assert run["date"].endswith("+00:00") and run["torch"] and run["python"]
    assert json.loads(json.dumps(run)) == run
    assert describe("cpu", Path("/"))["commit"] is None


def test_the_summary_shows_ratios_overhead_and_the_papers_figures(records):
    mini = made_up_records(Case(height=154, channels=32), suite="mini")
    text = summary(records + mini)
    assert text.index("the tail: fused features to depth") < text.index("the whole MiniVGGT")
    assert "154x518, 8 frames a call, K = 4, ieee, 3 interleaved rounds; time over the baseline's (range of 3" in text
    row = next(line for line in text.splitlines() if line.startswith("reference"))
    ratio = next(r for r in records if r.peer == "reference").ratio(STOCK)
    assert f"{ratio.value:.2f} ({ratio.low:.2f}..{ratio.high:.2f})" in row
    overhead = text[text.index("overhead of the mixture") :]
    assert "8 frames" not in overhead and "1 frame, ieee (range of 3 rounds)" in overhead and "95%" not in text
    many = summary(made_up_records(CASE, rounds=6))
    assert "6 interleaved rounds; time over the baseline's (95% interval)" in many and "range" not in many
    assert f"{next(r for r in mini if r.peer == CONCATENATED).ratio(STOCK_CACHED).percent_more.value:+.1f}%" in overhead
    assert "GFLOPs +4.97% (the paper: +4.97%), parameters +0.79% (the paper: +0.79%)" in overhead


def test_memory_and_first_calls_have_tables(records):
    memory = replace(records[0], suite="memory", peak_bytes=300 << 20)
    latency = replace(records[0], suite="latency", first_call_ms={"cold": 4200.0, "warm": 27.3})
    lines = summary([memory, latency]).splitlines()
    assert any(line.split()[-1] == "300" for line in lines)
    assert any("4200" in line and "27.3" in line for line in lines)


def test_a_busy_machine_is_said(records):
    busy = [replace(r, run={**r.run, "load": 7.0, "cores": 2}) for r in records]
    quiet = [replace(r, run={**r.run, "load": 0.1, "cores": 2}) for r in records]
    assert "the machine was busy" in summary(busy) and "the machine was busy" not in summary(quiet)


@pytest.mark.parametrize("value, text", [(1072.4, "1072"), (456.12, "456"), (45.61, "45.6"), (0.08123, "0.0812")])
def test_three_digits(value, text):
    assert milliseconds(value) == text
