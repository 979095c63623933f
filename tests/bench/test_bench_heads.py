"""The whole-head peers: the stock head with VGGT's embedding cost, and mixtures behind its front."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from moe3d.benchmark import heads
from moe3d.benchmark.case import Case, random_weights
from moe3d.benchmark.peers import BY_EXPERT, STOCK, STOCK_CACHED, features, single_head
from moe3d.benchmark.race import Unavailable
from moe3d.models.dpt import DPTHead

CASE = Case(frames=9, height=28, width=42, experts=1, channels=16)  # 9: more than VGGT's chunk
SMALL = {"dim_in": 24, "features": 32, "out_channels": [8, 12, 16, 20], "intermediate_layer_idx": [0, 1, 2, 3]}


def small_head(head_class: type = DPTHead) -> nn.Module:
    torch.manual_seed(0)
    return head_class(output_dim=2, activation="exp", **SMALL).eval()


def tokens_and_images() -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randn(1, CASE.frames, 5 + 6, 24, generator=generator) for _ in range(4)]
    return tokens, torch.empty(1, CASE.frames, 3, *CASE.size)


def assert_equal_to_the_stock_head(head_class: type) -> None:
    """Mixed-in embeddings, and the front with a plain tail behind it, change nothing but the rounding."""
    tokens, images = tokens_and_images()
    head, weights = small_head(head_class), random_weights(CASE, 0)
    heads._load_block(head.scratch.output_conv2, weights)
    with torch.no_grad():
        expected = head(tokens, images, 5)
        for mixin in (heads.RebuiltEmbedding, heads.CachedEmbedding):
            mixed = heads._mix_in(small_head(head_class), mixin)
            heads._load_block(mixed.scratch.output_conv2, weights)
            tail = heads.EagerHead(mixed, single_head(features(CASE, cached=False), weights))
            for again in (mixed, mixed, tail):  # twice: the second call uses what the first one kept
                torch.testing.assert_close(again(tokens, images, 5), expected, rtol=1e-5, atol=1e-6)


def test_variants_of_our_head_compute_what_it_does():
    assert_equal_to_the_stock_head(DPTHead)


@pytest.mark.real_vggt
def test_variants_of_vggts_head_compute_what_it_does():
    from vggt.heads.dpt_head import DPTHead as RealHead

    assert_equal_to_the_stock_head(RealHead)
    assert type(heads.vggt_head()) is RealHead


def test_the_cached_embedding_is_built_once(monkeypatch):
    built = []
    monkeypatch.setattr(heads, "embedding", lambda size, c, device, aspect: built.append(size) or torch.zeros(c, *size))
    tokens, images = tokens_and_images()
    for mixin, times in ((heads.CachedEmbedding, 1), (heads.RebuiltEmbedding, 3)):
        built.clear()
        head = heads._mix_in(small_head(), mixin)
        with torch.no_grad():
            for _ in range(3):
                head(tokens, images, 5, frames_chunk_size=None)
        assert built.count(CASE.size) == times


def test_judges_come_first_whatever_is_asked_for():
    field = heads.mini_field(Case(1, 28, 28, experts=2, channels=32), ["reference", STOCK])
    assert field.names == [STOCK_CACHED, STOCK, BY_EXPERT, "reference"]


def test_the_cpu_backend_is_skipped_on_a_gpu(monkeypatch):
    """Not refused, as what is wrong is: it has no place in that race."""
    monkeypatch.setattr("moe3d.backends", lambda: {"cpu": None, "reference": None})
    field = heads.mini_field(Case(1, 28, 28, experts=2, channels=32), ["cpu"])
    field.case = replace(field.case, device="cuda")
    with pytest.raises(Unavailable, match="works on the CPU"):
        field._prepare("cpu")


def test_contestants_share_everything_but_the_head():
    field = heads.mini_field(Case(1, 28, 28, experts=2, channels=32), [STOCK, STOCK_CACHED, BY_EXPERT, "reference"])
    models = [field._variant(name) for name in field.names]
    assert len({id(m.aggregator) for m in models}) == len({id(m.camera_head) for m in models}) == 1
    assert len({id(m.depth_head) for m in models}) == len(models)
    assert "depth_entropy" in field.run(models[-1])


def test_random_features_are_neither_flat_nor_explosive():
    field = heads.mini_field(Case(2, 28, 42, channels=32), [STOCK])
    assert heads.front(field.model.depth_head, *field.seen, slice(0, 1)).std().item() == pytest.approx(1, rel=1e-3)
    depth = field.run(field.model)["depth"]
    assert depth.isfinite().all() and depth.std() > 0.05 * depth.mean()
