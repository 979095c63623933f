"""save_head and load_head: the configuration travels, and nothing happens to a model that the file does not fit."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import moe3d
from moe3d.integrations import patched_heads
from support import models
from support.models import BOTH, assert_equal, assert_untouched, disturb, fingerprint, predict, state

TRAINED = {
    "num_experts": 3, "gate_hidden": 8, "init_noise": 0.03, "temperature": 0.5, "mode": "argmax", "gap": 0.2, "seed": 7,
    "image_gate": True,
}  # fmt: skip


def trained(heads=BOTH, seed=0):
    return disturb(moe3d.patch_vggt(models.mini(seed), heads=heads, **TRAINED))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A good file of both heads."""
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    moe3d.save_head(trained(), path)
    return path


def rewrite(source, target, metadata=None, tensors=None):
    """The file with other metadata or tensors."""
    with safe_open(source, framework="pt") as file:
        old_metadata, old = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    new = tensors(old) if tensors else old
    safetensors.torch.save_file(new, target, metadata=metadata(dict(old_metadata)) if metadata else old_metadata)
    return target


def configured(**changes):
    """Metadata whose depth configuration is changed; None removes an entry."""

    def change(metadata):
        heads = json.loads(metadata["heads"])
        heads["depth"] = {k: v for k, v in (heads["depth"] | changes).items() if v is not None}
        return metadata | {"heads": json.dumps(heads)}

    return change


@pytest.mark.parametrize("heads", [("depth",), ("point",), BOTH], ids=str)
def test_a_file_patches_an_unpatched_model(tmp_path, heads):
    model = trained(heads)
    moe3d.save_head(model, tmp_path / "h.safetensors")
    other = moe3d.load_head(models.mini(), tmp_path / "h.safetensors")
    assert patched_heads(other).keys() == set(heads)
    for head in patched_heads(other).values():
        assert {name: getattr(head.tail, name) for name in TRAINED if name != "image_gate"} == {
            name: value for name, value in TRAINED.items() if name != "image_gate"
        }
        assert head.tail.image_gate is not None
    assert_equal(predict(other), predict(model))
    assert_equal(state(moe3d.unpatch_vggt(other)), state(models.mini()))


def test_a_file_knows_how_to_sharpen_and_one_that_was_written_before_sharpening_says_nothing_of_it(tmp_path):
    path = tmp_path / "h.safetensors"
    moe3d.save_head(moe3d.patch_vggt(models.mini(), sharpen=3), path)
    assert moe3d.load_head(models.mini(), path).depth_head.tail.sharpen == 3
    old = rewrite(path, tmp_path / "old.safetensors", configured(sharpen=None))
    assert moe3d.load_head(models.mini(), old).depth_head.tail.sharpen == 0


@pytest.mark.parametrize("image_gate", [False, True, "guided"])
def test_a_file_knows_its_image_gate(tmp_path, image_gate):
    model = disturb(moe3d.patch_vggt(models.mini(), image_gate=image_gate))
    moe3d.save_head(model, tmp_path / "h.safetensors")
    other = moe3d.load_head(models.mini(), tmp_path / "h.safetensors")
    assert_equal(predict(other), predict(model))


def test_heads_of_different_configurations(tmp_path):
    model = trained(("depth",))
    disturb(moe3d.patch_vggt(model, 2, heads=("point",), temperature=2.0))
    moe3d.save_head(model, tmp_path / "h.safetensors")
    assert_equal(predict(moe3d.load_head(models.mini(), tmp_path / "h.safetensors")), predict(model))


def test_a_file_loads_into_a_patched_model_of_the_same_structure(whole):
    other = moe3d.patch_vggt(
        models.mini(), heads=BOTH, **(TRAINED | {"mode": "mean", "seed": 1, "backend": "reference"})
    )
    assert moe3d.load_head(other, whole) is other
    assert_equal(state(other), state(trained()))
    assert other.depth_head.tail.mode == "mean" and other.depth_head.tail.seed == 1, "how to decode is the caller's"


