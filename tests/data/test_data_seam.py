"""open_dataset: one seam for all datasets."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from moe3d.data import DATASETS, Sample, open_dataset


def test_unknown_dataset_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown dataset 'kitty', expected one of .*motorcycle.*synthetic"):
        open_dataset("kitty")


def test_the_names_are_the_documented_ones():
    assert set(DATASETS) == {
        "7scenes", "bonn", "hypersim", "kitti", "motorcycle", "nrgbd", "nyuv2", "sintel", "synthetic", "vkitti2",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["motorcycle", "synthetic"])
def test_a_maximum_depth_can_be_set(name):
    dataset = open_dataset(name)
    assert dataset.max_depth == math.inf
    assert dataset.has_poses
    assert dataset.skipped == []
    sequence, frames = next(iter(dataset.sequences.items()))
    usual = dataset.load(sequence, frames[:1])
    dataset.max_depth = float(usual.depth[usual.valid].median())
    cut = dataset.load(sequence, frames[:1])
    assert torch.equal(cut.valid, usual.valid & (usual.depth < dataset.max_depth))
    assert torch.equal(cut.depth, usual.depth * cut.valid)


@pytest.mark.parametrize("name", ["motorcycle", "synthetic"])
def test_samples_have_the_promised_form(name):
    dataset = open_dataset(name)
    sequence, frames = next(iter(dataset.sequences.items()))
    chosen = frames[::-1][:2]
    sample = dataset.load(sequence, chosen)
    assert isinstance(sample, Sample)
    assert sample.names == chosen
    count, _, height, width = sample.images.shape
    assert count == len(chosen)
    assert sample.depth.shape == sample.valid.shape == (count, height, width)
    assert sample.intrinsics.shape == (count, 3, 3)
    assert sample.extrinsics.shape == (count, 3, 4)
    assert sample.valid.dtype == torch.bool
    floats = (sample.images, sample.depth, sample.intrinsics, sample.extrinsics)
    assert all(tensor.dtype == torch.float32 for tensor in floats)
    assert sample.images.min() >= 0
    assert sample.images.max() <= 1
    assert (sample.depth[sample.valid] > 0).all()
    assert (sample.depth[~sample.valid] == 0).all()
    rotation = sample.extrinsics[..., :3].double()
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).double().expand(count, 3, 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["motorcycle", "synthetic"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", ["left"]), "unknown sequence 'nowhere'"),
        ((None, ["frame-9999"]), "has no frame 'frame-9999'"),
        ((None, []), "frames must be a non-empty list"),
        ((None, "left"), "frames must be a non-empty list of frame names, got 'left'"),
    ],
)
def test_wrong_names_are_named(name, arguments, message):
    dataset = open_dataset(name)
    sequence, frames = arguments
    with pytest.raises(ValueError, match=message):
        dataset.load(sequence or next(iter(dataset.sequences)), frames)


def test_one_dataset_does_not_import_another():
    code = (
        "import sys; from moe3d.data import open_dataset; open_dataset('motorcycle');"
        "sys.exit(any(name.startswith('moe3d.data.synthetic') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_registered_dataset_can_be_found():
    for target in DATASETS.values():
        module, factory = target.split(":")
        __import__(module)
        assert callable(getattr(sys.modules[module], factory))
