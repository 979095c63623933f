"""patch_vggt and unpatch_vggt: VGGT and every model whose heads are built like its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moe3d.integrations.dpt import (
    PatchedDPTHead,
    check_head,
    patch_head,
    require_image_resolution,
    unpatch_head,
)
from moe3d.nn import MoEHead

HEADS = ("depth", "point")


def patch_vggt(
    model: nn.Module,
    num_experts: int = 4,
    gate_hidden: int = 128,
    heads: Sequence[str] = ("depth",),
    init_noise: float = 1e-2,
    temperature: float = 1.0,
    mode: str = "mean",
    gap: float = 0.3,
    image_gate: bool | str = False,
    sharpen: int = 0,
    return_experts: bool = False,
    backend: str = "auto",
    precision: str = "auto",
    optimize_head: bool = True,
    skip_below: float | None = None,
    seed: int = 0,
    head_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Give a VGGT-like model mixture-of-experts depth (and point) heads, in place.

    Everything after a head's ``output_conv1`` (upsampling, position embedding, output block, activations) becomes a
    :class:`~moe3d.nn.MoEHead` whose experts are noisy copies of the stock block and whose gate is uniform: with
    ``init_noise=0`` the model predicts what it did. The model's dictionary keeps every key and gains ``depth_entropy``
    [B, S, H, W] (nats), and with ``return_experts`` ``depth_weights`` and ``depth_hypotheses`` [B, S, K, H, W]
    (``point_...`` likewise; a point head's hypotheses are [B, S, K, H, W, 3]). The track head stays as it is.

    Args:
        model: any module with ``depth_head`` / ``point_head`` of VGGT's DPT structure (not judged by class).
        num_experts: K; 1 keeps the plain head and only accelerates it.
        gate_hidden: hidden channels of the gate; K = 4 with 128 is the paper's budget (inferred from its figures).
        heads: which of "depth" and "point".
        init_noise: of each expert's weights, relative to each tensor's standard deviation.
        optimize_head: let the head's front, tokens to fused features, run in the package's faster order of operations
            (:mod:`moe3d.integrations.front`); the outputs are the same within rounding.
        head_dtype: torch.bfloat16 or torch.float16 for the heads' convolutions in that type, on parameters that stay as
            they are; VGGT's own heads fail so. Depths of a random head of VGGT's size then differ by 0.5% RMS and 3% at
            worst (bfloat16), or 0.06% and 0.3% (float16). On a CPU it saves no time. None: the parameters' own type.
        temperature, mode, gap, image_gate, sharpen, return_experts, backend, precision, skip_below, seed: see
            :class:`~moe3d.nn.MoEHead`.

    Returns:
        The same model. Undo with :func:`unpatch_vggt`. A stock checkpoint still loads, strictly.

    Raises:
        TypeError, ValueError: an unsuitable or already patched model, an argument of the wrong kind or out of range;
            the model is then untouched.
    """
    names = _check_heads(heads)
    if head_dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"head_dtype must be None, torch.bfloat16 or torch.float16, got {head_dtype!r}")
    for name in names:
        if not hasattr(model, name):
            raise ValueError(f"model must have a {name} like VGGT's, got {type(model).__name__} without one")
        head = _unwrapped(getattr(model, name))
        if isinstance(head, PatchedDPTHead):
            raise ValueError(f"model.{name} is already patched: call unpatch_vggt(model) first")
        check_head(name, head)
        if image_gate or sharpen:
            require_image_resolution(f"model.{name}", head)
    tails = {
        name: _tail(
            _unwrapped(getattr(model, name)),
            num_experts=num_experts,
            gate_hidden=gate_hidden,
            init_noise=init_noise,
            temperature=temperature,
            mode=mode,
            gap=gap,
            image_gate=image_gate,
            sharpen=sharpen,
            return_experts=return_experts,
            backend=backend,
            precision=precision,
            skip_below=skip_below,
            seed=seed,
        )
        for name in names
    }
    for name, tail in tails.items():
        patch_head(_unwrapped(getattr(model, name)), tail, optimize_head, head_dtype)
    _install_hooks(model)
    return model


def unpatch_vggt(model: nn.Module) -> nn.Module:
    """Give a patched model its stock heads back, bit for bit as last loaded; nothing happens to an unpatched one."""
    for head in patched_heads(model).values():
        unpatch_head(head)
    _remove_hooks(model)
    return model


def patched_heads(model: nn.Module) -> dict[str, PatchedDPTHead]:
    """The patched heads by name ("depth", "point")."""
    found = {name: _unwrapped(getattr(model, f"{name}_head", None)) for name in HEADS}
    return {name: head for name, head in found.items() if isinstance(head, PatchedDPTHead)}


def _unwrapped(module: Any) -> Any:
    """What a compiled, checkpointed or sharded module wraps."""
    for name in ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"):
        if name in getattr(module, "_modules", {}):
            return _unwrapped(module._modules[name])
    return module


def _tail(head: Any, **options: Any) -> MoEHead:
    return MoEHead.from_conv_block(
        head.scratch.output_conv2, activation=head.activation, conf_activation=head.conf_activation, **options
    )


def _check_heads(heads: Sequence[str]) -> list[str]:
    names = [heads] if isinstance(heads, str) else heads
    valid = isinstance(names, Sequence) and all(name in HEADS for name in names)
    if not valid or not 0 < len(names) == len(set(names)):
        raise ValueError(f"heads must name one or both of {', '.join(HEADS)}, got {heads!r}")
    return [f"{name}_head" for name in names]


def _expect_extras(model: nn.Module, args) -> None:
    for head in patched_heads(model).values():
        head.expect_extras()


def _add_extras(model: nn.Module, args, predictions):
    """The patched heads' extras into the model's dictionary; a model that returns something else keeps it as it is."""
    for name, head in patched_heads(model).items():
        extras = head.take_extras()
        if isinstance(predictions, dict):
            for key, value in extras.items():  # one by one: StreamVGGT's ModelOutput forbids ``update``
                predictions[f"{name}_{key}"] = value
    return predictions


def _install_hooks(model: nn.Module) -> None:
    if _expect_extras in model._forward_pre_hooks.values():
        return  # another head was patched before
    model.register_forward_pre_hook(_expect_extras)
    model.register_forward_hook(_add_extras, always_call=True)


def _remove_hooks(model: nn.Module) -> None:
    """By identity, not by handle: a handle would have to live on the model, and be copied and pickled with it."""
    for hooks, ours in ((model._forward_pre_hooks, _expect_extras), (model._forward_hooks, _add_extras)):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)
