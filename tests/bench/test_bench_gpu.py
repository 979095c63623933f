"""``make gpu`` without a GPU: the dry run, the bookkeeping, and the checks themselves on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

import moe3d
from bench.gpu import __main__ as command
from bench.gpu import calls, stages
from bench.gpu.stages import ROOT, STAGES, Context, Item, Skip, Stage, source_digest
from bench.gpu.state import FAILED, PASSED, RUNNING, SKIPPED, State
from bench.gpu.worker import DEVICE_LOST, work
from moe3d.benchmark.case import PRECISIONS, Case
from moe3d.ops import dispatch, native_cuda
from moe3d.ops.reference import ReferenceBackend

RUNS = {"status": PASSED}


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


def test_the_most_valuable_stages_come_first_and_fit_in_the_time_for_which_a_gpu_is_lent():
    names = ["build", "probe", "right", "fast", "tune", "tuned", "matrix"]
    assert list(STAGES)[: len(names)] == names
    assert sum(STAGES[name].limit_s for name in names[:4]) <= 8 * 60
    assert sum(STAGES[name].limit_s for name in names) <= 14 * 60
    assert all(stage.item_s <= stage.limit_s for stage in STAGES.values())


def test_an_unknown_stage_is_wrong_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["paint"])
    assert "STAGE must be one of build, probe, right, fast" in capsys.readouterr().err


def test_every_stage_says_why_a_backend_is_skipped(monkeypatch):
    """On a machine whose only backend is the reference, every item of the stages that need another one skips."""
    monkeypatch.setattr("moe3d.backends", lambda: {"triton": "there is no GPU", "reference": None})
    (probe,) = STAGES["probe"].items(Context("cpu"))
    with pytest.raises(Skip, match="there is no GPU") as skipped:
        probe.run()
    for status, error in ((SKIPPED, Skip), (FAILED, RuntimeError)):
        context = Context("cpu", probes={"triton": {"status": status, "reason": str(skipped.value), "attempt": "1"}})
        for name in ("right", "tune", "tuned", "matrix", "sanitizers", "determinism", "graphs", "large"):
            (item,) = STAGES[name].items(context)
            with pytest.raises(error, match="there is no GPU"):
                item.run()


def test_what_a_backend_raises_in_its_probe_costs_no_other(monkeypatch, tmp_path):
    class Broken(ReferenceBackend):
        def forward(self, tensors, options):
            raise SyntaxError("Triton's errors are of all kinds")

    monkeypatch.setitem(dispatch._REGISTRY, "triton", Broken())
    monkeypatch.setitem(dispatch._REGISTRY, "cuda", ReferenceBackend())
    state = State(tmp_path / "state.json")
    work(state, "probe", STAGES["probe"].items(Context("cpu")), attempt="1")
    context = Context("cpu", probes=state.entries("probe"))
    assert state.entry("probe", "triton")["status"] == FAILED and context.runs("cuda") and not context.runs("triton")
    names = [item.name for item in STAGES["right"].items(context)]
    assert "triton" in names and "cuda 518x518-1f-K4-bf16" in names
    assert context.racing(["stock", "triton", "cuda"]) == ["stock", "cuda"]


def test_backends_take_turns_and_the_fastest_precision_is_first():
    names = [item.name for item in STAGES["right"].items(Context("cpu", probes={"triton": RUNS, "cuda": RUNS}))]
    assert names[:4] == [
        "triton compiles",
        "cuda 518x518-1f-K4-bf16",
        "triton 518x518-1f-K4-bf16",
        "cuda 518x518-1f-K4-tf32",
    ]
    assert len(names) == 2 * 15 + 1


def test_what_is_compiled_in_advance_are_the_cases(monkeypatch):
    seen = []
    monkeypatch.setattr(stages, "_command", lambda command: seen.append(Case(**json.loads(command[-1]))))
    stages._compile("cpu", "triton")
    assert set(seen) == set(stages._right_cases("cpu"))
    argv = ["calls", "reference", "--device", "cpu", "--case", json.dumps(Case(1, 28, 28, experts=2).asdict())]
    monkeypatch.setattr(sys, "argv", argv)
    made = []
    monkeypatch.setattr(calls.Call, "forward", lambda self: made.append(self.case))
    calls.main()
    assert made == [Case(1, 28, 28, experts=2)]


@pytest.mark.parametrize("found", [None, "xdist"])
def test_the_matrix_runs_on_all_cores_where_it_can(monkeypatch, found):
    commands = []

    def run(command, env, **_):
        commands.append((command, env))
        xml = next(part.split("=")[1] for part in command if part.startswith("--junitxml"))
        with open(xml, "w") as file:
            file.write('<a><testsuite tests="2" failures="0" errors="0" skipped="1"/></a>')

    monkeypatch.setattr(stages.subprocess, "run", run)
    monkeypatch.setattr(stages.importlib.util, "find_spec", lambda name: found)
    (item,) = STAGES["matrix"].items(Context("cuda", probes={"cuda": RUNS}))
    assert item.run() == {"tests": 2, "failures": 0, "errors": 0, "skipped": 1}
    ((command, environment),) = commands
    assert command[-3:] == ["tests/ops", "-k", "cuda-cuda"]
    assert ("-n" in command) == (found is not None)
    if found:
        assert command[command.index("-n") + 1] == str(os.cpu_count()) and environment["OMP_NUM_THREADS"] == "1"


def test_each_entry_that_is_tuned_is_an_item_and_the_tuned_table_is_measured(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setenv("MOE3D_CACHE", str(tmp_path))
    monkeypatch.setattr("moe3d.benchmark.tuning.precisions", lambda device: PRECISIONS)
    context = Context("cpu", probes={"triton": RUNS, "cuda": RUNS})
    tuned = [item.name for item in STAGES["tune"].items(context) if item.name.startswith("triton")]
    assert tuned == [f"triton 518x518-8f-K{k}-{p}" for p in ("bf16", "tf32", "ieee") for k in (4, 1)]

    def names():
        return {name: [item.name for item in STAGES[name].items(context)] for name in ("fast", "tuned")}

    untuned = names()
    assert untuned["tuned"] == ["triton", "cuda"]
    (tmp_path / "triton.json").write_text("{}")
    first = names()
    (tmp_path / "triton.json").write_text("{ }")
    second = names()
    for one, other in ((untuned, first), (first, second)):
        assert not set(one["fast"]) & set(other["fast"])
    assert first["tuned"][0].startswith("triton 518x518-8f-K4-bf16, table ") and first["tuned"] != second["tuned"]


def test_both_formulations_of_the_cuda_backend_are_raced(monkeypatch):
    """Each is asked for while it is judged, and no longer."""
    asked = []

    def judged(case, backend):
        asked.append((native_cuda.formulation(), backend))
        return {}

    monkeypatch.setattr("bench.gpu.calls.accuracy", judged)
    monkeypatch.setattr("moe3d.benchmark.suites.RACES", {"tail": type("Race", (), {"run": lambda *_: {}})()})
    for item in STAGES["tune"].items(Context("cpu", probes={"cuda": RUNS})):
        assert item.run() == {"errors": {}, "times_ms": {}}
    assert set(asked) == {("low-resolution", "cuda"), ("direct", "cuda")} and native_cuda.formulation() == "auto"


def test_a_backend_that_refuses_the_device_is_skipped_with_its_reason(monkeypatch):
    class OnlyElsewhere(ReferenceBackend):
        def unsupported(self, tensors, options):
            return "x is on the wrong device"

    monkeypatch.setitem(dispatch._REGISTRY, "cuda", OnlyElsewhere())
    monkeypatch.setitem(dispatch._REGISTRY, "cpu", ReferenceBackend())
    probes = {item.name: item.run for item in STAGES["probe"].items(Context("cpu"))}
    with pytest.raises(Skip, match="x is on the wrong device"):
        probes["cuda"]()
    assert probes["cpu"]() is None and "reference" not in probes


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


def test_a_fault_that_stays_on_the_gpu_costs_one_item(tmp_path, monkeypatch):
    """Every later call fails with it: the process ends and another one goes on, whatever the item says of it."""
    faults = []

    def synchronize():
        if faults:
            raise RuntimeError("an illegal memory access")

    class Ended(BaseException):
        pass

    def leave(code):
        faults.clear()
        raise Ended(code)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(os, "_exit", leave)

    def fails():
        faults.append(1)
        return broken()

    path = tmp_path / "state.json"
    items = [Item("fails", fails), Item("hides it", lambda: faults.append(1) or {}), Item("good", lambda: {})]

    def worker(path, name, limit_s, attempt):
        try:
            work(State(path), name, items, attempt)
        except Ended as end:
            assert end.args == (DEVICE_LOST,)
            return command.LOST
        return None

    monkeypatch.setattr(command, "_run_worker", worker)
    command.run_stage(path, "right", limit_s=60, attempt="1")
    entries = State(path).entries("right")
    assert [entries[item.name]["status"] for item in items] == [FAILED, FAILED, PASSED] and len(entries) == 3
    assert entries["fails"]["reason"] == "ValueError: sparks"
    assert entries["hides it"]["reason"] == "it left the GPU with RuntimeError: an illegal memory access"


def test_how_a_worker_ended_is_told(tmp_path, monkeypatch):
    """And what it has started ends with it."""
    popen = subprocess.Popen
    for script, told in (
        ("pass", None),
        (f"raise SystemExit({DEVICE_LOST})", command.LOST),
        ("import os; os.kill(os.getpid(), 11)", "the process ended with code -11"),
        ("import signal, time; signal.setitimer(signal.ITIMER_REAL, .1); time.sleep(9)", "ran past its 60 s"),
    ):
        run = textwrap.dedent(script)
        monkeypatch.setattr(command.subprocess, "Popen", lambda _, r=run, **o: popen([sys.executable, "-c", r], **o))
        assert command._run_worker(tmp_path / "state.json", "right", 30, "1") == told
    child = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, file=open(sys.argv[1], 'w'))"
    pid = tmp_path / "pid"
    monkeypatch.setattr(command.subprocess, "Popen", lambda _, **o: popen([sys.executable, "-c", child, str(pid)], **o))
    assert command._run_worker(tmp_path / "state.json", "right", 30, "1") is None
    stat = f"/proc/{pid.read_text().strip()}/stat"
    deadline = time.monotonic() + 10
    while os.path.exists(stat) and open(stat).read().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(stat) or open(stat).read().split()[2] == "Z"


def test_an_item_that_hangs_ends_its_process_and_no_other_item(tmp_path):
    script = f"""
        import sys, time
        import torch  # takes seconds, and the worker does it in the first item
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from bench.gpu.stages import Item
        from bench.gpu.state import State
        from bench.gpu.worker import work
        items = [Item("quick", dict), Item("hangs", lambda: time.sleep(60)), Item("never", dict)]
        work(State(Path(sys.argv[1])), "probe", items, "1", item_s=1.5)
    """
    path = tmp_path / "state.json"
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(path)], cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGALRM
    statuses = {name: entry["status"] for name, entry in State(path).entries("probe").items()}
    assert statuses == {"quick": PASSED, "hangs": RUNNING}


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
    second = source_digest()
    (tmp_path / "kernels" / "tables.json").write_text("{}")
    assert len({digest, first, second, source_digest()}) == 4
    third = source_digest()
    (tmp_path / "bench" / "results" / "gpu").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "gpu" / "a.json").write_text("{}")
    assert source_digest() == third


def test_all_stages_in_order_with_time_running_out(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(command, "STAGES", {n: Stage(n, 60, lambda context: []) for n in ("build", "probe", "right")})
    monkeypatch.setattr(command, "why_dry_run", lambda asked: None)
    monkeypatch.setattr(command, "run_stage", lambda path, name, limit, attempt: ran.append(name))
    assert command.main(["--out", str(tmp_path), "--commit", "abc"]) == 0
    assert ran == ["build", "probe", "right"]
    (written,) = tmp_path.glob("*.json")
    assert json.loads(written.read_text())["commit"] == "abc"
    ran.clear()
    command.main(["--out", str(tmp_path), "right"])
    assert ran == ["probe", "right"]  # the backends must be known
    command.main(["--out", str(tmp_path), "--minutes", "0"])
    assert ran == ["probe", "right"] and "not started, the 0 minutes are over" in capsys.readouterr().out
