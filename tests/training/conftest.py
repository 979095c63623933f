from __future__ import annotations

import pytest
import torch

from moe3d.models import MiniVGGT, save_mini
from moe3d.training import pool
from moe3d.training.features import cache_scenes
from moe3d.training.scenes import LiveScenes, open_corpus

SIZE = (56, 84)


@pytest.fixture(scope="session")
def pool_folder(tmp_path_factory):
    """A pool of two shards of three scenes, 84x112."""
    folder = tmp_path_factory.mktemp("pool")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "SCENES_PER_SHARD", 3)
        pool.render_pool(folder, 2, sizes=((84, 112),))
    return folder


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    """A file with a MiniVGGT that costs next to nothing."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_mini(MiniVGGT(embed_dim=32, num_heads=2, features=32), path)
    return path


@pytest.fixture(scope="session")
def live():
    """Synthetic training scenes, one or two frames each."""
    return LiveScenes([open_corpus("synthetic", None, SIZE, 2)], (1, 2), seed=1)


@pytest.fixture(scope="session")
def tiny_model(tiny_weights):
    """That model, unpatched; tests copy it before they change it."""
    from moe3d.models import load_mini

    return load_mini(path=tiny_weights)


@pytest.fixture(scope="session")
def cache(tmp_path_factory, tiny_model, live):
    """The features of four of those scenes, of one and of two frames."""
    folder = tmp_path_factory.mktemp("cache")
    cache_scenes(tiny_model, live, 4, folder)
    return folder
