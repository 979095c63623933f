from __future__ import annotations

import pytest

from moe3d.training import pool


@pytest.fixture(scope="session")
def pool_folder(tmp_path_factory):
    """A pool of two shards of three scenes, 84x112."""
    folder = tmp_path_factory.mktemp("pool")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "SCENES_PER_SHARD", 3)
        pool.render_pool(folder, 2, sizes=((84, 112),))
    return folder
