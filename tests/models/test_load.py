"""Models by name: the shipped one, the hub's, files; what is not a model is refused in one sentence."""

from __future__ import annotations

import functools
import pickle

import pytest
import torch
from safetensors.torch import save_file

from moe3d.integrations import patch_vggt, patched_heads, save_head
from moe3d.models import MiniVGGT, input_width, load, load_mini, load_model, save_mini
from support.models import mini, predict, real, state


@pytest.fixture(scope="module")
def mini_files(tmp_path_factory):
    """``(weights, head)`` of a throw-away MiniVGGT."""
    folder = tmp_path_factory.mktemp("mini")
    model = mini()
    save_mini(model, folder / "mini.safetensors")
    save_head(patch_vggt(model, gate_hidden=16, init_noise=0.5), folder / "head.safetensors")
    return folder / "mini.safetensors", folder / "head.safetensors"


def _equal_states(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_mini_comes_with_its_shipped_head_or_without(mini_files):
    assert _equal_states(load_model("mini"), load_mini("moe"))
    assert _equal_states(load_model("mini", "stock"), load_mini("single"))
    assert not load_model("mini").training and input_width(load_model("mini")) == 224


def test_mini_from_a_file_has_its_stock_head_unless_one_is_named(mini_files):
    weights, head = mini_files
    assert _equal_states(load_model(weights), load_mini(path=weights))
    assert patched_heads(load_model(str(weights), head))["depth"].tail.gate_hidden == 16


def test_the_heads_options_are_set(mini_files):
    options = {"mode": "argmax", "sharpen": 2, "backend": "reference", "precision": "ieee", "return_experts": True}
    tail = patched_heads(load_model(*mini_files, **options))["depth"].tail
    assert {key: getattr(tail, key) for key in options} == options
    assert patched_heads(load_model(*mini_files))["depth"].tail.mode == "mean"


@pytest.mark.parametrize(
    "option", [{"mode": "argmax"}, {"sharpen": 2}, {"backend": "reference"}, {"precision": "ieee"}]
)
def test_options_of_a_moe_head_need_one(mini_files, option):
    ((key, value),) = option.items()
    with pytest.raises(ValueError, match=f"{key}={value!r} is for a mixture-of-experts head, but the model 'mini'"):
        load_model("mini", "stock", **option)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"mode": "median"}, "mode must be None or one of mean, argmax, switch, got 'median'"),
        ({"sharpen": -1}, "sharpen must be None or an integer of at least 0, got -1"),
        ({"backend": "fast"}, "backend must be one of auto, .*, got 'fast'"),
        ({"precision": "fp8"}, "precision must be one of auto, ieee, tf32, bf16, got 'fp8'"),
    ],
    ids=str,
)
def test_an_unknown_option_is_refused(option, message):
    with pytest.raises(ValueError, match=message):
        load_model("mini", **option)


def test_how_to_decode_is_for_the_depth_head(tmp_path, monkeypatch):
    small = {"embed_dim": 32, "num_heads": 2, "features": 32, "enable_point": True}
    monkeypatch.setattr(load, "_load_backbone", lambda name, shipped_head: MiniVGGT(**small))
    save_head(patch_vggt(MiniVGGT(**small), 2, 8, heads=("depth", "point")), tmp_path / "head.safetensors")
    model = load_model("mini", tmp_path / "head.safetensors", mode="switch", sharpen=2)
    assert (model.depth_head.tail.mode, model.depth_head.tail.sharpen) == ("switch", 2)
    with torch.no_grad():
        assert model(torch.rand(1, 3, 28, 42))["depth"].isfinite().all()


@pytest.mark.parametrize("name", ["maxi", "no/such/file", "no/such.safetensors", "/nowhere"])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(ValueError, match=f"model must be 'mini', a name on the hub .*, got '{name}'"):
        load_model(name)


def test_a_folder_without_weights_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there are no weights in .*: expected one of model\.saf"):
        load_model(tmp_path)


class _Malicious:
    def __reduce__(self):
        return (pytest.fail, ("a file's code was run",))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.safetensors", b"no weights", "a.safetensors is not a whole safetensors file"),
        ("a.pt", b"no weights", "a.pt holds more than weights, or is no weights file"),
        ("a.pt", pickle.dumps(_Malicious(), protocol=2), "a.pt holds more than weights, or is no weights file"),
        ("a.pt", b"PK\x03\x04 truncated", "a.pt is not a whole weights file"),
        ("a.pt", b"\x80\x02a.", "a.pt is not a whole weights file"),  # IndexError: pop from empty list
    ],
    ids=["safetensors", "text", "pickle", "zip", "empty stack"],
)
def test_damaged_and_dangerous_files_are_refused(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        load_model(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"model": {"a": 1}}])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt must hold a state dict"):
        load_model(tmp_path / "a.pt")