def test_the_file_holds_the_head_and_nothing_else(whole):
    with safe_open(whole, framework="pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    model = trained()
    assert names == {f"{name}.{key}" for name, head in patched_heads(model).items() for key in head.tail.state_dict()}
    assert metadata["format"] == "moe3d-head" and set(json.loads(metadata["heads"])) == set(BOTH)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_weights_are_cast_to_the_models_type(whole, dtype):
    model = moe3d.load_head(models.mini().to(dtype), whole)
    assert {p.dtype for p in model.depth_head.tail.parameters()} == {dtype}
    expected = trained().depth_head.tail.expert_w1.to(dtype)
    assert torch.equal(model.depth_head.tail.expert_w1, expected)


def test_a_single_expert_travels(tmp_path):
    model = moe3d.patch_vggt(models.mini(), num_experts=1)
    moe3d.save_head(model, tmp_path / "h.safetensors")
    assert_equal(predict(moe3d.load_head(models.mini(), tmp_path / "h.safetensors")), predict(model))


# --- writing ----------------------------------------------------------------------------------------------------------


def test_an_unpatched_model_has_no_head_to_save(tmp_path):
    with pytest.raises(ValueError, match="model must be patched before its head can be saved"):
        moe3d.save_head(models.mini(), tmp_path / "h.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failure", ["write", "rename"])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, failure):
    path = tmp_path / "h.safetensors"
    moe3d.save_head(trained(), path)
    old = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(*((type(path), "write_bytes", fail) if failure == "write" else (os, "replace", fail)))
    with pytest.raises(OSError, match="no space left"):
        moe3d.save_head(trained(seed=1), path)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["h.safetensors"] and path.read_bytes() == old


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError):
        moe3d.save_head(trained(), tmp_path / "absent" / "h.safetensors")
    with pytest.raises(OSError):
        moe3d.save_head(trained(), tmp_path)
    assert not list(tmp_path.iterdir()) and not list(tmp_path.parent.glob("*.tmp"))


def test_paths_may_be_strings(tmp_path):
    moe3d.save_head(trained(), str(tmp_path / "h.safetensors"))
    moe3d.load_head(models.mini(), str(tmp_path / "h.safetensors"))


# --- reading what does not fit ----------------------------------------------------------------------------------------


def assert_refused(model, path, message, error=ValueError):
    before = fingerprint(model)
    predictions = predict(model)
    generator = torch.get_rng_state()
    with pytest.raises(error, match=message) as caught:
        moe3d.load_head(model, path)
    assert str(path) in str(caught.value) or "model." in str(caught.value)
    assert_untouched(model, before)
    assert_equal(predict(model), predictions)
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize(
    "changes",
    [{"num_experts": 4}, {"gate_hidden": 9}, {"image_gate": False}, {"temperature": 1.0}, {"heads": ("depth",)}],
    ids=str,
)
def test_a_model_patched_otherwise(whole, changes):
    model = disturb(moe3d.patch_vggt(models.mini(), **({"heads": BOTH} | TRAINED | changes)))
    assert_refused(model, whole, r"holds heads .*, but the model has .*: call unpatch_vggt\(model\) first")


@pytest.mark.parametrize("patched", [False, True])
def test_a_model_with_other_activations(whole, patched):
    model = models.mini()
    model.depth_head.activation = "relu"
    if patched:
        moe3d.patch_vggt(model, heads=BOTH, **TRAINED)
    assert_refused(model, whole, "'activation': 'exp'.*but the model has .*'activation': 'relu'")


@pytest.mark.parametrize("patched", [False, True])
def test_a_model_of_another_width(whole, patched):
    model = models.mini(features=64)
    if patched:
        moe3d.patch_vggt(model, heads=BOTH, **TRAINED)
    assert_refused(model, whole, r"does not fit the model: \w+\.\w+ has shape \[.*\], expected \[.*\]")


def test_a_model_without_such_a_head(whole):
    assert_refused(models.mini(enable_point=False), whole, r"model\.point_head must be a DPT head, got None")


