"""Depth Anything 3's own networks and heads in their own configurations, with random weights."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn

WHY_NOT = "the `depth-anything-3` package cannot be imported (make test installs it without its dependencies)"
SIZES = ("da3-small", "da3-base", "da3-large", "da3-giant", "da3metric-large")
SMALL = {"dim_in": 64, "features": 32, "out_channels": [8, 16, 32, 32]}  # options that make any head small
HEIGHT, WIDTH, PATCH = 28, 42, 14


def package():
    """The package's configuration module; skips the test where the package is not there."""
    os.environ.setdefault("DA3_LOG_LEVEL", "WARN")
    cfg = pytest.importorskip("depth_anything_3.cfg", reason=WHY_NOT, exc_type=ImportError)
    pytest.importorskip("depth_anything_3.model.dualdpt", reason=WHY_NOT, exc_type=ImportError)
    return cfg


def config(name: str):
    return package().load_config(f"depth_anything_3.configs.{name}")


def head(name: str = "da3-small", seed: int = 0, **options) -> nn.Module:
    """A depth head as the configuration has it, with ``options`` instead."""
    return _make(config(name).head | options, seed)


def network(seed: int = 0) -> nn.Module:
    """The small network, whole."""
    return _make(config("da3-small"), seed)


def metric_network(seed: int = 0) -> nn.Module:
    """As the metric network is configured, on the small backbone."""
    whole = config("da3metric-large")
    whole.net.update(name="vits", out_layers=[2, 5, 8, 11])
    whole.head.update(dim_in=384, features=64, out_channels=[48, 96, 192, 384])
    return _make(whole, seed)


def nested_network() -> nn.Module:
    """The nested network's own class around two small ones."""
    package()
    from depth_anything_3.model.da3 import NestedDepthAnything3Net

    nested = NestedDepthAnything3Net.__new__(NestedDepthAnything3Net)
    nn.Module.__init__(nested)
    nested.da3, nested.da3_metric = network(), metric_network(seed=1)
    return nested.eval()


def features(head: nn.Module, frames: int = 3, seed: int = 1) -> list[tuple[Tensor, None]]:
    """What the backbone hands to a head: four pairs of patch tokens [1, S, P, dim] and a camera token."""
    generator = torch.Generator().manual_seed(seed)
    dim = head.projects[0].in_channels
    patches = (HEIGHT // PATCH) * (WIDTH // PATCH)
    return [(3 * torch.randn(1, frames, patches, dim, generator=generator), None) for _ in range(4)]


def images(frames: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(1, frames, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


def run(head: nn.Module, feats=None, chunk_size: int | None = 8):
    """The head on patch tokens alone, as the network calls it."""
    return head(features(head) if feats is None else feats, HEIGHT, WIDTH, patch_start_idx=0, chunk_size=chunk_size)


@torch.no_grad()
def predict(head: nn.Module, feats=None, **options) -> dict[str, Tensor]:
    return dict(run(head, feats, **options))


@torch.no_grad()
def _make(configuration, seed: int) -> nn.Module:
    """An untrained network predicts nearly the same everywhere; this one varies by tens of per cent."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = package().create_object(configuration)
    scratch = getattr(model, "head", model).scratch
    scratch.output_conv2[-1].weight.mul_(30)
    if hasattr(scratch, "sky_output_conv2"):
        scratch.sky_output_conv2[-1].weight.mul_(30)
        scratch.sky_output_conv2[-1].bias.fill_(-0.6)
    return model.eval()
