"""patch and unpatch: for a model of any kind that the package knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from moe3d.integrations import da3, vggt


class Kind(NamedTuple):
    """How to recognise one family of models, and what to do with it."""

    name: str
    what: str  # was looked for
    fits: Callable[[Any], bool]
    patch: Callable[..., nn.Module]
    patch_head: Callable[..., nn.Module]  # (model, one head's name, other options of ``patch``)
    unpatch: Callable[[nn.Module], nn.Module]
    patched_heads: Callable[[nn.Module], dict[str, Any]]


def _fits_vggt(model: Any) -> bool:
    # moe3d.models gives Depth Anything 3 VGGT's attributes, too.
    return any(hasattr(model, f"{name}_head") for name in vggt.HEADS) and not _fits_da3(model)


def _patch_vggt_head(model: nn.Module, name: str, **options: Any) -> nn.Module:
    return vggt.patch_vggt(model, heads=(name,), **options)


def _fits_da3(model: Any) -> bool:
    return da3.find_head(model) is not None


def _patch_da3_head(model: nn.Module, name: str, **options: Any) -> nn.Module:
    if name != "depth":
        raise ValueError(f"Depth Anything 3 has no other head than that of depth, got {name!r}")
    return da3.patch_da3(model, **options)


KINDS = (
    Kind(
        "vggt",
        "a depth_head or point_head like VGGT's",
        _fits_vggt,
        vggt.patch_vggt,
        _patch_vggt_head,
        vggt.unpatch_vggt,
        vggt.patched_heads,
    ),
    Kind(
        "da3",
        "a head with head_main like Depth Anything 3's (or be one)",
        _fits_da3,
        da3.patch_da3,
        _patch_da3_head,
        da3.unpatch_da3,
        da3.patched_heads,
    ),
)


def patch(model: nn.Module, num_experts: int = 4, **options: Any) -> nn.Module:
    """Give a model mixture-of-experts heads, in place, whichever kind it is; judged by its attributes.

    Args:
        model: what :func:`moe3d.patch_vggt` or :func:`moe3d.patch_da3` takes.
        num_experts: K; 1 keeps the plain head and only accelerates it.
        options: the others of that function.

    Returns:
        The same model. Undo with :func:`unpatch`.

    Raises:
        ValueError: no kind fits, or as that function; the model is then untouched.
        TypeError: an option that this kind of model does not have, or as that function.
    """
    return kind_of(model).patch(model, num_experts, **options)


def unpatch(model: nn.Module) -> nn.Module:
    """Give a patched model its stock heads back, bit for bit as last loaded; nothing happens to an unpatched one.

    Raises:
        ValueError: a model of no kind that could have been patched.
    """
    return kind_of(model).unpatch(model)


def patched_heads(model: nn.Module) -> dict[str, Any]:
    """The patched heads by name ("depth", "point"); none in a model of an unknown kind."""
    for kind in KINDS:
        if kind.fits(model):
            return kind.patched_heads(model)
    return {}


def kind_of(model: nn.Module) -> Kind:
    """The first kind that fits, or a ValueError that says what was looked for."""
    for kind in KINDS:
        if kind.fits(model):
            return kind
    wanted = ", or ".join(kind.what for kind in KINDS)
    raise ValueError(f"model must have {wanted}, got {type(model).__name__} with neither")
