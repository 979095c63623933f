"""Runs the items of one stage; its own process, because a fault on the GPU ends everything in a process."""

from __future__ import annotations

import argparse
import os
import signal
import time
import traceback
from pathlib import Path

from bench.gpu.stages import STAGES, Context, Item, Skip
from bench.gpu.state import FAILED, PASSED, RUNNING, SKIPPED, State

DEVICE_LOST = 75  # this process's exit code where it can do nothing more on the GPU, and another one can


def work(state: State, stage: str, items: list[Item], attempt: str, item_s: float = 0) -> None:
    """Run every item that has neither passed nor been skipped before, and that this attempt has not tried yet.

    One that takes longer than ``item_s`` ends the process by SIGALRM, wherever it hangs; 0: there is no limit.
    """
    for item in items:
        before = state.entry(stage, item.name)
        if before and (before["status"] in (PASSED, SKIPPED) or before["attempt"] == attempt):
            continue
        state.record(stage, item.name, status=RUNNING, attempt=attempt)
        signal.setitimer(signal.ITIMER_REAL, item_s)
        entry, fault = _run(item), _device_fault()
        signal.setitimer(signal.ITIMER_REAL, 0)
        if fault and entry["status"] != FAILED:  # a race goes on without those that fail, and so says nothing of it
            entry = {"status": FAILED, "seconds": entry["seconds"], "reason": f"it left the GPU with {fault}"}
        state.record(stage, item.name, **entry, attempt=attempt)
        print(f"  {stage}: {item.name}: {entry['status']}{_because(entry)} ({entry['seconds']:.1f} s)", flush=True)
        if fault:
            os._exit(DEVICE_LOST)  # at once: whatever is torn down on the way out would call the device again


def _run(item: Item) -> dict:
    start = time.monotonic()

    def entry(status: str, **more) -> dict:
        return {"status": status, "seconds": round(time.monotonic() - start, 2), **more}

    try:
        return entry(PASSED, result=item.run())
    except Skip as reason:
        return entry(SKIPPED, reason=str(reason))
    except Exception as error:  # it belongs into the report, whatever it is
        where = "".join(traceback.format_exception(error)[-3:])
        return entry(FAILED, reason=f"{type(error).__name__}: {error}", traceback=where)


def _device_fault() -> str | None:
    """What a fault has left behind: every later call of this process on the GPU fails with it."""
    import torch

    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except Exception as error:  # its type depends on PyTorch's version
        return f"{type(error).__name__}: {error}"
    return None


def _because(entry: dict) -> str:
    return f": {entry['reason']}" if "reason" in entry else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--attempt", required=True)
    args = parser.parse_args()
    state = State(args.state)
    stage = STAGES[args.stage]
    items = stage.items(Context("cuda", state.data["commit"], state.entries("probe")))
    work(state, args.stage, items, args.attempt, stage.item_s)


if __name__ == "__main__":
    main()
