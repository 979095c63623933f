"""The head as a module: parameters around :func:`moe3d.functional.moe_head`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe3d.functional import check_number, check_options, moe_head
from moe3d.ops.types import MoEOutput
from moe3d.sharpen import sharpen

DEFAULT_SKIP_BELOW = 1e-6  # in eval mode: costs no measurable accuracy (1e-3 would)
GUIDED = "guided"
_OPTIONS = ("temperature", "activation", "conf_activation", "mode", "gap", "return_experts", "backend", "precision")


class MoEHead(nn.Module):
    """K expert output blocks and a gate in place of one output block (MoE3D, arXiv 2601.05208).

    Args:
        in_channels: C, the channels of the fused decoder features.
        out_channels: O, per expert: prediction, then confidence (VGGT: depth 2, points 4).
        num_experts: K. With K = 1 there is no gate: the plain block through the fast kernels.
        expert_hidden: Hd, hidden channels of an expert (VGGT's block: 32).
        gate_hidden: Hg, hidden channels of the gate. K = 4 with 128 is what the paper's cost figures imply (inferred).
        image_gate: add a small branch on the RGB image to the gate's logits; "guided" lets it see the features, too, so
            that an edge of the image and the features beside it decide together.
        sharpen: in eval mode, so many passes of :func:`moe3d.sharpen.sharpen` over the prediction, which move its edges
            to the image's; only for a prediction of one channel. A plain attribute, too.
        activation, conf_activation, temperature, mode, gap, skip_below, backend, precision, return_experts: see
            :func:`moe3d.functional.moe_head`. They are plain attributes and may be changed at any time.
            ``skip_below=None`` means 1e-6 in eval mode, and 0 in training or with ``return_experts``.
        seed: of the gate's (and, in :meth:`from_conv_block`, the noise's) own generator; the global random state
            never advances.

    The gate's last layer starts at zero: every weight is exactly 1/K and the entropy log K.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range; the message names it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 2,
        num_experts: int = 4,
        *,
        expert_hidden: int = 32,
        gate_hidden: int = 128,
        image_gate: bool | str = False,
        sharpen: int = 0,
        activation: str = "exp",
        conf_activation: str | None = "expp1",
        temperature: float = 1.0,
        mode: str = "mean",
        gap: float = 0.3,
        return_experts: bool = False,
        skip_below: float | None = None,
        backend: str = "auto",
        precision: str = "auto",
        seed: int = 0,
    ):
        super().__init__()
        counts = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "num_experts": num_experts,
            "expert_hidden": expert_hidden,
            "gate_hidden": gate_hidden,
        }
        for name, value in counts.items():
            _check_integer(name, value, at_least=1)
        _check_integer("seed", seed, at_least=0)
        _check_integer("sharpen", sharpen, at_least=0)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.num_experts, self.expert_hidden, self.gate_hidden = num_experts, expert_hidden, gate_hidden
        self.activation, self.conf_activation = activation, conf_activation
        self.temperature, self.mode, self.gap, self.sharpen = temperature, mode, gap, sharpen
        self.return_experts, self.skip_below = return_experts, skip_below
        self.backend, self.precision, self.seed = backend, precision, seed
        check_options((1, 1), out_channels, **self._options())
        self._check_sharpen(out_channels - (conf_activation is not None))
        self.init_noise = 0.0
        self._source: tuple[nn.Sequential, ...] = ()  # the block that from_conv_block copied, hidden in a tuple

        self.expert_w1 = nn.Parameter(torch.empty(num_experts, expert_hidden, in_channels, 3, 3))
        self.expert_b1 = nn.Parameter(torch.empty(num_experts, expert_hidden))
        self.expert_w2 = nn.Parameter(torch.empty(num_experts, out_channels, expert_hidden))
        self.expert_b2 = nn.Parameter(torch.empty(num_experts, out_channels))
        gated = num_experts > 1
        self.gate_w1 = nn.Parameter(torch.empty(gate_hidden, in_channels, 3, 3)) if gated else None
        self.gate_b1 = nn.Parameter(torch.empty(gate_hidden)) if gated else None
        self.gate_w2 = nn.Parameter(torch.empty(num_experts, gate_hidden)) if gated else None
        self.gate_b2 = nn.Parameter(torch.empty(num_experts)) if gated else None
        _check_image_gate(image_gate)
        seen = in_channels if image_gate == GUIDED else 0
        self.image_gate = ImageGate(num_experts, seen) if gated and image_gate else None
        generator = _generator(seed)
        self._reset_experts(generator)
        self._reset_gate(generator)

    @classmethod
    def from_conv_block(
        cls,
        block: nn.Sequential,
        num_experts: int = 4,
        gate_hidden: int = 128,
        *,
        init_noise: float = 1e-2,
        seed: int = 0,
        **options: Any,
    ) -> MoEHead:
        """K copies of a pretrained output block, each with its own noise, and a uniform gate.

        Args:
            block: ``Sequential(Conv2d(C, Hd, 3, padding=1), ReLU, Conv2d(Hd, O, 1))``, as VGGT's ``output_conv2``.
            init_noise: standard deviation of the Gaussian noise, relative to each tensor's own; breaks the symmetry
                between experts. A single expert gets none: it is the block itself.
            options: as for the constructor.

        The new parameters take the block's device, dtype and training flag. The block is kept, outside the module's
        parameters and state dict, for :attr:`source_block`; a state dict of the plain block loads, too, and fills
        every expert from it.

        Raises:
            TypeError, ValueError: a block of another structure, an argument of the wrong kind or out of range.
        """
        first, last = check_conv_block(block)
        init_noise = check_number("init_noise", init_noise)
        with first.weight.device:
            head = cls(
                first.in_channels,
                last.out_channels,
                num_experts,
                expert_hidden=first.out_channels,
                gate_hidden=gate_hidden,
                seed=seed,
                **options,
            )
        head.init_noise = init_noise
        head._source = (block,)
        head.to(dtype=first.weight.dtype).train(block.training)
        head._copy_source()
        return head

    @property
    def source_block(self) -> nn.Sequential | None:
        """The plain block that the experts were copied from, as last loaded; None if there was none."""
        return self._source[0] if self._source else None

    def forward(
        self,
        x: Tensor,
        size: tuple[int, int],
        pos: tuple[Tensor, Tensor] | None = None,
        image: Tensor | None = None,
    ) -> MoEOutput:
        """x [B, C, h, w] and, if :attr:`sees_image`, image [B, 3, H, W] in [0, 1], to outputs at ``size`` = (H, W).

        Raises:
            TypeError, ValueError, RuntimeError: as :func:`moe3d.functional.moe_head`, or no image where one is needed.
        """
        if image is None and self.sees_image:
            raise ValueError("image must be given to a head with image_gate or sharpen, got None")
        gate_logits = self.image_gate(image, x) if self.image_gate is not None else None
        output = moe_head(
            x,
            size,
            expert_w1=self.expert_w1,
            expert_b1=self.expert_b1,
            expert_w2=self.expert_w2,
            expert_b2=self.expert_b2,
            gate_w1=self.gate_w1,
            gate_b1=self.gate_b1,
            gate_w2=self.gate_w2,
            gate_b2=self.gate_b2,
            gate_logits=gate_logits,
            pos=pos,
            **self._options(),
        )
        return output if self.training or not self.sharpen else self._sharpened(output, image)

    @property
    def sees_image(self) -> bool:
        """Whether the image must be given: to the gate, or to sharpen the prediction."""
        return self.image_gate is not None or bool(self.sharpen)

    def _sharpened(self, output: MoEOutput, image: Any) -> MoEOutput:
        self._check_sharpen(output.prediction.shape[1])
        sharp = sharpen(output.prediction.squeeze(1), image, self.sharpen)
        return MoEOutput(sharp.unsqueeze(1), *output[1:])

    def _check_sharpen(self, channels: int) -> None:
        if self.sharpen and channels != 1:
            raise ValueError(f"sharpen must be 0 for a prediction of {channels} channels, got {self.sharpen!r}")

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, num_experts={self.num_experts}, "
            f"expert_hidden={self.expert_hidden}, gate_hidden={self.gate_hidden}, mode={self.mode!r}"
        )

    def _options(self) -> dict[str, Any]:
        """The arguments of :func:`moe_head` that are no tensors, as the attributes have them now."""
        skip_below = self.skip_below
        if skip_below is None:
            skip_below = 0.0 if self.training or self.return_experts else DEFAULT_SKIP_BELOW
        return {name: getattr(self, name) for name in _OPTIONS} | {"skip_below": skip_below}

    @torch.no_grad()
    def _reset_experts(self, generator: torch.Generator) -> None:
        """As nn.Conv2d starts, but from the head's own generator."""
        for weight, bias in ((self.expert_w1, self.expert_b1), (self.expert_w2, self.expert_b2)):
            bound = weight[0, 0].numel() ** -0.5
            _fill_uniform(weight, bound, generator)
            _fill_uniform(bias, bound, generator)

    @torch.no_grad()
    def _reset_gate(self, generator: torch.Generator) -> None:
        """A random first layer under a last layer of zeros, so that the weights are exactly uniform."""
        if self.gate_w1 is None or self.gate_b1 is None or self.gate_w2 is None or self.gate_b2 is None:
            return
        bound = self.gate_w1[0].numel() ** -0.5
        _fill_uniform(self.gate_w1, bound, generator)
        _fill_uniform(self.gate_b1, bound, generator)
        self.gate_w2.zero_()
        self.gate_b2.zero_()
        if self.image_gate is not None:
            self.image_gate.reset(generator)

    @torch.no_grad()
    def _copy_source(self) -> None:
        """Every expert from the source block, with the noise of the seed; the gate back to uniform."""
        generator = _generator(self.seed)
        first, last = check_conv_block(self._source[0])
        copies: tuple[tuple[Tensor, Any], ...] = (
            (self.expert_w1, first.weight),
            (self.expert_b1, first.bias),
            (self.expert_w2, last.weight.flatten(1)),
            (self.expert_b2, last.bias),
        )
        noise = self.init_noise if self.num_experts > 1 else 0.0
        for parameter, source in copies:
            if noise == 0.0 or source.is_meta:
                parameter.copy_(source.expand_as(parameter))
                continue
            source = source.to("cpu", torch.promote_types(source.dtype, torch.float32))
            normal = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu")
            parameter.copy_(source + noise * source.std(correction=0) * normal)
        self._reset_gate(generator)

    def _apply(self, fn, recurse=True):
        """Moves and casts reach the hidden source block, too."""
        super()._apply(fn, recurse)
        for block in self._source:
            block._apply(fn)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        """Accepts the plain block's state dict, too: it goes into the source block, and from there to all experts."""
        if self._source and f"{prefix}0.weight" in state_dict:
            self._load_source(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
            state_dict.update({prefix + name: value for name, value in self.state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def _load_source(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        found = len(errors) + len(missing)
        for name, layer in self._source[0].named_children():
            layer._load_from_state_dict(
                state_dict, f"{prefix}{name}.", local_metadata, strict, missing, unexpected, errors
            )
            for key in [k for k in state_dict if k.startswith(f"{prefix}{name}.")]:
                del state_dict[key]
        if len(errors) + len(missing) == found:
            if local_metadata.get("assign_to_params_buffers"):
                self._become_like_source()
            self._copy_source()

    def _become_like_source(self) -> None:
        """Parameters without values, of the source's device and type: what is assigned keeps the checkpoint's."""
        source = next(self._source[0].parameters())
        super()._apply(lambda t: torch.empty_like(t, dtype=source.dtype, device=source.device))


class ImageGate(nn.Module):
    """A full-resolution branch on the RGB image for the gate: 3x3 -> 16, 3x3 -> 16, 1x1 -> K, zero at the start.

    The features of a depth head live at 8/14 of the resolution or less; only the image itself knows where an edge is.
    A guided branch puts 16 channels of the features, upsampled, beside those of the image and merges both by one more
    3x3 -> 16: logits that are only added cannot say "in front, if there is an edge here".

    Args:
        num_experts: K.
        feature_channels: C of the features that guide it; 0 for a branch on the image alone.
        hidden: channels inside.
    """

    def __init__(self, num_experts: int, feature_channels: int = 0, hidden: int = 16):
        super().__init__()
        # skip_init: nn.Conv2d's own initialisation would advance the global random state.
        self.conv1 = nn.utils.skip_init(nn.Conv2d, 3, hidden, 3, padding=1)
        self.conv2 = nn.utils.skip_init(nn.Conv2d, hidden, hidden, 3, padding=1)
        guided = feature_channels > 0
        self.project = nn.utils.skip_init(nn.Conv2d, feature_channels, hidden, 1) if guided else None
        self.merge = nn.utils.skip_init(nn.Conv2d, 2 * hidden, hidden, 3, padding=1) if guided else None
        self.out = nn.utils.skip_init(nn.Conv2d, hidden, num_experts, 1)

    @property
    def option(self) -> bool | str:
        """The ``image_gate`` of :class:`MoEHead` that asks for it."""
        return True if self.project is None else GUIDED

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        for conv in (self.conv1, self.conv2, self.project, self.merge):
            if conv is not None:
                bound = conv.weight[0].numel() ** -0.5
                _fill_uniform(conv.weight, bound, generator)
                _fill_uniform(conv.bias, bound, generator)
        self.out.weight.zero_()
        self.out.bias.zero_()

    def forward(self, image: Tensor, features: Tensor | None = None) -> Tensor:
        """image [B, 3, H, W] in [0, 1] and, of a guided branch, features [B, C, h, w] -> logits [B, K, H, W]."""
        hidden = torch.relu(self.conv1(image.to(self.conv1.weight.dtype) - 0.5))
        hidden = torch.relu(self.conv2(hidden))
        if self.project is not None and self.merge is not None:
            if features is None:
                raise ValueError("features must be given to a guided image gate, got None")
            seen = self.project(features.to(self.project.weight.dtype))
            seen = F.interpolate(seen, image.shape[-2:], mode="bilinear", align_corners=True)
            hidden = torch.relu(self.merge(torch.cat([hidden, seen], dim=1)))
        return self.out(hidden)


def check_conv_block(block: nn.Module) -> tuple[nn.Conv2d, nn.Conv2d]:
    """The two convolutions of a ``Conv3x3, ReLU, Conv1x1`` block; ValueError for any other structure."""
    expected = "Sequential(Conv2d(C, Hd, 3, padding=1), ReLU, Conv2d(Hd, O, 1)), both with bias"
    layers: list[Any] = list(block) if isinstance(block, nn.Sequential) else []
    if [type(layer) for layer in layers] != [nn.Conv2d, nn.ReLU, nn.Conv2d]:
        found = ", ".join(type(layer).__name__ for layer in layers) or type(block).__name__
        raise ValueError(f"block must be {expected}, got {found}")
    first, _, last = layers
    if not (_is_plain(first, kernel_size=3, padding=1) and _is_plain(last, kernel_size=1, padding=0)):
        raise ValueError(f"block must be {expected}, got {first} and {last}")
    return first, last


def _is_plain(conv: nn.Conv2d, kernel_size: int, padding: int) -> bool:
    plain = conv.stride == conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
    square = conv.kernel_size == (kernel_size, kernel_size) and conv.padding == (padding, padding)
    return plain and square and conv.bias is not None


def _check_image_gate(value: bool | str) -> None:
    if not isinstance(value, bool) and value != GUIDED:
        raise ValueError(f"image_gate must be False, True or '{GUIDED}', got {value!r}")


def _check_integer(name: str, value: int, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value < 2**63:
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {value!r}")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def _fill_uniform(parameter: Tensor, bound: float, generator: torch.Generator) -> None:
    """Drawn on the CPU in float32 whatever the parameter's device and dtype, so that a seed means one thing."""
    values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
    parameter.copy_(values.uniform_(-bound, bound, generator=generator))
