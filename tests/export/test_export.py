"""ONNX files, checked in ONNX Runtime, and AOTInductor packages, both against the model in PyTorch."""

from __future__ import annotations

import doctest
import os

import numpy as np
import pytest
import torch

import moe3d
import moe3d.export
from support import da3, models
from support.models import disturb, images, tensors

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
FRAMES = torch.export.Dim("frames", min=1, max=64)
compiles = pytest.mark.skipif(os.environ.get("MOE3D_COMPILE") != "1", reason="takes minutes: make test-export")


def patched(**options):
    return disturb(moe3d.patch(models.mini(enable_point=False), 3, gate_hidden=8, **options))


@torch.no_grad()
def head_arguments(model, frames):
    """What the model calls its depth head with."""
    batch = images(frames)[None]
    tokens, patch_start_idx = model.aggregator(batch)
    return tokens, batch, patch_start_idx


def run_onnx(path, *inputs):
    """ONNX Runtime's outputs by name; inputs are given in the order of the file's own."""
    session = onnxruntime.InferenceSession(path)
    names = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]
    fed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return dict(zip(outputs, map(torch.from_numpy, session.run(None, fed)), strict=True))


@pytest.mark.parametrize("options", [{"mode": "switch", "image_gate": True}, {"sharpen": 2}], ids=str)
def test_a_patched_head_as_onnx_with_any_number_of_frames(tmp_path, options):
    model = patched(**options)
    arguments = head_arguments(model, 2)
    dynamic = ([{1: FRAMES}] * len(arguments[0]), {1: FRAMES}, None)
    moe3d.export.to_onnx(model.depth_head, arguments, tmp_path / "head.onnx", dynamic_shapes=dynamic)
    assert [file.name for file in tmp_path.iterdir()] == ["head.onnx"]
    for frames in (1, 2, 9):
        tokens, batch, start = head_arguments(model, frames)
        with torch.no_grad():
            expected = model.depth_head(tokens, batch, start)
        found = run_onnx(tmp_path / "head.onnx", *tokens, batch)
        assert list(found) == ["output.0", "output.1"]
        for a, b in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("name", ["da3-small", "da3metric-large"])
def test_a_depth_anything_3_head_as_onnx(tmp_path, name):
    head = disturb(moe3d.patch(da3.head(name, **da3.SMALL), 3, gate_hidden=8, return_experts=True))
    feats = [(tokens,) for tokens, _ in da3.features(head)]
    moe3d.export.to_onnx(head, (feats, da3.HEIGHT, da3.WIDTH, 0), tmp_path / "head.onnx")
    found = run_onnx(tmp_path / "head.onnx", *(tokens for (tokens,) in feats))
    expected = da3.predict(head)
    assert list(found) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **TOLERANCE, msg=key)


