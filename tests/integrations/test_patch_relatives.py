"""VGGT's relatives, which bring heads of their own: stand-ins with the structure of each, and the real StreamVGGT."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

import moe3d
from moe3d.models import DPTHead
from support import models
from support.models import HEIGHT, WIDTH, assert_equal, assert_untouched, disturb, fingerprint, images, state


class ModelOutput(OrderedDict):
    """As in the ``transformers`` package: items are attributes, too, and ``update`` is forbidden."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)

    def update(self, *args, **kwargs):
        raise Exception("You cannot use ``update`` on a ModelOutput instance.")


class Stream(nn.Module):
    """StreamVGGT: views in, one dictionary a frame out, in a ModelOutput; ``inference`` goes frame by frame."""

    def __init__(self):
        super().__init__()
        model = models.mini()
        self.aggregator, self.depth_head, self.point_head = model.aggregator, model.depth_head, model.point_head

    def forward(self, views):
        batch = torch.stack([view["img"] for view in views], dim=1)
        tokens, start = self.aggregator(batch)
        depth, conf = self.depth_head(tokens, images=batch, patch_start_idx=start)
        frames = [{"depth": depth[:, s], "depth_conf": conf[:, s]} for s in range(len(views))]
        output = ModelOutput()
        output["ress"], output["views"] = frames, views
        return output

    def inference(self, frames):
        found = []
        for frame in frames:
            batch = frame["img"].unsqueeze(0)
            tokens, start = self.aggregator(batch)
            found.append(self.depth_head(tokens, images=batch, patch_start_idx=start))
        return found


class Fast(nn.Module):
    """FastVGGT: only the four layers that the heads read come out of the aggregator, as 16-bit tokens."""

    def __init__(self):
        super().__init__()
        model = models.mini(depth=8, enable_point=False)
        self.aggregator, self.depth_head = model.aggregator, model.depth_head
        self.layers = list(self.depth_head.intermediate_layer_idx)
        self.depth_head.intermediate_layer_idx = [0, 1, 2, 3]
        self.depth_head.scratch.stem_transpose = nn.Identity()
        self.point_head = None

    def forward(self, batch, tokens_dtype=torch.bfloat16):
        tokens, start = self.aggregator(batch[None])
        tokens = [tokens[layer].to(tokens_dtype) for layer in self.layers]
        depth, conf = self.depth_head(tokens, images=batch[None], patch_start_idx=start)
        return {"depth": depth, "depth_conf": conf}


def views(frames=3):
    return [{"img": image[None]} for image in images(frames)]


@torch.no_grad()
def test_streamvggt():
    model = Stream().eval()
    before, stock, streamed = fingerprint(model), model(views()), model.inference(views())
    moe3d.patch(model, init_noise=0.0, return_experts=True)
    output = model(views())
    for found, expected in zip(output.ress, stock.ress, strict=True):
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found["depth"], expected["depth"], rtol=1e-4, atol=1e-5)
    assert output.depth_entropy.shape == (1, 3, HEIGHT, WIDTH)
    assert output["depth_hypotheses"].shape == (1, 3, 4, HEIGHT, WIDTH)
    for found, expected in zip(model.inference(views()), streamed, strict=True):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert model.depth_head.extras == {}
    assert_untouched(moe3d.unpatch(model), before)


@torch.no_grad()
@pytest.mark.parametrize("autocast", [True, False])
def test_fastvggt(autocast):
    """Its tokens are 16-bit: its users run it under autocast, or cast the whole model."""
    model = Fast().eval()
    before, exact = fingerprint(model), model(images(3), torch.float32)
    moe3d.patch(model, init_noise=0.0)
    torch.testing.assert_close(model(images(3), torch.float32)["depth"], exact["depth"], rtol=1e-4, atol=1e-5)
    if not autocast:
        model.depth_head.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = model(images(3))
    assert found["depth"].dtype == found["depth_entropy"].dtype == torch.float32
    assert (found["depth"] - exact["depth"]).norm() < 0.05 * exact["depth"].norm()
    if autocast:
        assert_untouched(moe3d.unpatch(model), before)


def test_vggt_long_holds_its_model_in_an_adapter():
    """Which is no module: what it holds is patched, whatever its head's class."""

    class Head(DPTHead):
        pass

    class Adapter:
        model = models.mini(enable_point=False)

    adapter = Adapter()
    adapter.model.depth_head.__class__ = Head
    stock = models.predict(adapter.model)
    checkpoint = state(adapter.model)
    disturb(moe3d.patch(adapter.model))
    adapter.model.load_state_dict(checkpoint, strict=True)
    assert type(moe3d.unpatch(adapter.model).depth_head) is Head
    assert_equal(models.predict(adapter.model), stock)


@pytest.mark.relatives
@torch.no_grad()
def test_the_real_streamvggt():
    """Where it can be imported (PYTHONPATH=<its checkout>/src, with ``transformers``): its own class and head."""
    streamvggt = pytest.importorskip(
        "streamvggt.models.streamvggt", reason="StreamVGGT is not here", exc_type=ImportError
    )
    dpt = pytest.importorskip("streamvggt.heads.dpt_head")
    model = streamvggt.StreamVGGT.__new__(streamvggt.StreamVGGT)
    nn.Module.__init__(model)
    small = {"features": 32, "out_channels": [24, 48, 64, 64], "intermediate_layer_idx": [0, 1, 2, 3]}
    mini = models.mini()
    model.aggregator, model.camera_head, model.track_head = mini.aggregator, mini.camera_head, None
    model.depth_head = dpt.DPTHead(64, output_dim=2, activation="exp", conf_activation="expp1", **small)
    model.point_head = dpt.DPTHead(64, output_dim=4, activation="inv_log", conf_activation="expp1", **small)
    model.eval()
    stock = model(views())
    moe3d.patch(model, heads=models.BOTH, init_noise=0.0)
    patched = model(views())
    for found, expected in zip(patched.ress, stock.ress, strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)
    assert patched.depth_entropy.shape == (1, 3, HEIGHT, WIDTH)
