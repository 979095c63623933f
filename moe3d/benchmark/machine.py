"""On what, with what and when something was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import moe3d


def describe(device: str, checkout: Path | None = None) -> dict:
    """The fields that every record carries. ``checkout``: the repository whose commit is named, if there is one."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.device(device).type,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpu": _gpu(device),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "moe3d": moe3d.__version__,
        "commit": _commit(checkout),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _gpu(device: str) -> dict | None:
    if torch.device(device).type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "clocks": _clocks(torch.device(device).index or 0),
    }


def _clocks(index: int) -> dict | None:
    """Of multiprocessors and memory at this moment in MHz, where the driver's tool tells them."""
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "driver_version")
    text = _output(["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"])
    return dict(zip(fields, text.split(", "), strict=False)) if text else None


def _commit(checkout: Path | None) -> str | None:
    """The commit, with "+" where the measured code differs from it."""
    if checkout is None:
        return None
    commit = _output(["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"])
    changes = _output(["git", "-C", str(checkout), "status", "--porcelain", "--", "moe3d", "kernels", "csrc"])
    return commit and commit + ("+" if changes else "")


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
