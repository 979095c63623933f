"""Which backends the tests judge: every one that ``moe3d.backends()`` says can run, on every device it serves."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

import moe3d
from support.problems import random_problem


class Runner(NamedTuple):
    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"


def cannot_run(error: RuntimeError, backend: str) -> bool:
    """Whether this is the dispatcher's own refusal, with the reason."""
    return re.match(rf"backend '{backend}' cannot run here because \w", str(error)) is not None


def runners() -> list[Runner]:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = []
    for backend, reason in moe3d.backends().items():
        if reason is None:
            served = [device for device in devices if _serves(backend, device)]
            found += [Runner(backend, device) for device in served or devices[-1:]]
    return found


def _serves(backend: str, device: str) -> bool:
    try:
        random_problem(device=device).run(backend=backend)
    except RuntimeError as error:
        return not cannot_run(error, backend)  # any other failure is for the tests to show
    return True
