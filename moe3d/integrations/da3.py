"""patch_da3 and unpatch_da3: Depth Anything 3 (Lin et al., arXiv 2511.10647), its ``DualDPT`` and its ``DPT`` heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe3d.functional import moe_head
from moe3d.integrations.dpt import refuse_tail, require_image_resolution
from moe3d.nn import MoEHead, check_conv_block
from moe3d.ops.types import MoEOutput
from moe3d.position import position_tables

# Where a head is: in a network, in a nested one, in the API's wrapper of either.
_PLACES = ("head", "da3.head", "model.head", "model.da3.head")
_ATTRIBUTES = (
    "norm", "projects", "resize_layers", "scratch", "patch_size", "activation", "conf_activation", "pos_embed",
    "down_ratio", "intermediate_layer_idx", "head_main",
)  # fmt: skip
_LAYERS = (*(f"layer{i}_rn" for i in range(1, 5)), "output_conv1", "output_conv2")
_REFINENETS = tuple(f"refinenet{i}" for i in range(1, 5))
_RAY_LAYERS = (*(f"{name}_aux" for name in _REFINENETS), "output_conv1_aux", "output_conv2_aux")

# Depth Anything 3's names that mean something here, and what they are called here. (It takes unknown ones for linear.)
_ACTIVATIONS = {"exp": "exp", "relu": "relu", "sigmoid": "sigmoid", "linear": "linear"}
_CONF_ACTIVATIONS = {"expp1": "expp1", "exp": "expp0", "sigmoid": "sigmoid"}


def patch_da3(
    model: nn.Module,
    num_experts: int = 4,
    gate_hidden: int = 128,
    init_noise: float = 1e-2,
    temperature: float = 1.0,
    mode: str = "mean",
    gap: float = 0.3,
    image_gate: bool | str = False,
    sharpen: int = 0,
    return_experts: bool = False,
    backend: str = "auto",
    precision: str = "auto",
    skip_below: float | None = None,
    seed: int = 0,
) -> nn.Module:
    """Give Depth Anything 3 a mixture-of-experts depth head, in place.

    Everything after the head's ``output_conv1`` becomes a :class:`~moe3d.nn.MoEHead`, as in :func:`moe3d.patch_vggt`;
    with ``init_noise=0`` the model predicts what it did. The head's dictionary, and so the network's, keeps every key
    and gains ``depth_entropy`` [B, S, H, W] (nats), and with ``return_experts`` ``depth_weights`` and
    ``depth_hypotheses`` [B, S, K, H, W]. These are the head's own: what the network does to ``depth`` afterwards
    (filling the sky, and in the nested model the metric scale) is not done to them. The ray branch gives bit for bit
    what it gave; the sky branch runs through the same kernels as the experts.

    Args:
        model: a ``DepthAnything3Net``, a ``NestedDepthAnything3Net`` (whose ``da3`` is patched; for the other one pass
            ``model.da3_metric``), the ``DepthAnything3`` that wraps either, or a ``DualDPT`` or ``DPT`` head itself;
            judged by its attributes, not by its class.
        num_experts: K; 1 keeps the plain head and only accelerates it.
        gate_hidden: hidden channels of the gate.
        init_noise: of each expert's weights, relative to each tensor's standard deviation.
        temperature, mode, gap, return_experts, backend, precision, skip_below, seed: see :class:`~moe3d.nn.MoEHead`.
        image_gate, sharpen: likewise, for a head that is given ``images`` when it is called: by
            :class:`moe3d.models.depth_anything.DepthAnything3`, not by Depth Anything 3's own networks.

    Returns:
        The same model. Undo with :func:`unpatch_da3`. A stock checkpoint still loads, strictly.

    Raises:
        TypeError, ValueError: an unsuitable or already patched model, an argument of the wrong kind or out of range;
            the model is then untouched.
    """
    name, head = _head_of(model)
    if isinstance(head, PatchedDA3Head):
        raise ValueError(f"{name} is already patched: call unpatch_da3(model) first")
    _check_head(name, head)
    if image_gate or sharpen:
        _check_images(model, name, head)
    tail = MoEHead.from_conv_block(
        head.scratch.output_conv2,
        num_experts,
        gate_hidden,
        init_noise=init_noise,
        seed=seed,
        activation=_translate(name, "activation", head, _ACTIVATIONS),
        conf_activation=_translate(name, "conf_activation", head, _CONF_ACTIVATIONS) if _has_conf(head) else None,
        temperature=temperature,
        mode=mode,
        gap=gap,
        image_gate=image_gate,
        sharpen=sharpen,
        return_experts=return_experts,
        backend=backend,
        precision=precision,
        skip_below=skip_below,
    )
    head.stock_class = type(head)
    head.scratch.output_conv2 = tail
    head.__class__ = PatchedDA3Head
    return model


def unpatch_da3(model: nn.Module) -> nn.Module:
    """Give a patched model its stock head back, bit for bit as last loaded; nothing happens to an unpatched one."""
    for head in patched_heads(model).values():
        block: Any = head.tail.source_block
        block.train(head.tail.training)
        head.scratch.output_conv2 = block
        head.__class__ = head.stock_class
        del head.stock_class
    return model


def patched_heads(model: nn.Module) -> dict[str, PatchedDA3Head]:
    """The patched head as "depth", if there is one."""
    found = find_head(model)
    return {"depth": found[1]} if found and isinstance(found[1], PatchedDA3Head) else {}


def find_head(model: Any) -> tuple[str, Any] | None:
    """The depth head in a model, or the model itself if it is one, after what to call it in a message."""
    for place in ("", *_PLACES):
        head = model
        for name in filter(None, place.split(".")):
            head = getattr(head, name, None)
        if hasattr(head, "head_main"):
            return f"model.{place}".rstrip("."), head
    return None


class PatchedDA3Head(nn.Module):
    """A ``DualDPT`` or ``DPT`` with a mixture-of-experts tail; made by :func:`patch_da3`, never constructed.

    It is called as the stock head is; the stock class still gathers the features, cuts the frames into chunks and
    joins the results, so that only the computation for one chunk is written here.
    """

    # What _check_head has made sure of: the stock head's own attributes.
    norm: Any
    projects: Any
    resize_layers: Any
    scratch: Any
    patch_size: int
    conf_activation: str
    pos_embed: bool
    down_ratio: float
    intermediate_layer_idx: Sequence[int]
    head_main: str
    head_aux: str
    sky_name: str
    sky_activation: str

    stock_class: Any

    @property
    def tail(self) -> MoEHead:
        return self.scratch.output_conv2

    def other_branches(self) -> list[nn.Module]:
        """What predicts something else than depth: the rays, the sky."""
        names = [*(_RAY_LAYERS if _has_rays(self) else ()), *(["sky_output_conv2"] if _has_sky(self) else ())]
        return [getattr(self.scratch, name) for name in names]

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_tail(name)
        super().__setattr__(name, value)

    def forward(
        self,
        feats: Sequence[Any],
        H: int,
        W: int,
        patch_start_idx: int,
        chunk_size: int | None = 8,
        images: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Pairs or lists whose first is a token tensor [B, S, patch_start_idx + P, dim], one for each level; images
        [B, S, 3, H, W] in [0, 1] where the tail looks at them.

        ``chunk_size`` frames at a time bound the memory; None = all at once, as in an exported graph.
        """
        chunk_size = None if torch.compiler.is_exporting() else chunk_size
        if images is None:
            return self.stock_class.forward(self, feats, H, W, patch_start_idx, chunk_size=chunk_size)
        batch, frames = images.shape[:2]
        step = frames if chunk_size is None else chunk_size
        chunks = []
        for part in (slice(i, i + step) for i in range(0, frames, step)):  # the stock head would not cut the images
            tokens = [feat[0][:, part].flatten(0, 1) for feat in feats]
            results = self._forward_impl(tokens, H, W, patch_start_idx, images[:, part].flatten(0, 1))
            chunks.append({key: value.unflatten(0, (batch, -1)) for key, value in results.items()})
        return {key: torch.cat([chunk[key] for chunk in chunks], dim=1) for key in chunks[0]}

    def _forward_impl(
        self, feats: Sequence[Tensor], H: int, W: int, patch_start_idx: int, image: Tensor | None = None
    ) -> dict[str, Tensor]:
        """One chunk: token tensors [N, patch_start_idx + P, dim] and images [N, 3, H, W] to results with N frames in
        front."""
        grid = (H // self.patch_size, W // self.patch_size)
        levels = [
            self._project(i, feats[layer][:, patch_start_idx:], grid, (H, W))
            for i, layer in enumerate(self.intermediate_layer_idx)
        ]
        levels = [getattr(self.scratch, f"layer{i}_rn")(level) for i, level in enumerate(levels, start=1)]
        fused = self.scratch.output_conv1(_fuse(self.scratch, levels))
        rows, columns = (int(n * self.patch_size / self.down_ratio) for n in grid)
        size = (rows, columns)
        pos = position_tables(size, fused.shape[1], W / H, fused) if self.pos_embed else None
        results = self._present(self.tail(fused, size, pos=pos, image=image))
        if _has_rays(self):
            results |= self._rays(_fuse(self.scratch, levels, "_aux"), (H, W))
        if _has_sky(self):
            results[self.sky_name] = self._sky(fused, size, pos)
        return results

    def _project(self, level: int, tokens: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Patch tokens [N, P, dim] of one layer to a feature map of its own scale."""
        x = self.norm(tokens).transpose(1, 2)
        x = x if _has_rays(self) else x.contiguous()  # as either stock head: how a convolution rounds is in the layout
        return self.resize_layers[level](self._embed(self.projects[level](x.unflatten(2, grid)), size))

    def _embed(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        height, width = size
        return self.stock_class._add_pos_embed(self, x, width, height) if self.pos_embed else x

    def _present(self, output: MoEOutput) -> dict[str, Tensor]:
        """The stock head's own keys and shapes, and what a mixture knows beyond them."""
        name = self.head_main
        results = {name: self._points(output.prediction)}
        if output.confidence is not None:
            results[f"{name}_conf"] = output.confidence
        results[f"{name}_entropy"] = output.entropy
        if output.weights is not None and output.hypotheses is not None:
            results[f"{name}_weights"] = output.weights
            results[f"{name}_hypotheses"] = self._points(output.hypotheses)
        return results

    def _points(self, values: Tensor) -> Tensor:
        """[..., O-1, H, W] to [..., H, W, O-1], and to [..., H, W] where the stock head drops that dimension."""
        values = values.movedim(-3, -1)
        return values.squeeze(-1) if _has_rays(self) or not _has_conf(self) else values

    def _rays(self, fused: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """The auxiliary branch at its last level, the only one that the stock head returns."""
        x = self._embed(self.scratch.output_conv1_aux[-1](fused), size)
        rays = self.scratch.output_conv2_aux[-1](x).movedim(1, -1)
        confidence = self.stock_class._apply_activation_single(self, rays[..., -1], self.conf_activation)
        return {self.head_aux: rays[..., :-1], f"{self.head_aux}_conf": confidence}

    def _sky(self, fused: Tensor, size: tuple[int, int], pos: tuple[Tensor, Tensor] | None) -> Tensor:
        """The sky's output block is a head of one expert without confidence, [N, H, W]."""
        first, _, last = self.scratch.sky_output_conv2
        output = moe_head(
            fused,
            size,
            pos=pos,
            expert_w1=first.weight[None],
            expert_b1=first.bias[None],
            expert_w2=last.weight.flatten(1)[None],
            expert_b2=last.bias[None],
            activation=_sky_activation(self),
            conf_activation=None,
            backend=self.tail.backend,
            precision=self.tail.precision,
        )
        return output.prediction.squeeze(1)


def _fuse(scratch: Any, levels: Sequence[Tensor], branch: str = "") -> Tensor:
    """The refinement pyramid of the main or the auxiliary ("_aux") branch, coarsest level first."""
    first, second, third, fourth = levels
    refine1, refine2, refine3, refine4 = (getattr(scratch, f"{name}{branch}") for name in _REFINENETS)
    x = refine4(fourth, size=third.shape[2:])
    x = refine3(x, third, size=second.shape[2:])
    x = refine2(x, second, size=first.shape[2:])
    return refine1(x, first)


def _has_rays(head: Any) -> bool:
    """A ``DualDPT``, rather than a ``DPT``."""
    return hasattr(head, "head_aux")


def _has_sky(head: Any) -> bool:
    return getattr(head, "use_sky_head", False)


def _has_conf(head: Any) -> bool:
    return getattr(head, "has_conf", True)


def _sky_activation(head: Any) -> str:
    activation = str(head.sky_activation).lower()
    return activation if activation in ("sigmoid", "relu") else "linear"


def _head_of(model: Any) -> tuple[str, Any]:
    found = find_head(model)
    if found is None:
        raise ValueError(
            "model must be a DualDPT or DPT head of Depth Anything 3 (which have head_main), or hold one as "
            f"{', '.join(_PLACES[:-1])} or {_PLACES[-1]}, got {type(model).__name__} without one"
        )
    return found


def _check_head(name: str, head: Any) -> None:
    """ValueError that says what was looked for and what was found, unless ``head`` has the structure of either head."""
    wanted = [*_LAYERS, *_REFINENETS, *(_RAY_LAYERS if _has_rays(head) else ())]
    missing = [a for a in _ATTRIBUTES if not hasattr(head, a)]
    missing += [f"scratch.{a}" for a in wanted if not hasattr(getattr(head, "scratch", None), a)]
    if missing:
        raise ValueError(
            f"{name} must have the attributes of Depth Anything 3's depth heads, got {type(head).__name__} without "
            f"{', '.join(missing)}"
        )
    if hasattr(head, "images_merger"):
        raise ValueError(f"{name} must predict depth, got {type(head).__name__}, which merges images into its features")
    for block in ("output_conv2", "sky_output_conv2") if _has_sky(head) else ("output_conv2",):
        try:
            check_conv_block(getattr(head.scratch, block))
        except ValueError as error:
            raise ValueError(f"{name}.scratch.{block}: {error}") from None


def _check_images(model: Any, name: str, head: Any) -> None:
    """ValueError where the head is not shown images, or not at the resolution at which it predicts."""
    if head is not model and not getattr(model, "shows_images", False):
        raise ValueError(
            "image_gate and sharpen need a model that gives its head the images, as moe3d.models.DepthAnything3 does, "
            f"got {type(model).__name__}"
        )
    require_image_resolution(name, head)


def _translate(name: str, attribute: str, head: Any, names: dict[str, str]) -> str:
    value = getattr(head, attribute)
    if not isinstance(value, str) or value.lower() not in names:
        raise ValueError(f"{name}.{attribute} must be one of {', '.join(names)}, got {value!r}")
    return names[value.lower()]
