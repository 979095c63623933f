"""The plots, from made-up results."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from bench import plot
from moe3d.benchmark.case import Case
from moe3d.benchmark.records import append_jsonl
from support.results import made_up_records

CASES = [Case(), *(Case(frames, 154) for frames in (1, 2, 8)), *(Case(experts=k) for k in (1, 2, 8))]


@pytest.fixture(scope="module")
def records():
    return [record for case in CASES for record in made_up_records(case)]


def test_all_plots_are_drawn(records, tmp_path):
    append_jsonl(tmp_path / "cpu.jsonl", records)
    plot.main([str(tmp_path / "cpu.jsonl"), "--out", str(tmp_path / "plots")])
    written = sorted((tmp_path / "plots").iterdir())
    assert [p.name for p in written] == ["cpu-experts.svg", "cpu-frames.svg", "cpu-ratios.svg", "cpu-roofline.svg"]
    for path in written:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_equal_results_give_equal_files(records, tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "PLOTS", {"experts": plot.experts})
    one, two = (plot.draw(records, tmp_path / name)[0].read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_plot_without_results_is_left_out_and_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plot, "PLOTS", {"experts": plot.experts, "frames": plot.frames})
    assert plot.draw(made_up_records(Case()), tmp_path) == []
    assert "no results for experts" in capsys.readouterr().out


def test_the_newest_result_of_the_machine_measured_last_counts(records):
    old = replace(records[0], p50_ms=1.0, run={**records[0].run, "date": "2020-01-01T00:00:00+00:00"})
    elsewhere = replace(old, run={**old.run, "cpu": "another"}, peer="nobody else")
    chosen = plot.newest(sorted([*records, old, elsewhere], key=lambda r: r.run["date"]))
    assert sorted(map(repr, chosen)) == sorted(map(repr, records))


def test_the_headline_is_the_race_with_most_contestants(records):
    group = plot._largest(records, 8)
    assert {(r.case["frames"], r.case["experts"]) for r in group} == {(8, 4)}


def test_nothing_to_draw_is_an_error(tmp_path, capsys):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(SystemExit, match="2"):
        plot.main([str(tmp_path / "empty.jsonl")])
    assert "no results to draw" in capsys.readouterr().err
