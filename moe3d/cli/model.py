"""How a command's model is set, and where it runs: options of ``reconstruct`` and ``eval``."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn

from moe3d.cli.arguments import integer
from moe3d.models import input_width, load_model
from moe3d.models.mini import PATCH_SIZE
from moe3d.ops.dispatch import AUTO, NAMES
from moe3d.ops.mixture import MODES
from moe3d.ops.types import PRECISIONS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAME_HELP = "'mini', a name on the Hugging Face hub (facebook/VGGT-1B, depth-anything/DA3-BASE) or a path"
OPTIONS = ("head", "mode", "sharpen", "backend", "precision", "device", "dtype", "width")


def add_model_arguments(add: Callable) -> None:
    """:data:`OPTIONS`, for the functions below; which model it is, each command asks in its own way."""
    add(
        "--head",
        metavar="PATH",
        help="a trained MoE head, or 'stock' for the model's own (default: the shipped one for mini, else stock)",
    )
    add("--mode", choices=MODES, help="how the experts are combined (default: the head's own)")
    add(
        "--sharpen",
        type=integer(0),
        metavar="N",
        help="passes of a filter that moves the MoE head's depth edges to the image's (default: the head's own)",
    )
    add("--backend", default=AUTO, choices=NAMES, help="of the MoE head (default: %(default)s)")
    add("--precision", default="auto", choices=PRECISIONS, help="of the head's convolutions (default: %(default)s)")
    add("--device", default="auto", help="'cpu', 'cuda' or 'cuda:N' (default: a GPU if there is one)")
    add(
        "--dtype",
        default="auto",
        choices=("auto", *DTYPES),
        help="of the backbone (default: bfloat16 or float16 on GPUs)",
    )
    add(
        "--width",
        type=integer(PATCH_SIZE, multiple_of=PATCH_SIZE),
        metavar="PIXELS",
        help="of the images that the model gets (default: 224 for mini, 504 for Depth Anything 3, 518 for VGGT)",
    )


def load(args: argparse.Namespace, name: str, device: torch.device, return_experts: bool = False) -> nn.Module:
    """The model of that name with the head that is asked for, on its device."""
    options = {option: getattr(args, option) for option in ("mode", "sharpen", "backend", "precision")}
    return load_model(name, args.head, **options, return_experts=return_experts).to(device)


def width_of(args: argparse.Namespace, model: nn.Module) -> int:
    """Of the images that the model gets, in pixels."""
    return args.width or input_width(model)


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
