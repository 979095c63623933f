"""Runs the items of one stage; its own process, because a fault on the GPU ends everything in a process."""

from __future__ import annotations

import argparse
import time
import traceback
from pathlib import Path

from bench.gpu.stages import STAGES, Context, Item, Skip
from bench.gpu.state import FAILED, PASSED, RUNNING, SKIPPED, State


def work(state: State, stage: str, items: list[Item], attempt: str) -> None:
    """Run every item that has neither passed nor been skipped before, and that this attempt has not tried yet."""
    for item in items:
        before = state.entry(stage, item.name)
        if before and (before["status"] in (PASSED, SKIPPED) or before["attempt"] == attempt):
            continue
        state.record(stage, item.name, status=RUNNING, attempt=attempt)
        entry = _run(item)
        state.record(stage, item.name, **entry, attempt=attempt)
        print(f"  {stage}: {item.name}: {entry['status']}{_because(entry)} ({entry['seconds']:.1f} s)", flush=True)


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


def _because(entry: dict) -> str:
    return f": {entry['reason']}" if "reason" in entry else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--attempt", required=True)
    args = parser.parse_args()
    state = State(args.state)
    work(state, args.stage, STAGES[args.stage].items(Context("cuda", state.data["commit"])), args.attempt)


if __name__ == "__main__":
    main()