def test_the_program_has_no_operator_of_ours_and_computes_the_same():
    """Every mode, also those whose graph has a choice in it; images as many and as large as they come."""

    class Doubling(torch.nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.head = disturb_head(moe3d.MoEHead(6, num_experts=3, expert_hidden=5, gate_hidden=4, **options))

        def forward(self, x):
            return self.head(x, (2 * x.shape[2], 2 * x.shape[3]))

    sizes = ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
    for options in ({"mode": "argmax"}, {"mode": "switch"}, {"return_experts": True}, {"conf_activation": None}):
        module = Doubling(**options).eval()
        program = moe3d.export.to_program(module, (torch.randn(2, 6, 3, 4),), dynamic_shapes=sizes)
        assert not [node for node in program.graph.nodes if "moe3d" in str(node.target)]
        for shape in ((2, 6, 3, 4), (3, 6, 5, 2)):
            x = torch.randn(shape)
            torch.testing.assert_close(program.module()(x), module(x)._asdict(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def disturb_head(head):
    generator = torch.Generator().manual_seed(0)
    for parameter in head.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return head


def test_the_docstrings_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(moe3d.export)
    assert found.attempted > 5 and not found.failed


def test_exporting_leaves_the_model_as_it_was():
    head = moe3d.MoEHead(4, num_experts=2).eval()
    before = models.fingerprint(head)
    moe3d.export.to_program(head, (torch.randn(1, 4, 3, 3), (6, 6)))
    models.assert_untouched(head, before)
    assert head(torch.randn(1, 4, 3, 3), (6, 6)).prediction.requires_grad


def test_inputs_are_named_by_what_they_are(tmp_path):
    class Chooses(torch.nn.Module):
        def forward(self, x, strategy="sum", y=None, z=None):
            return x + 2 * y + 3 * z if strategy == "sum" else x

    path, (x, y, z) = tmp_path / "a.onnx", torch.randn(3, 2, 2)
    moe3d.export.to_onnx(Chooses().eval(), (x,), path, {"strategy": "sum", "y": y, "z": z})
    session = onnxruntime.InferenceSession(path)
    assert [given.name for given in session.get_inputs()] == ["x", "y", "z"]
    (found,) = session.run(None, {"x": x.numpy(), "y": y.numpy(), "z": z.numpy()})
    assert (torch.from_numpy(found) - (x + 2 * y + 3 * z)).abs().max() < 1e-5


def test_bfloat16_needs_an_opset_that_has_it(tmp_path):
    head = moe3d.MoEHead(4, num_experts=2, precision="bf16").eval()
    args = (torch.randn(1, 4, 3, 3), (6, 6))
    for opset in (None, 21):
        says = f"opset must be at least 22 for a model that computes in bfloat16, got {opset}"
        with pytest.raises(ValueError, match=says):
            moe3d.export.to_onnx(head, args, tmp_path / "head.onnx", opset=opset)
    assert not list(tmp_path.iterdir())
    moe3d.export.to_onnx(head, args, tmp_path / "head.onnx", opset=22)
    (opset,) = {given.version for given in onnx.load(tmp_path / "head.onnx").opset_import if not given.domain}
    assert opset == 22


def test_what_is_refused(tmp_path):
    head = moe3d.MoEHead(4, num_experts=2)
    args = (torch.randn(1, 4, 3, 3), (6, 6))
    with pytest.raises(ValueError, match="model must be in eval mode, got MoEHead in training mode"):
        moe3d.export.to_onnx(head, args, tmp_path / "head.onnx")
    with pytest.raises(ValueError, match=r"path must end in \.pt2, got '.*head\.so'"):
        moe3d.export.to_aoti(head.eval(), args, tmp_path / "head.so")
    assert not list(tmp_path.iterdir())


# --- minutes: make test-export ----------------------------------------------------------------------------------------


@compiles
def test_a_patched_model_as_onnx(tmp_path):
    model = patched(image_gate=True)
    path = tmp_path / "model.onnx"
    moe3d.export.to_onnx(model, (images(3)[None],), path, dynamic_shapes=({1: FRAMES},))
    for frames in (1, 2, 5):
        batch = images(frames)[None]
        with torch.no_grad():
            expected = tensors(model(batch))
        found = run_onnx(path, batch)
        assert list(found) == ["images.out" if key == "images" else key for key in expected]
        for (key, value), output in zip(expected.items(), found.values(), strict=True):
            torch.testing.assert_close(output, value, **TOLERANCE, msg=key)


@compiles
def test_a_patched_model_as_an_aotinductor_package(tmp_path):
    model = patched(image_gate=True)
    path = tmp_path / "model.pt2"
    moe3d.export.to_aoti(model, (images(3)[None],), path, dynamic_shapes=({1: FRAMES},))
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    package = torch._inductor.aoti_load_package(str(path))
    for frames in (2, 3, 5):
        with torch.no_grad():
            expected, found = (tensors(run(images(frames)[None])) for run in (model, package))
        for key, value in expected.items():
            np.testing.assert_allclose(found[key].numpy(), value.numpy(), **TOLERANCE, err_msg=key)


@compiles
@torch.no_grad()
def test_a_head_that_sharpens_as_an_aotinductor_package(tmp_path):
    head = disturb_head(moe3d.MoEHead(6, 2, 2, expert_hidden=5, gate_hidden=4, sharpen=2)).eval()
    args, image = (torch.randn(2, 6, 6, 7), (12, 14)), torch.rand(2, 3, 12, 14)
    moe3d.export.to_aoti(head, args, tmp_path / "head.pt2", {"image": image})
    found = torch._inductor.aoti_load_package(str(tmp_path / "head.pt2"))(*args, image=image)
    assert isinstance(found, dict) and found["weights"] is None
    for name in ("prediction", "confidence", "entropy"):
        torch.testing.assert_close(found[name], getattr(head(*args, image=image), name), **TOLERANCE)
