"""Launch configurations, from the data file beside this: per architecture, kernel and kind of arithmetic.

The shipped table was chosen analytically (registers, shared memory and instructions of the compiled code; see
bench/NOTES.md). With MOE3D_AUTOTUNE=1 the first call of each shape times the candidates and writes its choice, keyed
by the GPU's name, to ``$MOE3D_CACHE/triton.json`` (``~/.cache/moe3d/triton.json``), where later calls find it.
"""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DEFAULTS = Path(__file__).with_name("tables.json")
# The widest group of hidden channels beside a second layer of at most 32, at most 64 and more columns. The table's own
# widths are for 16, which 4 experts need; the more columns, the more registers they take, and wider groups spill.
_WIDEST = {
    ("forward", "half"): (128, 128, 64),
    ("forward", "tf32"): (128, 128, 64),
    ("forward", "ieee"): (32, 32, 16),
    ("recompute", "half"): (64, 64, 64),
    ("recompute", "tf32"): (64, 32, 32),
    ("recompute", "ieee"): (32, 32, 16),
}


class Config(NamedTuple):
    """One launch: a tile of pixels, blocks of the product, warps and pipeline stages."""

    tile_height: int
    tile_width: int
    block_k: int
    max_width: int  #  of a group of hidden channels
    num_warps: int
    num_stages: int
    formulation: str = "direct"  # of the forward kernel; "columns" takes tile_width/2 source columns at a time
    tma: bool = False  # the direct formulation's 3x3 weights come by the tensor memory accelerator (sm_90 and newer)
    splits: int = 16  # of the sum over pixels in the gradient to the 3x3 weights

    @property
    def name(self) -> str:
        return (
            f"{self.formulation} {self.tile_height}x{self.tile_width} K{self.block_k} N{self.max_width} "
            f"{self.num_warps} warps {self.num_stages} stages" + " TMA" * self.tma
        )


def architecture(capability: tuple[int, int]) -> str:
    """The row of the default table that serves a GPU: the newest that is not newer than it."""
    known = [tuple(map(int, name.split("."))) for name in _defaults()]
    return "{}.{}".format(*max(k for k in known if k <= capability))


def config(
    kernel: str, kind: str, capability: tuple[int, int], device_name: str, columns: int, shape: str = "any"
) -> Config:
    """The configuration of ``kernel`` for a kind of arithmetic ("half", "tf32", "ieee") and a class of shapes.

    ``columns``: of the second layer's product, see :attr:`moe3d.kernels.passes.Call.columns`.
    """
    tuned = _read(user_file()).get(device_name, {}).get(f"{kernel}/{kind}/{shape}")
    return Config(**tuned) if tuned else _default(kernel, kind, capability, columns)


def _default(kernel: str, kind: str, capability: tuple[int, int], columns: int) -> Config:
    default = Config(**_defaults()[architecture(capability)][kernel][kind])
    if columns <= 16 or (kernel, kind) not in _WIDEST:
        return default
    widest = _WIDEST[kernel, kind][0 if columns <= 32 else 1 if columns <= 64 else 2]
    return default._replace(max_width=min(default.max_width, widest))


def candidates(kind: str, capability: tuple[int, int], columns: int, wider: bool) -> dict[str, Config]:
    """What is raced for the forward kernel, by name: the default, its neighbours, and commuted columns where the width
    grows."""
    default = _default("forward", kind, capability, columns)
    options = [
        default,
        *(default._replace(tile_height=h, tile_width=w) for h, w in ((4, 32), (16, 8))),
        *(default._replace(num_stages=s) for s in (default.num_stages + 1, max(default.num_stages - 1, 2))),
        default._replace(max_width=128),
        default._replace(block_k=32),
        default._replace(tile_height=2 * default.tile_height, max_width=128),  # half the weights from L2; it may spill
    ]
    if capability >= (9, 0):
        options += [default._replace(tma=True), default._replace(tma=True, max_width=128, num_stages=4)]
    if wider:
        commuted = _default("columns", kind, capability, columns)
        options += [commuted, commuted._replace(num_stages=commuted.num_stages + 1)]
    return {c.name: c for c in options}


def autotune_requested() -> bool:
    return os.environ.get("MOE3D_AUTOTUNE") == "1"


def is_tuned(kernel: str, kind: str, device_name: str, shape: str) -> bool:
    return f"{kernel}/{kind}/{shape}" in _read(user_file()).get(device_name, {})


def tune(kernel: str, kind: str, device_name: str, shape: str, options: Sequence[Config],
         time: Callable[[Config], float]) -> Config:  # fmt: skip
    """Times each candidate and writes the fastest; one that cannot be launched (too much shared memory) is left out."""
    timed = [(t, c) for c in options if (t := _attempt(time, c)) is not None]
    if not timed:
        raise RuntimeError(f"none of {len(options)} launch configurations of {kernel!r} ({kind}) runs on {device_name}")
    best = min(timed, key=lambda pair: pair[0])[1]
    choose(kernel, kind, device_name, shape, best)
    return best


def choose(kernel: str, kind: str, device_name: str, shape: str, chosen: Config) -> None:
    """Writes a configuration into the user's table, where later calls find it."""
    table = copy.deepcopy(_read(user_file()))
    table.setdefault(device_name, {})[f"{kernel}/{kind}/{shape}"] = chosen._asdict()
    _write(user_file(), table)


def user_file() -> Path:
    root = os.environ.get("MOE3D_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe3d"
    return Path(root) / "triton.json"


def _attempt(time: Callable[[Config], float], config: Config) -> float | None:
    from triton.runtime.errors import OutOfResources

    try:
        return time(config)
    except OutOfResources:
        return None


@functools.cache
def _defaults() -> dict[str, Any]:
    return json.loads(DEFAULTS.read_text())


def _read(path: Path) -> dict[str, Any]:
    try:
        stamp = path.stat().st_mtime_ns
    except FileNotFoundError:
        return {}
    return _parsed(path, stamp)


@functools.lru_cache(maxsize=1)
def _parsed(path: Path, stamp: int) -> dict[str, Any]:
    return json.loads(path.read_text())


def _write(path: Path, table: dict[str, Any]) -> None:
    """Whole or not at all: other processes read this file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(table, indent=2) + "\n")
    temporary.replace(path)
