"""The whole of ``moe3d reconstruct`` on the real class with random weights: heads of full size, a narrow backbone."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
import trimesh
from safetensors.torch import save_file

from moe3d.cli import main
from moe3d.evaluation import read_predictions
from moe3d.integrations import patch_vggt, save_head
from moe3d.reconstruct.frames import find_scenes
from support.models import disturb, real, state

pytestmark = pytest.mark.real_vggt


@pytest.fixture(scope="module")
def vggt(tmp_path_factory, photos):
    """``(folder of a run, the weights' model, its patched twin, the images)``."""
    module = pytest.importorskip("vggt.models.vggt")
    folder = tmp_path_factory.mktemp("vggt")
    stock, patched = real(), disturb(patch_vggt(real(), num_experts=3, gate_hidden=16, return_experts=True))
    save_file(state(stock), folder / "model.safetensors")
    save_head(patched, folder / "head.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Aggregator", functools.partial(module.Aggregator, patch_embed="conv", num_heads=4))
        flags = f"--model {folder} --head {folder / 'head.safetensors'} --out {folder / 'out'} --width 42 --experts"
        exports = "--export npz,glb,colmap,depth-png,gate-png --frames-chunk 2 --json"
        assert (
            main(["reconstruct", *(str(photos / f"img{i}.png") for i in (1, 2, 3)), *flags.split(), *exports.split()])
            == 0
        )
    from moe3d.reconstruct import load_images

    return folder / "out", stock, patched, load_images([photos / f"img{i}.png" for i in (1, 2, 3)], 42).images


def test_vggt_reconstructs_what_its_own_forward_says(vggt):
    out, stock, patched, images = vggt
    with torch.no_grad():
        plain, mixed = stock(images), patched(images)
    scene = find_scenes(out)["scene"]
    for i, frame in enumerate(scene):
        pairs = {
            "depth": mixed["depth"][0, i, ..., 0],
            "stock_depth": plain["depth"][0, i, ..., 0],
            "confidence": mixed["depth_conf"][0, i],
            "points": mixed["world_points"][0, i],
            "points_confidence": mixed["world_points_conf"][0, i],
            "hypotheses": mixed["depth_hypotheses"][0, i],
        }
        for name, values in pairs.items():
            np.testing.assert_allclose(getattr(frame, name), values, rtol=1e-3, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(frame.weights, mixed["depth_weights"][0, i], atol=2e-3)
    assert np.abs(frame.depth - frame.stock_depth).max() > 1e-2


def test_vggts_cameras_are_its_own_decoder_s(vggt):
    from vggt.utils.pose_enc import pose_encoding_to_extri_intri

    out, stock, _, images = vggt
    with torch.no_grad():
        extrinsics, intrinsics = pose_encoding_to_extri_intri(stock(images)["pose_enc"], images.shape[-2:])
    predictions = read_predictions(out, "scene")
    np.testing.assert_allclose(predictions.extrinsics, extrinsics[0], atol=1e-5)
    np.testing.assert_allclose(predictions.intrinsics, intrinsics[0], rtol=1e-4)


def test_vggts_points_are_what_its_own_unprojection_gives(vggt):
    from vggt.utils.geometry import unproject_depth_map_to_point_map

    out, *_ = vggt
    for frame in find_scenes(out)["scene"]:
        arrays = frame.depth[None, ..., None], frame.extrinsics[None], frame.intrinsics[None]
        np.testing.assert_allclose(
            frame.unprojected(), unproject_depth_map_to_point_map(*arrays)[0], rtol=1e-3, atol=1e-4
        )
    (cloud,) = trimesh.load(out / "scene.glb").geometry.values()
    assert len(cloud.vertices) > 1000
    assert json.loads((out / "scene" / "depth" / "scale.json").read_text())["frames"] == ["img1", "img2", "img3"]
