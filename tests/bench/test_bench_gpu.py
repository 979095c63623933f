"""``make gpu`` without a GPU: the dry run, the bookkeeping, and the checks themselves on the CPU."""

from __future__ import annotations

import json
import subprocess

import pytest

import moe3d
from bench.gpu import __main__ as command
from bench.gpu import calls
from bench.gpu.stages import STAGES, Context, Item, Skip, Stage, source_digest
from bench.gpu.state import FAILED, PASSED, RUNNING, SKIPPED, State
from bench.gpu.worker import work
from moe3d.benchmark.case import Case
from moe3d.ops import dispatch, native_cuda
from moe3d.ops.reference import ReferenceBackend


@pytest.mark.parametrize("asked", [False, True])
def test_the_dry_run_says_what_it_skips_and_why(asked, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: asked)
    assert command.main(["--out", str(tmp_path), *(["--dry-run"] if asked else [])]) == 0
    text = capsys.readouterr().out
    reason = "a dry run was asked for" if asked else "PyTorch finds no CUDA device here"
    assert f"dry run, because {reason}; skipped:" in text
    for name, stage in STAGES.items():
        assert f"  {name} (at most" in text and stage.about in text
    for name, why in moe3d.backends().items():
        assert f"  {name}: {why or 'can run'}" in text
    assert not list(tmp_path.iterdir())


def test_the_first_three_stages_fit_in_eight_minutes():
    assert list(STAGES)[:4] == ["build", "right", "fast", "tune"]
    assert sum(STAGES[name].limit_s for name in ("build", "right", "fast")) <= 8 * 60


def test_an_unknown_stage_is_wrong_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["paint"])
    assert "STAGE must be one of build, right, fast" in capsys.readouterr().err


def test_every_stage_says_why_a_backend_is_skipped(monkeypatch):
    """On a machine whose only backend is the reference, every item of the stages that need another one skips."""
    monkeypatch.setattr("moe3d.backends", lambda: {"triton": "there is no GPU", "reference": None})
    context = Context("cpu")
    for name in ("right", "tune", "sanitizers", "determinism", "graphs", "streams", "devices", "large"):
        (item,) = STAGES[name].items(context)
        with pytest.raises(Skip, match="there is no GPU"):
            item.run()


def test_both_formulations_of_the_cuda_backend_are_raced(monkeypatch):
    """Each is asked for while it is judged, and no longer."""
    asked = []

    def judged(case, backend):
        asked.append((native_cuda.formulation(), backend))
        return {}

    monkeypatch.setattr("bench.gpu.calls.accuracy", judged)
    monkeypatch.setattr("moe3d.benchmark.suites.RACES", {"tail": type("Race", (), {"run": lambda *_: {}})()})
    context = Context("cpu")
    monkeypatch.setattr(context, "backends", {"cuda": None}, raising=False)
    for item in STAGES["tune"].items(context):
        assert item.run() == {"errors": {}, "times_ms": {}}
    assert set(asked) == {("low-resolution", "cuda"), ("direct", "cuda")} and native_cuda.formulation() == "auto"


def test_a_backend_that_refuses_the_device_is_skipped_with_its_reason(monkeypatch):
    class OnlyElsewhere(ReferenceBackend):
        def unsupported(self, tensors, options):
            return "x is on the wrong device"

    monkeypatch.setitem(dispatch._REGISTRY, "cuda", OnlyElsewhere())
    monkeypatch.setitem(dispatch._REGISTRY, "cpu", ReferenceBackend())
    backends = Context("cpu").backends
    assert backends["cuda"] == "x is on the wrong device" and backends["cpu"] is None and "reference" not in backends
    names = [item.name for item in STAGES["right"].items(Context("cpu"))]
    assert "cuda" in names and "cpu 518x518-1f-K4-ieee" in names and "cpu op.md's matrix" in names


def test_accuracy_and_determinism_of_a_right_backend(monkeypatch):
    monkeypatch.setitem(dispatch._REGISTRY, "cpu", ReferenceBackend())
    errors = calls.accuracy(Case(1, 28, 42, experts=2), "cpu")
    assert errors["tail"]["rms"] < 1e-5 and set(errors) == {"tail", "decoder training"}
    assert calls.determinism("cpu", "cpu", ["ieee"], runs=3, size=(28, 28))["runs"] == 3


def test_a_wrong_backend_fails_the_right_stage(wrong_backend):
    with pytest.raises(RuntimeError, match="tail: wrong: relative RMS error"):
        calls.accuracy(Case(1, 28, 42, experts=2), wrong_backend)


