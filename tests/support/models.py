"""Small VGGT-like models, and the real one where the ``vggt`` package can be imported."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from moe3d.integrations import patched_heads
from moe3d.models import MiniVGGT

HEIGHT, WIDTH = 28, 42
BOTH = ("depth", "point")


def mini(seed: int = 0, **options) -> MiniVGGT:
    """An untrained MiniVGGT with both heads, a thousandth of VGGT's size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        small = {"embed_dim": 32, "depth": 4, "num_heads": 2, "features": 32, "enable_point": True}
        return _loud(MiniVGGT(**(small | options)))


def real(seed: int = 0, **options) -> nn.Module:
    """The ``vggt`` package's own class: heads of full size, a narrow backbone with a convolutional patch embedding."""
    from vggt.models import vggt

    aggregator = vggt.Aggregator
    vggt.Aggregator = functools.partial(aggregator, patch_embed="conv", num_heads=4)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _loud(vggt.VGGT(img_size=112, embed_dim=64, **({"enable_track": False} | options)))
    finally:
        vggt.Aggregator = aggregator


def images(*lead: int, seed: int = 1, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Tensor:
    """Noise with a dark square, [*lead, 3, H, W] in [0, 1]."""
    noise = torch.rand(*lead, 3, *size, generator=torch.Generator().manual_seed(seed))
    noise[..., 5:20, 10:30] *= 0.3
    return noise


@torch.no_grad()
def _loud(model: nn.Module) -> nn.Module:
    """An untrained network predicts nearly the same everywhere; this one varies by tens of per cent."""
    for head in (model.depth_head, model.point_head):
        if head is not None:
            head.scratch.output_conv2[2].weight.mul_(30)
            head.norm.weight.mul_(3)
    return model.eval()


def tensors(predictions):
    """The dictionary's tensors by key; lists of tensors by key and index."""
    flat = {}
    for key, value in predictions.items():
        flat |= {key: value} if isinstance(value, torch.Tensor) else {f"{key}.{i}": v for i, v in enumerate(value)}
    return flat


@torch.no_grad()
def predict(model, batch=None):
    return tensors(model(images(3) if batch is None else batch))


def assert_equal(actual, expected):
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def fingerprint(model):
    """Everything that patching may touch: parameters in order, classes, attributes, hooks, flags."""
    return (
        [(key, value.clone()) for key, value in model.state_dict().items()],
        [(name, type(m), sorted(vars(m)), m.training) for name, m in model.named_modules()],
        [(name, p.requires_grad, p.dtype, p.device) for name, p in model.named_parameters()],
        [list(hooks) for hooks in (model._forward_hooks, model._forward_pre_hooks, model._forward_hooks_always_called)],
    )


def assert_untouched(model, before):
    (state_before, *rest_before), (state_now, *rest_now) = before, fingerprint(model)
    assert rest_now == rest_before
    assert [key for key, _ in state_now] == [key for key, _ in state_before]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(state_now, state_before, strict=True))


def disturb(model):
    """A patched model whose gate and experts have gone somewhere."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for head in patched_heads(model).values():
            for parameter in head.tail.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.05)
    return model
