"""Patched heads as files: safetensors, with the configuration in the metadata."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch import Tensor, nn

from moe3d.atomic import whole_file
from moe3d.integrations.kinds import Kind, kind_of, patched_heads
from moe3d.integrations.vggt import HEADS

FORMAT = "moe3d-head"
FORMAT_VERSION = 1

_CONFIG = (  # patch's arguments that belong to a trained head, rather than to the machine it runs on
    "num_experts", "gate_hidden", "init_noise", "temperature", "mode", "gap", "seed",
    "sharpen",
)  # fmt: skip
_ACTIVATIONS = ("activation", "conf_activation")  # the model's own: what the weights were trained under
_LATER = {"sharpen", *_ACTIVATIONS}  # not in the first files, which mean patch's default and the model's own


def save_head(model: nn.Module, path: str | os.PathLike) -> None:
    """Write a model's patched heads (experts, gates, configuration; not the rest of the model) as safetensors.

    The file is written under a temporary name and renamed when whole.

    Raises:
        ValueError: the model is not patched.
        OSError: the file cannot be written.
    """
    from safetensors.torch import save

    heads = patched_heads(model)
    if not heads:
        raise ValueError("model must be patched before its head can be saved, got one without a patched head")
    config = {name: _config(head.tail) for name, head in heads.items()}
    tensors = {
        f"{name}.{key}": value.detach().contiguous()
        for name, head in heads.items()
        for key, value in head.tail.state_dict().items()
    }
    metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "heads": json.dumps(config)}
    metadata["kind"] = kind_of(model).name
    with whole_file(path) as unfinished:
        unfinished.write_bytes(save(tensors, metadata=metadata))


def load_head(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Load heads that :func:`save_head` wrote; an unpatched model is patched with the file's configuration.

    A patched model keeps its own ``mode``, ``gap``, ``sharpen``, ``init_noise`` and ``seed``; the rest must be the
    file's.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no head file, is damaged, or does not fit the model (or the configuration with which it
            is already patched); the model is then left bit for bit as it was.
    """
    config, tensors, trained_for = _read(Path(path))
    kind = kind_of(model)
    if kind.name != trained_for:
        raise ValueError(f"{path} holds heads for a model of kind {trained_for!r}, but the model is {kind.name!r}")
    patched = kind.patched_heads(model)
    if patched:
        _check_same_configuration(path, config, patched, f": call unpatch_{kind.name}(model) first")
        _load(path, patched, tensors)
        return model
    _check_sizes(path, config, tensors)
    try:
        _patch(model, path, config, kind)
        _check_same_configuration(path, config, kind.patched_heads(model), "")
        _load(path, kind.patched_heads(model), tensors)
    except BaseException:
        kind.unpatch(model)
        raise
    return model


def _config(tail) -> dict:
    image_gate = tail.image_gate.option if tail.image_gate is not None else False
    return {key: getattr(tail, key) for key in (*_CONFIG, *_ACTIVATIONS)} | {"image_gate": image_gate}


def _read(path: Path) -> tuple[dict[str, dict], dict[str, Tensor], str]:
    """The file's configuration by head, its tensors by name, and the kind of model (the first files do not say)."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from None
    if metadata.get("format") != FORMAT or metadata.get("format_version") != str(FORMAT_VERSION):
        found = f"{metadata.get('format', 'no format')} {metadata.get('format_version', '')}".strip()
        raise ValueError(f"{path} must be a head file of moe3d ({FORMAT} {FORMAT_VERSION}), got {found}")
    try:
        config = json.loads(metadata["heads"])
        valid = bool(config) and config.keys() <= set(HEADS)
        valid = valid and all(
            options.keys() | _LATER == {*_CONFIG, *_ACTIVATIONS, "image_gate"} for options in config.values()
        )
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError):
        valid = False
    if not valid:
        raise ValueError(f"{path} holds no valid head configuration in its metadata")
    return config, tensors, metadata.get("kind", "vggt")


def _check_sizes(path, config: dict[str, dict], tensors: dict[str, Tensor]) -> None:
    """The configuration is believed only as far as the tensors bear it out, before anything of its size is made."""
    for name, options in config.items():
        sizes = {"num_experts": "expert_w1"} | ({"gate_hidden": "gate_w1"} if options["num_experts"] != 1 else {})
        for option, key in sizes.items():
            tensor = tensors.get(f"{name}.{key}")
            if tensor is None or tensor.shape[:1] != (options[option],):
                raise ValueError(f"{path} holds no {name}.{key} for its configuration, {option}={options[option]!r}")


def _patch(model: nn.Module, path, config: dict[str, dict], kind: Kind) -> None:
    try:
        for name, options in config.items():
            kind.patch_head(model, name, **{key: value for key, value in options.items() if key not in _ACTIVATIONS})
    except TypeError as error:
        raise ValueError(f"{path} holds no valid head configuration in its metadata ({error})") from None


def _check_same_configuration(path, config: dict, patched: dict, remedy: str) -> None:
    there = {name: _structure(options) for name, options in config.items()}
    here = {name: _structure(_config(head.tail)) for name, head in patched.items()}
    for name in here.keys() & there.keys():  # of the first files only the model knows the activations
        here[name] = {key: value for key, value in here[name].items() if key in there[name]}
    if here != there:
        raise ValueError(f"{path} holds heads {there}, but the model has {here}{remedy}")


def _structure(config: dict) -> dict:
    """What the weights were trained for; the rest may differ between a file and the model it is loaded into."""
    keys = ("num_experts", "gate_hidden", "image_gate", "temperature", *_ACTIVATIONS)
    return {key: config[key] for key in keys if key in config}


def _load(path, heads: dict, tensors: dict[str, Tensor]) -> None:
    """All or nothing: every name and shape is checked before a tensor is copied."""
    wanted = {f"{name}.{key}": value for name, head in heads.items() for key, value in head.tail.state_dict().items()}
    different = sorted(wanted.keys() ^ tensors.keys())
    if different:
        raise ValueError(f"{path} does not fit the model: {different[0]} is in only one of them")
    for key, value in wanted.items():
        found = tensors[key]
        if found.shape != value.shape:
            raise ValueError(
                f"{path} does not fit the model: {key} has shape {list(found.shape)}, expected {list(value.shape)}"
            )
        if not found.is_floating_point():
            raise ValueError(f"{path} is damaged: {key} holds {found.dtype}, expected floating point")
    for name, head in heads.items():
        head.tail.load_state_dict({key: tensors[f"{name}.{key}"] for key in head.tail.state_dict()})
