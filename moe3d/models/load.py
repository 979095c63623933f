"""One way to a model by its name, for every command: the shipped MiniVGGT; VGGT or Depth Anything 3 from the Hugging
Face hub; or a file.

Files are safetensors, or PyTorch's with ``weights_only``: nothing that a file says is ever run.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from moe3d.integrations import load_head, patched_heads
from moe3d.models import depth_anything
from moe3d.models.checkpoint import load_mini
from moe3d.models.depth_anything import DepthAnything3
from moe3d.models.mini import MiniVGGT
from moe3d.ops.dispatch import NAMES
from moe3d.ops.mixture import MODES
from moe3d.ops.types import PRECISIONS

MINI = "mini"
STOCK = "stock"
MINI_WIDTH = 224  # where the shipped weights err least in depth on validation scenes; they saw small pictures only

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WEIGHTS = ("model.safetensors", "model.pt", "pytorch_model.bin", "vggt_1B_commercial.pt")  # in a repository or folder
_HEADS = ("camera", "point", "depth", "track")


def load_model(
    name: str | os.PathLike[str],
    head: str | os.PathLike[str] | None = None,
    *,
    mode: str | None = None,
    sharpen: int | None = None,
    backend: str = "auto",
    precision: str = "auto",
    return_experts: bool = False,
) -> nn.Module:
    """Load a model, in fp32 on the CPU and in eval mode.

    Args:
        name: "mini" for the shipped :class:`~moe3d.models.mini.MiniVGGT`; a name on the Hugging Face hub, as
            "facebook/VGGT-1B" or "depth-anything/DA3-BASE"; or the path of a weights file of either or of MiniVGGT, or
            of a folder with one. VGGT needs its own package, ``vggt``, and Depth Anything 3 needs
            ``depth-anything-3``; its networks without cameras and its nested one are refused.
        head: the path of a head that :func:`~moe3d.integrations.save_head` wrote; "stock" for the model as it comes;
            None for the shipped MoE head on "mini" and for "stock" on all others.
        mode: of the MoE depth head, in place of its file's: "mean", "argmax" or "switch".
        sharpen: of the MoE depth head, in place of its file's: see :class:`~moe3d.nn.MoEHead`.
        backend, precision, return_experts: of the MoE heads, see :class:`~moe3d.nn.MoEHead`.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: a name that is none of these, weights of another architecture or damaged ones, a head that does
            not fit, or options of a MoE head for a model without one.
        RuntimeError: the model's own package is missing, or the hub cannot give the weights.
    """
    model = _load_backbone(name, shipped_head=head is None)
    if head not in (None, STOCK):
        load_head(model, head)
    tails = {head: patched.tail for head, patched in patched_heads(model).items()}
    _check_options(name, tails, mode=mode, sharpen=sharpen, backend=backend, precision=precision)
    for tail in tails.values():
        tail.backend, tail.precision, tail.return_experts = backend, precision, return_experts
    if "depth" in tails:
        tails["depth"].mode = mode or tails["depth"].mode
        tails["depth"].sharpen = tails["depth"].sharpen if sharpen is None else sharpen
    return model.eval()


def input_width(model: nn.Module) -> int:
    """The image width in pixels that a model was made for: VGGT's 518, Depth Anything 3's 504; MiniVGGT was trained on
    small ones."""
    if isinstance(model, DepthAnything3):
        return depth_anything.INPUT_WIDTH
    return MINI_WIDTH if isinstance(model, MiniVGGT) else 518


def _load_backbone(name: str | os.PathLike[str], shipped_head: bool) -> nn.Module:
    if name == MINI:
        return load_mini("moe" if shipped_head else "single")
    path = Path(name)
    if path.exists():
        return _load_file(weights_file(path))
    if path.suffix not in (".safetensors", ".pt", ".pth", ".bin") and _HUB_NAME.fullmatch(str(name)):
        return _load_file(_download(str(name)))
    raise ValueError(
        f"model must be '{MINI}', a name on the hub (as facebook/VGGT-1B) or an existing path, got '{name}'"
    )


def _check_options(name, tails: dict, mode: str | None, sharpen: int | None, **options: str) -> None:
    if mode not in (None, *MODES):
        raise ValueError(f"mode must be None or one of {', '.join(MODES)}, got {mode!r}")
    for option, known in (("backend", NAMES), ("precision", PRECISIONS)):
        if options[option] not in known:
            raise ValueError(f"{option} must be one of {', '.join(known)}, got {options[option]!r}")
    if sharpen is not None and (isinstance(sharpen, bool) or not isinstance(sharpen, int) or sharpen < 0):
        raise ValueError(f"sharpen must be None or an integer of at least 0, got {sharpen!r}")
    asked_for = {"mode": mode, "sharpen": sharpen} | {key: value for key, value in options.items() if value != "auto"}
    for key, value in asked_for.items():
        if value is not None and not tails:
            raise ValueError(
                f"{key}={value!r} is for a mixture-of-experts head, but the model '{name}' has its stock head"
            )


def weights_file(path: Path) -> Path:
    """A folder's file of weights; any other path is one itself."""
    if not path.is_dir():
        return path
    for file in _WEIGHTS:
        if (path / file).is_file():
            return path / file
    raise FileNotFoundError(f"there are no weights in {path}: expected one of {', '.join(_WEIGHTS)}")


