"""Reading and writing MiniVGGT's weights: fp16 safetensors that carry the model's configuration."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe3d.atomic import whole_file
from moe3d.models.mini import MiniVGGT

WEIGHTS = Path(__file__).parent / "weights"


def save_mini(model: MiniVGGT, path: str | os.PathLike[str]) -> None:
    """Write a model's configuration and weights, rounded to fp16, to a safetensors file.

    The file appears under ``path`` only when it is whole.

    Raises:
        ValueError: the model's state is not that of a plain MiniVGGT (a patched head is saved by ``save_head``), or a
            weight is not finite in fp16.
        OSError: ``path`` cannot be written.
    """
    from safetensors.torch import save

    state = {name: tensor.detach().half().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if _shapes(state) != _shapes(_blank(model.config).state_dict()):
        raise ValueError(
            "model must be a MiniVGGT with its stock heads, but its state dict has other entries: unpatch it"
        )
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"model has a weight that is not finite in float16: {name}")

    with whole_file(path) as unfinished:
        unfinished.write_bytes(save(state, metadata={"model": "MiniVGGT", "config": json.dumps(model.config)}))


def load_mini(head: str = "single", path: str | os.PathLike[str] | None = None) -> MiniVGGT:
    """The MiniVGGT that is shipped with the package, in fp32 and eval mode; needs no network.

    Args:
        head: "single" for the stock depth head, "moe" for the shipped mixture-of-experts head in its place.
        path: other weights than the shipped ones, as :func:`save_mini` writes them.

    Raises:
        ValueError: ``head`` is unknown, or the file is damaged or holds something else.
        FileNotFoundError: there is no such file.
    """
    if head not in ("single", "moe"):
        raise ValueError(f"head must be 'single' or 'moe', got {head!r}")
    model = _read(Path(path) if path is not None else WEIGHTS / "mini_single.safetensors")
    if head == "moe":
        from moe3d.integrations import load_head

        load_head(model, WEIGHTS / "mini_moe_head.safetensors")
    return model.eval()


def _read(path: Path) -> MiniVGGT:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            state = {name: file.get_tensor(name).float() for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from error
    if metadata.get("model") != "MiniVGGT":
        raise ValueError(f"{path} does not hold a MiniVGGT: its metadata names {metadata.get('model', 'no model')!r}")
    try:
        model = _blank(json.loads(metadata["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold a configuration that this version of MiniVGGT knows ({error})"
        ) from error
    if _shapes(state) != _shapes(model.state_dict()):
        raise ValueError(f"{path} does not hold the weights of the MiniVGGT that its configuration describes")
    model.load_state_dict(state, assign=True)
    return model


def _blank(config: dict[str, Any]) -> MiniVGGT:
    """A model without storage: costs no time and leaves the global random state alone."""
    with torch.device("meta"):
        return MiniVGGT(**config)


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}
