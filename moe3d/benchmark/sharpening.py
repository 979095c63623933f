"""Who races over sharpening depth: PyTorch's operators and the compiled filter, on MiniVGGT's view of a photograph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from moe3d.benchmark.accuracy import Error, Wrong, error_of
from moe3d.benchmark.case import Case
from moe3d.benchmark.race import Contestant, Unavailable
from moe3d.models import load_mini
from moe3d.ops.native_sharpen import can_sharpen, sharpen_once
from moe3d.sharpen import EDGE_RATIO, SIGMA, WINDOW, sharpen_in_pytorch, steepness_of
from moe3d.training.validate import motorcycle

PASSES = 4
IN_PYTORCH, COMPILED_FILTER = "filter in PyTorch", "filter compiled"
_WAYS = {IN_PYTORCH: sharpen_in_pytorch, COMPILED_FILTER: sharpen_once}
_LIMIT = 1e-3  # relative RMS: where two depths have half of the weight each, rounding decides between them


def names() -> list[str]:
    return list(_WAYS)


class SharpeningField:
    """The contestants of one case: ``PASSES`` passes over each of its frames."""

    def __init__(self, case: Case, names: Sequence[str], seed: int):
        self.case, self.names = case, names
        self.depth, self.image = _photograph(case)

    def contestants(self) -> list[Contestant]:
        truth = _passes(sharpen_in_pytorch, self.depth.double(), self.image.double())
        return [Contestant(name, partial(self._prepare, name), partial(_check, truth)) for name in self.names]

    def _prepare(self, name: str) -> Callable[[int], Tensor]:
        if name == COMPILED_FILTER and not can_sharpen(self.depth, self.image, None, WINDOW):
            raise Unavailable("it needs the compiled module and the CPU")
        return lambda _: _passes(_WAYS[name], self.depth, self.image)


def _passes(once: Callable[..., Tensor], depth: Tensor, image: Tensor) -> Tensor:
    for _ in range(PASSES):
        depth = once(depth, image, None, WINDOW, steepness_of(SIGMA), EDGE_RATIO)
    return depth


def _check(truth: Tensor, sharp: Tensor) -> Error:
    error = error_of([sharp], [truth])
    if error.rms > _LIMIT:
        raise Wrong(f"wrong: relative RMS error {error.rms:.1e} (allowed {_LIMIT:.1e})")
    return error


@torch.no_grad()
def _photograph(case: Case) -> tuple[Tensor, Tensor]:
    """The Motorcycle pair's left view and its predicted depth, both resized, for each frame."""
    (sample,) = motorcycle()
    images = sample.images[:1]
    depth = load_mini()(images)["depth"][..., 0]

    def of_the_case(maps: Tensor) -> Tensor:
        resized = F.interpolate(maps, case.size, mode="bilinear", antialias=True)
        return resized.expand(case.frames, -1, -1, -1).contiguous().to(case.device)

    return of_the_case(depth)[:, 0], of_the_case(images)