def test_weights_of_another_model_are_refused(tmp_path):
    save_file({"layer1.weight": torch.zeros(3)}, tmp_path / "resnet.safetensors")
    with pytest.raises(ValueError, match="the weights of a MiniVGGT, a VGGT or a Depth Anything 3, got none for 'agg"):
        load_model(tmp_path / "resnet.safetensors")


def _hub(monkeypatch, give):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "hf_hub_download", give)
    return hub.errors


def test_weights_come_from_the_hub(monkeypatch, mini_files):
    asked_for = []

    def give(name, file):
        asked_for.append((name, file))
        if file != "model.pt":
            raise _made(errors.EntryNotFoundError, "404")
        return str(mini_files[0])

    errors = _hub(monkeypatch, give)
    assert _equal_states(load_model("someone/mini-vggt"), load_mini(path=mini_files[0]))
    assert asked_for == [("someone/mini-vggt", "model.safetensors"), ("someone/mini-vggt", "model.pt")]


def _made(kind, text):
    """An error of the hub, whatever its constructor wants to know of the response."""
    error = kind.__new__(kind)
    error.args = (text,)
    return error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("EntryNotFoundError", "on the hub holds no weights: expected one of"),
        ("LocalEntryNotFoundError", r"cannot be downloaded \(No access to it\)"),
        ("GatedRepoError", r"cannot be downloaded \(No access to it\)"),
        ("RepositoryNotFoundError", r"cannot be downloaded \(No access to it\)"),
    ],
)
def test_a_hub_that_gives_nothing_is_one_sentence(monkeypatch, error, says):
    def give(name, file):
        raise _made(getattr(errors, error), "No access to it.\nTry again.")

    errors = _hub(monkeypatch, give)
    with pytest.raises(RuntimeError, match=f"model 'facebook/VGGT-1B' .*{says}") as caught:
        load_model("facebook/VGGT-1B")
    assert "\n" not in str(caught.value)


# The real package: heads of full size on a narrow backbone, see support.models.real.


@pytest.fixture
def narrow(monkeypatch):
    module = pytest.importorskip("vggt.models.vggt")
    monkeypatch.setattr(module, "Aggregator", functools.partial(module.Aggregator, patch_embed="conv", num_heads=4))


@pytest.fixture(scope="module")
def vggt_files(tmp_path_factory):
    pytest.importorskip("vggt.models.vggt")
    folder = tmp_path_factory.mktemp("vggt")
    model = real()
    save_file(state(model), folder / "model.safetensors")
    torch.save({"model": state(model), "epoch": 3}, folder / "checkpoint.pt")
    return folder, model


@pytest.mark.real_vggt
@pytest.mark.parametrize("file", ["", "model.safetensors", "checkpoint.pt"])
def test_vggt_comes_from_disk(narrow, vggt_files, file):
    folder, model = vggt_files
    loaded = load_model(folder / file)
    assert type(loaded) is type(model) and loaded.track_head is None and input_width(loaded) == 518
    assert _equal_states(loaded, model)


@pytest.mark.real_vggt
def test_vggt_takes_a_head_and_leaves_the_random_state_alone(narrow, vggt_files, tmp_path):
    folder, _ = vggt_files
    save_head(patch_vggt(load_model(folder), num_experts=3, init_noise=0.5), tmp_path / "head.safetensors")
    before = torch.random.get_rng_state()
    loaded = load_model(folder, tmp_path / "head.safetensors", return_experts=True)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert predict(loaded)["depth_weights"].shape[2] == 3


@pytest.mark.real_vggt
def test_vggt_weights_of_another_size_are_refused(narrow, vggt_files, tmp_path):
    _, model = vggt_files
    weights = state(model)
    weights["depth_head.scratch.output_conv2.2.bias"] = torch.zeros(5)
    save_file(weights, tmp_path / "a.safetensors")
    says = "1 tensors differ, the first 'depth_head.*bias': \\[5\\] in the file, \\[2\\] in the model"
    with pytest.raises(ValueError, match=says):
        load_model(tmp_path / "a.safetensors")
