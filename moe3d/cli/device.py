"""Where a command's model runs, and in which type: options of ``reconstruct`` and ``eval``."""

from __future__ import annotations

from collections.abc import Callable

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_device_arguments(add: Callable) -> None:
    """``--device`` and ``--dtype``, for :func:`choose_device` and :func:`choose_dtype`."""
    add("--device", default="auto", help="'cpu', 'cuda' or 'cuda:N' (default: a GPU if there is one)")
    add(
        "--dtype",
        default="auto",
        choices=("auto", *DTYPES),
        help="of the backbone (default: bfloat16 or float16 on GPUs)",
    )


def choose_device(name: str) -> torch.device:
    """Raises ValueError for a device that PyTorch does not have here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device '{name}' is not available here ({str(error).splitlines()[0]})") from None
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is what VGGT's authors run: bfloat16 on GPUs that have it, float16 on older ones, float32 on CPUs."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
