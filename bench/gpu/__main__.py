"""The command: stage after stage, each in a worker process with a time limit."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench.gpu.stages import ROOT, STAGES, Stage, source_digest
from bench.gpu.state import FAILED, PASSED, SKIPPED, State
from bench.gpu.worker import DEVICE_LOST

RESULTS = ROOT / "bench" / "results" / "gpu"
LOST = "the GPU was lost"  # with the process, whose item has its own reason


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    stages = {name: stage for name, stage in STAGES.items() if name in {"probe", *args.stages}}  # others need it
    reason = why_dry_run(args.dry_run)
    if reason:
        print(plan(stages, reason))
        return 0
    state = _open_state(args)
    attempt = str(time.time_ns())
    deadline = time.monotonic() + 60 * args.minutes
    for name, stage in stages.items():
        left = deadline - time.monotonic()
        if left <= 0:
            print(f"{name}: not started, the {args.minutes:g} minutes are over; run the same command again")
            continue
        print(f"{name}: {stage.about}", flush=True)
        if stage.always:
            state.data["stages"].pop(name, None)
            state.save()
        run_stage(state.path, name, min(stage.limit_s, left), attempt)
    state = State(state.path)
    print(report(state, stages))
    return 1 if any(e["status"] == FAILED for name in stages for e in state.entries(name).values()) else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Build, check and measure on a GPU.")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"some of {', '.join(STAGES)} (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=120, help="start nothing after so long (default: %(default)s)")
    parser.add_argument("--commit", help="the commit, for a copy without its git folder")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    args = parser.parse_args(argv)
    unknown = [name for name in args.stages if name not in STAGES]
    if unknown:
        parser.error(f"STAGE must be one of {', '.join(STAGES)}, got {unknown[0]!r}")
    args.stages = args.stages or list(STAGES)
    return args


def why_dry_run(asked: bool) -> str | None:
    """Why nothing is run, or None."""
    if asked:
        return "a dry run was asked for"
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no PyTorch"
    import torch

    return None if torch.cuda.is_available() else "PyTorch finds no CUDA device here"


def plan(stages: dict[str, Stage], reason: str) -> str:
    """What each stage would do."""
    lines = [f"dry run, because {reason}; skipped:"]
    lines += [f"  {name} (at most {stage.limit_s:.0f} s): {stage.about}" for name, stage in stages.items()]
    if importlib.util.find_spec("torch") is not None:
        import moe3d

        lines.append("backends, as they are here; the stages after the first skip those that cannot run:")
        lines += [f"  {name}: {reason or 'can run'}" for name, reason in moe3d.backends().items()]
    return "\n".join(lines)


def _open_state(args: argparse.Namespace) -> State:
    """The file of these sources: taken up from the results folder where ``--out`` does not have it yet."""
    name = f"{source_digest()}.json"
    state = State(args.out / name)
    if not state.path.is_file() and (RESULTS / name).is_file():
        state.data = State(RESULTS / name).data
    state.data["commit"] = args.commit or state.data["commit"]
    state.save()
    print(f"results: {state.path}")
    return state


def run_stage(path: Path, name: str, limit_s: float, attempt: str) -> None:
    """Workers until the stage's items are done; what a worker did when it ended or ran out of time has failed."""
    end = time.monotonic() + limit_s
    while True:
        reason = _run_worker(path, name, end - time.monotonic(), attempt)
        state = State(path)
        item = state.running(name)
        if item is not None:
            state.record(name, item, status=FAILED, seconds=None, reason=reason or "the process ended", attempt=attempt)
            print(f"  {name}: {item}: failed: {reason}", flush=True)
        elif reason not in (None, LOST):
            state.record(name, "stage", status=FAILED, seconds=None, reason=reason, attempt=attempt)
            print(f"  {name}: failed: {reason}", flush=True)
        if (item is None and reason != LOST) or time.monotonic() > end:
            return


def _run_worker(path: Path, name: str, limit_s: float, attempt: str) -> str | None:
    """None when the worker finished, else what became of it."""
    command = [sys.executable, "-m", "bench.gpu.worker", name, "--state", str(path), "--attempt", attempt]
    worker = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        code = worker.wait(timeout=max(limit_s, 1))
    except subprocess.TimeoutExpired:
        return f"ran past the stage's {limit_s:.0f} s"
    finally:  # also what it has started, which may outlive it
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
    ends = {0: None, DEVICE_LOST: LOST, -signal.SIGALRM: f"ran past its {STAGES[name].item_s:.0f} s"}
    return ends.get(code, f"the process ended with code {code}")


def report(state: State, stages: dict[str, Stage]) -> str:
    """A line for each stage, and whatever failed or was skipped with its reason; the measured tables last."""
    lines = [""]
    for name in stages:
        entries = state.entries(name)
        counts = {s: sum(e["status"] == s for e in entries.values()) for s in (PASSED, FAILED, SKIPPED)}
        lines.append(f"{name:<14}" + ", ".join(f"{n} {status}" for status, n in counts.items() if n))
        shown = [(item, e) for item, e in entries.items() if e["status"] in (FAILED, SKIPPED)]
        lines += [f"  {e['status']}: {item}: {e['reason']}" for item, e in shown]
        refused = [
            (i, *pair) for i, e in entries.items() for pair in (e.get("result") or {}).get("refused", {}).items()
        ]
        lines += [f"  refused: {item}: {peer}: {why}" for item, peer, why in refused]
    records = list(state.benchmark_records())
    if records:
        from moe3d.benchmark.records import Record
        from moe3d.benchmark.tables import summary

        lines += ["", summary([Record(**r) for r in records])]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