DAMAGED = {
    "no format": (lambda m: {}, None, "must be a head file of moe3d"),
    "another format": (lambda m: m | {"format": "lora"}, None, r"must be a head file of moe3d .*, got lora"),
    "a newer version": (lambda m: m | {"format_version": "2"}, None, r"got moe3d-head 2"),
    "no configuration": (lambda m: {k: v for k, v in m.items() if k != "heads"}, None, "no valid head configuration"),
    "no JSON": (lambda m: m | {"heads": "{"}, None, "no valid head configuration"),
    "JSON of a number": (lambda m: m | {"heads": "3"}, None, "no valid head configuration"),
    "JSON of a list": (lambda m: m | {"heads": '["depth"]'}, None, "no valid head configuration"),
    "JSON of an empty object": (lambda m: m | {"heads": "{}"}, None, "no valid head configuration"),
    "an unknown head": (lambda m: m | {"heads": '{"track": {}}'}, None, "no valid head configuration"),
    "a head without options": (lambda m: m | {"heads": '{"depth": 1}'}, None, "no valid head configuration"),
    "a missing option": (configured(gap=None), None, "no valid head configuration"),
    "an unknown option": (configured(speed=1), None, "no valid head configuration"),
    "another number of experts": (configured(num_experts=2), None, r"no depth\.expert_w1 for .*num_experts=2"),
    "experts without end": (configured(num_experts=10**15), None, r"no depth\.expert_w1 for .*num_experts=10{15}"),
    "experts in words": (configured(num_experts="three"), None, r"no depth\.expert_w1 for .*num_experts='three'"),
    "a gate without end": (configured(gate_hidden=10**15), None, r"no depth\.gate_w1 for .*gate_hidden=10{15}"),
    "one expert only": (configured(num_experts=1), None, r"no depth\.expert_w1 for"),
    "a temperature in words": (configured(temperature="hot"), None, "no valid head configuration .*temperature"),
    "an impossible noise": (configured(init_noise=-1), None, "init_noise"),
    "an unknown mode": (configured(mode="best"), None, "mode must be one of"),
    "no tensors": (None, lambda t: {}, r"no depth\.expert_w1"),
    "a missing tensor": (None, lambda t: {k: t[k] for k in t if k != "depth.gate_b2"}, r"depth\.gate_b2 is in only"),
    "a foreign tensor": (None, lambda t: t | {"depth.bias": torch.zeros(1)}, r"depth\.bias is in only one"),
    "another shape": (None, lambda t: t | {"point.gate_b1": torch.zeros(9)}, r"point\.gate_b1 has shape \[9\]"),
    "integers": (None, lambda t: t | {"point.gate_b1": torch.zeros(8).int()}, r"point\.gate_b1 holds torch\.int32"),
    "a scalar": (None, lambda t: t | {"depth.expert_w1": torch.tensor(1.0)}, r"no depth\.expert_w1"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_files_are_refused(tmp_path, whole, what):
    metadata, tensors, message = DAMAGED[what]
    path = rewrite(whole, tmp_path / "damaged.safetensors", metadata, tensors)
    before = fingerprint(model := models.mini())
    with pytest.raises(ValueError, match=message):
        moe3d.load_head(model, path)
    assert_untouched(model, before)


@pytest.mark.parametrize("patched", [False, True])
def test_a_damaged_file_leaves_a_patched_model_alone_too(tmp_path, whole, patched):
    path = rewrite(whole, tmp_path / "d.safetensors", tensors=lambda t: t | {"point.gate_b1": torch.zeros(9)})
    assert_refused(trained(seed=2) if patched else models.mini(), path, r"point\.gate_b1 has shape")


def test_files_of_other_kinds(tmp_path, whole):
    model = models.mini()
    for name, content in {
        "empty": b"",
        "text": b"not a checkpoint\n",
        "huge header": b"\xff" * 16,
        "pickle": b"\x80\x02}q\x00.",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert_refused(model, tmp_path / name, "is not a whole safetensors file")
    torch.save(model.state_dict(), tmp_path / "torch")
    assert_refused(model, tmp_path / "torch", "is not a whole safetensors file")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    assert_refused(model, tmp_path / "foreign", "must be a head file of moe3d .*, got no format")


def test_files_that_are_not_there(tmp_path):
    assert_refused(models.mini(), tmp_path / "absent.safetensors", "no such file", FileNotFoundError)
    assert_refused(models.mini(), tmp_path, "no such file", FileNotFoundError)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_truncated_and_corrupt_files(tmp_path, whole, data):
    """Cut anywhere, or with other bytes in the header: refused, or (a digit of the metadata) loaded whole."""
    content = bytearray(whole.read_bytes())
    header = int.from_bytes(content[:8], "little") + 8
    path = tmp_path / "x.safetensors"
    model = models.mini()
    before = fingerprint(model)
    if data.draw(st.booleans()):
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
    try:
        moe3d.load_head(model, path)
    except ValueError:
        assert_untouched(model, before)
    else:
        assert all(p.isfinite().all() for p in model.depth_head.tail.parameters())
        assert_untouched(moe3d.unpatch_vggt(model), before)


def test_reading_needs_no_pickle(tmp_path, whole, monkeypatch):
    """A file from a stranger must not run code."""
    import pickle

    def forbidden(*args, **kwargs):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    moe3d.load_head(models.mini(), whole)


def test_the_same_file_gives_the_same_bytes(tmp_path, whole):
    moe3d.save_head(moe3d.load_head(models.mini(), whole), tmp_path / "again.safetensors")
    with safe_open(whole, framework="np") as a, safe_open(tmp_path / "again.safetensors", framework="np") as b:
        assert a.metadata() == b.metadata() and a.keys() == b.keys()
        assert all(np.array_equal(a.get_tensor(key), b.get_tensor(key)) for key in a.keys())


@pytest.mark.real_vggt
def test_a_head_of_the_real_model(tmp_path):
    model = disturb(moe3d.patch_vggt(models.real(), heads=BOTH, **TRAINED))
    moe3d.save_head(model, tmp_path / "h.safetensors")
    other = moe3d.load_head(models.real(), tmp_path / "h.safetensors")
    assert_equal(predict(other), predict(model))
    assert_refused(models.mini(), tmp_path / "h.safetensors", "does not fit the model")