def _download(name: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise RuntimeError(f"model '{name}' needs huggingface_hub: pip install huggingface_hub") from None
    for file in _WEIGHTS:
        try:
            return Path(hf_hub_download(name, file))
        except LocalEntryNotFoundError as error:  # neither downloaded before, nor can the hub be reached
            raise RuntimeError(f"model '{name}' cannot be downloaded ({_first_line(error)})") from None
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError) as error:
            raise RuntimeError(f"model '{name}' cannot be downloaded ({_first_line(error)})") from None
    raise RuntimeError(f"model '{name}' on the hub holds no weights: expected one of {', '.join(_WEIGHTS)}")


def _load_file(path: Path) -> nn.Module:
    if path.suffix == ".safetensors":
        metadata, state = _read_safetensors(path)
        if metadata.get("model") == "MiniVGGT":
            return load_mini(path=path)
    else:
        state = _read_pickle(path)
    return _depth_anything(path, state) if depth_anything.is_depth_anything(state) else _vggt(path, state)


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    from pickle import UnpicklingError

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise ValueError(
            f"{path} holds more than weights, or is no weights file, and is not loaded for safety"
        ) from None
    except Exception as error:  # on damaged files torch.load raises whatever its parts do
        raise ValueError(f"{path} is not a whole weights file ({_first_line(error)})") from None
    if isinstance(state, dict):  # a training run's checkpoint holds the weights beside its optimizer's state
        state = next((state[key] for key in ("model", "state_dict") if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} must hold a state dict, tensors by name, got {type(state).__name__}")
    return state


def _vggt(path: Path, state: dict[str, Tensor]) -> nn.Module:
    """VGGT's own class, of the sizes and with the heads that the weights have."""
    camera_token = state.get("aggregator.camera_token")
    if camera_token is None or camera_token.ndim != 4:
        raise ValueError(
            f"{path} must hold the weights of a MiniVGGT, a VGGT or a Depth Anything 3, got none for "
            "'aggregator.camera_token'"
        )
    sizes = {"embed_dim": camera_token.shape[-1]}
    position = state.get("aggregator.patch_embed.pos_embed")
    if position is not None:  # [1, 1 + patches, channels]
        sizes["img_size"] = 14 * round((position.shape[1] - 1) ** 0.5)
    heads = {f"enable_{name}": any(key.startswith(f"{name}_head.") for key in state) for name in _HEADS}
    try:
        from vggt.models.vggt import VGGT
    except ImportError as error:
        raise RuntimeError(f"{path} needs VGGT's own package ({error}): pip install 'moe3d[vggt]'") from None
    with torch.random.fork_rng(devices=[]):
        model = VGGT(**sizes, **heads)
    return _with_weights(path, "VGGT", model, state)


def _depth_anything(path: Path, state: dict[str, Tensor]) -> nn.Module:
    try:
        with torch.random.fork_rng(devices=[]):
            model, own = depth_anything.build(state)
    except ValueError as error:
        raise ValueError(f"{path} must hold the weights of one of {error}") from None
    except ImportError as error:
        raise RuntimeError(
            f"{path} needs Depth Anything 3's own package ({error}): pip install 'moe3d[da3]', then "
            "pip install --no-deps depth-anything-3"
        ) from None
    return _with_weights(path, "Depth Anything 3", model, own)


def _with_weights(path: Path, architecture: str, model: nn.Module, found: dict[str, Tensor]) -> nn.Module:
    wanted = model.state_dict()
    # Safetensors hold what several names share once, under one of them.
    places = {key: (value.data_ptr(), value.shape) for key, value in wanted.items()}
    shared = {place: found[key] for key, place in places.items() if key in found}
    found = {key: shared[place] for key, place in places.items() if place in shared} | found
    different = sorted(found.keys() ^ wanted.keys())
    different += sorted(key for key in found.keys() & wanted.keys() if found[key].shape != wanted[key].shape)
    if different:
        key = different[0]
        there, here = (list(state[key].shape) if key in state else "absent" for state in (found, wanted))
        raise ValueError(
            f"{path} does not fit {architecture}'s architecture: {len(different)} tensors differ, the first '{key}': "
            f"{there} in the file, {here} in the model"
        )
    model.load_state_dict(found)
    return model


def _first_line(error: BaseException) -> str:
    return next((line.strip().rstrip(".:") for line in str(error).splitlines() if line.strip()), type(error).__name__)
