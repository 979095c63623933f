"""Who races over the whole depth head (tokens to depth) and the whole model.

The stock head is VGGT's own where its package can be imported, else this package's equal; either way its embedding is
rebuilt in float64 at every call, as VGGT does, or kept.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import moe3d
from moe3d.benchmark.accuracy import Error, Judge, join, truth
from moe3d.benchmark.case import VGGT_CHUNK, Case, Weights, random_weights
from moe3d.benchmark.peers import (
    BY_EXPERT,
    STOCK,
    STOCK_CACHED,
    Tail,
    by_expert,
    embedding,
    features,
    require_backend,
)
from moe3d.benchmark.race import Contestant
from moe3d.integrations import patch_vggt
from moe3d.models import MiniVGGT
from moe3d.models.dpt import DPTHead
from moe3d.nn import MoEHead
from moe3d.position import position_tables

Model = Any  # VGGT's or ours: known by its attributes
Head = Any
Tokens = Mapping[int, Tensor] | Sequence[Tensor]  # by layer of the backbone

SPECIAL_TOKENS = 5
_JUDGES: dict[str, str | None] = {
    STOCK_CACHED: None,
    STOCK: STOCK_CACHED,
    BY_EXPERT: None,
}  # the plain peers, and by whom each is judged


def names() -> list[str]:
    """The plain peers, those first that judge, and the package's backends."""
    return [*_JUDGES, *moe3d.backends()]


def judge_of(name: str) -> str | None:
    return _JUDGES.get(name, BY_EXPERT)


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[2], x.shape[3]


class RebuiltEmbedding:
    """Mixed into a DPT head: VGGT's embedding, as VGGT computes it."""

    def _apply_pos_embed(self, x: Tensor, W: int, H: int) -> Tensor:
        return x + embedding(_size(x), x.shape[1], x.device, W / H).to(x.dtype)


class CachedEmbedding:
    """Mixed into a DPT head: the same, computed once for each shape."""

    def _apply_pos_embed(self, x: Tensor, W: int, H: int) -> Tensor:
        kept = self.__dict__.setdefault("kept_embeddings", {})
        key = (x.shape[1:], W / H, x.dtype)
        if key not in kept:
            kept[key] = embedding(_size(x), x.shape[1], x.device, W / H).to(x.dtype).contiguous()
        return x + kept[key]


def _mix_in(head: Head, mixin: type) -> Head:
    head.__class__ = type(mixin.__name__, (mixin, type(head)), {})
    return head


class EagerHead(nn.Module):
    """A stock head's front with a mixture in plain PyTorch behind it, in VGGT's chunks of frames."""

    def __init__(self, stock: Head, tail: Tail):
        super().__init__()
        self.stock, self.tail = stock, tail

    def forward(self, tokens: Tokens, images: Tensor, patch_start_idx: int) -> tuple[Tensor, Tensor]:
        chunks = [slice(start, start + VGGT_CHUNK) for start in range(0, images.shape[1], VGGT_CHUNK)]
        outputs = join([self.tail(front(self.stock, tokens, images, patch_start_idx, frames)) for frames in chunks])
        return outputs.prediction.movedim(1, -1)[None], outputs.confidence[None]


