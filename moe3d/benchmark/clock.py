"""The clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def time_call(run: Callable[[], Any], device: str) -> float:
    """Seconds of one call: by the device's own clock on CUDA, where work is asynchronous, else by the host's."""
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
