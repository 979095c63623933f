"""Checkpoints of a run: plain data in one file, which is whole or not there."""

from __future__ import annotations

import random
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import numpy as np
import torch

from moe3d.atomic import whole_file


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a state of tensors, numbers, strings, lists and dictionaries in place of the last one.

    Raises:
        OSError: it could not be written, and the last one, which the message names, is as it was.
    """
    try:
        with whole_file(path) as unfinished:
            torch.save(state, unfinished)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        kept = f"the last one, {path}, is kept" if path.exists() else "there is no earlier one"
        raise OSError(f"the checkpoint of step {state.get('step')} could not be written ({error}); {kept}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote, onto the CPU; nothing in the file is ever run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged, or holds more than plain data.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} is not a whole checkpoint ({reason})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds {type(state).__name__}")
    return state


def random_state() -> dict[str, Any]:
    """The states of the random generators of Python, NumPy and PyTorch, as plain data."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = cast(tuple, np.random.get_state(legacy=True))
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo what was drawn since :func:`random_state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