def front(head: Head, tokens: Tokens, images: Tensor, patch_start_idx: int, frames: slice) -> Tensor:
    """A DPT head's features before the tail, [frames, C, h, w], of a batch of one sequence."""
    height, width = images.shape[-2:]
    grid = (height // head.patch_size, width // head.patch_size)
    levels = []
    for layer, project, resize in zip(head.intermediate_layer_idx, head.projects, head.resize_layers, strict=True):
        x = head.norm(tokens[layer][0, frames, patch_start_idx:])
        x = project(x.mT.unflatten(2, grid))
        levels.append(resize(head._apply_pos_embed(x, width, height)))
    return head.scratch_forward(levels)


class HeadAlone(nn.Module):
    """A model that is nothing but its depth head."""

    def __init__(self, head: Head):
        super().__init__()
        self.depth_head = head

    def forward(self, tokens: Tokens, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.depth_head(tokens, images=images, patch_start_idx=SPECIAL_TOKENS)


class ModelField:
    """The contestants of one case over a model with a depth head: copies that share everything but that head."""

    def __init__(
        self,
        model: Model,
        inputs: tuple,
        case: Case,
        wanted: Sequence[str],
        seed: int = 0,
        autocast: bool = False,
    ):
        """``model(*inputs)`` returns a pair (depth, confidence) or VGGT's dictionary, for one sequence.

        ``autocast``: run it under bfloat16 autocast, as VGGT is run on GPUs (its heads switch that off again).
        """
        self.model, self.case = model, case
        with_judges = {*wanted, *map(judge_of, wanted)}
        self.names = [name for name in names() if name in with_judges]
        self.run = partial(_run, inputs, torch.device(case.device).type, autocast)
        self.judge = Judge(case.precision)
        self.weights = {c.experts: random_weights(c, seed) for c in (case.single, case)}
        self.seen = _head_inputs(model, self.run)
        _calibrate(model.depth_head, *self.seen)
        _load_block(model.depth_head.scratch.output_conv2, self.weights[1])
        self._truths: dict[int, tuple[Tensor, Tensor]] = {}

    def contestants(self) -> list[Contestant]:
        return [Contestant(name, partial(self._prepare, name), partial(self._check, name)) for name in self.names]

    @torch.no_grad()
    def _prepare(self, name: str) -> Callable[[int], object]:
        require_backend(name, self.case.device)
        model = self._variant(name)
        return lambda i: self.run(model)

    @torch.no_grad()
    def _check(self, name: str, outputs: Any) -> Error:
        pair = (outputs["depth"], outputs["depth_conf"]) if isinstance(outputs, dict) else outputs
        experts = 1 if name in (STOCK, STOCK_CACHED) else self.case.experts
        if experts not in self._truths:
            self._truths[experts] = self._true_pair(self.weights[experts])
        return self.judge(name, judge_of(name), pair, self._truths[experts])

    def _variant(self, name: str) -> Model:
        model = self._sibling()
        head, mixture = model.depth_head, self.weights[self.case.experts]
        if name == STOCK:
            _mix_in(head, RebuiltEmbedding)
        elif name == STOCK_CACHED:
            _mix_in(head, CachedEmbedding)
        elif name == BY_EXPERT:
            tail = by_expert(features(self.case, cached=False), mixture)
            model.depth_head = EagerHead(_mix_in(head, RebuiltEmbedding), tail)
        else:
            options: dict[str, Any] = {"skip_below": 0.0, "backend": name, "precision": self.case.precision}
            patch_vggt(model, self.case.experts, self.case.gate_hidden, **options)
            _load_mixture(head.tail, mixture)
        return model

    def _sibling(self) -> Model:
        """A copy that shares everything but the depth head."""
        shared = {id(child): child for name, child in self.model.named_children() if name != "depth_head"}
        return copy.deepcopy(self.model, shared)

    def _true_pair(self, weights: Weights) -> tuple[Tensor, Tensor]:
        """Depth and confidence in float64 from the tokens that the head gets: its own error, not the backbone's."""
        size = self.case.size
        tables = position_tables(size, self.case.channels, size[1] / size[0], weights.expert_b1)
        true = join([truth(x, weights, size, tables) for x in self._true_features])
        return true.prediction.movedim(1, -1)[None], true.confidence[None]

    @functools.cached_property
    def _true_features(self) -> list[Tensor]:
        """What the tail gets, frame by frame, in float64."""
        tokens, images, start = self.seen
        head = copy.deepcopy(self.model.depth_head).double()
        needed = {layer: tokens[layer].double() for layer in head.intermediate_layer_idx}
        return [front(head, needed, images, start, slice(f, f + 1)) for f in range(self.case.frames)]


@torch.no_grad()
def _run(inputs: tuple, device_type: str, autocast: bool, model: Model) -> object:
    with torch.autocast(device_type, torch.bfloat16, enabled=autocast):
        return model(*inputs)


def _head_inputs(model: Model, run: Callable[[Model], object]) -> tuple[Tokens, Tensor, int]:
    """Tokens, images and patch_start_idx that the depth head gets."""
    seen = []

    def keep(module, args, kwargs):
        seen.append((*args, *kwargs.values()))

    handle = model.depth_head.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        run(model)
    finally:
        handle.remove()
    return seen[0]


@torch.no_grad()
def _calibrate(head: Head, tokens: Tokens, images: Tensor, patch_start_idx: int) -> None:
    """Features of standard deviation 1 into the tail, so that its outputs vary."""
    scale = front(head, tokens, images, patch_start_idx, slice(0, 1)).std()
    head.scratch.output_conv1.weight /= scale
    head.scratch.output_conv1.bias /= scale


@torch.no_grad()
def _load_block(block: Any, w: Weights) -> None:
    block[0].weight.copy_(w.expert_w1[0])
    block[0].bias.copy_(w.expert_b1[0])
    block[2].weight.copy_(w.expert_w2[0][:, :, None, None])
    block[2].bias.copy_(w.expert_b2[0])


@torch.no_grad()
def _load_mixture(tail: MoEHead, w: Weights) -> None:
    for name, value in w._asdict().items():
        if value is not None:
            getattr(tail, name).copy_(value)


@torch.no_grad()
def head_field(case: Case, wanted: Sequence[str], seed: int = 0) -> ModelField:
    """VGGT's depth head with random weights, on random tokens of its backbone's shape."""
    generator = torch.Generator(case.device).manual_seed(seed)
    head = randomise(vggt_head().to(case.device), seed)
    grid = (case.height // head.patch_size) * (case.width // head.patch_size)
    shape = (1, case.frames, SPECIAL_TOKENS + grid, head.norm.normalized_shape[0])
    layers = head.intermediate_layer_idx
    tokens = {layer: torch.randn(shape, generator=generator, device=case.device) for layer in layers}
    images = torch.empty(1, case.frames, 3, *case.size, device=case.device)
    return ModelField(HeadAlone(head).eval(), (tokens, images), case, wanted, seed)


def vggt_head() -> Head:
    """VGGT's depth head: the package's own class where it can be imported, else ours of the same arithmetic."""
    try:
        from vggt.heads.dpt_head import DPTHead as Head
    except ImportError:
        Head = DPTHead
    return Head(dim_in=2048, output_dim=2, activation="exp", conf_activation="expp1")


@torch.no_grad()
def randomise(module: Any, seed: int) -> Any:
    """Weights under which activations neither vanish nor explode."""
    generator = torch.Generator(next(module.parameters()).device).manual_seed(seed)
    for layer in module.modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() > 1:
            weight.normal_(0, (2 / weight[0].numel()) ** 0.5, generator=generator)
    return module


@torch.no_grad()
def mini_field(case: Case, wanted: Sequence[str], seed: int = 0) -> ModelField:
    """The whole MiniVGGT with random weights; ``case.channels`` are those of its tail."""
    torch.manual_seed(seed)
    return _model_field(MiniVGGT(features=2 * case.channels).to(case.device), case, wanted, seed)


@torch.no_grad()
def vggt_field(case: Case, wanted: Sequence[str], seed: int = 0) -> ModelField:
    """VGGT-1B's architecture with random weights, its depth and camera heads; ImportError without ``vggt``."""
    from vggt.models.vggt import VGGT

    with torch.device(case.device):
        model = VGGT(enable_point=False, enable_track=False)
    return _model_field(randomise(model, seed), case, wanted, seed)


def _model_field(model: Model, case: Case, wanted: Sequence[str], seed: int) -> ModelField:
    generator = torch.Generator(case.device).manual_seed(seed)
    images = torch.rand(1, case.frames, 3, *case.size, generator=generator, device=case.device)
    on_gpu = torch.device(case.device).type == "cuda"
    return ModelField(model.eval(), (images,), case, wanted, seed, autocast=on_gpu)
