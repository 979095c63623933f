"""Weights files of MiniVGGT: what is written comes back, and what is not such a file is refused in one sentence."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe3d.integrations import patch_vggt, save_head
from moe3d.models import MiniVGGT, checkpoint, load_mini, save_mini

SIZES = {"embed_dim": 32, "depth": 5, "num_heads": 2, "features": 32, "enable_point": True}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MiniVGGT(**SIZES)


@pytest.fixture
def path(model, tmp_path):
    save_mini(model, tmp_path / "mini.safetensors")
    return tmp_path / "mini.safetensors"


def assert_refused(path, message=""):
    with pytest.raises(ValueError, match=message) as caught:
        load_mini(path=path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def rewrite(path, change=lambda state: None, **metadata):
    with safe_open(path, framework="pt") as file:
        metadata = {name: value for name, value in (file.metadata() | metadata).items() if value is not None}
    state = load_file(path)
    change(state)
    save_file(state, path, metadata=metadata)


def test_configuration_and_weights_come_back(model, path):
    loaded = load_mini(path=path)
    assert loaded.config == SIZES and not loaded.training
    assert len(loaded.aggregator.frame_blocks) == 5 and loaded.point_head is not None
    for (name, got), expected in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert got.dtype == torch.float32 and got.requires_grad and not got.is_meta, name
        assert torch.equal(got, expected.half().float()), name
    images = torch.rand(2, 3, 28, 42)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images)["depth"], model(images)["depth"], rtol=1e-3, atol=1e-3)


def test_weights_are_stored_as_fp16(model, path):
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}


def test_loading_leaves_the_random_state_alone(path):
    before = torch.get_rng_state()
    load_mini(path=path)
    assert torch.equal(before, torch.get_rng_state())


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_file_is_refused(path, share):
    whole = path.read_bytes()
    cut = path.with_name("cut.safetensors")
    cut.write_bytes(whole[: int(share * len(whole))])
    assert_refused(cut, "is not a whole safetensors file")


def test_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"not weights at all, but long enough to look at")
    assert_refused(path, "is not a whole safetensors file")


def test_file_of_another_model_is_refused(path):
    rewrite(path, model=None)
    assert_refused(path, "does not hold a MiniVGGT: its metadata names 'no model'")


@pytest.mark.parametrize(
    "config",
    [None, "{", "[]", json.dumps(SIZES | {"width": 3}), json.dumps(SIZES | {"depth": 0}), json.dumps({"depth": "5"})],
)
def test_unusable_configuration_is_refused(path, config):
    rewrite(path, config=config)
    assert_refused(path, "does not hold a configuration that this version of MiniVGGT knows")


def test_weights_that_do_not_fit_the_configuration_are_refused(path):
    rewrite(path, config=json.dumps(SIZES | {"features": 64}))
    assert_refused(path, "does not hold the weights of the MiniVGGT that its configuration describes")


def test_missing_weight_is_refused(path):
    rewrite(path, change=lambda state: state.pop("camera_head.initial_pose"))
    assert_refused(path, "does not hold the weights")


def test_missing_file_and_unknown_head(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no weights file at .*nothing\.safetensors"):
        load_mini(path=tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="head must be 'single' or 'moe', got 'double'"):
        load_mini(head="double")


def test_interrupted_save_leaves_the_old_file_and_nothing_else(model, path, monkeypatch):
    before = path.read_bytes()

    def interrupted(source, target):
        assert os.path.getsize(source) == len(before)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_mini(model, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_weight_beyond_fp16_is_not_saved(tmp_path):
    model = MiniVGGT(**SIZES)
    with torch.no_grad():
        model.camera_head.embed_pose.bias[3] = 70_000
    with pytest.raises(ValueError, match=r"not finite in float16: camera_head\.embed_pose\.bias"):
        save_mini(model, tmp_path / "mini.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_patched_model_is_not_saved(tmp_path):
    model = patch_vggt(MiniVGGT(**SIZES))
    with pytest.raises(ValueError, match="stock heads"):
        save_mini(model, tmp_path / "mini.safetensors")


def test_moe_head_is_loaded_on_top(path, monkeypatch):
    monkeypatch.setattr(checkpoint, "WEIGHTS", path.parent)
    path.rename(path.parent / "mini_single.safetensors")
    patched = patch_vggt(load_mini(), num_experts=3, init_noise=0.5)
    save_head(patched, path.parent / "mini_moe_head.safetensors")
    loaded = load_mini(head="moe")
    images = torch.rand(2, 3, 28, 42)
    with torch.no_grad():
        expected, got = patched.eval()(images), loaded(images)
        assert not loaded.training and "depth_entropy" in got
        torch.testing.assert_close(got["depth"], expected["depth"])
        assert not torch.allclose(got["depth"], load_mini()(images)["depth"])