def test_a_moving_result_fails_the_determinism_stage(monkeypatch):
    class Moving(ReferenceBackend):
        scale = 1.0

        def forward(self, tensors, options):
            self.scale += 1e-6
            output = super().forward(tensors, options)
            return output._replace(entropy=output.entropy * self.scale)

    monkeypatch.setitem(dispatch._REGISTRY, "cpu", Moving())
    with pytest.raises(RuntimeError, match="ieee: run 1 differs from the first in 1 of"):
        calls.determinism("cpu", "cpu", ["ieee"], runs=3, size=(28, 28))


def broken() -> dict:
    raise ValueError("sparks")


def absent() -> dict:
    raise Skip("no second GPU")


def test_a_worker_writes_every_result_at_once(tmp_path):
    state = State(tmp_path / "state.json")
    seen = []

    def look() -> dict:
        seen.append(State(state.path).entries("fast"))
        return {"records": [{"peer": "cuda"}]}

    work(state, "fast", [Item("a", broken), Item("b", absent), Item("c", look)], attempt="1")
    assert seen[0]["a"]["status"] == FAILED and seen[0]["c"]["status"] == RUNNING
    entries = State(state.path).entries("fast")
    assert entries["a"]["reason"] == "ValueError: sparks" and "broken" in entries["a"]["traceback"]
    assert entries["b"]["status"] == SKIPPED and entries["b"]["reason"] == "no second GPU"
    assert entries["c"]["status"] == PASSED
    assert list(State(state.path).benchmark_records()) == [{"peer": "cuda"}]


def test_a_second_run_repeats_only_what_failed(tmp_path):
    state, runs = State(tmp_path / "state.json"), []
    items = [Item("good", lambda: runs.append("good")), Item("bad", broken), Item("absent", absent)]
    for attempt in ("1", "1", "2"):
        work(State(state.path), "right", items, attempt)
    assert runs == ["good"]
    assert State(state.path).entry("right", "bad")["attempt"] == "2"
    assert State(state.path).entry("right", "absent")["attempt"] == "1"


def test_a_crash_costs_one_item(tmp_path, monkeypatch):
    """The worker dies in its second item, is started again, and goes on with the third."""
    path = tmp_path / "state.json"
    State(path).save()

    def worker(path, name, limit_s, attempt):
        state = State(path)
        if state.entry(name, "one") is None:
            state.record(name, "one", status=PASSED, seconds=1.0, attempt=attempt)
            state.record(name, "two", status=RUNNING, attempt=attempt)
            return "the process ended with code -11"
        state.record(name, "three", status=PASSED, seconds=1.0, attempt=attempt)
        return None

    monkeypatch.setattr(command, "_run_worker", worker)
    command.run_stage(path, "right", limit_s=60, attempt="1")
    entries = State(path).entries("right")
    assert [entries[n]["status"] for n in ("one", "two", "three")] == [PASSED, FAILED, PASSED]
    assert entries["two"]["reason"] == "the process ended with code -11"
    text = command.report(State(path), {"right": STAGES["right"]})
    assert "2 passed, 1 failed" in text and "failed: two: the process ended with code -11" in text


def test_a_worker_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(command.sys, "executable", "/bin/sleep")
    popen = subprocess.Popen
    monkeypatch.setattr(command.subprocess, "Popen", lambda args, **options: popen([args[0], "60"], **options))
    assert command._run_worker(tmp_path / "state.json", "right", 1, "1") == "ran past the stage's 1 s"


def test_results_of_other_sources_are_not_taken_up(tmp_path, monkeypatch):
    digest = source_digest()
    assert digest == source_digest() and len(digest) == 12
    for folder in ("moe3d", "kernels"):
        (tmp_path / folder).mkdir()
    (tmp_path / "moe3d" / "a.py").write_text("1")
    monkeypatch.setattr("bench.gpu.stages.ROOT", tmp_path)
    first = source_digest()
    (tmp_path / "moe3d" / "a.py").write_text("2")
    assert len({digest, first, source_digest()}) == 3


def test_all_stages_in_order_with_time_running_out(tmp_path, monkeypatch, capsys):
    ran = []
    stages = {name: Stage(name, 60, lambda context: []) for name in ("build", "right")}
    monkeypatch.setattr(command, "STAGES", stages)
    monkeypatch.setattr(command, "why_dry_run", lambda asked: None)
    monkeypatch.setattr(command, "run_stage", lambda path, name, limit, attempt: ran.append(name))
    assert command.main(["--out", str(tmp_path), "--commit", "abc"]) == 0
    assert ran == ["build", "right"]
    (written,) = tmp_path.glob("*.json")
    assert json.loads(written.read_text())["commit"] == "abc"
    command.main(["--out", str(tmp_path), "--minutes", "0"])
    assert ran == ["build", "right"] and "not started, the 0 minutes are over" in capsys.readouterr().out
