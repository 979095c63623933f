"""What only a process of its own can show: the peak memory of a call, and how long the first call takes.

Memory. On CUDA, the allocator's own peak. On the CPU, the kernel's high-water mark of the resident set, reset before
the call (Linux; ``ru_maxrss`` would not do, a child inherits its parent's). It sees every byte, whoever allocated it.
The call is a second one: what the first one keeps (compiled code, a cached embedding, packed weights) is not counted.
In the child freed blocks go back to the system at once (``MALLOC_MMAP_THRESHOLD_``), so that memory left over from the
first call does not hide what the second one needs.

Latency. The first call in a process that has imported the package and built the head, with empty compilation caches
("cold") and again with those that this left behind ("warm"); and the call after it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from moe3d.benchmark.case import Case
from moe3d.benchmark.clock import time_call

_SMALL_BLOCK = 64 << 10  # bytes; larger ones come from the system and go back to it one by one
_TIMEOUT_S = 900
_STATUS = Path("/proc/self/status")


class ProbeFailed(RuntimeError):
    """The probe's process ended with an error; the message is its last line."""


def peak_memory(suite: str, peer: str, case: Case) -> dict[str, float]:
    """{"peak_bytes", "seconds"} of one call: beyond its inputs and what it keeps between calls, outputs included."""
    return _run("memory", suite, peer, case, {"MALLOC_MMAP_THRESHOLD_": str(_SMALL_BLOCK)})


def first_call(suite: str, peer: str, case: Case) -> dict[str, dict[str, float]]:
    """{"cold": {"first_s", "second_s"}, "warm": ...} of a peer in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: f"{folder}/{name}" for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        return {state: _run("latency", suite, peer, case, caches) for state in ("cold", "warm")}


def _run(what: str, suite: str, peer: str, case: Case, variables: dict[str, str]) -> dict:
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "moe3d.benchmark.probe", what, suite, peer, json.dumps(case.asdict())]
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S)
    if child.returncode:
        raise ProbeFailed((child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1])
    return json.loads(child.stdout.splitlines()[-1])


def _memory(call: Callable[[int], object], device: str) -> dict:
    call(0)
    gc.collect()
    meter = _AllocatorMeter() if torch.device(device).type == "cuda" else _ResidentMeter()
    before = meter.restart()
    seconds = time_call(lambda: call(0), device)
    return {"peak_bytes": meter.peak() - before, "seconds": seconds}


class _AllocatorMeter:
    """PyTorch's caching allocator on the current CUDA device."""

    def restart(self) -> int:
        """Forget the peak; bytes that are in use now."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()


class _ResidentMeter:
    """This process's resident set, as Linux keeps it."""

    def __init__(self) -> None:
        if not _STATUS.exists():
            raise OSError("the peak memory of a process on the CPU is read from /proc, which only Linux has")

    def restart(self) -> int:
        Path("/proc/self/clear_refs").write_text("5")
        return self._read("VmRSS:")

    def peak(self) -> int:
        return self._read("VmHWM:")

    def _read(self, field: str) -> int:
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def _latency(call: Callable[[int], object], device: str) -> dict:
    return {"first_s": time_call(lambda: call(0), device), "second_s": time_call(lambda: call(1), device)}


def main(argv: list[str] | None = None) -> None:
    from moe3d.benchmark.suites import RACES

    parser = argparse.ArgumentParser(description="Probe one contestant in this process; prints a JSON object.")
    parser.add_argument("what", choices=("memory", "latency"))
    parser.add_argument("suite", choices=RACES)
    parser.add_argument("peer")
    parser.add_argument("case", type=lambda text: Case(**json.loads(text)))
    args = parser.parse_args(argv)
    call = RACES[args.suite].call(args.case, args.peer)
    measure = _memory if args.what == "memory" else _latency
    print(json.dumps(measure(call, args.case.device)))


if __name__ == "__main__":
    main()
