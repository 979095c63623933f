"""Small photographs, a throw-away model, and its reconstruction."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from moe3d.integrations import patch_vggt, save_head
from moe3d.models import MiniVGGT, save_mini
from support.pictures import photo


@pytest.fixture(scope="session")
def small_weights(tmp_path_factory):
    """``(weights, head)`` of a very small MiniVGGT with a point head and a gate that is not uniform."""
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MiniVGGT(embed_dim=32, depth=4, num_heads=4, features=32, enable_point=True).eval()
        save_mini(model, folder / "mini.safetensors")
        patch_vggt(model, init_noise=0.5, gate_hidden=16)
        torch.nn.init.normal_(model.depth_head.tail.gate_w2)
    save_head(model, folder / "head.safetensors")
    return folder / "mini.safetensors", folder / "head.safetensors"


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder ``room`` with ten photographs of 60x80, ``img1.png`` to ``img10.png``."""
    folder = tmp_path_factory.mktemp("photos") / "room"
    folder.mkdir()
    for number in range(1, 11):
        Image.fromarray(photo(60, 80, number)).save(folder / f"img{number}.png")
    return folder
