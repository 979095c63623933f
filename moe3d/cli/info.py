"""``moe3d info``: versions, and which backends can run on this machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform

import torch

import moe3d


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> None:
    facts = collect()
    print(json.dumps(facts, indent=2) if args.json else as_text(facts))


def collect() -> dict:
    """What ``moe3d info --json`` prints: version, backends, native, torch, triton, python (null: not installed)."""
    backends = {name: _availability(reason) for name, reason in moe3d.backends().items()}
    return {
        "version": moe3d.__version__,
        "backends": backends,
        "native": _native(backends),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
    }


def as_text(facts: dict) -> str:
    """The same for people, with a line on the platform."""
    lines = [
        f"moe3d {facts['version']}",
        f"  Python {facts['python']}, torch {facts['torch']}, triton {facts['triton'] or 'not installed'}",
        f"  {platform_note(platform.system(), platform.machine())}",
        "",
        "backends, the fastest first",
        *(_line(name, entry) for name, entry in facts["backends"].items()),
        "",
        "compiled code (C++, CUDA)",
        _line("native", facts["native"]),
    ]
    return "\n".join(lines)


def platform_note(system: str, machine: str) -> str:
    """What moe3d supports on a platform, named as ``platform.system()`` and ``platform.machine()`` do."""
    here = f"{'macOS' if system == 'Darwin' else system} {machine}"
    if system == "Linux" and machine == "x86_64":
        return f"{here}: supported"
    if system == "Linux" and machine == "aarch64":
        return f"{here}: untested; its C++ part has been run under emulation only"
    return f"{here}: the reference backend only (Linux on x86-64 is supported in full)"


def _availability(reason: str | None) -> dict:
    return {"available": reason is None, "reason": reason}


def _native(backends: dict[str, dict]) -> dict:
    """The compiled module serves the backends "cpu" and "cuda": it is there if either can run."""
    served = [(name, backends[name]) for name in ("cpu", "cuda")]
    if any(entry["available"] for _, entry in served):
        return _availability(None)
    return _availability("; ".join(f"{name}: {entry['reason']}" for name, entry in served))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _line(name: str, entry: dict) -> str:
    return f"  {name:<10} " + ("yes" if entry["available"] else f"no: {entry['reason']}")
